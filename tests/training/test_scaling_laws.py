"""Step Law against the numbers of the paper's tables."""

from __future__ import annotations

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
