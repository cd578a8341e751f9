"""Backward attention of many query heads on one key/value head, Hopper (sm_90a).

Two kernels, neither with atomics, so the gradients are the same bits in every run.

``dq``: as the forward: a block holds 128 queries of one head (64 in each of two warpgroups), walks
the keys, and shares them with a second head's block by multicast.

``dk_dv``: a block holds 64 keys and walks the queries of a group of heads. At width 256 the two
float32 accumulators of 64 rows are half the registers of an SM, so each has a warpgroup of its own:
one recomputes the probabilities P' = exp(K Q') and accumulates dV = P' dO, the other takes P' from
shared memory, computes dS' = P' * (V dO' - delta) and accumulates dK = dS' Q. Each does two of the
four products, and one's elementwise work falls under the other's products. Two blocks, neighbouring
keys, form a cluster that multicasts the queries: at 64 keys a block, the L2 cache could not feed
both. Every group of heads writes its own float32 partial sums, added up afterwards in a fixed
order; with one key/value head there would otherwise be too few blocks for the device.

Shape suffixes: B batch, T queries, S keys, N query heads, H head width, G groups of heads; within a
kernel Q 64 queries, K 64 keys.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import attention_tiles as tiles
from pallas_kernels.gpu.attention_forward import key_tiles
from pallas_kernels.gpu.attention_tiles import LOG2E, ROWS, Mask, Ring


def dq(
    q_BTNH, k_BSH, v_BSH, do_BTNH, lse_BNT, delta_BNT, first_BT, *, scale, mask: Mask, interpret
):
    """Gradient of the queries, bfloat16; arguments as in the forward.

    ``delta_BNT`` is the float32 row sum of ``o * do``.
    """
    B, T, N, H = q_BTNH.shape
    pair = 2 if N % 2 == 0 else 1
    inputs = (q_BTNH, k_BSH, v_BSH, do_BTNH, lse_BNT, delta_BNT)
    inputs += (first_BT,) if mask.bounded else ()
    static = {"scale": scale, "mask": mask, "pair": pair, "interpret": interpret is not None}
    wide = tiles.smem
    k_slots, v_slots = 2, 1

    def kernel(*refs):
        _dq_block(*refs, slots=(k_slots, v_slots), **static)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        scratch_types=[
            wide(2, ROWS, H),
            wide(2, ROWS, H),
            wide(k_slots, ROWS, H),
            wide(v_slots, ROWS, H),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_barriers=k_slots),
            plgpu.Barrier(num_barriers=v_slots),
            tiles.freed(k_slots, 2, pair),
            tiles.freed(v_slots, 2, pair),
        ],
        grid=(T // (2 * ROWS), B, N // pair),
        grid_names=("tile", "batch", "heads"),
        cluster=(pair,),
        cluster_names=(tiles.PAIR,),
        num_threads=3,
        thread_name="wg",
        kernel_name="mfa_attention_dq",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(*inputs)


def _dq_block(*refs, scale, mask: Mask, pair: int, slots: tuple[int, int], interpret: bool):
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *rest = refs
    first_ref = rest.pop(0) if mask.bounded else None
    dq_ref, q_smem, do_smem, k_smem, v_smem, q_ready, k_ready, v_ready, k_free, v_free = rest
    ring_k = Ring([k_smem], k_ready, k_free, slots[0], pair)
    ring_v = Ring([v_smem], v_ready, v_free, slots[1], pair)

    b = lax.axis_index("batch")
    n = lax.axis_index("heads") * pair + lax.axis_index(tiles.PAIR)
    tile = q_ref.shape[1] // (2 * ROWS) - 1 - lax.axis_index("tile")
    begin, stop = key_tiles(tile, mask, k_ref.shape[1], first_ref, b)

    def produce():
        @pl.loop(0, stop - begin)
        def _(i):
            keys = pl.ds((begin + i) * ROWS, ROWS)
            ring_k.fill(i, [k_ref.at[b, keys]])
            ring_v.fill(i, [v_ref.at[b, keys]])

        ring_k.drain(stop - begin)
        ring_v.drain(stop - begin)

    def differentiate():
        wg = lax.axis_index("wg")
        rows = pl.ds((2 * tile + wg) * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q_smem.at[wg], q_ready.at[wg])
        plgpu.copy_gmem_to_smem(do_ref.at[b, rows, n], do_smem.at[wg], q_ready.at[wg])
        lse_Q = tiles.per_row(lse_ref.at[b, n, rows])
        delta_Q = tiles.per_row(delta_ref.at[b, n, rows])
        first_Q = tiles.per_row(first_ref.at[b, rows]) if mask.bounded else None
        plgpu.barrier_wait(q_ready.at[wg])

        def step(j, dq_QH):
            k_slot = ring_k.wait(j - begin)
            row = tiles.not_hoisted(wg)
            s_QK = tiles.product(q_smem.at[row], k_smem.at[k_slot].transpose((1, 0)))
            base = (2 * tile + wg) * ROWS
            s_QK = mask.hide(s_QK, j >= 2 * tile, 0, base, j * ROWS, first_Q=first_Q)
            p_QK = jnp.exp2(s_QK * (scale * LOG2E) - tiles.along(lse_Q, s_QK.shape, 0))
            v_slot = ring_v.wait(j - begin)
            dp_QK = tiles.product(do_smem.at[row], v_smem.at[v_slot].transpose((1, 0)))
            ring_v.release(v_slot)
            ds_QK = p_QK * (dp_QK - tiles.along(delta_Q, dp_QK.shape, 0))
            ds_QK = ds_QK.astype(k_smem.dtype)
            dq_QH = tiles.add_product(dq_QH, ds_QK, k_smem.at[k_slot], interpret=interpret)
            ring_k.release(k_slot)
            return dq_QH

        dq_QH = tiles.zeros(ROWS, q_smem.shape[-1])
        dq_QH = lax.fori_loop(begin, stop, step, dq_QH)
        q_smem[wg] = (dq_QH * scale).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[wg], dq_ref.at[b, rows, n])
        plgpu.wait_smem_to_gmem(0)

    tiles.split_registers(produce, differentiate)


def dk_dv(
    q_BTNH,
    k_BSH,
    v_BSH,
    do_BTNH,
    lse_BNT,
    delta_BNT,
    last_BS,
    *,
    scale,
    mask: Mask,
    groups: int,
    interpret,
):
    """Partial gradients of keys and values, float32 of shape (G, B, S, H).

    ``last_BS`` is the last query that sees each key, non-decreasing along S, None unless
    ``mask.bounded``; ``groups`` divides the number of heads.
    """
    B, S, H = k_BSH.shape
    pair = 2 if S % (2 * ROWS) == 0 else 1
    inputs = (q_BTNH, k_BSH, v_BSH, do_BTNH, lse_BNT, delta_BNT)
    inputs += (last_BS,) if mask.bounded else ()
    static = {"scale": scale, "mask": mask, "pair": pair, "interpret": interpret is not None}
    wide = tiles.smem
    slots = 2

    def kernel(*refs):
        _dk_dv_block(*refs, groups=groups, slots=slots, **static)

    partial = jax.ShapeDtypeStruct((groups, B, S, H), jnp.float32)
    return plgpu.kernel(
        kernel,
        out_type=[partial, partial],
        scratch_types=[
            wide(ROWS, H),
            wide(ROWS, H),
            wide(slots, ROWS, H),
            wide(slots, ROWS, H),
            plgpu.SMEM((slots, ROWS), jnp.float32),
            plgpu.SMEM((slots, ROWS), jnp.float32),
            wide(slots, ROWS, ROWS),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=3, num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
            tiles.freed(slots, 2, pair),
            tiles.freed(slots, 2, pair),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
        ],
        grid=(S // (pair * ROWS), B, groups),
        grid_names=("tile", "batch", "group"),
        cluster=(pair,),
        cluster_names=(tiles.PAIR,),
        num_threads=3,
        thread_name="wg",
        kernel_name="mfa_attention_dk_dv",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(*inputs)


def _dk_dv_block(*refs, scale, mask: Mask, pair: int, groups: int, slots: int, interpret: bool):
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *rest = refs
    last_ref = rest.pop(0) if mask.bounded else None
    dk_ref, dv_ref, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, p_smem, *barriers = rest
    kv_ready, q_ready, do_ready, q_free, do_free, p_ready, p_free = barriers
    # In a cluster one thread of a warpgroup frees a slot for all of it: safe after a wgmma, which
    # the four warps do together, not after a plain read. Hence lse and delta go with the queries,
    # whose slot is free only after the product that both went into.
    ring_q = Ring([q_smem, lse_smem, delta_smem], q_ready, q_free, slots, pair)
    ring_do = Ring([do_smem], do_ready, do_free, slots, pair)
    # P' goes from one warpgroup to the other in a ring of its own.
    ring_p = Ring([p_smem], p_ready, p_free, slots, 1)
    walk = functools.partial(_walk, q_ref.shape, pair, mask, groups, last_ref)

    def produce():
        def fetch(at: _Step, carry):
            rows = pl.ds(at.q_base, ROWS)
            lse, delta = lse_ref.at[at.b, at.n, rows], delta_ref.at[at.b, at.n, rows]
            ring_q.fill(at.i, [q_ref.at[at.b, rows, at.n], lse, delta])
            ring_do.fill(at.i, [do_ref.at[at.b, rows, at.n]])
            return carry

        steps, _ = walk(fetch, None)
        ring_q.drain(steps)
        ring_do.drain(steps)

    def values():
        """P' and dV."""
        group, b, k_base = _place(pair)
        keys = pl.ds(k_base, ROWS)
        last_K = tiles.per_row(last_ref.at[b, keys]) if mask.bounded else None
        plgpu.copy_gmem_to_smem(k_ref.at[b, keys], k_smem, kv_ready.at[0])
        plgpu.barrier_wait(kv_ready.at[0])

        def step(at: _Step, dv_KH):
            slot = ring_q.wait(at.i)
            s_KQ = tiles.product(k_smem, q_smem.at[slot].transpose((1, 0)))
            lse_Q = plgpu.load(lse_smem.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
            ring_q.release(slot)
            s_KQ = mask.hide(s_KQ, at.crossing, 1, at.q_base, k_base, last_K=last_K)
            p_KQ = jnp.exp2(s_KQ * (scale * LOG2E) - tiles.along(lse_Q, s_KQ.shape, 1))
            p_KQ = p_KQ.astype(p_smem.dtype)
            ring_p.wait_free(at.i, slot)
            p_smem[slot] = p_KQ
            plgpu.barrier_arrive(p_ready.at[slot])
            ring_do.wait(at.i)
            dv_KH = tiles.add_product(dv_KH, p_KQ, do_smem.at[slot], interpret=interpret)
            ring_do.release(slot)
            return dv_KH

        steps, dv_KH = walk(step, tiles.zeros(ROWS, k_smem.shape[-1]))
        ring_p.drain(steps)
        dv_ref[group, b, keys] = dv_KH

    def keys():
        """dS' and dK."""
        group, b, k_base = _place(pair)
        keys = pl.ds(k_base, ROWS)
        plgpu.copy_gmem_to_smem(v_ref.at[b, keys], v_smem, kv_ready.at[1])
        plgpu.barrier_wait(kv_ready.at[1])

        def step(at: _Step, dk_KH):
            slot = ring_do.wait(at.i)
            dp_KQ = tiles.product(v_smem, do_smem.at[slot].transpose((1, 0)))
            ring_do.release(slot)
            ring_q.wait(at.i)
            delta_Q = plgpu.load(delta_smem.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
            ring_p.wait(at.i)
            p_KQ = plgpu.load(p_smem.at[slot], layout=plgpu.Layout.WGMMA)
            ring_p.release(slot)
            ds_KQ = p_KQ.astype(jnp.float32) * (dp_KQ - tiles.along(delta_Q, dp_KQ.shape, 1))
            ds_KQ = ds_KQ.astype(q_smem.dtype)
            dk_KH = tiles.add_product(dk_KH, ds_KQ, q_smem.at[slot], interpret=interpret)
            ring_q.release(slot)
            return dk_KH

        _, dk_KH = walk(step, tiles.zeros(ROWS, v_smem.shape[-1]))
        dk_ref[group, b, keys] = dk_KH * scale

    tiles.split_registers(produce, values, keys)


class _Step(NamedTuple):
    """Where a warpgroup of ``dk_dv`` is: scalars.

    Attributes:
      i: steps taken before.
      b, n: batch row and head.
      q_base: first query of the tile.
      crossing: whether the tile of queries crosses the diagonal.
    """

    i: jax.Array
    b: jax.Array
    n: jax.Array
    q_base: jax.Array
    crossing: jax.Array | bool


def _place(pair: int):
    """Group of heads, batch row and first key of this block.

    Every warpgroup asks for itself: values computed before the warpgroups part ways would be held
    in registers, of which the producer has few.
    """
    tile = lax.axis_index("tile") * pair + lax.axis_index(tiles.PAIR)
    return lax.axis_index("group"), lax.axis_index("batch"), tile * ROWS


def _walk(shape, pair: int, mask: Mask, groups: int, last_ref, step, carry):
    """Folds ``carry = step(_Step, carry)`` over the heads of the block's group and the tiles of
    queries that a cluster's keys need. ``shape`` is (B, T, N, H). Returns the number of steps too.
    """
    _, T, N, _ = shape
    heads = N // groups
    first_tile = lax.axis_index("tile") * pair
    group, b = lax.axis_index("group"), lax.axis_index("batch")
    begin, stop = jnp.int32(0), jnp.int32(T // ROWS)
    if mask.causal:
        begin = first_tile
        if last_ref is not None:
            stop = lax.div(last_ref[b, (first_tile + pair) * ROWS - 1], jnp.int32(ROWS)) + 1
    count = stop - begin

    def head(h, carry):
        def tile(t, carry):
            crossing = t < first_tile + pair
            at = _Step(h * count + t - begin, b, group * heads + h, t * ROWS, crossing)
            return step(at, carry)

        return lax.fori_loop(begin, stop, tile, carry)

    return heads * count, lax.fori_loop(0, heads, head, carry)
