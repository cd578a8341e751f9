"""An interrupted cell: the process that somebody types into stays, and can run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from step_jax.runs import preemption
from step_jax.runs.history import outcome
from step_jax.runs.metrics_log import read_metrics

CELL = """
import signal, threading, time
import jax.numpy as jnp, numpy as np, optax
from dataclasses import dataclass
from step_jax.checkpoint.artifact import Description
from step_jax.core.sharding import MeshConfig
from step_jax.core.spec import ZEROS, ParamSpec
from step_jax.data.schema import Field
from step_jax.runs.reporter import LoggingConfig
from step_jax.runs.session import RunConfig, Session
from step_jax.training.learner import Learning
from step_jax.training.optimizers.build import Optimizer
from step_jax.training.program import Program, Work
from step_jax.training.step import LossOutput, Part

@dataclass(frozen=True)
class Config:
    run: RunConfig
    parallel: MeshConfig = MeshConfig(tensor=-1)  # all devices, with the batch on each
    loop: str = "test"

class Model:
    def initialise(self, key):
        return {"w": jnp.zeros(1)}

def loss(params, batch, key):
    return LossOutput({"all": Part(-jnp.sum(params["model"]["w"]), jnp.float32(1))})

def program(sharding, steps):
    specs = {"w": ParamSpec((1,), (None,), ZEROS, role="vector")}
    counting = Optimizer(optax.identity(), lambda step: jnp.float32(1), 1.0, specs)
    return Program.build(
        loss, {"model": Model()}, {"model": Learning(specs, specs, counting)},
        {"x": Field(("batch",), (1,))}, sharding, total_steps=steps, work=Work(1, "rows"), seed=0,
    )

def prepare():
    print("preparing", flush=True)
    time.sleep(60)
    print("prepared", flush=True)

def loop(directory, steps=3, slow=0.0, prepare=lambda: None):
    config = Config(RunConfig(directory, logging=LoggingConfig(sinks=())))
    with Session(config) as session:
        prepare()
        built = program(session.sharding, steps)
        state, start = session.start(built)
        session.describe(config, Description("test", {}), {}, {})
        for step in range(start, steps):
            session.before(step)
            if slow and step == start + 1:
                print("running", flush=True)
            time.sleep(slow)
            state, metrics = built.step(state, {"x": np.ones(1, np.float32)})
            session.finished(step + 1, state, metrics)
        session.flush()
    print("finished at", int(state.learners["model"].params["w"][0]), flush=True)

"""


class Prompt:
    """A Python prompt, as a notebook's kernel is one: cells go in, what they print comes out."""

    def __init__(self, tmp_path):
        (tmp_path / "cell.py").write_text(CELL)
        self.process = subprocess.Popen(
            [sys.executable, "-i", "-u", str(tmp_path / "cell.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd(), "XLA_FLAGS": ""},
        )
        self.seen: list[str] = []

    def type(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def wait_for(self, text):
        for line in self.process.stdout:
            self.seen.append(line)
            if text in line:
                return
        pytest.fail(f"the prompt is gone, without '{text}':\n{''.join(self.seen)}")

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)


@pytest.fixture
def prompt(tmp_path):
    prompt = Prompt(tmp_path)
    limit = threading.Timer(120, prompt.process.kill)  # whoever waits for a word then fails
    limit.start()
    yield prompt
    limit.cancel()
    prompt.process.kill()
    prompt.process.wait()


@pytest.mark.slow
def test_an_interrupted_cell_saves_and_the_next_one_goes_on(prompt, tmp_path):
    run = str(tmp_path / "run")
    prompt.type(f"loop({run!r}, steps=100_000, slow=0.05)")
    prompt.wait_for("running")
    prompt.interrupt()
    prompt.wait_for("KeyboardInterrupt")
    assert outcome(read_metrics(run), running=False).status == "interrupted"
    done = max(r["step"] for r in read_metrics(run) if r["event"] == "step")
    prompt.type(f"loop({run!r}, steps={done + 3})")  # neither locked nor deaf
    prompt.wait_for(f"finished at {done + 3}")
    prompt.type("print('handler', signal.getsignal(signal.SIGINT))")
    prompt.wait_for("handler <built-in function default_int_handler>")
    prompt.type("print([t.name for t in threading.enumerate() if t.name == 'stop-signal'])")
    prompt.wait_for("[]")
    assert prompt.process.poll() is None


@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once_and_the_process_stays(prompt, tmp_path):
    run = str(tmp_path / "run")
    prompt.type(f"loop({run!r}, prepare=prepare)")  # long before the next step could save
    prompt.wait_for("preparing")
    prompt.interrupt()
    prompt.wait_for("a second one stops at once without saving")
    prompt.interrupt()
    prompt.wait_for("KeyboardInterrupt")
    assert "prepared\n" not in prompt.seen
    prompt.type(f"loop({run!r}, steps=4)")
    prompt.wait_for("finished at 4")


@pytest.mark.thorough
def test_a_hang_shows_its_stacks_and_the_process_stays(prompt):
    prompt.type("from step_jax.runs.watchdog import HangWatchdog")
    prompt.type("with HangWatchdog(0.2, 2, 0.2): time.sleep(5)")
    prompt.type("")
    prompt.wait_for("Timeout")
    prompt.type("print('still', 'here')")
    prompt.wait_for("still here")


# --- the same without a process of its own, in every run of the tests -----------------------------


@pytest.fixture
def kernel(monkeypatch):
    """This process as a notebook's kernel: the names of the cell, and a switch of the signals."""
    monkeypatch.setattr(preemption, "is_interactive", lambda: True)
    module = types.ModuleType("cell")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # for its dataclass
    exec(CELL, module.__dict__)
    return module


def test_an_interrupted_cell_keeps_its_kernel_and_its_steps(kernel, tmp_path, monkeypatch, capsys):
    run, before = str(tmp_path / "run"), signal.getsignal(signal.SIGINT)
    sleeps = iter(range(1000))

    def interrupt_the_third(_):
        if next(sleeps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)

    monkeypatch.setattr(kernel, "time", types.SimpleNamespace(sleep=interrupt_the_third))
    with pytest.raises(KeyboardInterrupt):
        kernel.loop(run, steps=1000)
    assert outcome(read_metrics(run), running=False).status == "interrupted"
    done = max(r["step"] for r in read_metrics(run) if r["event"] == "step")
    assert 2 <= done < 1000
    assert signal.getsignal(signal.SIGINT) is before
    assert "stop-signal" not in [thread.name for thread in threading.enumerate()]
    kernel.loop(run, steps=done + 2)
    assert f"finished at {done + 2}" in capsys.readouterr().out


def test_a_second_interrupt_raises_in_the_kernel_at_once(kernel):
    said: list[str] = []
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), preemption.StopSignal(said.append) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        while not stop.requested(0) and time.monotonic() < begin + 10:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            time.sleep(0.1)
    assert time.monotonic() - begin < 9
    assert "a second one stops at once without saving" in said[0]
