"""Runs in an object store: killed, and gone on with by a machine that has only the URL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from step_jax.checkpoint import Checkpointer, verify
from step_jax.cli.main import main
from step_jax.core.storage import Objects, staged
from tests.object_stores import store
from tests.trainers.loops import run_loop, steps
from tests.trainers.test_pretrain import RECIPE, ROOT, WORDS

STEPS = 12
COUNTING = """
run: {{directory: {run}, checkpoint: {{every_steps: 2}}, logging: {{sinks: []}}}}
model:
  width: 16
  vocab: 14
  layers:
    - repeat: 1
      blocks:
        - attention: {{kind: mfa, heads: 2, head_dim: 8}}
          mlp: {{kind: swiglu, hidden: 32}}
optimizer: {{kind: adamw, learning_rate: 1e-2, schedule: {{kind: constant}}}}
steps: 5
rows: 8
length: 8
"""
#: Dies of SIGKILL in the moment that is asked for: when a step is trained, when a checkpoint's
#: arrays are there and nothing joins them, or when all of it is but the manifest.
CHILD = """
import os, signal, sys
from step_jax.checkpoint import places, remote_arrays
from step_jax.cli.main import main
from step_jax.runs.session import Session

moment, step = sys.argv[1], int(sys.argv[2])

def killed(function, when):
    def dying(*arguments, **named):
        if when(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return dying

if moment == "step":
    def of_step(self, n, *_):
        if n == step:
            self._checkpointer.wait()  # which checkpoint is there shall not be chance
        return n == step
    Session.finished = killed(Session.finished, of_step)
elif moment == "arrays":
    remote_arrays.join = killed(remote_arrays.join, lambda place: int(place.parent.name) == step)
elif moment == "commit":
    places.InBucket.commit = killed(places.InBucket.commit, lambda self, n, entries: n == step)
sys.exit(main(sys.argv[3:]))
"""


def test_a_loop_that_is_cut_goes_on_in_a_store_and_ends_as_on_a_disk(tmp_path):
    """In one process; those that are killed are below, for minutes."""
    loop, written = str(ROOT / "docs" / "examples" / "counting.py"), tmp_path / "recipe.yaml"
    written.write_text(COUNTING.format(run=tmp_path / "run"))
    straight = run_loop(loop, str(written))
    with store("gs") as bucket:
        url = f"{bucket}/runs/counting"
        written.write_text(COUNTING.format(run=url))
        run_loop(loop, str(written), cut_after=3)
        assert verify(f"{url}/checkpoints") == {2: []}
        again = run_loop(loop, str(written))
        jax.tree.map(np.testing.assert_array_equal, again, straight)
        run = staged(Objects.at(url), "metrics.jsonl", "lock")
        assert steps(run) == steps(tmp_path / "run") and not (run / "lock").exists()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    texts = folder / "texts"
    texts.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        (texts / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 120)) + ".\n")
    text = RECIPE.format(run=folder / "run", text=texts, cache=folder / "cache", fsdp=1)
    (folder / "recipe.yaml").write_text(text)
    return folder


def start(recipe: Path, home: Path, *flags: str, moment: str = "", step: int = 0):
    """A process on a machine of its own: nothing of others is in its folders."""
    home.mkdir(parents=True)
    environment = os.environ | {
        "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home),
        "PYTHONPATH": str(ROOT), "XLA_FLAGS": "",
    }  # fmt: skip
    words = ["pretrain", str(recipe / "recipe.yaml"), "--training.steps", str(STEPS), *flags]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, moment, str(step), *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=home,
    )  # fmt: skip


def ended(process: subprocess.Popen, code: int) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory) -> Path:
    ended(start(recipe, tmp_path_factory.mktemp("there") / "home"), 0)
    return recipe / "run"


def weights(checkpoints) -> dict[str, np.ndarray]:
    saver = Checkpointer(checkpoints)
    leaves = saver._info(STEPS)["leaves"]
    from step_jax.checkpoint import arrays

    like = {n: np.broadcast_to(np.zeros((), d), s) for n, (s, d) in leaves.items()}
    return arrays.read(saver._step_dir(STEPS), like)


@pytest.mark.system
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_run_in_a_store_killed_three_times_ends_as_one_on_a_disk(
    scheme, recipe, undisturbed, tmp_path, capsys
):
    with store(scheme) as bucket:
        Objects.at(f"{bucket}/texts").upload(recipe / "texts", os.listdir(recipe / "texts"))
        url = f"{bucket}/runs/mine"
        flags = ["--run.directory", url, "--data.path", f"{bucket}/texts"]
        flags += ["--data.cache_dir", f"{bucket}/cache"]
        kills = [("arrays", 4), ("commit", 8), ("step", 10)]
        for k, (moment, step) in enumerate(kills):
            ended(start(recipe, tmp_path / f"{k}", *flags, moment=moment, step=step), -9)
            committed = [s for s in (4, 8) if s < step]
            assert verify(f"{url}/checkpoints") == {s: [] for s in committed}
        said = ended(start(recipe, tmp_path / "last", *flags), 0)
        assert "resumed after step 8" in said and "tokenising" not in said
        assert f"everything is in {url}" in said and "training a tokenizer" not in said

        run = staged(Objects.at(url), "metrics.jsonl", "plots", "samples", "heldout", "lock")
        assert steps(run) == steps(undisturbed) and len(steps(run)) == STEPS
        assert not (run / "lock").exists()
        for kind in ("plots/loss.png", f"samples/step_{STEPS}.txt", "heldout/meta.json"):
            assert (run / kind).is_file()
        expected = weights(undisturbed / "checkpoints")
        for name, found in weights(f"{url}/checkpoints").items():
            np.testing.assert_array_equal(found, expected[name], name)
        read_by_commands(url, capsys)


def read_by_commands(url: str, capsys) -> None:
    for words, answer in [
        (["runs", url.rpartition("/")[0]], "done"),
        (["checkpoints", "verify", url], "verified"),
        (["eval", f"{url}@{STEPS}"], "perplexity"),
        (["generate", url, "--prompt", "the", "--max_new_tokens", "4"], "the"),
    ]:
        capsys.readouterr()
        assert main(words) == 0
        assert answer in capsys.readouterr().out


@pytest.mark.system
@pytest.mark.multiprocess
def test_two_processes_write_one_run_in_a_store(recipe, undisturbed, tmp_path):
    with store("s3") as bucket:
        url = f"{bucket}/runs/two"
        flags = ["--run.directory", url, "--parallel.data", "2", "--parallel.fsdp", "1"]
        launch = [sys.executable, "-m", "step_jax.launch.local", "2", "--restarts", "0"]
        launch += ["--", sys.executable, "-c"]
        for moment, step, code in (("commit", 8, None), ("", 0, 0)):
            home = tmp_path / (moment or "last")
            home.mkdir()
            words = ["pretrain", str(recipe / "recipe.yaml"), "--training.steps", str(STEPS)]
            done = subprocess.run(
                [*launch, CHILD, moment, str(step), *words, *flags],
                env=os.environ | {"TMPDIR": str(home), "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
                capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
            if moment:
                assert verify(f"{url}/checkpoints") == {4: []}
        run = staged(Objects.at(url), "metrics.jsonl")
        losses = [record["loss"] for record in steps(run)]
        assert len(losses) == STEPS
        expected = [record["loss"] for record in steps(undisturbed)]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
