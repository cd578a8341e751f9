"""Estimates beside compiled programs, and the variants that the search proposes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from step_jax.cli.main import main
from step_jax.core.command_line import load_config
from step_jax.planning import estimate, search, topology
from step_jax.planning.case import case_of
from step_jax.planning.compiled import compile_step, program_for, resolved
from step_jax.planning.plan import take_stock
from step_jax.trainers import pretrain

RECIPE = """
run: {directory: unused}
model:
  width: 256
  vocab: 1024
  layers:
    - repeat: 8
      blocks:
        - attention: {kind: mfa, heads: 4, head_dim: 128}
          mlp: {kind: moe, experts: [{count: 8, hidden: 256}], router: {top_k: 2}, capacity: 2.0}
training: {tokens: 1e8, batch_size: 64}
data: {path: unused, sequence_length: 512, vocab_size: 1024}
optimizer: {kind: adamw, learning_rate: 1e-3, schedule: {kind: constant}}
execution: {remat: full}
parallel: {expert: 2, fsdp: -1}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "mixture.yaml"
    path.write_text(RECIPE)
    return str(path)


def load(recipe: str, *flags: str) -> pretrain.Config:
    return load_config(pretrain.Config, [recipe, *flags]).config


def both(config: pretrain.Config, at: topology.Topology):
    """(plan, bytes that its estimate says are sent by mesh axes)."""
    config = resolved(config, at.count)
    program = program_for(pretrain, config, at)
    case = case_of(program, config.execution)
    plan = take_stock(config, at, compile_step(program, at))
    return plan, {c.axes: c.nbytes for c in estimate.sent(case, at)}


def meshes_tried(config: pretrain.Config, at: topology.Topology):
    case = case_of(program_for(pretrain, resolved(config, at.count), at), config.execution)
    return {v.parallel for v in search.variants(config, case, at)}


@pytest.mark.slow
def test_estimate_counts_gathers_over_fsdp_and_context(recipe):
    flags = ["--execution.dtype", "float32", "--model.layers.0.repeat", "2"]
    flags += ["--parallel.context", "2", "--parallel.expert", "2"]
    plan, estimated = both(load(recipe, *flags), topology.parse("cpu:8"))
    gathers = {c["axes"]: c["nbytes"] for c in plan.collectives if c["kind"] == "all-gather"}
    # those of the experts, beside them their gradients' way back; others go axis by axis
    assert 1.0 < estimated["fsdp+context"] / gathers["fsdp+context"] < 2.5
    assert estimated["fsdp"] > 0 and estimated["context"] > 0


def test_variants_use_the_axes_that_the_model_can(recipe):
    config = load(recipe, "--data.sequence_length", "8192")
    meshes = meshes_tried(config, topology.parse("cpu:8"))
    assert {m.context for m in meshes} == {1, 2, 4}  # pieces of at least 2048 tokens
    assert {m.pipeline for m in meshes} == {1, 2, 4, 8} == {m.expert for m in meshes}
    (group,) = config.model.layers
    odd = replace(config, model=replace(config.model, layers=(replace(group, repeat=7),)))
    assert {m.pipeline for m in meshes_tried(odd, topology.parse("cpu:8"))} == {1}


def test_flags_of_a_proposal_give_its_variant(recipe):
    config = load(recipe)
    at = topology.parse("cpu:8")
    found = search.search(pretrain, config, at, compiled=False)
    assert len(found) == search.SHOWN + 1 and found[-1].flags == ""
    assert found[-1].config == resolved(config, at.count)
    for proposal in found[:-1]:
        again = resolved(load(recipe, *proposal.flags.split()), at.count)
        assert again == proposal.config
    times = [p.step_s for p in found[:-1]]
    assert times == sorted(times)
    assert found[-1].step_s >= times[0]


def test_recipe_that_fits_nowhere_is_an_error(recipe, capsys):
    argv = ["plan", recipe, "--topology", "cpu:8", "--search", "--training.batch_size", "7"]
    assert main(argv) != 0
    assert "no mesh of cpu:8 divides" in capsys.readouterr().err


def test_every_divisor_of_a_devices_rows_is_a_number_of_microbatches(recipe):
    config = load(recipe, "--training.batch_size", "48", "--execution.remat", "none")
    at = topology.parse("cpu:8")
    estimated = search.Estimator(pretrain, config, at)
    case = case_of(estimated.own, config.execution)
    counts = {
        v.training.accumulation
        for v in search.variants(config, case, at, estimated.rows)
        if v.parallel.fsdp * v.parallel.expert == 8
    }
    assert counts == {1, 2, 3, 6}  # of the six rows that each of eight devices has


@pytest.mark.aot
def test_estimates_rank_meshes_as_compiled_programs_do(recipe):
    meshes = ("expert 8", "expert 2 context 2", "expert 2 data 2")
    by_program, by_estimate = {}, {}
    at = topology.parse("v5e:2x4")
    for mesh in meshes:
        words = mesh.split()
        sizes = zip(words[::2], words[1::2], strict=True)
        flags = [word for axis, n in sizes for word in (f"--parallel.{axis}", n)]
        config = load(recipe, *flags)
        plan, _ = both(config, at)
        by_program[mesh] = plan.forecast["step"]
        estimated = search.Estimator(pretrain, config, at)
        by_estimate[mesh] = estimated(resolved(config, 8)).step_s
    assert sorted(meshes, key=by_program.__getitem__) == sorted(meshes, key=by_estimate.__getitem__)
    assert by_estimate == pytest.approx(by_program, rel=0.25)
