"""The forward kernel of :mod:`pallas_kernels.tpu.attention`.

Shape suffixes: B batch, K key/value heads, G query heads of one key head, T queries, S keys, H
width of queries and keys, V width of values, W visits, 1 an axis of one, L 128 lanes. In the kernel
B, K, G, T and S are those of a block.

A block of queries is ``heads * tokens`` rows that meet the same keys, which is what makes a shared
key head cheap: a key block is loaded once for all of them. Softmax is online (FlashAttention, arXiv
2205.14135) and to base 2, so that a score costs one product, one difference and one power.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.visits import COMPUTE, FIRST, LAST, MASKED, Pattern

LANES = 128
HIDDEN = -1e30  # a score nobody may see; finite: exp2(HIDDEN - LOWEST) is 0, never NaN
LOWEST = 0.5 * HIDDEN  # where row maxima start


def product(a, b, contract: tuple[int, int]):
    """Matrix product over the named axes, accumulated in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def column(row_1T):
    """(1, T) -> (T, L) with every lane the same."""
    return jnp.broadcast_to(row_1T, (LANES, row_1T.shape[1])).T


def across(x_TL, width: int):
    """(T, L) of equal lanes -> (T, width)."""
    return jnp.concatenate([x_TL] * -(-width // LANES), axis=1)[:, :width]


def _kernel(
    visits_ref,
    q_positions_ref,
    q_segments_ref,
    kv_positions_ref,
    kv_segments_ref,
    q_ref,
    k_ref,
    v_ref,
    o_ref,
    lse_ref,
    max_ref,
    sum_ref,
    acc_ref,
    *,
    row_visits: int,
    exponent: float,
    pattern: Pattern,
    inner: int,
):
    """One visit. Scratch: row maxima and sums (G, T, L), unnormalised output (G, T, V), float32."""
    visit = visits_ref[pl.program_id(0) * row_visits + pl.program_id(3)]
    heads, tokens = acc_ref.shape[:2]

    @pl.when(visit & FIRST != 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, LOWEST)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def compute(masked: bool):
        S = k_ref.shape[2]
        for start in range(0, S, inner):
            keys = slice(start, start + inner)
            k_SH, v_SV = k_ref[0, 0, keys], v_ref[0, 0, keys]
            if masked:
                same_TS = across(column(q_segments_ref[0]), inner) == kv_segments_ref[0, :, keys]
                distance_TS = (
                    across(column(q_positions_ref[0]), inner) - kv_positions_ref[0, :, keys]
                )
                allowed_TS = same_TS & pattern.may_see(distance_TS)
            for g in range(heads):
                s_TS = product(q_ref[0, 0, g], k_SH, (1, 1))
                if masked:
                    s_TS = jnp.where(allowed_TS, s_TS, HIDDEN)
                before_TL = max_ref[g]
                max_TL = jnp.maximum(before_TL, jnp.max(s_TS, axis=1, keepdims=True))
                p_TS = jnp.exp2((s_TS - across(max_TL, inner)) * exponent)
                alpha_TL = jnp.exp2((before_TL - max_TL) * exponent)
                parts = [p_TS[:, i : i + LANES] for i in range(0, inner, LANES)]
                sum_ref[g] = sum_ref[g] * alpha_TL + functools.reduce(jnp.add, parts)
                o_TV = product(p_TS.astype(v_SV.dtype), v_SV, (1, 0))
                acc_ref[g] = acc_ref[g] * across(alpha_TL, o_TV.shape[1]) + o_TV
                max_ref[g] = max_TL

    pl.when(visit & (COMPUTE | MASKED) == COMPUTE)(lambda: compute(masked=False))
    pl.when(visit & MASKED != 0)(lambda: compute(masked=True))

    @pl.when(visit & LAST != 0)
    def _():
        for g in range(heads):
            sum_TL = jnp.broadcast_to(jnp.sum(sum_ref[g], axis=1, keepdims=True), (tokens, LANES))
            sum_TL = jnp.where(sum_TL == 0.0, 1.0, sum_TL)
            scale_TV = across(1.0 / sum_TL, acc_ref.shape[2])
            o_ref[0, 0, g] = (acc_ref[g] * scale_TV).astype(o_ref.dtype)
            lse_ref[0, 0, g] = (max_ref[g] * exponent + jnp.log2(sum_TL)).T[:1]


def query_block(row_visits: int, *axes: str):
    """Index map of a block that follows the visits' queries; axes named b, k, g, q or 0."""

    def index(b, k, g, w, visits):
        q = visits[b * row_visits + w] >> 16
        return tuple({"b": b, "k": k, "g": g, "q": q, "0": 0}[a] for a in axes)

    return index


def key_block(row_visits: int, *axes: str):
    """Index map of a block that follows the visits' keys; axes named b, k, s or 0."""

    def index(b, k, g, w, visits):
        s = (visits[b * row_visits + w] >> 4) & 0xFFF
        return tuple({"b": b, "k": k, "s": s, "0": 0}[a] for a in axes)

    return index


def token_specs(row_visits: int, tokens: int, keys: int):
    """Block specs of (q positions, q segments, kv positions, kv segments), each (B, 1, tokens)."""
    q = pl.BlockSpec((1, 1, tokens), query_block(row_visits, "b", "0", "q"))
    kv = pl.BlockSpec((1, 1, keys), key_block(row_visits, "b", "0", "s"))
    return [q, q, kv, kv]


def forward(
    visits, token_arrays, q_BKGTH, k_BKSH, v_BKSV, *, exponent, pattern, sizes, vmem, interpret
):
    """(output_BKGTV in the queries' dtype, log-sum-exp to base 2 float32 (B, K, G, 1, T)).

    Args:
      visits: (int32 (B, W), steps): see ``visits.plan``; ``steps`` may be traced.
      token_arrays: (q positions_B1T, q segments_B1T, kv positions_B1S, kv segments_B1S), int32.
      exponent: the scores' scale times log2(e).
      sizes: ForwardSizes that divide the shapes.
    """
    visits_BW, steps = visits
    W = visits_BW.shape[1]
    B, K, G, T, H = q_BKGTH.shape
    V = v_BKSV.shape[-1]
    heads, tokens, keys = sizes.heads, sizes.q_block, sizes.kv_block
    q_spec = pl.BlockSpec((1, 1, heads, tokens, H), query_block(W, "b", "k", "g", "q", "0"))
    o_spec = pl.BlockSpec((1, 1, heads, tokens, V), query_block(W, "b", "k", "g", "q", "0"))
    row_spec = pl.BlockSpec((1, 1, heads, 1, tokens), query_block(W, "b", "k", "g", "0", "q"))
    pairs = B * K * G * W * tokens * keys
    return pl.pallas_call(
        functools.partial(
            _kernel, row_visits=W, exponent=exponent, pattern=pattern, inner=sizes.kv_inner
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, G // heads, steps),
            in_specs=[
                *token_specs(W, tokens, keys),
                q_spec,
                pl.BlockSpec((1, 1, keys, H), key_block(W, "b", "k", "s", "0")),
                pl.BlockSpec((1, 1, keys, V), key_block(W, "b", "k", "s", "0")),
            ],
            out_specs=[o_spec, row_spec],
            scratch_shapes=[
                pltpu.VMEM((heads, tokens, LANES), jnp.float32),
                pltpu.VMEM((heads, tokens, LANES), jnp.float32),
                pltpu.VMEM((heads, tokens, V), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, K, G, T, V), q_BKGTH.dtype),
            jax.ShapeDtypeStruct((B, K, G, 1, T), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (H + V),
            transcendentals=pairs,
            bytes_accessed=B * K * G * T * (H + V) * q_BKGTH.dtype.itemsize
            + B * K * (G // heads) * W * keys * (H + V) * k_BKSH.dtype.itemsize,
        ),
        interpret=interpret,
        name="attention_forward",
    )(visits_BW.reshape(-1), *token_arrays, q_BKGTH, k_BKSH, v_BKSV)
