"""Rules of the estimates, and the estimates beside compiled steps that are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import plan_search
from step_jax.core.command_line import load_config
from step_jax.planning import estimate, topology
from step_jax.planning.case import Case, case_of
from step_jax.planning.collectives import PART_OF
from step_jax.planning.compiled import program_for, resolved
from step_jax.trainers import pretrain
from tests.planning.test_search import RECIPE


@pytest.fixture
def case_on(tmp_path):
    """(topology, flags) -> the case of the small mixture."""

    def make(name: str, *flags: str) -> Case:
        path = tmp_path / "mixture.yaml"
        path.write_text(RECIPE)
        at = topology.parse(name)
        config = resolved(load_config(pretrain.Config, [str(path), *flags]).config, at.count)
        case = case_of(program_for(pretrain, config, at), config.execution)
        assert case is not None
        return case

    return make


@pytest.mark.usefixtures("topology")
def test_arrays_that_stay_on_chip_cost_no_traffic(case_on):
    small = estimate.work(case_on("v5e:2x4"))
    large = estimate.work(case_on("v5e:2x4", "--training.batch_size", "8192"))
    assert small["experts", "elementwise"] == small["attention", "elementwise"] == 0
    assert small["rest", "elementwise"] > 0  # every layer's input waits in main memory
    for layer in ("experts", "attention"):
        assert large[layer, "elementwise"] > 0
    assert large["experts", "experts"] == 128 * small["experts", "experts"]


@pytest.mark.usefixtures("topology")
def test_layers_that_are_run_again_together_lie_in_memory_together(case_on):
    case = case_on("v5e:2x4", "--training.batch_size", "1024")
    (group,) = case.model.trunk.groups
    pair = replace(group, repeat=group.repeat // 2, blocks=group.blocks * 2)
    trunk = replace(case.model.trunk, groups=(pair,))
    model = replace(case.model, layers=trunk.groups)
    alone, paired = estimate.memory(case), estimate.memory(replace(case, model=model))
    assert paired["temporaries"] > 1.5 * alone["temporaries"]
    assert paired["activations"] == alone["activations"] / 2  # of two layers the first one's input


@pytest.mark.usefixtures("topology")
def test_pipeline_with_remat_keeps_the_layers_of_one_stage_and_what_each_step_was_handed(case_on):
    flags = ("--parallel.expert", "1", "--execution.remat", "full")
    flat = case_on("v5e:2x4", *flags)
    piped = case_on("v5e:2x4", *flags, "--parallel.pipeline", "2")
    # eight layers' inputs of eight rows; four of two rows, nine steps' and five sets' beside them
    assert estimate.bubble(64, 1, piped.sharding)[0] == 8
    row = 512 * 256 * 2
    assert estimate.memory(flat)["activations"] == 8 * 8 * row
    assert estimate.memory(piped)["activations"] == (4 + 9 + 5) * 2 * row


@pytest.mark.usefixtures("topology")
def test_gradients_of_one_microbatch_are_not_summed_first(case_on):
    one, four = (case_on("v5e:2x4", "--training.accumulation", n) for n in ("1", "4"))
    trained = one.held.trained
    assert estimate.memory(one)["gradients"] == 0.5 * trained
    assert estimate.memory(four)["gradients"] == 1.5 * trained


@pytest.mark.usefixtures("topology")
def test_sums_over_a_folded_axis_go_in_pieces(case_on):
    at = topology.parse("v5p:2x2x2")
    flat = case_on("v5p:2x2x2", "--parallel.expert", "1")
    pieces = [c for c in estimate.sent(flat, at) if c.axes == PART_OF + "fsdp"]
    assert sorted(len(c.group) for c in pieces) == [2, 4]
    cut = case_on("v5p:2x2x2", "--parallel.expert", "4")  # two devices are not folded
    assert not any(c.group for c in estimate.sent(cut, at))


# --- Beside compiled steps -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    return {name: plan_search.rows_of(name) for name in plan_search.MODELS}


def test_ranks_of_equal_values_are_shared():
    assert plan_search.spearman([1, 2, 3], [10, 30, 20]) == pytest.approx(0.5)
    assert plan_search.spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1.0)


@pytest.mark.usefixtures("topology")
def test_estimates_order_meshes_as_compiled_steps_do(rows):
    for name, found in rows.items():
        run = [row for row in found if row.fits]
        assert len(run) >= 2 and plan_search.order_of(run) >= 0.9, name


@pytest.mark.usefixtures("topology")
def test_estimated_memory_is_within_a_tenth_of_the_compilers_and_its_verdict_is_the_same(rows):
    assert sum(map(len, rows.values())) >= 20
    for found in rows.values():
        for row in found:
            assert row.may_fit == row.fits, row.words
            if row.fits:  # what does not was made smaller until the compiler gave up
                assert row.nbytes == pytest.approx(row.compiled_nbytes, rel=0.1), row.words


@pytest.mark.parametrize("name", ["dense", "experts", "muon"])
@pytest.mark.usefixtures("topology")
def test_best_of_the_search_is_near_the_best_compiled(rows, name):
    compiled = {row.words: row.compiled_seconds for row in rows[name] if row.fits}
    taken = plan_search.best_of_search(plan_search.MODELS[name])
    assert min(compiled[words] for words in taken) <= 1.03 * min(compiled.values())
