"""Profiler windows cover the configured steps and nothing else."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from step_jax.core.config import parse_config
from step_jax.core.errors import ConfigError
from step_jax.runs.profiling import ProfileConfig, ProfilerWindow


def drive(window, steps, monkeypatch, at=lambda step: None):
    """What happens in these steps; ``at`` is called before each."""
    import jax

    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    for step in steps:
        at(step)
        window.before_step(step)
        events.append(step)
        window.after_step(step)
    window.close()
    return events


@pytest.mark.parametrize(
    ("start", "steps", "expected"),
    [
        (None, range(1, 4), [1, 2, 3]),
        (2, range(1, 6), [1, "start", 2, 3, "stop", 4, 5]),
        (2, range(3, 6), ["start", 3, "stop", 4, 5]),  # resumed inside the window
        (2, range(4, 6), [4, 5]),  # resumed behind it
        (3, range(1, 4), [1, 2, "start", 3, "stop"]),  # the run ends inside it
    ],
)
def test_window(start, steps, expected, monkeypatch, tmp_path):
    window = ProfilerWindow(ProfileConfig(start_step=start, steps=2), tmp_path)
    assert drive(window, steps, monkeypatch) == expected


@pytest.mark.parametrize(
    ("start", "asked", "expected"),
    [
        (None, [2], [1, "start", 2, 3, "stop", 4, 5, 6]),
        (None, [2, 3], [1, "start", 2, 3, "stop", "start", 4, 5, "stop", 6]),  # in mid-trace
        (None, [6], [1, 2, 3, 4, 5, "start", 6, "stop"]),  # the run ends inside it
        (1, [4], ["start", 1, 2, "stop", 3, "start", 4, 5, "stop", 6]),
        (5, [2], [1, "start", 2, 3, "stop", 4, "start", 5, 6, "stop"]),
    ],
)
def test_a_signal_asks_for_a_window(start, asked, expected, monkeypatch, tmp_path):
    def at(step):
        if step in asked:
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    window = ProfilerWindow(ProfileConfig(start_step=start, steps=2), tmp_path)
    with window.asked_by_signal():
        assert drive(window, range(1, 7), monkeypatch, at) == expected
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_run_outside_of_the_main_thread_leaves_signals_alone(tmp_path):
    window, before = ProfilerWindow(ProfileConfig(), tmp_path), signal.getsignal(signal.SIGUSR1)

    def enter():
        with window.asked_by_signal():
            assert signal.getsignal(signal.SIGUSR1) == before

    with ThreadPoolExecutor() as pool:
        pool.submit(enter).result()


def test_a_real_trace_is_written(tmp_path):
    import jax.numpy as jnp

    window = ProfilerWindow(ProfileConfig(start_step=1, steps=1), tmp_path / "profile")
    window.before_step(1)
    assert window.after_step(1, jnp.ones(3) * 2)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["steps: 0", "start_step: -1"])
def test_bad_window(text):
    with pytest.raises(ConfigError):
        parse_config(ProfileConfig, text)
