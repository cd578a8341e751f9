"""How a session is left where no step is under way: while it prepares, and in its last save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from step_jax.core import distributed
from step_jax.core.errors import ExitCode, exit_of
from tests.runs.test_interactive import CELL

ROOT = Path(__file__).parents[2]


def started(code: str, tmp_path: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-u", "-c", f"import sys{CELL}{code}", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )


@pytest.mark.thorough
def test_sigterm_while_data_are_prepared_ends_the_run_at_once_with_the_code_for_a_restart(tmp_path):
    run = started(
        "from step_jax.core.errors import RestartRequested\n"
        "def importing():\n"  # what a library makes of an exception in its midst
        "    try:\n"
        "        prepare()\n"
        "    except Exception:\n"
        "        raise ImportError('initializing the extension')\n"
        "try:\n"
        "    loop(sys.argv[1], prepare=importing)\n"
        "except RestartRequested as error:\n"
        "    print(error)\n"
        "    sys.exit(error.exit_code)\n",
        tmp_path,
    )
    for line in run.stdout:
        if "preparing" in line:
            break
    begin = time.monotonic()
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=50)
    assert run.returncode == ExitCode.RESTART, output
    assert "stopped before its first step" in output and "prepared" not in output
    assert time.monotonic() - begin < 30  # ten, on a machine with nothing else to do


@pytest.mark.thorough
def test_a_last_save_that_hangs_ends_the_process_with_its_stacks(tmp_path):
    run = started(
        "import functools\n"
        "from step_jax.core import distributed\n"
        "from step_jax.runs import session\n"
        "session.HangWatchdog = functools.partial(session.HangWatchdog, floor_s=1, first_s=60)\n"
        "distributed.TIMEOUT_S = 1\n"
        "def never_done(self, *_):\n"
        "    time.sleep(60)\n"
        "session.Checkpointer.__exit__ = never_done\n"
        "loop(sys.argv[1])\n",
        tmp_path,
    )
    output, _ = run.communicate(timeout=60)
    assert run.returncode == ExitCode.HANG, output
    assert "makes no progress; this is where its threads are:" in output
    assert "never_done" in output


@pytest.mark.thorough
def test_what_comes_after_the_last_step_is_no_hang_however_short_the_steps_were(tmp_path):
    run = started(
        "import functools\n"
        "from step_jax.runs import session\n"
        "session.HangWatchdog = functools.partial(session.HangWatchdog, floor_s=2, first_s=60)\n"
        "flush = Session.flush\n"
        "def and_a_long_evaluation(self):\n"
        "    flush(self)\n"
        "    time.sleep(7 * (self._reported == self.total_steps))\n"
        "Session.flush = and_a_long_evaluation\n"
        "loop(sys.argv[1])\n",
        tmp_path,
    )
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 0, output


GLOO = "UNKNOWN: Gloo all-reduce failed: Read error [127.0.0.1]:56193: Connection reset by peer"


@pytest.mark.parametrize(
    ("text", "count", "lost"),
    [
        (GLOO, 2, True),
        ("UNAVAILABLE: The tasks have crashed. Task heartbeat timeouts", 2, True),
        (GLOO, 1, False),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes", 2, False),
    ],
)
def test_a_step_that_fails_of_a_lost_process_asks_for_a_restart(monkeypatch, text, count, lost):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    found = distributed.peer_lost(jax.errors.JaxRuntimeError(text))
    assert (found is not None) == lost
    assert found is None or exit_of(found.exit_code).again == "counted"
    assert distributed.peer_lost(None) is None and distributed.peer_lost(ValueError(text)) is None
