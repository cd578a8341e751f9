"""`step-jax launch`: what it prints, what it refuses before anything is submitted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from step_jax.cli.main import main
from step_jax.core.errors import ExitCode
from step_jax.launch import fit

ROOT = Path(__file__).parents[2]
TOY = str(ROOT / "configs" / "toys" / "pretrain.yaml")
GKE = """
place: {kind: gke, topology: "v5e:2x4", image: registry/image, queue: research}
save_s: 45
environment: {MINE: "1"}
"""
SHARED = ["--run.directory", "/shared/runs/toy"]


def launch(tmp_path: Path, target: str, *flags: str) -> int:
    (tmp_path / "target.yaml").write_text(target)
    options = ["--target", str(tmp_path / "target.yaml"), "--output", str(tmp_path / "launches")]
    return main(["launch", TOY, *options, *flags])


def test_a_dry_run_prints_what_would_be_submitted_and_writes_nothing(tmp_path, capsys):
    two = ["--parallel.data", "2", "--dry-run"]
    assert launch(tmp_path, "place: {kind: slurm, nodes: 2}", *SHARED, *two) == ExitCode.OK
    printed = capsys.readouterr().out
    assert "#SBATCH --nodes=2" in printed and "multihost: true" in printed
    assert f"sbatch {tmp_path}/launches/pretrain/job.sh" in printed
    assert "# mesh and batch divide over 2 devices" in printed
    assert not (tmp_path / "launches").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parallel.data", "3"], "the mesh data=3 x fsdp=-1 does not match the 2 devices"),
        (["--parallel.data", "2", "--training.batch-size", "3"], "do not divide"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_it_is_submitted(
    tmp_path, capsys, flags, message
):
    code = launch(tmp_path, "place: {kind: slurm, nodes: 2}", *SHARED, *flags)
    assert code == ExitCode.CONFIG
    assert message in capsys.readouterr().err
    assert not (tmp_path / "launches").exists()


def test_a_run_directory_that_goes_with_its_machine_is_refused(tmp_path, capsys):
    assert launch(tmp_path, GKE, "--dry-run") == ExitCode.CONFIG
    assert "run.directory is runs/toy, a folder of the machine" in capsys.readouterr().err


def test_what_needs_more_memory_than_a_chip_has_is_refused_with_both_figures(
    tmp_path, capsys, monkeypatch
):
    """The plan itself is tested where it is made (tests/planning)."""
    plan = SimpleNamespace(fits=False, memory_compiler=20e9, memory_limit=17e9, bound_s=1.0)
    monkeypatch.setattr(fit, "make_plan", lambda *_: plan)
    monkeypatch.setattr(fit, "program_for", lambda *_: None)
    place = SimpleNamespace(name="v5e:2x4")
    monkeypatch.setattr(fit.topology, "parse", lambda *_: place)
    code = launch(tmp_path, GKE, *SHARED, "--parallel.data", "8", "--training.batch-size", "8")
    assert code == ExitCode.FAILURE
    assert "needs 20 GB of the 17 GB of a device of v5e:2x4" in capsys.readouterr().err


@pytest.mark.aot
def test_a_recipe_is_compiled_for_its_slice_before_it_is_submitted(tmp_path, capsys, monkeypatch):
    """With a `kubectl` that takes everything and notes it."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/bash\ncp "${{@: -1}}" {tmp_path}/taken\necho created\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    code = launch(tmp_path, GKE, *SHARED, "--parallel.data", "8", "--training.batch-size", "8")
    printed = capsys.readouterr().out
    assert code == ExitCode.OK and "of a device of v5e:2x4; a step takes" in printed
    (job,) = yaml.safe_load((tmp_path / "taken").read_text())["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 30 + 2 * 45
    variables = {v["name"]: v["value"] for v in pod["containers"][0]["env"]}
    assert variables["MINE"] == "1" and variables["JAX_PLATFORMS"] == "tpu,cpu"


@pytest.mark.parametrize("name", ["slurm", "skypilot", "gke", "queued"])
def test_what_an_example_shows_fits_its_target(name, monkeypatch, capsys):
    if name in ("gke", "queued") and importlib.util.find_spec("libtpu") is None:
        pytest.fail("libtpu is missing: pip install '.[dev]'")
    monkeypatch.chdir(ROOT)
    text = (ROOT / "launch" / "targets" / f"{name}.yaml").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("#   step-jax launch")]
    assert main(line.removeprefix("#   step-jax ").split()) == ExitCode.OK
    assert "# mesh and batch divide" in capsys.readouterr().out
