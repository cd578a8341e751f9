"""The pretraining loop end to end, on a few kilobytes of text."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from step_jax.checkpoint.manifest import step_name
from step_jax.cli.main import main
from step_jax.core.errors import ExitCode
from step_jax.runs import device_memory
from step_jax.runs.metrics_log import read_metrics
from step_jax.trainers import pretrain

ROOT = Path(__file__).parents[2]
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards boil some odd juice".split()

RECIPE = """
run:
  directory: {run}
  checkpoint: {{every_steps: 4}}
  logging: {{sinks: []}}
model:
  width: 32
  layers:
    - repeat: 2
      blocks:
        - attention: {{kind: mfa, heads: 4, head_dim: 8}}
          mlp: {{kind: swiglu, hidden: 64}}
training: {{steps: 8, batch_size: 8}}
data: {{path: {text}, vocab_size: 300, sequence_length: 32, cache_dir: {cache}}}
optimizer: {{kind: adamw, learning_rate: 1e-2, schedule: {{kind: constant}}}}
execution: {{dtype: float32}}
parallel: {{fsdp: {fsdp}, data: -1}}
evaluation: {{every_steps: 4, tokens: 100}}
sample: {{tokens: 4}}
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 120)) + ".\n")
    return folder


def recipe(tmp: Path, text: Path, run: str, fsdp: int = 1) -> str:
    path = tmp / f"{run}.yaml"
    cache = text.parent / "token_cache"
    path.write_text(RECIPE.format(run=tmp / run, text=text, cache=cache, fsdp=fsdp))
    return str(path)


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if r["event"] == "step"}


def evaluations(run: Path) -> list[tuple]:
    """Every evaluation that the run's account has, and its loss."""
    return [(r["step"], r["name"], r["loss"]) for r in read_metrics(run) if r["event"] == "eval"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, text) -> Path:
    tmp = tmp_path_factory.mktemp("straight")
    assert main(["pretrain", recipe(tmp, text, "run")]) == 0
    return tmp / "run"


def test_run_leaves_everything_behind(straight):
    curve = losses(straight)
    assert list(curve) == list(range(1, 9))
    assert curve[8] < curve[1] - 0.5
    records = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    final = next(r for r in records if r["event"] == "eval" and r["name"] == "final")
    assert 0 < final["bits_per_byte"] < 8
    summary = next(r for r in records if r["event"] == "summary")["values"]
    assert summary["status"] == "done" and summary["gzip bits per byte"] > 0
    assert (straight / "plots" / "loss.png").stat().st_size > 1000
    assert (straight / "samples" / "step_8.txt").exists()
    assert (straight / "tokenizer/tokenizer.model").exists() and (straight / "config.yaml").exists()
    assert (straight / "heldout" / "meta.json").exists()


@pytest.mark.slow
def test_resumed_run_repeats_the_undisturbed_one_bit_for_bit(straight, tmp_path, text, monkeypatch):
    from step_jax.runs import session

    real = session.Session.finished

    def killed_after_six(self, step, *rest):
        real(self, step, *rest)
        if step == 6:
            raise RuntimeError("power cut")

    monkeypatch.setattr(session.Session, "finished", killed_after_six)
    with pytest.raises(RuntimeError, match="power cut"):
        main(["pretrain", recipe(tmp_path, text, "run")])
    monkeypatch.undo()
    assert main(["pretrain", recipe(tmp_path, text, "run")]) == 0
    assert losses(tmp_path / "run") == losses(straight)


def test_an_evaluation_that_a_stop_cut_off_is_made_when_the_run_goes_on(straight, tmp_path, text):
    """From what a stop at the step of an evaluation leaves: its checkpoint, and no word of it."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints" / step_name(8))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if json.loads(line)["event"] == "eval")
    (run / "metrics.jsonl").write_text("".join(lines[:cut]))
    assert evaluations(run) == []
    assert main(["pretrain", recipe(tmp_path, text, "run")]) == 0
    assert evaluations(run) == evaluations(straight)
    assert [(step, name) for step, name, _ in evaluations(run)] == [(4, "heldout"), (8, "final")]
    assert losses(run) == losses(straight)


@pytest.mark.slow  # by default a branch is tried in the loops' contract, and rates in tests/runs
def test_a_branch_from_before_the_decay_is_the_longer_run(tmp_path, text):
    wsd = ["--optimizer.schedule", "{kind: wsd, warmup_steps: 1, decay_fraction: 0.5}"]
    longer = [*wsd, "--training.steps", "12"]
    assert main(["pretrain", recipe(tmp_path, text, "short"), *wsd]) == 0
    assert main(["pretrain", recipe(tmp_path, text, "short"), *longer]) == ExitCode.CONFIG
    branch = [*longer, "--run.branch-from", f"{tmp_path / 'short'}@4"]
    assert main(["pretrain", recipe(tmp_path, text, "branch"), *branch]) == 0
    assert main(["pretrain", recipe(tmp_path, text, "whole"), *longer]) == 0
    whole, got = losses(tmp_path / "whole"), losses(tmp_path / "branch")
    assert got == {step: whole[step] for step in range(5, 13)}
    assert evaluations(tmp_path / "branch")[-1] == evaluations(tmp_path / "whole")[-1]


@pytest.mark.slow
def test_resume_on_another_mesh_goes_on_within_float_tolerance(straight, tmp_path, text):
    assert main(["pretrain", recipe(tmp_path, text, "run"), "--training.steps", "4"]) == 0
    assert main(["pretrain", recipe(tmp_path, text, "run", fsdp=8)]) == 0
    got, want = losses(tmp_path / "run"), losses(straight)
    np.testing.assert_allclose([got[i] for i in want], [want[i] for i in want], rtol=1e-5)


def test_finished_run_is_not_trained_again(straight, capsys):
    before = losses(straight), evaluations(straight)
    assert main(["pretrain", str(straight / "config.yaml")]) == 0
    assert (losses(straight), evaluations(straight)) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run.seed", "1"], "seed was 0 and is 1"),
        (["--model.width", "64"], "embedding_VD"),
        (["--data.sequence-length", "16"], "sequence_length was 32 and is 16"),
        (["--training.batch-size", "16"], "batch_size was 8 and is 16"),
    ],
)
def test_a_run_that_does_not_continue_the_checkpoint_is_refused(
    straight, capsys, monkeypatch, flags, message
):
    monkeypatch.setattr(pretrain, "fitting", lambda *_: None)  # no step is needed to know it
    config = (straight / "config.yaml").read_bytes()
    assert main(["pretrain", str(straight / "config.yaml"), *flags]) != 0
    assert message in capsys.readouterr().err
    assert (straight / "config.yaml").read_bytes() == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parallel.data", "3"], "does not match the 8 devices"),
        (["--parallel.tensor", "8"], "'vocab' has size 300"),
        (["--parallel.data", "1", "--parallel.fsdp", "1", "--parallel.context", "8",
          "--data.sequence-length", "36"], "'sequence' has size 36"),
        (["--training.steps", "0"], "training.steps"),
        (["--training.tokens", "1e6"], "either training.steps or training.tokens"),
        (["--model.vocab", "10"], "model.vocab is 10"),
        (["--data.isolate", "false", "--model.mtp.heads", "1", "--model.mtp.block",
          "{attention: {kind: mfa, heads: 4, head_dim: 8}, mlp: {kind: swiglu, hidden: 64}}"],
         "set data.isolate: true"),
        (["--optimizer.schedule.warmup-steps", "9"], "warm-up of 9 steps"),
        (["--data.path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--execution.grouped-matmul", "dense"], "expected 'auto' or 'reference' or 'tiles'"),
        (["--execution.grouped-matmul", "pallas_gpu"], "it needs a Hopper GPU (compute capability"),
        (["--execution.loss", "pallas_gpu"], "cross-entropy pallas_gpu cannot do this"),
        (["--execution.loss", "pallas_tpu"], "needs a TPU, and this is compiled for cpu; use auto"),
        (["--execution.attention", "pallas_tpu"], "attention pallas_tpu cannot do this"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_words(tmp_path, text, capsys, flags, message):
    assert main(["pretrain", recipe(tmp_path, text, "run"), *flags]) not in (0, ExitCode.RESTART)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_step_that_does_not_fit_is_refused_with_what_would_help(
    tmp_path, text, capsys, monkeypatch
):
    monkeypatch.setattr(device_memory, "available", lambda device: 1e5)
    file = recipe(tmp_path, text, "large")
    assert main(["pretrain", file, "--training.steps", "1"]) == ExitCode.FAILURE
    message = capsys.readouterr().err
    for words in ("GB of the 0.0001 GB of a device", "\n  1. ", "f32[300,32]", "would help: "):
        assert words in message
    assert not list((tmp_path / "large" / "checkpoints").glob("*"))
    assert main(["pretrain", file, "--force", "--training.steps", "1"]) == ExitCode.OK


def test_two_runs_do_not_share_a_directory(tmp_path, text, capsys):
    from step_jax.runs.run_directory import RunDirectory

    with RunDirectory(tmp_path / "run"):
        assert main(["pretrain", recipe(tmp_path, text, "run")]) == ExitCode.CONFIG
    assert "in use by process" in capsys.readouterr().err


def _environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


@pytest.mark.multiprocess
@pytest.mark.slow
def test_sigterm_saves_exits_42_and_two_processes_go_on(straight, tmp_path, text):
    """Two processes of 4 devices each; stopped by SIGTERM to one of them, then resumed."""
    command = [sys.executable, "-m", "step_jax.launch.local", "2", "--", sys.executable, "-m",
               "step_jax.cli", "pretrain", recipe(tmp_path, text, "run", fsdp=8)]  # fmt: skip
    first = subprocess.Popen(
        [*command, "--training.steps", "100000"], env=_environment(4), cwd=tmp_path
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and '"step": 2,' in metrics.read_text()):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == ExitCode.RESTART
    stopped = max(losses(tmp_path / "run"))
    total = str(stopped + 2)
    second = subprocess.run([*command, "--training.steps", total], env=_environment(4), timeout=240)
    assert second.returncode == 0
    got, want = losses(tmp_path / "run"), losses(straight)
    assert list(got) == list(range(1, stopped + 3))
    shared = sorted(set(got) & set(want))
    np.testing.assert_allclose([got[i] for i in shared], [want[i] for i in shared], rtol=1e-5)
