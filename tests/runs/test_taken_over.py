"""A run whose directory another job has by now ends soon, in all processes, and writes no more."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from step_jax.core.errors import ConfigError, ExitCode, TakenOverError
from step_jax.core.storage import Objects
from step_jax.runs import lease
from step_jax.runs.folder_lock import FolderLock, is_locked
from step_jax.runs.lease import LOCK, Renewal
from tests.object_stores import store
from tests.runs.test_interactive import CELL

OTHER = {"host": "far", "pid": 7, "started": "today", "machine": "another", "token": "other"}


def told(beat: float | None = None) -> bytes:
    return json.dumps(OTHER | {"beat": time.time() if beat is None else beat}).encode()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    monkeypatch.setattr(lease, "PATIENCE_S", 0.5)


def test_an_owner_finds_another_in_its_lock(tmp_path):
    lock = FolderLock(tmp_path)
    lock.take()
    lock.renew()
    (tmp_path / LOCK).write_bytes(told())  # by a machine that does not see this one's record lock
    with pytest.raises(TakenOverError, match="in use by process 7 on far since today"):
        lock.renew()
    lock.release()
    assert json.loads((tmp_path / LOCK).read_bytes())["host"] == "far"


def test_an_owner_whose_directory_was_replaced_finds_the_one_that_came_after_it(tmp_path):
    lock, second = FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run")
    lock.take()
    os.rename(tmp_path / "run", tmp_path / "moved")
    with pytest.raises(TakenOverError, match="the run directory was moved or removed"):
        lock.renew()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_bytes(told())
    with pytest.raises(TakenOverError, match="on far"):
        lock.renew()
    lock.release()
    (tmp_path / "run" / LOCK).unlink()
    second.take()
    second.release()


def test_a_lock_of_another_machine_is_taken_over_if_it_does_not_beat(tmp_path, quick, caplog):
    (tmp_path / LOCK).write_bytes(told(beat=0))
    lock = FolderLock(tmp_path)
    lock.take()
    assert "not given back by process 7 on far" in caplog.text
    lock.release()
    assert (tmp_path / LOCK).read_bytes() == b""


def test_a_lock_of_another_machine_that_beats_is_refused(tmp_path, quick, monkeypatch):
    (tmp_path / LOCK).write_bytes(told(beat=0))
    beat = lambda _: (tmp_path / LOCK).write_bytes(told(beat=1))  # noqa: E731
    monkeypatch.setattr("step_jax.runs.folder_lock.time.sleep", beat)
    with pytest.raises(ConfigError, match="in use by process 7 on far"):
        FolderLock(tmp_path).take()
    (tmp_path / LOCK).write_bytes(told())
    assert is_locked(tmp_path)


def test_a_lock_that_cannot_be_looked_at_is_not_lost(quick, caplog):
    class Flaky:
        seen = 0

        def renew(self):
            self.seen += 1
            raise OSError("stale") if self.seen < 3 else TakenOverError("another has it")

    lost = []
    with Renewal(Flaky(), lost.append) as renewal:
        renewal._thread.join(20)
    assert [str(error) for error in lost] == ["another has it"]
    assert caplog.text.count("stale") == 2


# --- whole runs ----------------------------------------------------------------------------------

RUN = """
from step_jax.core.errors import StepError
from step_jax.runs import lease
lease.BEAT_S = 0.2
try:
    loop(sys.argv[1], steps=10**6, slow=0.05)
except StepError as error:
    print("ended of", type(error).__name__, error)
    sys.exit(error.exit_code)
"""


def ended(place: str, take_over) -> str:
    """What a run said that another job takes over while it trains."""
    run = subprocess.Popen(
        [sys.executable, "-u", "-c", f"import sys{CELL}{RUN}", place],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "XLA_FLAGS": ""},
    )  # fmt: skip
    try:
        said = []
        for line in run.stdout:
            said.append(line)
            if "running" in line:
                break
        take_over()
        output, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    output = "".join(said) + output
    assert run.returncode == ExitCode.FAILURE, output
    assert "ended of TakenOverError" in output and "in use by process 7 on far" in output
    return output


def test_a_run_whose_folder_is_taken_over_ends_and_leaves_it_alone(tmp_path):
    def take_over():
        (tmp_path / "run" / LOCK).write_bytes(told())

    ended(str(tmp_path / "run"), take_over)
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert "end" not in {json.loads(record)["event"] for record in records}
    assert json.loads((tmp_path / "run" / LOCK).read_bytes())["host"] == "far"


@pytest.mark.thorough
def test_a_run_whose_objects_are_taken_over_ends_and_leaves_them_alone(tmp_path):
    with store("s3") as bucket:
        place = Objects.at(f"{bucket}/run")

        def take_over():
            while place.write(LOCK, told(), instead_of=place.generation(LOCK)) is None:
                pass

        ended(str(place), take_over)
        assert json.loads(place.get(LOCK))["host"] == "far"
        assert "metrics.jsonl" not in place.list()


FAILS = """
import ctypes, os, sys, threading, time
from step_jax.core import distributed
from step_jax.core.errors import StepError, TakenOverError
from step_jax.runs import preemption
how, count, index, port = sys.argv[1], *map(int, sys.argv[2:5])
preemption._LEAVE_S = 1 if how == "blocked" else 10
try:
    with preemption.StopSignal(lambda e: print(e, flush=True), joined=False) as stop:
        if count > 1:
            os.environ |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                           "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
            distributed.join()
        stop.join()
        stop.requested(3)
        if index == 0:
            threading.Timer(1, stop.fail, [TakenOverError("another job has it")]).start()
        if how == "blocked":
            libc, forever = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            libc.pthread_mutex_lock(forever)
            libc.pthread_mutex_lock(forever)
        time.sleep(60)
except StepError as error:
    print("raised", error, flush=True)
    sys.exit(error.exit_code)
"""


@pytest.mark.thorough
@pytest.mark.multiprocess
@pytest.mark.parametrize(("how", "count"), [("sleeping", 1), ("blocked", 1), ("sleeping", 2)])
def test_an_error_that_a_thread_finds_ends_all_processes(how, count):
    """Also one whose main thread is in C, as in a step on the devices."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", FAILS, how, str(count), str(i), str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(count)
    ]  # fmt: skip
    try:
        outputs = [run.communicate(timeout=60)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [ExitCode.FAILURE] * count, outputs
    assert all("another job has it" in output for output in outputs)
    assert ("raised another" in outputs[0]) == (how == "sleeping")
