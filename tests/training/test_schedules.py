"""Schedules against their closed forms at the corner steps."""

from __future__ import annotations

import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from step_jax.core.errors import ConfigError
from step_jax.training import schedules
from step_jax.training.schedules import WSD, Constant, Cosine

PEAK, MINIMUM, WARMUP, TOTAL = 3e-3, 1e-5, 10, 110


def cosine(s):
    if s < WARMUP:
        return PEAK * (s + 1) / WARMUP
    u = min(1.0, (s + 1 - WARMUP) / (TOTAL - WARMUP))
    return MINIMUM + (PEAK - MINIMUM) * 0.5 * (1 + math.cos(math.pi * u))


def wsd(shape):
    decay = 22  # 20 % of 110

    def rate(s):
        if s < WARMUP:
            return PEAK * (s + 1) / WARMUP
        u = min(1.0, max(0.0, (s + 1 - (TOTAL - decay)) / decay))
        falling = 1 - math.sqrt(u) if shape == "1-sqrt" else 1 - u
        return MINIMUM + (PEAK - MINIMUM) * falling

    return rate


CASES = {
    "cosine": (Cosine(WARMUP, MINIMUM), cosine),
    "wsd-sqrt": (WSD(WARMUP, 0.2, "1-sqrt", MINIMUM), wsd("1-sqrt")),
    "wsd-linear": (WSD(WARMUP, 0.2, "linear", MINIMUM), wsd("linear")),
    "constant": (Constant(WARMUP), lambda s: PEAK * min(1.0, (s + 1) / WARMUP)),
    "constant-without-warmup": (Constant(), lambda s: PEAK),
}


@pytest.mark.parametrize("name", CASES)
def test_closed_form_at_every_step(name):
    config, expected = CASES[name]
    steps = np.arange(TOTAL + 20)
    rates = jax.jit(jax.vmap(schedules.build(config, PEAK, TOTAL)))(steps)
    assert rates.dtype == np.float32
    np.testing.assert_allclose(rates, [expected(s) for s in steps], rtol=3e-5, atol=2e-9)


@pytest.mark.parametrize("name", ["cosine", "wsd-sqrt", "wsd-linear"])
def test_corners(name):
    rate = schedules.build(CASES[name][0], PEAK, TOTAL)
    np.testing.assert_allclose(rate(0), PEAK / WARMUP, rtol=1e-6)
    np.testing.assert_allclose(rate(WARMUP - 1), PEAK, rtol=1e-6)
    np.testing.assert_allclose(rate(TOTAL - 1), MINIMUM, rtol=1e-4)
    assert rate(TOTAL - 2) > rate(TOTAL - 1)


def test_shortest_runs():
    np.testing.assert_allclose(schedules.build(Cosine(3, 0.0), PEAK, 4)(3), 0.0, atol=1e-12)
    np.testing.assert_allclose(schedules.build(WSD(0, 1.0), PEAK, 1)(0), 0.0, atol=1e-12)
    np.testing.assert_allclose(schedules.build(Constant(2), PEAK, 2)(1), PEAK, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "peak", "total", "message"),
    [
        (Cosine(100), 1e-3, 100, "warm-up of 100 steps does not fit into a run of 100"),
        (Constant(5), 1e-3, 4, "warm-up of 5 steps"),
        (WSD(90, 0.2), 1e-3, 100, "needs 110 or more"),
        (WSD(0, 0.0), 1e-3, 100, "decay_fraction"),
        (WSD(0, 0.5, "sqrt"), 1e-3, 100, "shape is 'sqrt'"),
        (Cosine(0, 1e-2), 1e-3, 100, "minimum 0.01 is not between"),
        (Cosine(-1), 1e-3, 100, "warmup_steps is -1"),
        (Cosine(0), 0.0, 100, "peak learning rate"),
        (Constant(), 1e-3, 0, "at least one step"),
    ],
)
def test_bad_input(config, peak, total, message):
    with pytest.raises(ConfigError, match=message):
        schedules.build(config, peak, total)


def test_configuration_imports_no_jax():
    code = (
        "import sys; import step_jax.training.schedules, step_jax.training.scaling_laws, "
        "step_jax.training.optimizers.config; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
