"""``step-jax doctor``: what it says, and its exit code."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from step_jax.cli.main import main
from step_jax.ops.selfcheck import Attention, GroupedMatmul, Verdict
from step_jax.ops.selfcheck.verdicts import inputs_like, lowered
from step_jax.planning import collective_check, doctor
from step_jax.planning.contenders import contenders

RECIPE = """
run: {directory: runs/none}
training: {steps: 4000, batch_size: 8}
data: {sequence_length: 256, vocab_size: 300}
execution: {dtype: float32}
model:
  width: 128
  layers:
    - repeat: 1
      blocks:
        - attention: {kind: mfa, heads: 4, head_dim: 128}
          mlp: {kind: swiglu, hidden: 128}
"""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(RECIPE)
    return str(file)


@pytest.fixture
def verdicts(monkeypatch):
    """Every kernel has the error that it is given here."""

    def use(error: float):
        def made(cases, device, fresh):
            assert fresh
            found = [
                Verdict(f"{c.operation.name} {c.implementation}", c.shapes(), error, 1e-3, "o",
                        True, 1.0)
                for c in cases
            ]  # fmt: skip
            return found, len(found)

        monkeypatch.setattr(doctor, "kept_or_made", made)
        monkeypatch.setattr(doctor, "check_collectives", lambda devices: [])

    return use


def test_a_right_machine_has_exit_code_0(recipe, verdicts, capsys):
    verdicts(1e-6)
    assert main(["doctor", recipe, "--execution.attention", "pallas_tpu_interpret"]) == 0
    said = capsys.readouterr().out
    for words in (
        "attention pallas_tpu_interpret: 4 heads on 1 of 128, 256 tokens, float32",
        "4 x 256 queries by 256 keys",
        "decode attention pallas_tpu_interpret: 4 heads on 1 of 128, 256 slots",
        "cross-entropy chunked: ",
        "1.0e-06 of o (at most 1.0e-03)",
        "the same bits twice",
        "nothing is wrong",
    ):
        assert words in said, said
    assert " ms" not in said  # what an interpreter takes says nothing


def test_a_wrong_kernel_has_exit_code_1(recipe, verdicts, capsys):
    verdicts(0.5)
    assert main(["doctor", recipe]) == 1
    assert "WRONG: attention xla: o has an error of 0.5 with 4 heads" in capsys.readouterr().out


def test_json_says_the_same_to_machines(recipe, verdicts, capsys):
    verdicts(float("nan"))
    assert main(["doctor", recipe, "--json"]) == 1
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (report["recipe"], report["passed"], report["hosts"]) == ("small", False, 1)
    assert report["chosen"] == {"attention": "auto -> xla", "loss": "auto -> chunked"}
    assert {"python", "jax", "jaxlib", "runtime"} <= set(report["versions"])
    assert all(kernel["verdict"]["error"] == "NaN" for kernel in report["kernels"])
    assert len(report["failures"]) == len(report["kernels"]) == 3


def test_without_a_recipe_the_links_are_looked_at_alone(capsys):
    """Every collective over the simulated devices, right; they have no speed."""
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in report["collectives"]] == list(collective_check.KINDS)
    assert all(c["right"] and c["bytes_per_s"] is None for c in report["collectives"])
    assert report["kernels"] == [] and "name a recipe" in report["notes"][0]


def test_a_collective_that_leaves_a_device_out_is_found(monkeypatch):
    name = "all-reduce"
    _, of_all, sent = collective_check.KINDS[name]

    def wrong(x):
        mine = jax.lax.axis_index(collective_check.AXIS) != 1
        return jax.lax.psum(x * mine, collective_check.AXIS)

    monkeypatch.setattr(collective_check, "KINDS", {name: (wrong, of_all, sent)})
    (found,) = collective_check.check_collectives(jax.devices()[:2])
    assert not found.right
    assert np.isclose(sent(4), 1.5)  # of an all-reduce on a ring of four


def test_hosts_that_differ_are_told_apart():
    report = doctor.Report("r", "hash", {"jax": "1"}, {}, {"attention": "auto -> pallas_tpu"})
    plain = report.plain()
    assert doctor._failures([plain, plain]) == []
    others = {
        "versions": {"jax": "2"},
        "configuration": "other",
        "chosen": {"attention": "auto -> xla"},
    }
    for name, value in others.items():
        (failure,) = doctor._failures([plain, plain | {name: value}])
        assert failure.startswith(f"host 1 has another {name} than host 0")
    wrong = dataclasses.replace(report, failures=("all-reduce over 4 devices is wrong",)).plain()
    assert doctor._failures([plain, wrong]) == ["host 1: all-reduce over 4 devices is wrong"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--aot", "v6e:2x2"], "--aot compiles the kernels of a recipe: name one before it"),
        (["--training.steps", "3"], "changes a recipe, and none is named before it"),
        (["RECIPE", "--aot", "cpu:2"], "nothing can be compiled for cpu:2 here"),
        (["RECIPE", "--aot", "v6e:3x3"], "v6e has no shape '3x3'"),
    ],
)
def test_a_wrong_command_line_is_named(words, message, recipe, capsys):
    assert main(["doctor", *(recipe if w == "RECIPE" else w for w in words)]) == 78
    assert message in capsys.readouterr().err


@pytest.mark.aot
def test_kernels_of_a_recipe_compile_for_a_pod_that_is_not_here(recipe, topology, capsys):
    flags = ["--aot", "v6e:2x2", "--execution.dtype", "bfloat16", "--json"]
    assert main(["doctor", recipe, *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chosen"]["attention"] == "auto -> pallas_tpu"
    names = {kernel["name"] for kernel in report["kernels"]}
    assert names == {"attention pallas_tpu", "decode attention pallas_tpu"}
    assert all(k["compile_s"] and k["blocks"] and not k["trouble"] for k in report["kernels"])
    assert report["devices"]["topology"] == "v6e:2x2, 4 devices"


@pytest.mark.aot
@pytest.mark.parametrize(
    "case, name",
    [
        (Attention("pallas_tpu", 4, 2, 128, 128, 1024, window=300, rows=1), "splash attention"),
        (GroupedMatmul("pallas_tpu", 4, 256, 512, even=1024), "megablox"),
    ],
    ids=["attention", "grouped matmul"],
)
def test_the_kernels_that_come_with_jax_compile_beside_ours(case, name, topology):
    (device, *_) = topology("v6e:2x2").devices
    found = contenders(case, device)
    (theirs,) = [compute for other, compute in found.items() if other.startswith(name)]
    program = lowered(theirs, device, inputs_like(case))
    assert {k: v.shape for k, v in program.out_info.items()} == {
        k: v.shape for k, v in jax.eval_shape(case.reference(), *inputs_like(case)).items()
    }
    assert "tpu_custom_call" in program.compile().as_text()
