"""Step Law against the numbers of the paper's tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from step_jax.core.errors import ConfigError
from step_jax.training import scaling_laws as laws

# (non-embedding parameters, tokens, law's rate, law's batch in tokens)
TABLE = [
    (215e6, 4e9, 1.82e-3, 176e3),
    (215e6, 20e9, 2.98e-3, 442e3),
    (215e6, 100e9, 4.89e-3, 1.11e6),
    (268e6, 5e9, 1.66e-3, 200e3),
    (268e6, 80e9, 3.90e-3, 975e3),
    (429e6, 8e9, 1.38e-3, 262e3),
    (429e6, 50e9, 2.41e-3, 746e3),
    (537e6, 10e9, 1.25e-3, 298e3),
    (1.07e9, 20e9, 9.49e-4, 442e3),
    (1.07e9, 57e9, 1.31e-3, 804e3),
    (60e6, 2e9, 3.65e-3, 119e3),
    (20e6, 1e9, 6.5e-3, 80e3),
    (10e6, 0.4e9, 8.0e-3, 47e3),
]


@pytest.mark.parametrize(("parameters", "tokens", "rate", "batch"), TABLE)
def test_table(parameters, tokens, rate, batch):
    # The table gives sizes and results to two or three digits.
    assert laws.step_law_learning_rate(parameters, tokens) == pytest.approx(rate, rel=8e-3)
    assert laws.step_law_batch_tokens(tokens) == pytest.approx(batch, rel=8e-3)


def test_rate_falls_with_the_model_and_rises_with_the_data():
    base = laws.step_law_learning_rate(1e8, 1e10)
    assert laws.step_law_learning_rate(2e8, 1e10) == pytest.approx(base * 2**-0.713)
    assert laws.step_law_learning_rate(1e8, 2e10) == pytest.approx(base * 2**0.307)


def test_rows():
    # 119k tokens are 58.2 rows of 2048.
    assert laws.step_law_batch_rows(2e9, 2048) == 58
    assert laws.step_law_batch_rows(2e9, 2048, multiple=8) == 56
    assert laws.step_law_batch_rows(1e5, 2048, multiple=8) == 8


def test_extrapolation_is_said():
    assert laws.step_law_extrapolation(60e6, 2e9) is None
    assert laws.step_law_extrapolation(1.07e9, 100e9) is None
    both = laws.step_law_extrapolation(1e6, 1e12)
    assert "parameters 1e+06 is below" in both and "tokens 1e+12 is above" in both
    assert "parameters" not in laws.step_law_extrapolation(1e8, 1e8)


@pytest.mark.parametrize("arguments", [(0, 1e9), (1e8, 0), (1e8, float("nan"))])
def test_bad_input(arguments):
    with pytest.raises(ConfigError, match="positive"):
        laws.step_law_learning_rate(*arguments)


# --- laws of one's own runs -----------------------------------------------------------------------


def test_the_best_rate_lies_between_those_that_were_tried():
    rates = [1e-3, 3e-3, 1e-2]
    losses = [2 + math.log(rate / 4e-3) ** 2 for rate in rates]
    assert laws.best_value(rates, losses) == pytest.approx(4e-3)
    assert laws.best_value(rates, [3.0, 2.0, 1.0]) == 1e-2  # beyond it nothing is known
    assert laws.best_value(rates, [3.0, 2.0, math.inf]) == 3e-3


def test_a_power_law_is_found_in_its_values():
    points = [(n, d) for n in (60e6, 215e6, 1e9) for d in (2e9, 100e9)]
    rates = [laws.step_law_learning_rate(*point) for point in points]
    assert laws.fit_power_law(points, rates) == pytest.approx([1.79, -0.713, 0.307])


@pytest.mark.parametrize("points", [[(1, 2), (2, 4)], [(1, 2), (1, 3), (1, 4)]])
def test_a_power_law_that_is_not_fixed_is_refused(points):
    with pytest.raises(ConfigError, match="do not fix 3 numbers"):
        laws.fit_power_law(points, [1.0] * len(points))


#: what Besiroglu et al. (arXiv 2404.10102) found in the runs of Hoffmann et al.
CHINCHILLA = laws.ScalingLaw(1.8172, 482.01, 0.3478, 2085.43, 0.3658)


def test_a_scaling_law_is_found_in_noisy_losses():
    sizes, lengths = np.geomspace(5e7, 1.6e10, 7), np.geomspace(1e9, 5e11, 7)
    runs = [(n, d) for n in sizes for d in lengths]
    noise = np.random.default_rng(0).normal(0, 1e-3, len(runs))
    losses = [CHINCHILLA.loss(n, d) * math.exp(e) for (n, d), e in zip(runs, noise, strict=True)]
    losses[3] *= 1.2  # one run went wrong, which Huber's loss forgives
    law = laws.fit_scaling_law(*zip(*runs, strict=True), losses)
    assert law.floor == pytest.approx(CHINCHILLA.floor, rel=0.01)
    assert (law.alpha, law.beta) == pytest.approx((CHINCHILLA.alpha, CHINCHILLA.beta), rel=0.03)


def test_the_best_size_for_a_budget_has_the_lowest_loss():
    flops = 5.76e23  # of Chinchilla: 70e9 parameters and 1.4e12 tokens
    best = CHINCHILLA.best_parameters(flops)
    assert 50e9 < best < 90e9
    losses = [CHINCHILLA.loss(best * x, flops / (6 * best * x)) for x in (0.9, 1.0, 1.1)]
    assert min(losses) == losses[1]


@pytest.mark.parametrize("runs", [[(1, 1)] * 4, [(1, d) for d in range(1, 8)]])
def test_a_scaling_law_that_is_not_fixed_is_refused(runs):
    with pytest.raises(ConfigError, match="five or more, with two or more of each"):
        laws.fit_scaling_law(*zip(*runs, strict=True), [1.0] * len(runs))
