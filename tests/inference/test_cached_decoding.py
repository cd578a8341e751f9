"""Decoding with a cache gives what one forward pass over the whole text gives, for every kind.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.models.context import Context, saturated
from step_jax.models.layers.attention import MFA, MHA, MLA
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Alibi
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.models.tokens import Tokens
from tests.models import small

WINDOW = 5  # far shorter than the texts
KINDS = {
    "mha_alibi": MHA(4, 8, position=Alibi()),
    "mha_alibi_sqrt_window": MHA(4, 8, position=Alibi("sqrt"), window=WINDOW),
    "gqa_window": MHA(4, 8, kv_heads=2, window=WINDOW, qk_norm=RMSNorm(), output_gate=True),
    "mfa": MFA(4, 8),
    "mfa_released_window": MFA(4, 8, query_rank=16, query_norm=RMSNorm(), window=WINDOW),
    "mfa_gated_key": MFA(4, 8, value="gated_key", output_gate=True),
    "mfa_gated_key_window": MFA(4, 8, value="gated_key", window=WINDOW),
    "mfa_key_alibi": MFA(4, 8, value="key", position=Alibi("sqrt")),
    "mla": MLA(4, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8),
    "mla_query_rank_window": MLA(
        4, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8, query_rank=12, window=WINDOW
    ),
}

# Three calls: prompts, more of each text (none for row 2, one token for row 3), single tokens.
FIRST, SECOND, STEPS = [7, 3, 9, 1], [6, 4, 0, 1], 5
LENGTH = max(a + b for a, b in zip(FIRST, SECOND, strict=True)) + STEPS


def call_positions(before, new, width):
    """Positions (B, width) of ``new`` tokens a row after ``before`` of them, -1 for padding."""
    index_1T = np.arange(width)[None]
    before, new = np.asarray(before)[:, None], np.asarray(new)[:, None]
    return np.where(index_1T < new, before + index_1T, -1).astype(np.int32)


def compare(c: Decoder, sharding=None):
    tokens_BT = np.random.default_rng(0).integers(0, c.vocab, (4, LENGTH)).astype(np.int32)
    both = np.add(FIRST, SECOND)
    calls = [call_positions([0] * 4, FIRST, 9), call_positions(FIRST, SECOND, 6)]
    calls += [call_positions(both + i, [1] * 4, 1) for i in range(STEPS)]

    def logits(p, tokens_BT, positions_BT, cache=None, fresh=False):
        tokens, execution = Tokens(positions_BT), small.execution()
        ctx = Context(tokens, fresh=fresh, execution=execution, sharding=sharding)
        x_BTD, cache, _ = c.hidden(p, tokens_BT, ctx, cache)
        return c.logits(p, x_BTD, ctx), cache

    def whole_and_cached(p, tokens_BT):
        B, T = tokens_BT.shape
        whole_BTV, _ = logits(p, tokens_BT, jnp.broadcast_to(jnp.arange(T), (B, T)))
        cache = c.init_cache(B, T, jnp.float32)

        def call(cache, positions_BT, fresh=False):
            here_BT = jnp.take_along_axis(tokens_BT, jnp.maximum(positions_BT, 0), axis=1)
            out, cache = logits(p, here_BT, positions_BT, cache, fresh)
            return cache, out

        cache, first = call(cache, calls[0], fresh=True)
        cache, second = call(cache, calls[1])
        cache, steps = jax.lax.scan(call, cache, np.stack(calls[2:]))
        return whole_BTV, (first, second, *steps), cache.lengths_B

    p = small.params(c)
    if sharding is not None:
        p = jax.device_put(p, sharding.params(c.specs()))
    whole_BTV, cached, lengths_B = small.run(whole_and_cached, p, tokens_BT)
    assert lengths_B.tolist() == (both + STEPS).tolist()
    for positions_BT, got_BTV in zip(calls, cached, strict=True):
        row, column = np.nonzero(positions_BT >= 0)
        expected = whole_BTV[row, positions_BT[row, column]]
        np.testing.assert_allclose(got_BTV[row, column], expected, atol=2e-5, rtol=2e-5)
    assert np.abs(whole_BTV).max() > 0.1  # there is something to compare


EVERY_TIME = ("gqa_window", "mla", "mfa_gated_key")


@pytest.mark.parametrize(
    "kind",
    [k if k in EVERY_TIME else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)
def test_cached_calls_equal_one_forward_pass(kind):
    compare(small.decoder(KINDS[kind], repeat=2))


@pytest.mark.slow  # test_engine.py decodes a mixture on one device
@pytest.mark.parametrize("axes", [None, {"expert": 2, "data": 2, "tensor": 2}], ids=str)
def test_cached_calls_of_a_mixture_equal_one_forward_pass(axes):
    """Experts on one device and sharded, routed token by token as the whole text is."""
    router = Router(2, score="sigmoid", scale=2.0, bias=True)
    mixture = MoE((Experts(8, 16), Experts(4, 24)), router, shared=16, common=8)
    layers = (
        Group(1, (Block(KINDS["mfa"], SwiGLU(48)),)),
        Group(2, (Block(KINDS["gqa_window"], mixture),)),
    )
    c = Decoder(small.WIDTH, layers, small.VOCAB)
    compare(c, None if axes is None else small.on_mesh(**axes))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"])
@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
def test_a_cache_holds_the_largest_number_for_what_exceeds_its_range(computed, dtype):
    most = float(jnp.finfo(dtype).max)
    x = jnp.asarray([1.5, -0.25, 3e38, -3e38, jnp.nan, most], computed)
    got = np.asarray(saturated(x, dtype), np.float32)
    wanted = np.asarray([1.5, -0.25, min(most, float(x[2])), max(-most, float(x[3])), np.nan, most])
    np.testing.assert_allclose(got, wanted, rtol=2**-7)  # the rounding of bfloat16
    assert saturated(x, computed) is x  # as it is in its own dtype
    assert saturated(x, "int8").dtype == jnp.int8


def test_pattern_of_window_and_full_layers():
    c = small.decoder(KINDS["mfa_released_window"], KINDS["mha_alibi"])
    cache = c.init_cache(2, 64)
    assert [a.shape[2] for a in jax.tree.leaves(cache.layers)] == [WINDOW, WINDOW, 64, 64]


@pytest.mark.thorough
def test_live_cache_against_mha_of_eight_times_the_width():
    C, prompt_BT = 8, np.ones((2, 8), np.int32)

    def live_bytes(kind) -> int:
        c = small.decoder(kind)

        def prefill(p):
            positions_BT = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))
            ctx = Context(Tokens(positions_BT), fresh=True, execution=small.execution())
            return c.hidden(p, prompt_BT, ctx, c.init_cache(2, 32))[1]

        cache = jax.jit(prefill, compiler_options=small.FAST_COMPILE)(small.params(c))
        assert cache.nbytes() == sum(a.nbytes for a in jax.tree.leaves(cache.layers))
        return cache.nbytes()

    mha = live_bytes(MHA(8, C))
    assert mha == 2 * 2 * 32 * 2 * 8 * C * 2  # layers, rows, slots, keys and values, bfloat16
    assert 1 - live_bytes(MFA(26, C)) / mha == 0.875
    assert 1 - live_bytes(MFA(28, C, value="gated_key")) / mha == 0.9375
