"""What each attention kind promises beside its equations (those: test_mfa_oracle.py)."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.models.context import Context
from step_jax.models.layers.attention import MFA, MHA, MLA
from step_jax.models.layers.initialisation import Fixed
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Rope
from step_jax.models.tokens import Tokens
from tests.models import small


def params(attention, width=small.WIDTH):
    rng = np.random.default_rng(0)
    specs = attention.specs(width, Fixed(0.1))
    return small.map_specs(lambda s: (0.3 * rng.standard_normal(s.shape)).astype(np.float32), specs)


def apply(attention, p, x_BTD):
    positions_BT = np.broadcast_to(np.arange(x_BTD.shape[1], dtype=np.int32), x_BTD.shape[:2])
    ctx = Context(Tokens(positions_BT), execution=small.execution())
    return small.run(lambda p, x: attention.apply(p, x, ctx)[0], p, x_BTD)


X_BTD = np.random.default_rng(1).standard_normal((2, 9, small.WIDTH)).astype(np.float32)


def test_gqa_is_mha_with_repeated_heads():
    gqa, mha = MHA(6, 8, kv_heads=2), MHA(6, 8)
    p = params(gqa)
    repeated = p.replace(
        key_DKH=np.repeat(p.key_DKH, 3, axis=1), value_DKH=np.repeat(p.value_DKH, 3, axis=1)
    )
    np.testing.assert_allclose(apply(gqa, p, X_BTD), apply(mha, repeated, X_BTD), atol=1e-5)


def test_mfa_is_mqa_with_a_factorised_query():
    mfa, mqa = MFA(5, 8, query_rank=12), MHA(5, 8, kv_heads=1)
    p = params(mfa)
    q = params(mqa).replace(
        query_DNH=np.einsum("DR,RNC->DNC", p.query_down_DR, p.query_up_RNC),
        key_DKH=p.key_DC[:, None],
        value_DKH=p.value_DC[:, None],
        output_NHD=p.output_NCD,
    )
    np.testing.assert_allclose(apply(mfa, p, X_BTD), apply(mqa, q, X_BTD), atol=1e-4)


def test_key_reuse_starts_as_plain_reuse_and_reaches_any_value():
    """v = k + alpha (k N): at alpha = 0 plain reuse, at alpha = 1 MFA whose S_v = S_k (1 + N)."""
    kr, plain, mfa = (MFA(4, 8, value=v) for v in ("gated_key", "key", "projected"))
    p = params(kr)
    start = p.replace(reuse_gate_C=np.zeros(8, np.float32))
    without = p.replace(reuse_gate_C=None, reuse_CC=None)
    np.testing.assert_array_equal(apply(kr, start, X_BTD), apply(plain, without, X_BTD))
    full = p.replace(reuse_gate_C=np.ones(8, np.float32))
    value = p.key_DC @ (np.eye(8, dtype=np.float32) + p.reuse_CC)
    np.testing.assert_allclose(
        apply(kr, full, X_BTD), apply(mfa, without.replace(value_DC=value), X_BTD), atol=1e-5
    )
    assert kr.specs(32, Fixed()).reuse_gate_C.init.value == 0.0


@pytest.mark.parametrize("kind", small.KINDS)
def test_no_kind_looks_ahead_and_windows_forget(kind):
    attention = small.KINDS[kind]
    p, changed = params(attention), X_BTD.copy()
    changed[:, 6] += 1.0
    before, after = apply(attention, p, X_BTD), apply(attention, p, changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before - after)[:, 6:].max(axis=-1).min() > 1e-6
    windowed = dataclasses.replace(attention, window=2)
    before, after = apply(windowed, p, X_BTD), apply(windowed, p, changed)
    np.testing.assert_array_equal(before[:, 8:], after[:, 8:])
    assert np.any(before[:, 7] != after[:, 7])


@pytest.mark.parametrize("kind", small.KINDS)
def test_the_cache_is_what_cache_entries_says(kind):
    attention = small.KINDS[kind]
    c = small.decoder(kind)
    cache = jax.eval_shape(lambda: c.init_cache(3, 4))
    expected = [(2, 3, 4, *entry) for entry in attention.cache_entries()]
    assert [a.shape for a in cache.layers[0][0]] == expected


@pytest.mark.parametrize(
    "bad,message",
    [
        (MHA(6, 8, kv_heads=4), "kv_heads 4 does not divide heads 6"),
        (MHA(4, 8, window=0), "window is 0; it must be at least 1"),
        (MFA(4, 8, window=-1), "window is -1"),
        (MLA(4, 16, 8, 4, 8, window=0), "window is 0"),
        (MLA(4, 16, 8, 5, 8), "rope_dim is 5; it must be even"),
    ],
)
def test_bad_configurations_are_refused(bad, message):
    with pytest.raises(ConfigError, match=message):
        bad.validate()


@pytest.mark.parametrize("kind", small.KINDS)
def test_the_output_alone_can_learn_at_a_rate_of_its_own(kind):
    slow = dataclasses.replace(small.KINDS[kind], output_rate=0.25)
    by_name = spec_lib.by_name(slow.specs(32, Fixed()))
    rates = {name.partition("_")[0]: spec.rate for name, spec in by_name.items() if spec.rate != 1}
    assert rates == {"output": 0.25}
    assert all(s.rate == 1 for s in spec_lib.by_name(small.KINDS[kind].specs(32, Fixed())).values())


def test_optional_parts_have_parameters_only_when_chosen():
    bare = MFA(4, 8).specs(32, Fixed())
    assert bare.query_norm_R is None and bare.gate_DN is None and bare.reuse_CC is None
    released = MFA(4, 8, query_norm=RMSNorm(), output_gate=True).specs(32, Fixed())
    assert released.query_norm_R.shape == (8,) and released.gate_DN.shape == (32, 4)
    assert MFA(4, 8, position=Rope(fraction=0.5)).specs(32, Fixed()) == bare
