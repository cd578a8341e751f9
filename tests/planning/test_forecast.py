"""Forecasts beside published runs, from the counts of their work that are kept."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import plan_forecast
from step_jax.planning import efficiencies, forecast, topology

#: Runs whose forecasts are known to be off, and are not hidden: experts of 2,880 beside attention
#: heads of 64, most of whose layers see 128 tokens.
MISSED = {"gpt-oss-120b tpu7x 64"}


@pytest.fixture(scope="module")
def runs():
    return plan_forecast.data()


@pytest.fixture(scope="module")
def rows(runs):
    return plan_forecast.errors(runs)


def test_every_published_run_has_its_counts(runs):
    assert {run["name"] for run in runs} == {run["name"] for run in plan_forecast.runs()}


def test_no_published_run_is_faster_than_its_bound(rows):
    for run, bound, _, _ in rows:
        assert 0 < bound <= run["seconds"], run["name"]


def test_forecasts_of_runs_that_were_held_out(rows):
    off = {"dense": [], "experts": []}
    for run, _, _, unseen in rows:
        if run.get("held_out"):
            kind = "experts" if plan_forecast.has_experts(run) else "dense"
            off[kind].append(abs(unseen / run["seconds"] - 1))
    assert len(off["dense"]) >= 8 and max(off["dense"]) <= 0.15
    assert len(off["experts"]) >= 3 and max(off["experts"]) <= 0.25


def test_compiled_steps_of_published_runs_are_forecast_as_their_shapes_are(runs):
    compiled = [run for run in runs if "compiled" in run]
    assert compiled
    for run in compiled:
        counts, chip = run["compiled"], topology.CHIPS[run["chip"]]
        at = topology.Topology("", run["platform"], chip, 1, 1, 1, (), ())
        work = {tuple(name.split()): amount for name, amount in counts["layers"].items()}
        found = forecast.forecast(work, counts["network"], at, "bfloat16")
        assert counts["bound"] <= run["seconds"]
        assert found.step == pytest.approx(run["seconds"], rel=0.15)


def test_fit_follows_the_runs_that_it_has_seen(rows):
    for run, _, known, _ in rows:
        if run["name"] not in MISSED:
            limit = 0.25 if plan_forecast.has_experts(run) else 0.15
            assert abs(known / run["seconds"] - 1) < limit, run["name"]


def test_shares_of_the_peak_are_those_that_the_script_fits(runs):
    written = plan_forecast.TABLE.read_text(encoding="utf-8")
    assert plan_forecast.table(runs) == written
    for shares in (*efficiencies.CHIPS.values(), efficiencies.OTHER_CHIPS):
        assert all(0 < share <= 1 for share in shares.values())


def test_page_shows_what_the_script_reports():
    page = plan_forecast.TABLE.parents[2] / "docs" / "planning.md"
    assert plan_forecast.report() in page.read_text(encoding="utf-8")


def test_fit_recovers_shares_that_made_the_times():
    """Times made by known shares, of runs that tell the kinds apart."""
    draw = np.random.default_rng(0)
    true = {"attention": 0.6, "dense": 0.7, "experts": 0.55, "elementwise": 0.7, "optimizer": 0.7}
    made = []
    for n in range(24):
        at_peak = {f"rest {kind}": float(draw.uniform(0.1, 1.0)) for kind in true}
        seconds = sum(s / true[name.split()[1]] for name, s in at_peak.items())
        run = {"chip": "v5p", "platform": "tpu", "at_peak": at_peak, "network": {}, "name": str(n)}
        made.append(run | {"seconds": seconds})
    reached = plan_forecast.Fit(made).reached("v5p")
    assert reached == pytest.approx(true, rel=0.05)


def test_forecast_adds_layers_and_what_nothing_hides():
    at = topology.parse("gpu:h100x8")
    peak, bandwidth = at.chip.peak("bf16"), at.chip.hbm_bandwidth
    work = {("mlp", "dense"): peak, ("rest", "elementwise"): bandwidth}
    shares = efficiencies.CHIPS["H100"]
    found = forecast.forecast(work, {"fsdp": 0.1}, at, "bfloat16")
    assert found.layers == pytest.approx(
        {"mlp": 1 / shares["dense"], "rest": 1 / shares["elementwise"]}
    )
    assert found.exposed == pytest.approx(0.1 * efficiencies.EXPOSED["gpu"])
    assert found.step == pytest.approx(sum(found.layers.values()) + found.exposed)
    assert found.low < found.step < found.high and found.known
    # more than there is to hide it behind
    slow = forecast.forecast(work, {"fsdp": 100.0}, at, "bfloat16")
    assert slow.step == pytest.approx(100.0)


def test_chip_without_a_published_run_has_a_wider_range():
    work = {("mlp", "dense"): 1e15}
    known = forecast.forecast(work, {}, topology.parse("gpu:h200x8"), "bfloat16")
    unknown = forecast.forecast(work, {}, topology.parse("gpu:gb200x72"), "bfloat16")
    assert known.known and not unknown.known
    assert unknown.high / unknown.step > known.high / known.step
    assert forecast.forecast(work, {}, topology.parse("cpu:1"), "bfloat16") is None


def test_no_end_of_the_range_is_below_what_no_step_can_beat():
    at, work = topology.parse("v5p:2x2x1"), {("mlp", "dense"): 1e15}
    free = forecast.forecast(work, {"fsdp": 1.0}, at, "bfloat16")
    bound = forecast.forecast(work, {"fsdp": 1.0}, at, "bfloat16", least=free.step)
    assert free.low < free.step
    assert (bound.low, bound.step, bound.high) == (free.step, free.step, free.high)
