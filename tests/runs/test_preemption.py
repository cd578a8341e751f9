"""SIGTERM and Ctrl-C: one process and two; the state of one common step is saved."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from step_jax.checkpoint import Checkpointer, verify
from step_jax.runs.preemption import StopSignal

RUN = """
import os, sys, time
import jax
directory, index, count, port, total = sys.argv[1], *map(int, sys.argv[2:6])
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from step_jax.checkpoint import Checkpointer, CheckpointConfig
from step_jax.runs.preemption import StopSignal

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
sharding = NamedSharding(mesh, PartitionSpec("x"))
init = jax.jit(lambda: {"w": jnp.arange(64.0).reshape(8, 8)}, out_shardings=sharding)
step_fn = jax.jit(lambda s: {"w": s["w"] * 0.5 + s["w"].mean()}, donate_argnums=0,
                  out_shardings=sharding)
state, start = init(), 0
log = lambda e: print(e, flush=True)
with StopSignal(log) as stop, Checkpointer(directory, CheckpointConfig(), log) as saver:
    latest = saver.latest()
    if latest is not None:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        state, meta = saver.restore(latest, shapes)
        start = meta["step"]
    for step in range(start, total):
        if stop.requested(step):
            saver.save(step, state, {"step": step})
            saver.wait()
            print("stopped", step, flush=True)
            code = stop.exit_code
            break
        state = step_fn(state)
        jax.block_until_ready(state)
        if step == start + 2:
            print("running", flush=True)
        time.sleep(0.01)
    else:
        saver.save(total, state, {"step": total})
        code = 0
sys.exit(code)
"""


def start(directory: Path, count: int, total: int = 10**6) -> list[subprocess.Popen]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RUN, *map(str, (directory, i, count, port, total))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        for i in range(count)
    ]


def wait_until_running(runs: list[subprocess.Popen]) -> None:
    for run in runs:
        seen = []
        for line in run.stdout:
            seen.append(line)
            if line.startswith("running"):
                break
        else:
            pytest.fail("".join(seen))


def finish(runs: list[subprocess.Popen], timeout: float = 60) -> list[tuple[int, str]]:
    try:
        outputs = [r.communicate(timeout=timeout)[0] for r in runs]
    finally:
        for run in runs:
            run.kill()
    return [(r.returncode, text) for r, text in zip(runs, outputs, strict=True)]


def stopped_at(text: str) -> int:
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("stopped"))


def expected(steps: int) -> np.ndarray:
    w = np.arange(64, dtype=np.float32).reshape(8, 8)
    for _ in range(steps):
        w = w * np.float32(0.5) + w.mean(dtype=np.float32)
    return w


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 42), (signal.SIGINT, 130)])
def test_signal_saves_and_exits_with_its_code(tmp_path, number, code):
    runs = start(tmp_path, 1)
    wait_until_running(runs)
    runs[0].send_signal(number)
    ((returncode, text),) = finish(runs)
    assert returncode == code, text
    step = stopped_at(text)
    assert verify(tmp_path) == {step: []}
    shape = {"w": jax.ShapeDtypeStruct((8, 8), np.float32)}
    restored, meta = Checkpointer(tmp_path).restore(None, shape)
    assert meta == {"step": step}
    np.testing.assert_allclose(restored["w"], expected(step), rtol=1e-5)


def test_second_signal_ends_the_process_although_the_main_thread_is_blocked():
    code = """
import ctypes, threading
from step_jax.runs.preemption import StopSignal
libc, forever = ctypes.CDLL(None), ctypes.create_string_buffer(64)
def block():
    # Locking twice never returns and, unlike sleep(), is not interrupted by signals.
    libc.pthread_mutex_lock(forever)
    libc.pthread_mutex_lock(forever)
with StopSignal(lambda e: None):
    threading.Timer(1, lambda: print("ready", flush=True)).start()  # once it is blocked
    block()
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert run.stdout.readline() == b"ready\n"
    run.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    try:
        assert run.wait(timeout=10) == 128 + signal.SIGTERM
    finally:
        run.kill()


LEAVES = """
import ctypes, os, sys, time
import jax
from step_jax.core import distributed
from step_jax.core.errors import RestartRequested
from step_jax.runs import preemption
how, count, index, port = sys.argv[1], *map(int, sys.argv[2:5])
preemption._LEAVE_S = {"blocked": 0.5, "unknown": 2}.get(how, 20)
try:
    with preemption.StopSignal(lambda e: print(e, flush=True), joined=False) as stop:
        if count > 1:
            os.environ |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                           "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
            distributed.join()
            if how != "unknown":
                stop.join()
        print("running", flush=True)
        if how == "blocked":
            libc, forever = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            libc.pthread_mutex_lock(forever)
            libc.pthread_mutex_lock(forever)
        time.sleep(60)
except RestartRequested as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def start_leaving(how: str, count: int = 1) -> list[subprocess.Popen]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVES, how, str(count), str(i), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    wait_until_running(runs)
    return runs


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["sleeping", "blocked"])
def test_before_the_first_step_a_signal_ends_the_process_at_once(how):
    """Also one whose main thread is in C, as in a compiler."""
    runs = start_leaving(how)
    runs[0].send_signal(signal.SIGTERM)
    ((code, text),) = finish(runs, timeout=15)
    assert code == 42, text
    assert "SIGTERM received: leaving before the first step" in text
    assert ("stopped before its first step" in text) == (how == "sleeping")


@pytest.mark.thorough
@pytest.mark.multiprocess
@pytest.mark.parametrize("rank", [0, 1])
def test_before_the_first_step_a_signal_to_one_of_two_ends_both(rank):
    runs = start_leaving("sleeping", 2)
    runs[rank].send_signal(signal.SIGTERM)
    results = finish(runs, timeout=30)
    assert [code for code, _ in results] == [42, 42], results


@pytest.mark.multiprocess
def test_a_process_that_is_stopped_as_it_joins_waits_for_nobody_when_it_ends():
    """At its end JAX waits for the others, up to five minutes."""
    runs = start_leaving("unknown", 2)
    runs[0].send_signal(signal.SIGTERM)
    try:
        ((code, text),) = finish(runs[:1], timeout=15)
        assert code == 42 and "stopped before its first step" in text
    finally:
        runs[1].kill()


def test_a_signal_that_comes_after_anothers_request_is_no_second_one():
    """A cluster signals all processes, and one of them may be quicker to tell the others."""
    with StopSignal(lambda e: None) as stop:
        assert not stop.requested(0)
        stop._signal = signal.SIGTERM  # as another process published it
        stop._asked.set()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not stop._heard and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop._heard and stop.requested(1)


def test_the_coordinator_of_local_processes_listens_on_the_loopback_address_alone():
    """And a port that is in use is named."""
    code = """
import os, socket
from step_jax.core import distributed
from step_jax.core.errors import ConfigError
os.environ |= {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    s.listen()
    port = s.getsockname()[1]
    os.environ["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
    try:
        distributed.join()
    except ConfigError as error:
        print(f"listen on 127.0.0.1:{port}: the port is in use" in str(error))
for attempt in range(5):  # whoever else looks for a port may be quicker
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
    try:
        distributed.join()
        break
    except ConfigError:
        pass
for address in ("127.0.0.1", "127.0.0.2"):
    with socket.socket() as s:
        print(s.connect_ex((address, port)) == 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "True", "False"], done.stdout + done.stderr


def test_handlers_are_put_back_and_flag_costs_little():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal(lambda e: None) as stop:
        assert signal.getsignal(signal.SIGTERM) is not before
        begin = time.perf_counter()
        for step in range(1000):
            assert not stop.requested(step)
        assert time.perf_counter() - begin < 0.1  # 100 us a call, far above what it takes
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not stop.requested(1000) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.requested(1001) and stop.exit_code == 42
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_of_the_main_thread_it_only_misses_signals():
    seen = []

    def body():
        with StopSignal() as stop:
            seen.append(stop.requested(0))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(10)
    assert seen == [False]


@pytest.mark.multiprocess
@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_of_two_processes_stops_both_at_one_step(tmp_path, rank):
    runs = start(tmp_path, 2)
    wait_until_running(runs)
    runs[rank].send_signal(signal.SIGTERM)
    results = finish(runs)
    assert [code for code, _ in results] == [42, 42], results
    steps = {stopped_at(text) for _, text in results}
    assert len(steps) == 1
    step = steps.pop()
    assert verify(tmp_path) == {step: []}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_other_process_count_and_common_fall_back(tmp_path):
    """Two processes save, one goes on; its step is damaged, so two go on from the older one."""
    for count, total in ((2, 3), (1, 6)):
        results = finish(start(tmp_path, count, total))
        assert [code for code, _ in results] == [0] * count, results
    data = max((tmp_path / "00000006").glob("**/d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    results = finish(start(tmp_path, 2, 8))
    assert [code for code, _ in results] == [0, 0], results
    assert "step 6 is DAMAGED" in results[0][1]
    found = verify(tmp_path)
    assert [s for s, problems in found.items() if not problems] == [3, 8]
    assert len(found[6]) == 1  # kept for inspection
    shape = {"w": jax.ShapeDtypeStruct((8, 8), np.float32)}
    restored, _ = Checkpointer(tmp_path).restore(None, shape)
    np.testing.assert_allclose(restored["w"], expected(8), rtol=1e-5)
