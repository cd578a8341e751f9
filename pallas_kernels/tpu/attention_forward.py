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

from pallas_kernels.tpu.attention_call import (
    HIDDEN,
    LANES,
    LOWEST,
    Call,
    across,
    column,
    product,
    this_visit,
)
from pallas_kernels.tpu.visits import COMPUTE, FIRST, LAST, MASKED, Pattern


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
    visit = this_visit(visits_ref, row_visits)
    heads, tokens = acc_ref.shape[:2]

    @pl.when(visit & FIRST != 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, LOWEST)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def compute(masked: bool):
        S = k_ref.shape[2]
        for start in range(0, S, inner):
            count = min(inner, S - start)
            keys = slice(start, start + count)
            k_SH, v_SV = k_ref[0, 0, keys], v_ref[0, 0, keys]
            if masked:
                same_TS = across(column(q_segments_ref[0]), count) == kv_segments_ref[0, :, keys]
                distance_TS = (
                    across(column(q_positions_ref[0]), count) - kv_positions_ref[0, :, keys]
                )
                allowed_TS = same_TS & pattern.may_see(distance_TS)
            for g in range(heads):
                s_TS = product(q_ref[0, 0, g], k_SH, (1, 1))
                if masked:
                    s_TS = jnp.where(allowed_TS, s_TS, HIDDEN)
                before_TL = max_ref[g]
                max_TL = jnp.maximum(before_TL, jnp.max(s_TS, axis=1, keepdims=True))
                p_TS = jnp.exp2((s_TS - across(max_TL, count)) * exponent)
                alpha_TL = jnp.exp2((before_TL - max_TL) * exponent)
                parts = [p_TS[:, i : i + LANES] for i in range(0, count, LANES)]
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


def forward(
    visits,
    token_arrays,
    q_BKGTH,
    k_BKSH,
    v_BKSV,
    *,
    visited,
    exponent,
    pattern,
    sizes,
    vmem,
    interpret,
):
    """(output_BKGTV in the queries' dtype, log-sum-exp to base 2 float32 (B, K, G, 1, T)).

    Args:
      visits: (int32 (B, W), steps): see ``visits.plan``; ``steps`` may be traced.
      token_arrays: (q positions_B1T, q segments_B1T, kv positions_B1S, kv segments_B1S), int32.
      visited: see ``Pattern.visited``.
      exponent: the scores' scale times log2(e).
      sizes: ForwardSizes that divide the shapes.
    """
    B, K, G, T, H = q_BKGTH.shape
    V, dtype = v_BKSV.shape[-1], q_BKGTH.dtype
    call = Call(visits, q_BKGTH, v_BKSV, sizes, visited=visited)
    rows = (sizes.heads, sizes.q_block)
    return call.run(
        functools.partial(
            _kernel,
            row_visits=call.row_visits,
            exponent=exponent,
            pattern=pattern,
            inner=sizes.kv_inner,
        ),
        "attention_forward",
        (*token_arrays, q_BKGTH, k_BKSH, v_BKSV),
        in_specs=[*call.tokens(), call.queries(H), call.keys(H), call.keys(V)],
        out_specs=[call.queries(V), call.numbers()],
        out_shape=[
            jax.ShapeDtypeStruct((B, K, G, T, V), dtype),
            jax.ShapeDtypeStruct((B, K, G, 1, T), jnp.float32),
        ],
        scratch=[(*rows, LANES), (*rows, LANES), (*rows, V)],
        heads_in_order=False,
        macs=H + V,
        row_bytes=(H + V) * dtype.itemsize,
        vmem=vmem,
        interpret=interpret,
    )
