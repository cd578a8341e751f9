"""A hang ends the process with code 75 and the stacks of all threads."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from step_jax.runs.watchdog import HangWatchdog

HANGS = {
    "sleep": "time.sleep(60)",
    # PyDLL keeps the GIL during the call: no Python thread could act here.
    "holding the GIL": "ctypes.PyDLL(None).sleep(60)",
}


@pytest.mark.thorough
@pytest.mark.parametrize("hang", HANGS)
def test_hang_dumps_stacks_and_exits_75(hang):
    code = f"""
import ctypes, time
from step_jax.runs.watchdog import HangWatchdog
def stuck_in_a_read():
    {HANGS[hang]}
with HangWatchdog(floor_s=0.5, factor=2, first_s=0.5, name="process 3 of 4, 100 %n") as dog:
    dog.beat()
    stuck_in_a_read()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=50)
    assert done.returncode == 75, done.stderr
    said = done.stderr.decode()
    whose = "process 3 of 4, 100 %n makes no progress; this is where its threads are:"
    assert said.index(whose) < said.index("stuck_in_a_read")


def test_beats_keep_the_process_alive_and_leaving_disarms():
    with HangWatchdog(floor_s=0.4, factor=2, first_s=0.4) as dog:
        for _ in range(8):
            time.sleep(0.1)
            dog.beat()
    time.sleep(0.6)


def test_an_evaluation_may_take_longer_and_the_steps_after_it_may_not():
    code = """
import time
from step_jax.runs.watchdog import HangWatchdog
with HangWatchdog(floor_s=0.3, factor=2, first_s=0.3) as dog:
    for _ in range(3):
        dog.beat()
    dog.allow(60)
    time.sleep(1)
    dog.beat()
    print("evaluated", flush=True)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=50)
    assert (done.returncode, done.stdout) == (75, b"evaluated\n"), done.stderr


def test_limit_follows_the_median():
    dog = HangWatchdog(floor_s=10, factor=20, first_s=100)
    assert dog.limit_s == 100
    dog._intervals.extend([0.1, 0.2, 60.0])
    assert dog.limit_s == 10
    dog._intervals.extend([2.0] * 5)
    assert dog.limit_s == 40
