"""Where answers are written, and what a plan says of writing them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from step_jax.cli.main import main
from step_jax.core.command_line import load_config
from step_jax.core.errors import ExitCode
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.planning.phases import Stock, whole_step
from step_jax.planning.plan import not_there, too_much
from step_jax.trainers.rl import loop
from step_jax.trainers.rl.layouts import sender
from tests.trainers.loops import run_loop, steps
from tests.trainers.test_rl_loop import recipe

ROOT = Path(__file__).parents[2]
PPO = "{name: ppo, kl: 0.001}"
STOCK = Stock("writing", 4.0, 2e9, False, int(3e9), 1e9, 1e9, 0.1, 0.5, {}, 0.5, "memory", 1.0, [])


def phases(path: str, *flags: str, devices: int = 2):
    """(configuration, phases by the first word of their names)."""
    config = load_config(loop.Config, [path, *flags]).config
    sharding = Sharding.build(config.parallel, jax.devices()[:devices])
    return config, {p.name.split()[0]: p for p in loop.phases(config, sharding)}


# --- The run --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_writing_on_the_same_devices_laid_out_otherwise_writes_the_same_answers(tmp_path):
    """With a lag too, where it must take turns all the same."""
    flags = ["--parallel.fsdp", "-1", "--evaluation.problems", "4", "--evaluation.samples", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    run_loop("rl", recipe(one, rollout=", lag: 1"), *flags, devices=2)
    run_loop("rl", recipe(two, rollout=", lag: 1, parallel: {tensor: -1}"), *flags, devices=2)
    for ours, theirs in zip(steps(two / "run"), steps(one / "run"), strict=True):
        for name in ("reward", "answer_tokens", "staleness"):
            assert ours[name] == theirs[name], name
        for name in ("rollout_gap", "grad_norm"):  # a gap that is the lag's, not the layout's
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_what_is_sent_has_the_compute_dtype_and_lies_where_it_is_read(tmp_path):
    config = load_config(loop.Config, [recipe(tmp_path / "a")]).config
    model = dataclasses.replace(config.model, vocab=16)
    here = Sharding.build(MeshConfig(fsdp=2), jax.devices()[:2])
    there = Sharding.build(MeshConfig(tensor=2), jax.devices()[:2])
    params = jax.jit(model.initialise, out_shardings=here.params(model.specs()))(jax.random.key(0))
    sent = sender(model, "bfloat16", here, there)(params)
    for a, b, where in zip(*map(jax.tree.leaves, (params, sent, there.params(model.specs())))):  # noqa: B905
        assert b.sharding.is_equivalent_to(where, b.ndim)
        np.testing.assert_array_equal(np.asarray(a.astype(b.dtype)), np.asarray(b))
    assert {a.dtype.name for a in jax.tree.leaves(sent)} >= {"bfloat16"}


CHILD = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
from step_jax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_write_on_another_layout_of_their_devices(tmp_path):
    """Parameters go from mesh to mesh between processes; one of spare devices is refused."""
    given = recipe(tmp_path / "two", rollout=", parallel: {data: -1}")
    words = ["rl", given, "--parallel.fsdp", "-1", "--parallel.multihost", "true"]
    launch = [sys.executable, "-m", "step_jax.launch.local", "2", "--"]
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}

    def run(*flags: str) -> subprocess.CompletedProcess:
        command = [*launch, sys.executable, str(script), *words, *flags]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    run_loop("rl", recipe(tmp_path / "one"), "--parallel.fsdp", "-1", devices=4)
    for ours, theirs in zip(
        steps(tmp_path / "two" / "run"), steps(tmp_path / "one" / "run"), strict=True
    ):
        assert ours["rollout_gap"] < 1e-5 and ours["reward"] == theirs["reward"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    refused = run("--parallel.spare", "2", "--run.directory", str(tmp_path / "spare"))
    assert refused.returncode == ExitCode.CONFIG
    assert "parameters leave their devices inside one alone" in refused.stdout + refused.stderr


# --- The plan -------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_plan_has_every_phase_and_its_share(tmp_path, capsys):
    path = recipe(tmp_path / "a", rollout=", parallel: {tensor: -1}", algorithm=PPO)
    out = ["--topology", "cpu:2", "--parallel.fsdp", "-1", "--output", str(tmp_path / "plans")]
    assert main(["plan", path, *out]) == ExitCode.OK
    (saved,) = (tmp_path / "plans").glob("*.json")
    plan = json.loads(saved.read_text())
    seconds = [p["calls"] * p["bound_s"] for p in plan["phases"]]
    assert len(seconds) == 3 and min(seconds) > 0
    assert plan["memory_beside"] > 0  # the reference, which no argument of the step is
    assert plan["whole_s"] == pytest.approx(plan["bound_s"] + sum(seconds))
    assert plan["days"] == pytest.approx(plan["steps"] * plan["whole_s"] / 86400)
    shown = capsys.readouterr().out
    assert all(p["name"] in shown for p in plan["phases"]) and plan["fits"]
    page = saved.with_suffix(".html").read_text()
    assert all(p["name"] in page for p in plan["phases"])


def test_a_step_has_room_only_if_it_has_beside_what_lies_there_all_the_while():
    assert too_much(2e9, 1e9, 3e9) == too_much(2e9, 0, 1e9) == too_much(None, 1e9, 1e9) == ""
    assert too_much(2e9, 1e9, 2.9e9).startswith("the step needs 2 GB beside 1 GB that lie there")


def test_phases_are_called_as_often_as_a_run_calls_them(tmp_path):
    path = recipe(tmp_path / "a", rollout=", parallel: {tensor: -1}", algorithm=PPO)
    config, found = phases(path, "--parallel.fsdp", "-1")
    c, r = config.training, config.rollout
    assert found["reading"].calls == c.prompts / c.updates  # one text at a time
    assert found["writing"].calls == r.max_new_tokens * c.rows / r.slots / c.updates
    assert found["judging"].calls == 1 / c.updates
    # policy, critic and their optimizers' moments are there all the while; and the reference
    assert found["writing"].held > found["judging"].held > 0
    _, without = phases(path, "--parallel.fsdp", "-1", "--algorithm.kl", "0")
    assert without["writing"].held < found["writing"].held


def test_devices_of_their_own_hold_no_learner(tmp_path):
    path = recipe(tmp_path / "a", rollout=", lag: 1, parallel: {tensor: -1}")
    config, found = phases(path, "--parallel.fsdp", "2", "--parallel.spare", "2", devices=4)
    assert found["writing"].beside and not found["judging"].beside and found["writing"].held == 0
    assert found["writing"].sharding.mesh.size == 2


def test_phases_add_to_a_step_or_run_beside_it():
    beside = dataclasses.replace(STOCK, beside=True)
    assert whole_step(1.0, [STOCK]) == 3.0
    assert whole_step(1.0, [beside]) == 2.0 and whole_step(5.0, [beside]) == 5.0


def test_a_phase_that_does_not_fit_says_so():
    assert STOCK.misfit(None) == "" == STOCK.misfit(5e9)
    assert STOCK.misfit(4.9e9) == "writing needs 3 GB beside 2 GB that others keep, of 4.9 GB"
    assert "gave up" in dataclasses.replace(STOCK, memory=None, notes=["it gave up"]).misfit(None)


def replace_start(config, there: Path):
    return dataclasses.replace(
        config, init_from=dataclasses.replace(config.init_from, artifact=str(there))
    )


def test_a_plan_needs_no_artifact_where_the_recipe_says_its_model(tmp_path):
    path = recipe(tmp_path / "a")
    text = Path(path).read_text().replace("width: 16", "width: 16\n  vocab: 32")
    text = text.replace(f"tokenizer: {tmp_path}/a/tokenizer", "init_from: {artifact: nowhere}")
    Path(path).write_text(text)
    config = load_config(loop.Config, [path]).config
    built = loop.program(config, Sharding.build(MeshConfig(), jax.devices()[:1]))
    assert built.models["policy"].vocab == 32
    (note,) = not_there(config)  # a name that was mistyped is not passed over
    assert "nowhere is not here" in note and not not_there(replace_start(config, tmp_path))
    assert main(["rl", path]) == ExitCode.CONFIG  # a run does
