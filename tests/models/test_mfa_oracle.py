"""Every attention kind against its float64 transcription, head by head (numpy_oracles.py).

Tensors carry random values everywhere, the gate of key reuse and the norms' scales included, so
that no term is hidden by its initial value.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core.spec import map_specs
from step_jax.models.context import Context, Execution
from step_jax.models.layers.attention import MFA, MHA, MLA
from step_jax.models.layers.initialisation import FanIn
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Alibi, Rope
from step_jax.models.tokens import Tokens
from tests.models import numpy_oracles as oracle

WIDTH, EPS = 20, 1e-3  # an eps that shows
NORM = RMSNorm(eps=EPS)

# What the kind is configured with, and the same said to the oracle.
POSITIONS = {
    "none": (None, {}),
    "rope": (Rope(theta=100.0), {"theta": 100.0}),
    "partial_rope": (Rope(theta=100.0, fraction=0.5), {"theta": 100.0, "rotary_dims": 4}),
    "alibi": (Alibi(), {"alibi": "linear"}),
    "sqrt_alibi": (Alibi(distance="sqrt"), {"alibi": "sqrt"}),
}


def random_params(attention, seed: int):
    rng = np.random.default_rng(seed)

    def leaf(spec):
        if spec.role == "vector":
            return 1.0 + 0.5 * rng.standard_normal(spec.shape)
        return 2.0 / np.sqrt(spec.matrix_shape[1]) * rng.standard_normal(spec.shape)

    return map_specs(leaf, attention.specs(WIDTH, FanIn()))


def check(attention, expected_rows, *, tokens=11, implementation="reference", replace=None):
    """``expected_rows(p, x)`` is the oracle's output for one float64 row x (T, D)."""
    p = random_params(attention, seed=1).replace(**(replace or {}))
    x_BTD = np.random.default_rng(2).standard_normal((2, tokens, WIDTH))
    expected_BTD = np.stack([expected_rows(p, x) for x in x_BTD])

    @jax.jit
    def apply(p, x_BTD):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens), x_BTD.shape[:2])
        execution = Execution(dtype="float32", attention=implementation)
        return attention.apply(p, x_BTD, Context(Tokens(positions_BT), execution=execution))[0]

    to_float32 = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)  # noqa: E731
    actual_BTD = apply(to_float32(p), to_float32(x_BTD))
    np.testing.assert_allclose(
        actual_BTD, expected_BTD, rtol=0, atol=1e-5 * np.abs(expected_BTD).max()
    )


def heads_first(w):
    """(rows, N, columns) -> (N, rows, columns)."""
    return w.transpose(1, 0, 2)


def mfa_rows(where, **options):
    def rows(p, x):
        return oracle.mfa_released(
            x,
            p.query_down_DR,
            p.query_norm_R,
            heads_first(p.query_up_RNC),
            p.key_DC,
            p.value_DC,
            p.output_NCD,
            where,
            eps=EPS,
            N=p.reuse_CC,
            alpha=p.reuse_gate_C,
            gate=p.gate_DN,
            **options,
        )

    return rows


@pytest.mark.parametrize(
    "position, window",
    [
        ("none", None),
        ("rope", None),
        ("rope", 4),
        ("partial_rope", None),
        ("alibi", 4),
        ("sqrt_alibi", None),
    ],
)
def test_mfa_paper_form(position, window):
    """O_i = sum_c ( sum_j softmax_j( (x_i S_q Q_c)(x_j S_k)^T / sqrt(C) ) x_j S_v ) O_c^T."""
    kind, where = POSITIONS[position]

    def rows(p, x):
        return oracle.mfa_paper(
            x,
            p.query_down_DR,
            heads_first(p.query_up_RNC),
            p.key_DC,
            p.value_DC,
            p.output_NCD.transpose(0, 2, 1),
            oracle.Positions(**where, window=window),
        )

    check(MFA(heads=3, head_dim=8, window=window, position=kind), rows)


@pytest.mark.parametrize("value", ["projected", "gated_key", "key"])
@pytest.mark.parametrize("position", ["rope", "sqrt_alibi"])
def test_mfa_released_form_and_key_reuse(value, position):
    """v_j = x_j W_v, v_j = k_j + alpha * (k_j N), v_j = k_j, the last two before rotation."""
    kind, where = POSITIONS[position]
    attention = MFA(
        heads=3, head_dim=8, value=value, query_rank=12, query_norm=NORM, window=5, position=kind
    )
    check(attention, mfa_rows(oracle.Positions(**where, window=5)))


@pytest.mark.parametrize("value", ["projected", "gated_key"])
def test_mfa_paper_rank_with_output_gate(value):
    attention = MFA(
        heads=5, head_dim=8, value=value, output_gate=True, position=Rope(theta=100.0, fraction=0.5)
    )
    check(attention, mfa_rows(oracle.Positions(theta=100.0, rotary_dims=4)))


@pytest.mark.parametrize("value", ["projected", "gated_key"])
def test_mfa_in_blocks_of_queries(value):
    """Long enough for the blockwise implementation to cut the sequence."""
    attention = MFA(heads=2, head_dim=4, value=value, window=70, position=Rope(theta=100.0))
    check(
        attention,
        mfa_rows(oracle.Positions(theta=100.0, window=70)),
        tokens=128,
        implementation="xla",
    )


@pytest.mark.parametrize("value", ["projected", "gated_key", "key"])
def test_mfa_decoding_one_token_at_a_time(value):
    """The cached path, in which key reuse averages keys before it makes values of them."""
    attention = MFA(heads=3, head_dim=8, value=value, query_norm=NORM, position=Rope(theta=100.0))

    class Decoding:
        def apply(self, p, x_BTD, ctx):
            B, T, _ = x_BTD.shape
            cache = tuple(jnp.zeros((1, B, T, *entry)) for entry in attention.cache_entries())

            def step(cache, inputs):
                x_BD, t = inputs
                ctx_t = ctx.replace(
                    tokens=Tokens(jnp.full((B, 1), t)),
                    lengths_B=jnp.full((B,), t, jnp.int32),
                    layer=jnp.int32(0),
                )
                y_B1D, cache = attention.apply(p, x_BD[:, None], ctx_t, cache)
                return cache, y_B1D[:, 0]

            _, y_TBD = jax.lax.scan(step, cache, (x_BTD.swapaxes(0, 1), jnp.arange(T)))
            return y_TBD.swapaxes(0, 1), None

        specs = staticmethod(attention.specs)

    check(Decoding(), mfa_rows(oracle.Positions(theta=100.0)))


@pytest.mark.parametrize(
    "position, options",
    [
        ("partial_rope", {"kv_heads": 2, "qk_norm": NORM}),
        ("rope", {"kv_heads": 1, "output_gate": True, "window": 4}),
        ("alibi", {"kv_heads": 6, "qk_norm": NORM, "output_gate": True}),
        ("sqrt_alibi", {"kv_heads": 3, "window": 4}),
    ],
)
def test_multi_head_and_grouped_query_attention(position, options):
    kind, where = POSITIONS[position]

    def rows(p, x):
        return oracle.gqa(
            x,
            heads_first(p.query_DNH),
            heads_first(p.key_DKH),
            heads_first(p.value_DKH),
            p.output_NHD,
            oracle.Positions(**where, window=options.get("window")),
            eps=EPS,
            gate=p.gate_DN,
            q_norm=p.query_norm_H,
            k_norm=p.key_norm_H,
        )

    check(MHA(heads=6, head_dim=8, position=kind, **options), rows)


@pytest.mark.parametrize("query_rank", [None, 7])
@pytest.mark.parametrize("window", [None, 4])
def test_multi_head_latent_attention(query_rank, window):
    attention = MLA(
        heads=3,
        kv_rank=9,
        nope_dim=5,
        rope_dim=4,
        value_dim=6,
        query_rank=query_rank,
        window=window,
        norm=NORM,
        position=Rope(theta=100.0),
    )

    def rows(p, x):
        return oracle.mla(
            x,
            p.query_down_DQ,
            p.query_norm_Q,
            heads_first(p.query_DNH if query_rank is None else p.query_up_QNH),
            p.latent_DR,
            p.latent_norm_R,
            p.rotated_key_DE,
            heads_first(p.key_up_RNP),
            heads_first(p.value_up_RNV),
            p.output_NVD,
            oracle.Positions(theta=100.0, window=window),
            rope_dims=4,
            eps=EPS,
        )

    check(attention, rows)


def test_key_reuse_starts_as_plain_key_reuse():
    """The gate is zero at first, so MFA-KR is then v = k whatever N is."""
    attention = MFA(heads=3, head_dim=8, value="gated_key", position=Rope(theta=100.0))
    gate = attention.specs(WIDTH, FanIn()).reuse_gate_C
    initial = np.asarray(gate.init(jax.random.key(0), gate.shape, jnp.float32))
    plain = mfa_rows(oracle.Positions(theta=100.0))

    def rows(p, x):
        return plain(p.replace(reuse_CC=None, reuse_gate_C=None), x)

    check(attention, rows, replace={"reuse_gate_C": initial})
