"""Profiler windows cover the configured steps and nothing else."""

import pytest

from step_jax.core.config import parse_config
from step_jax.core.errors import ConfigError
from step_jax.runs.profiling import ProfileConfig, ProfilerWindow


def drive(window, steps, monkeypatch):
    import jax

    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    for step in steps:
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
