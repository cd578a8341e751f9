"""The backward kernel of :mod:`pallas_kernels.tpu.attention`.

Shape suffixes: B batch, K key/value heads, G query heads of one key head, T queries, S keys, H
width of queries and keys, V width of values, W visits, X parts of the query heads. In the kernel B,
K, G, T and S are those of a block.

One kernel makes all three gradients, so scores are recomputed once. The keys of a shared head are
few: the float32 gradients of a whole *chunk* of them stay in VMEM while every query block of every
head passes by, and each query block's own gradient is complete after its visits to the chunk.
Longer rows take one call a chunk, which adds to the same dQ in place: there is never a second one.
Everything is added up in grid order, so gradients are the same bits every time.

Scores are transposed (keys are rows): what belongs to a query is then a row that broadcasts freely.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tpu.attention_call import HIDDEN, Call, across, column, product, this_visit
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
    do_ref,
    lse_ref,
    mean_ref,
    dq_before_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    acc_ref,
    *,
    row_visits: int,
    first_block: int,
    scale: float,
    exponent: float,
    pattern: Pattern,
):
    """One visit. ``dk_ref``, ``dv_ref`` (1, 1, 1, chunk, width) float32 stay for all visits of a
    key head; scratch: dQ of this query block, float32 (G, T, H), not yet scaled."""
    visit = this_visit(visits_ref, row_visits)
    heads, keys = q_ref.shape[2], k_ref.shape[2]

    @pl.when((pl.program_id(3) == 0) & (pl.program_id(2) == 0))
    def _():
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    @pl.when(visit & FIRST != 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def compute(masked: bool):
        k_SH, v_SV = k_ref[0, 0], v_ref[0, 0]
        start = (((visit >> 4) & 0xFFF) - first_block) * keys
        rows = pl.ds(pl.multiple_of(start, keys), keys)
        if masked:
            tokens = q_ref.shape[3]
            same_ST = across(column(kv_segments_ref[0]), tokens) == q_segments_ref[0]
            distance_ST = q_positions_ref[0] - across(column(kv_positions_ref[0]), tokens)
            allowed_ST = same_ST & pattern.may_see(distance_ST)
        for g in range(heads):
            q_TH, do_TV = q_ref[0, 0, g], do_ref[0, 0, g]
            s_ST = product(k_SH, q_TH, (1, 1)) * exponent - lse_ref[0, 0, g]
            if masked:
                s_ST = jnp.where(allowed_ST, s_ST, HIDDEN)
            p_ST = jnp.exp2(s_ST)
            dv_ref[0, 0, 0, rows] += product(p_ST.astype(do_TV.dtype), do_TV, (1, 0))
            dp_ST = product(v_SV, do_TV, (1, 1))
            ds_ST = (p_ST * (dp_ST - mean_ref[0, 0, g])).astype(q_TH.dtype)
            dk_ref[0, 0, 0, rows] += product(ds_ST, q_TH, (1, 0))
            acc_ref[g] += product(ds_ST, k_SH, (0, 0))

    pl.when(visit & (COMPUTE | MASKED) == COMPUTE)(lambda: compute(masked=False))
    pl.when(visit & MASKED != 0)(lambda: compute(masked=True))

    @pl.when(visit & LAST != 0)
    def _():
        before = dq_before_ref[0, 0].astype(jnp.float32)
        dq_ref[0, 0] = (before + acc_ref[...] * scale).astype(dq_ref.dtype)


def backward_of_chunk(
    visits,
    token_arrays,
    q_BKGTH,
    k_BKSH,
    v_BKSV,
    do_BKGTV,
    lse_BKG1T,
    mean_BKG1T,
    dq_BKGTH,
    *,
    visited,
    blocks,
    scale,
    exponent,
    pattern,
    sizes,
    parts,
    vmem,
    interpret,
):
    """Adds a chunk of keys to dQ and completes its dK and dV.

    Args:
      visits: (int32 (B, W), steps) of this chunk alone.
      token_arrays, q_BKGTH, k_BKSH, v_BKSV: as in the forward kernel; whole, not the chunk.
      do_BKGTV: gradient of the output.
      lse_BKG1T, mean_BKG1T: float32 log-sum-exp to base 2, and the sum over V of output * gradient.
      dq_BKGTH: what other chunks gave; updated in place.
      visited: see ``Pattern.visited``.
      blocks: range of the chunk's blocks of keys.
      sizes: BackwardSizes that divide the shapes.
      parts: X; heads are cut into so many parts with gradients of their own (for two cores).

    Returns:
      (dq_BKGTH, dk_BKXSH, dv_BKXSV) with S the chunk; dk is not yet scaled. float32 but for dq.
    """
    B, K, _, _, H = q_BKGTH.shape
    V, chunk = v_BKSV.shape[-1], len(blocks) * sizes.kv_block
    call = Call(visits, q_BKGTH, v_BKSV, sizes, parts, visited)
    q_spec, number_spec = call.queries(H), call.numbers()
    arrays = (q_BKGTH, k_BKSH, v_BKSV, do_BKGTV, lse_BKG1T, mean_BKG1T, dq_BKGTH)
    specs = (q_spec, call.keys(H), call.keys(V), call.queries(V), number_spec, number_spec, q_spec)
    return call.run(
        functools.partial(
            _kernel,
            row_visits=call.row_visits,
            first_block=blocks.start,
            scale=scale,
            exponent=exponent,
            pattern=pattern,
        ),
        "attention_backward",
        (*token_arrays, *arrays),
        in_specs=[*call.tokens(), *specs],
        out_specs=[q_spec, call.gradients(chunk, H), call.gradients(chunk, V)],
        out_shape=[
            jax.ShapeDtypeStruct(dq_BKGTH.shape, dq_BKGTH.dtype),
            jax.ShapeDtypeStruct((B, K, parts, chunk, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, parts, chunk, V), jnp.float32),
        ],
        scratch=[(sizes.heads, sizes.q_block, H)],
        heads_in_order=True,
        macs=3 * H + 2 * V,
        row_bytes=(H + V) * q_BKGTH.dtype.itemsize + 8 * H,
        vmem=vmem,
        interpret=interpret,
        aliases={1 + len(token_arrays) + len(arrays) - 1: 0},  # dQ, after the visits
    )
