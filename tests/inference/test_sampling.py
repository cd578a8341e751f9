"""Sampling against a plain NumPy transcription, row independence, and bad settings."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_jax.core.errors import ConfigError
from step_jax.inference.sampling import SamplingConfig, draw_keys, row_keys, sample

V, ROWS = 12, 4096


@functools.partial(
    jax.jit,
    static_argnames="config",
    compiler_options={"xla_backend_optimization_level": 0},
)
def _draw(logits_BV, positions_B, requests_B, config: SamplingConfig):
    keys_B = row_keys(jax.random.key(0), requests_B[:, None])
    return sample(logits_BV, draw_keys(keys_B, positions_B), config)


def draw(logits_BV, positions_B, requests_B, config: SamplingConfig):
    """(tokens_B, logprobs_B), computed in a batch of ``ROWS`` so that a config compiles once."""
    n = len(positions_B)
    full = [np.zeros((ROWS, V), np.float32), np.zeros(ROWS, np.int32), np.zeros(ROWS, np.int32)]
    for array, part in zip(full, (logits_BV, positions_B, requests_B), strict=True):
        array[:n] = part
    tokens_B, logprobs_B = jax.device_get(_draw(*full, config))
    return tokens_B[:n], logprobs_B[:n]


def normal(seed: int, *shape: int, scale: float = 1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def allowed(logits_V, config: SamplingConfig) -> set[int]:
    """The tokens that may be drawn, by the definitions, one token at a time in float64."""
    p_V = np.exp(logits_V.astype(np.float64) / config.temperature)
    order = sorted(range(len(p_V)), key=lambda token: (-p_V[token], token))
    if config.top_k:
        order = order[: config.top_k]
    total, reached, kept = sum(p_V[t] for t in order), 0.0, set()
    for token in order:
        if reached / total >= config.top_p:
            break
        reached += p_V[token]
        if p_V[token] >= config.min_p * p_V[order[0]]:
            kept.add(token)
    return kept


CONFIGS = [
    SamplingConfig(top_k=3),
    SamplingConfig(top_p=0.613),
    SamplingConfig(min_p=0.2071, temperature=1.7),
    SamplingConfig(top_k=7, top_p=0.827, min_p=0.0533, temperature=0.6),
    SamplingConfig(top_k=50, top_p=0.9111),
]


@pytest.mark.thorough
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans(), config=st.sampled_from(CONFIGS))
def test_draws_every_allowed_token_and_no_other(seed, ties, config):
    logits_V = np.random.default_rng(seed).normal(0, 2, V)
    if ties:
        logits_V = np.round(logits_V)
    logits_V = logits_V.astype(np.float32)
    tokens_B, _ = draw(logits_V[None], np.zeros(ROWS), np.arange(ROWS), config)
    expected = allowed(logits_V, config)
    assert set(tokens_B.tolist()) <= expected
    p_V = np.exp(logits_V / config.temperature)
    likely = {t for t in expected if p_V[t] > 0.02 * sum(p_V[list(expected)])}
    assert likely <= set(tokens_B.tolist())


@pytest.mark.parametrize("config", [SamplingConfig(temperature=0.7), CONFIGS[3]], ids=str)
def test_frequencies_are_the_renormalised_probabilities(config):
    logits_V = np.random.default_rng(1).normal(0, 1.5, V).astype(np.float32)
    draws = [draw(logits_V[None], np.full(ROWS, i), np.arange(ROWS), config) for i in range(8)]
    tokens_B, logprobs_B = (np.concatenate(parts) for parts in zip(*draws, strict=True))
    n = len(tokens_B)
    policy_V = np.exp(logits_V / config.temperature)
    policy_V /= policy_V.sum()
    expected_V = np.zeros(V)
    kept = sorted(allowed(logits_V, config))
    expected_V[kept] = policy_V[kept] / policy_V[kept].sum()
    seen_V = np.bincount(tokens_B, minlength=V) / n
    deviation_V = np.sqrt(expected_V * (1 - expected_V) / n)
    assert np.all(np.abs(seen_V - expected_V) <= 4.5 * deviation_V)
    # of the tempered distribution over the whole vocabulary, whatever the filters
    np.testing.assert_allclose(logprobs_B, np.log(policy_V)[tokens_B], atol=1e-5)


def test_temperature_zero_is_the_best_token_and_the_lower_of_two():
    logits_BV = normal(3, 2, V)
    logits_BV[0, 4] = logits_BV[0, 7] = 6.0
    config = SamplingConfig(temperature=0, top_k=2)
    tokens_B, logprobs_B = draw(logits_BV, np.zeros(2), np.arange(2), config)
    assert tokens_B.tolist() == [4, logits_BV[1].argmax()]
    expected_BV = logits_BV - np.log(np.exp(logits_BV.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs_B, expected_BV[[0, 1], tokens_B], atol=2e-6)


def test_top_k_of_equal_logits_keeps_exactly_k():
    tokens_B, _ = draw(np.zeros((1, V)), np.zeros(ROWS), np.arange(ROWS), SamplingConfig(top_k=3))
    assert set(tokens_B.tolist()) == {0, 1, 2}


def test_filters_that_keep_everything_change_no_draw():
    args = normal(4, ROWS, V, scale=3), np.arange(ROWS), np.arange(ROWS)
    plain_B, _ = draw(*args, SamplingConfig())
    filtered_B, _ = draw(*args, SamplingConfig(top_k=99, min_p=1e-9))
    assert np.array_equal(filtered_B, plain_B)


def test_a_row_draws_the_same_in_any_batch():
    logits_BV = normal(5, 8, V)
    positions_B, requests_B = np.arange(8) * 3, np.arange(8) + 100
    config = CONFIGS[1]
    together_B, _ = draw(logits_BV, positions_B, requests_B, config)
    order = np.array([5, 2, 7])
    some_B, _ = draw(logits_BV[order], positions_B[order], requests_B[order], config)
    assert np.array_equal(some_B, together_B[order])
    # and both names of a draw matter
    zeros, numbers = np.zeros(64), np.arange(64)
    for names in [(numbers, zeros), (zeros, numbers)]:
        assert len(set(draw(np.zeros((1, V)), *names, config)[0].tolist())) > 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("max_new_tokens", 0),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value}; it must be"):
        SamplingConfig(**{field: value})
