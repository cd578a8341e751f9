"""Who holds a run up is said within a minute, by the others if it cannot speak itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from step_jax.runs import stalls
from step_jax.runs.stalls import WAITS, StallNotice, standing, verdict
from step_jax.runs.watchdog import HangWatchdog


class Board:
    """What several processes of a test publish, of which this is the first."""

    def __init__(self, others: dict[str, str], count: int):
        self.index, self.count, self.said = 0, count, dict(others)

    def publish(self, key, value):
        self.said.setdefault(key, value)

    def published(self):
        return dict(self.said)


def stalled(board, capfd) -> str:
    dog = HangWatchdog(floor_s=60, first_s=60)
    with dog, StallNotice(dog, board, floor_s=0.2, answers_s=0.4, look_s=0.05) as notice:
        for _ in range(3):
            dog.beat()
        notice.begun = 7
        time.sleep(1.2)
    return capfd.readouterr().err


def test_one_process_says_once_where_it_stands(capfd):
    said = stalled(Board({}, 1), capfd)
    assert said.count("no step ended for") == 1 and "with 7 begun: it is at code of others" in said


def test_who_does_not_wait_for_the_devices_and_who_is_silent_is_named(capfd, monkeypatch):
    monkeypatch.setattr(stalls, "standing", lambda frame: WAITS)
    others = {"6/1": "step_jax/data/take.py:8 in take", "7/2": WAITS, "3/3": "of a stall before"}
    said = stalled(Board(others, 5), capfd)
    assert (
        "held up by processes 3-4: no answer; process 1: at step_jax/data/take.py:8 in take; "
        "processes 0, 2: in the wait for the devices" in said
    )


def test_a_process_in_an_evaluation_tells_others_that_ask_where_it_is_and_says_nothing_else(capfd):
    dog, board = HangWatchdog(floor_s=60, first_s=60), Board({"3/1": WAITS, "7/1": WAITS}, 2)
    with dog, StallNotice(dog, board, floor_s=0.1, answers_s=0.4, look_s=0.05) as notice:
        notice.begun = 5  # nobody asks at this step
        dog.allow(60)
        time.sleep(0.3)
        assert "5/0" not in board.said
        notice.begun = 6
        deadline = time.monotonic() + 20
        while "6/0" not in board.said and time.monotonic() < deadline:
            time.sleep(0.05)
    assert board.said["6/0"] == "an evaluation or a save (at code of others)"
    assert capfd.readouterr().err == ""


def test_an_evaluation_a_compilation_and_a_save_are_no_stalls(capfd):
    dog = HangWatchdog(floor_s=60, first_s=60)
    with dog, StallNotice(dog, Board({}, 1), floor_s=0.1, look_s=0.02):
        dog.beat()
        dog.beat()
        assert dog.quiet_s is None  # the first steps compile
        dog.beat()
        assert dog.quiet_s is not None
        dog.allow(60)
        time.sleep(0.4)
        assert dog.quiet_s is None
    assert "no step" not in capfd.readouterr().err


def test_verdicts():
    assert verdict({0: WAITS, 1: WAITS}, 2).startswith("all processes wait for the devices")
    assert verdict({0: "a.py:1 in f", 1: "a.py:1 in f"}, 2) == "processes 0-1: at a.py:1 in f"
    aside = "an evaluation or a save (waiting for the devices)"
    assert verdict({0: aside, 1: WAITS}, 2).startswith(f"held up by process 0: at {aside}; ")


def test_a_thread_stands_in_this_package_or_in_its_loops_call_of_a_step():
    source = compile(
        "def run(call):\n    return call()\n", f"{stalls._PACKAGE}/trainers/text.py", "exec"
    )
    data = compile(
        "def read(call):\n    return call()\n", f"{stalls._PACKAGE}/data/files.py", "exec"
    )
    for code, name, expected in (
        (source, "run", WAITS),
        (data, "read", "step_jax/data/files.py:2 in read"),
    ):
        space: dict = {}
        exec(code, space)  # noqa: S102 - a frame with the name of a file of the package
        assert space[name](lambda: standing(sys._getframe(1))) == expected


#: a rank whose data stand still for a while
SLOW = """
import os, signal, sys, time
from step_jax.cli.main import main
from step_jax.data import dataset
from step_jax.runs import session
from step_jax.runs.stalls import StallNotice
session.StallNotice = lambda dog: StallNotice(dog, floor_s=2, answers_s=3, look_s=0.2)
read = dataset._Batches.__getitem__
def slow_disk(self, step):
    if os.environ["JAX_PROCESS_ID"] == "1" and step == 20:
        time.sleep(20)
    return read(self, step)
dataset._Batches.__getitem__ = slow_disk
sys.exit(main(sys.argv[1:]))
"""
RECIPE = """
base: {root}/configs/toys/pretrain.yaml
run: {{directory: run, logging: {{sinks: []}}}}
model:
  width: 32
  layers:
    - repeat: 1
      blocks:
        - attention: {{kind: mha, heads: 2, kv_heads: 1, head_dim: 16}}
          mlp: {{kind: swiglu, hidden: 32}}
training: {{steps: 30}}
data: {{path: {root}/step_jax/core, vocab_size: 512, sequence_length: 64}}
parallel: {{fsdp: 2}}
"""


@pytest.mark.slow
def test_the_rank_whose_data_stand_still_is_named_by_both_and_the_run_goes_on(tmp_path):
    root = Path(__file__).parents[2]
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=root))
    (tmp_path / "slow.py").write_text(SLOW)
    done = subprocess.run(
        [sys.executable, "-m", "step_jax.launch.local", "2", "--", sys.executable, "slow.py",
         "pretrain", "recipe.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if "no step ended for" in line]
    assert {line[:3] for line in said} == {"[0]", "[1]"}
    for line in said:
        assert "held up by process 1: at step_jax/data/dataset.py:" in line
        assert "in __next__; process 0: in the wait for the devices" in line
