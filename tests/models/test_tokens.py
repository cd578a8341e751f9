"""Places of several axes and blocks that see each other: against float64 oracles, on every mesh,
however the layers are run, and through a cache."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core.errors import ConfigError
from step_jax.core.spec import map_specs
from step_jax.models.context import Context
from step_jax.models.layers.attention import MFA, MHA, MLA
from step_jax.models.layers.initialisation import FanIn
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Alibi, Rope
from step_jax.models.tokens import Tokens
from tests.models import numpy_oracles as oracle
from tests.models import small

EPS, THETA = 1e-3, 50.0
NORM = RMSNorm(eps=EPS)
KINDS = {
    "mha": MHA(4, 8, qk_norm=NORM),
    "gqa": MHA(4, 8, kv_heads=2, output_gate=True),
    "mfa": MFA(4, 8, query_rank=12, query_norm=NORM),
    "mfa_kr": MFA(4, 8, value="gated_key"),
    "mla": MLA(4, kv_rank=12, nope_dim=6, rope_dim=8, value_dim=6, query_rank=10, norm=NORM),
}
AXES = {1: (), 2: (4, 4), 3: (4, 2, 2)}


def heads_first(w):
    return w.transpose(1, 0, 2)


def expected_row(kind, p, x, where: oracle.Positions):
    """One float64 row (T, D) by the equations of the kind's paper."""
    if isinstance(kind, MHA):
        return oracle.gqa(
            x, *map(heads_first, (p.query_DNH, p.key_DKH, p.value_DKH)), p.output_NHD, where,
            eps=EPS, gate=p.gate_DN, q_norm=p.query_norm_H, k_norm=p.key_norm_H,
        )  # fmt: skip
    if isinstance(kind, MFA):
        return oracle.mfa_released(
            x, p.query_down_DR, p.query_norm_R, heads_first(p.query_up_RNC), p.key_DC, p.value_DC,
            p.output_NCD, where, eps=EPS, N=p.reuse_CC, alpha=p.reuse_gate_C,
        )  # fmt: skip
    return oracle.mla(
        x, p.query_down_DQ, p.query_norm_Q, heads_first(p.query_up_QNH), p.latent_DR,
        p.latent_norm_R, p.rotated_key_DE, heads_first(p.key_up_RNP), heads_first(p.value_up_RNV),
        p.output_NVD, where, rope_dims=kind.rope_dim, eps=EPS,
    )  # fmt: skip


@pytest.mark.parametrize(
    "axes,window,causal,blocks",
    [(1, 3, True, True), (2, None, True, True), (3, 3, False, True), (2, 3, False, False)],
)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_its_equations_over_what_a_dense_mask_lets_it_see(
    name, axes, window, causal, blocks
):
    """Packed rows; windows that blocks reach beyond; places of one to three coordinates."""
    kind = replace(KINDS[name], window=window, position=Rope(THETA, axes=AXES[axes]))
    rng = np.random.default_rng(0)
    batch = small.with_pictures(small.packed_batch(rows=2, length=13, seed=4), axes, seed=2)
    p = map_specs(
        lambda s: 0.4 * rng.standard_normal(s.shape) + (s.role == "vector"),
        kind.specs(20, FanIn()),
    )
    x_BTD = rng.standard_normal((2, 13, 20))
    tokens = Tokens(
        batch["positions"],
        batch["segments"],
        batch["places"] if axes > 1 else None,
        batch["blocks"] if blocks else None,
        causal=causal,
    )

    def apply(p, x_BTD, implementation):
        ctx = Context(tokens, execution=small.execution(attention=implementation))
        return kind.apply(p, x_BTD, ctx)[0]

    def both(p, x_BTD):
        return apply(p, x_BTD, "xla"), apply(p, x_BTD, "reference")

    got = small.run(both, *jax.tree.map(np.float32, (p, x_BTD)))
    for b in range(2):
        where = oracle.Positions(
            theta=THETA,
            window=window,
            causal=causal,
            documents=batch["segments"][b],
            blocks=batch["blocks"][b] if blocks else None,
            axes=AXES[axes],
            places=batch["places"][b],
        )
        expected_TD = expected_row(kind, p, x_BTD[b], where)
        for actual_BTD in got:
            bound = 1e-5 * np.abs(expected_TD).max()
            np.testing.assert_allclose(actual_BTD[b], expected_TD, rtol=0, atol=bound)


def test_alibi_without_causality_counts_the_distance_both_ways():
    kind = MFA(4, 8, window=4, position=Alibi("sqrt"))
    rng = np.random.default_rng(1)
    p = map_specs(lambda s: 0.4 * rng.standard_normal(s.shape), kind.specs(20, FanIn()))
    x_BTD = rng.standard_normal((1, 9, 20))
    ctx = Context(Tokens.in_order(1, 9, causal=False), execution=small.execution())
    got = small.run(lambda p, x: kind.apply(p, x, ctx)[0], *jax.tree.map(np.float32, (p, x_BTD)))
    where = oracle.Positions(alibi="sqrt", window=4, causal=False)
    expected_TD = expected_row(kind, p, x_BTD[0], where)
    bound = 1e-5 * np.abs(expected_TD).max()
    np.testing.assert_allclose(got[0], expected_TD, rtol=0, atol=bound)


# --- a decoder of these kinds, however it is run --------------------------------------------------


def problem(*names, repeat=2):
    kinds = [replace(small.KINDS[n], position=Rope(THETA, axes=(2, 2))) for n in names]
    c = small.decoder(*kinds, repeat=repeat)
    return c, small.params(c), small.with_pictures(small.packed_batch(), 2)


@functools.cache
def on_one_device(*names, repeat=2):
    c, _, _ = problem(*names, repeat=repeat)
    return jax.jit(small.loss_and_gradient(c), compiler_options=small.FAST_COMPILE)


@functools.cache
def one_device(*names, repeat=2):
    _, p, batch = problem(*names, repeat=repeat)
    return jax.device_get(on_one_device(*names, repeat=repeat)(p, batch))


def assert_equal(got, expected):
    assert abs(got[0] - expected[0]) <= 1e-5 * abs(expected[0])
    assert all(np.any(g) for g in jax.tree.leaves(expected[1])), "a dead gradient compares nothing"
    error, leaf = small.worst_leaf(got[1], expected[1])
    assert error <= 1e-5, leaf


#: several key heads, key reuse and a latent; every kind alone is compared with its equations above
SOME = ("gqa", "kr", "mla")
GATHERED = {"data": 2, "context": 2, "tensor": 2}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "names,repeat,axes,changes",
    [
        (SOME, 2, GATHERED, {"remat": "full"}),
        pytest.param(tuple(small.KINDS), 2, GATHERED, {"remat": "full"}, marks=pytest.mark.slow),
        pytest.param(
            ("mha", "gqa"), 2, {"context": 4, "tensor": 2, "ring": True}, {}, marks=pytest.mark.slow
        ),
        pytest.param(
            ("gqa", "kr"),
            4,
            {"pipeline": 2, "fsdp": 2, "context": 2},
            {"remat": "dots"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["gathered", "gathered_all", "ring", "pipeline"],
)
def test_blocks_and_places_on_eight_devices_equal_one(names, repeat, axes, changes):
    c, p, batch = problem(*names, repeat=repeat)
    f, args = small.compile_on(small.on_mesh(**axes), c, p, batch, **changes)
    assert_equal(f(*args), one_device(*names, repeat=repeat))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"scan": False}, pytest.param({"attention": "reference"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_blocks_and_places_are_the_same_however_layers_are_run(changes):
    c, p, batch = problem(*SOME)
    got = small.run(small.loss_and_gradient(c, **changes), p, batch)
    assert_equal(got, one_device(*SOME))


@pytest.mark.thorough
def test_a_block_changes_what_is_computed():
    """Else all of the above could compare causal rows."""
    _, p, batch = problem(*SOME)
    none = batch | {"blocks": np.full_like(batch["blocks"], -1)}
    loss, _ = on_one_device(*SOME)(p, none)
    assert abs(loss - one_device(*SOME)[0]) > 1e-3 * abs(loss)


@pytest.mark.slow
def test_a_picture_goes_through_the_cache_as_one_call():
    """Text, a picture as one block, text token by token; one kind has a window within the block."""
    axes = Rope(THETA, axes=(2, 2))
    kinds = [replace(small.KINDS[n], position=axes) for n in ("mha", "gqa", "mfa", "mla")]
    c = small.decoder(*kinds, repeat=1)
    p, T = small.params(c), 15
    order = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
    block = np.where((order >= 4) & (order < 11), 0, -1).astype(np.int32)
    places = np.random.default_rng(0).integers(0, 9, (2, T, 2)).astype(np.int32)
    tokens_BT = np.random.default_rng(1).integers(0, small.VOCAB, (2, T))

    def hidden(p, start, stop, cache=None, fresh=False):
        cut = np.s_[:, start:stop]
        tokens = Tokens(order[cut], place_BTA=places[cut], block_BT=block[cut])
        ctx = Context(tokens, fresh=fresh, execution=small.execution())
        x_BTD, cache, _ = c.hidden(p, tokens_BT[cut], ctx, cache)
        return x_BTD, cache

    def both(p):
        cache, parts = c.init_cache(2, T, jnp.float32), []
        for start, stop in [(0, 4), (4, 11), *((t, t + 1) for t in range(11, T))]:
            x_BTD, cache = hidden(p, start, stop, cache, fresh=start == 0)
            parts.append(x_BTD)
        return hidden(p, 0, T)[0], jnp.concatenate(parts, axis=1)

    whole_BTD, cached_BTD = small.run(both, p)
    np.testing.assert_allclose(cached_BTD, whole_BTD, rtol=0, atol=2e-5 * np.abs(whole_BTD).max())


@pytest.mark.parametrize("value", ["gated_key", "key"])
def test_key_reuse_refuses_to_cache_tokens_with_places(value):
    c = small.decoder(MFA(4, 8, value=value, position=Rope(axes=(4, 4))))
    tokens = Tokens.in_order(1, 3).replace(place_BTA=np.zeros((1, 3, 2), np.int32))
    ctx = Context(tokens, fresh=True, execution=small.execution())
    with pytest.raises(ConfigError, match="places of their own cannot be cached; use value: proj"):
        jax.eval_shape(
            lambda p: c.hidden(p, np.zeros((1, 3), np.int32), ctx, c.init_cache(1, 4))[0],
            small.params(c),
        )


def test_padding_that_a_pipeline_adds_is_seen_by_nobody():
    one = jnp.ones((2, 3), jnp.int32)
    fill = Tokens(one, one, jnp.ones((2, 3, 2)), one).nowhere()
    assert (fill.order_BT, fill.segments_BT, fill.block_BT) == (-1, 0, -1)
    assert Tokens(one).nowhere() == Tokens(-1)
