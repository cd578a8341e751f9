"""Forward attention of many query heads on one key/value head, Hopper (sm_90a).

A block holds 128 queries of one head, 64 in each of two warpgroups, and walks the keys in tiles of
64 that a third warpgroup brings in by TMA. Two blocks, the same queries of two heads, form a
cluster: they need the same keys, so each fetches half of every tile and multicasts it. The two
warpgroups take turns on the tensor core (the schedule of FlashAttention-3, Shah et al. 2024): one
computes its softmax while the other multiplies.

Shape suffixes: B batch, T queries, S keys, N query heads, H head width; within the kernel Q the 64
queries of a warpgroup, K the 64 keys of a tile.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import attention_tiles as tiles
from pallas_kernels.gpu.attention_tiles import LOG2E, MASKED, ROWS, Mask, Ring

SLOTS = 2


def forward(q_BTNH, k_BSH, v_BSH, first_BT, *, scale: float, mask: Mask, interpret=None):
    """Attention output and the log of its normaliser.

    Args:
      q_BTNH, k_BSH, v_BSH: bfloat16; T a multiple of 128, S of 64, H of 64 and at most 256.
      first_BT: int32, first visible key of each query, non-decreasing along T; None unless
        ``mask.bounded``.
      scale: of the scores.
      mask: what is hidden.
      interpret: ``plgpu.InterpretGPUParams()`` to run on a CPU.

    Returns:
      o_BTNH bfloat16 and lse_BNT float32, the base-2 logarithm of the sum of ``2**(scores *
      log2(e))``.
    """
    B, T, N, H = q_BTNH.shape
    pair = 2 if N % 2 == 0 else 1
    inputs = (q_BTNH, k_BSH, v_BSH) + ((first_BT,) if mask.bounded else ())
    wide = tiles.smem

    def kernel(*refs):
        _forward_block(
            *refs,
            bounded=mask.bounded,
            scale=scale,
            mask=mask,
            pair=pair,
            interpret=interpret is not None,
        )

    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ],
        scratch_types=[
            wide(2, ROWS, H),
            wide(SLOTS, ROWS, H),
            wide(SLOTS, ROWS, H),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=SLOTS),
            plgpu.Barrier(num_barriers=SLOTS),
            tiles.freed(SLOTS, 2, pair),
            tiles.freed(SLOTS, 2, pair),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(T // (2 * ROWS), B, N // pair),
        grid_names=("tile", "batch", "heads"),
        cluster=(pair,),
        cluster_names=(tiles.PAIR,),
        num_threads=3,
        thread_name="wg",
        kernel_name="mfa_attention_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*inputs)


def _forward_block(*refs, bounded: bool, scale: float, mask: Mask, pair: int, interpret: bool):
    q_ref, k_ref, v_ref, *rest = refs
    first_ref = rest.pop(0) if bounded else None
    o_ref, lse_ref, q_smem, k_smem, v_smem, lse_smem, *barriers = rest
    q_ready, k_ready, v_ready, k_free, v_free, turn = barriers
    ring_k = Ring([k_smem], k_ready, k_free, SLOTS, pair)
    ring_v = Ring([v_smem], v_ready, v_free, SLOTS, pair)

    b = lax.axis_index("batch")
    n = lax.axis_index("heads") * pair + lax.axis_index(tiles.PAIR)
    # The longest rows first: late blocks are short and fill the last wave.
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

    def attend():
        wg = lax.axis_index("wg")
        rows = pl.ds((2 * tile + wg) * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q_smem.at[wg], q_ready.at[wg])
        first_Q = tiles.per_row(first_ref.at[b, rows]) if bounded else None
        plgpu.barrier_wait(q_ready.at[wg])
        pl.when(wg == 1)(lambda: _take_turn(turn))  # warpgroup 0 multiplies first

        def step(j, carry):
            acc_QH, m_Q, l_Q = carry
            slot = ring_k.wait(j - begin)

            def scores(acc_ref):
                plgpu.wgmma(acc_ref, q_smem.at[wg], k_smem.at[slot].transpose((1, 0)))
                _take_turn(turn)
                return acc_ref[...]

            s_QK = pl.run_scoped(scores, plgpu.ACC((ROWS, ROWS), jnp.float32))
            ring_k.release(slot)
            base = (2 * tile + wg) * ROWS
            s_QK = mask.hide(s_QK, j >= 2 * tile, 0, base, j * ROWS, first_Q=first_Q)
            new_m_Q = jnp.maximum(m_Q, s_QK.max(axis=1) * (scale * LOG2E))
            alpha_Q = jnp.exp2(m_Q - new_m_Q)
            p_QK = jnp.exp2(s_QK * (scale * LOG2E) - tiles.along(new_m_Q, s_QK.shape, 0))
            acc_QH *= tiles.along(alpha_Q, acc_QH.shape, 0)
            p16_QK = p_QK.astype(v_smem.dtype)
            plgpu.barrier_arrive(turn)
            ring_v.wait(j - begin)
            plgpu.barrier_wait(turn)
            l_Q = l_Q * alpha_Q + p_QK.sum(axis=1)
            acc_QH = tiles.add_product(acc_QH, p16_QK, v_smem.at[slot], interpret=interpret)
            ring_v.release(slot)
            return acc_QH, new_m_Q, l_Q

        start = (
            tiles.zeros(ROWS, q_smem.shape[-1]),
            tiles.zeros(ROWS) + MASKED * scale * LOG2E,
            tiles.zeros(ROWS),
        )
        acc_QH, m_Q, l_Q = lax.fori_loop(begin, stop, step, start)
        pl.when(wg == 0)(lambda: _take_turn(turn))
        q_smem[wg] = (acc_QH * tiles.along(1.0 / l_Q, acc_QH.shape, 0)).astype(q_smem.dtype)
        lse_smem[wg] = m_Q + jnp.log2(l_Q)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[wg], o_ref.at[b, rows, n])
        plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, n, rows])
        plgpu.wait_smem_to_gmem(0)

    tiles.split_registers(produce, attend)


def key_tiles(tile, mask: Mask, keys: int, first_ref, b):
    """The tiles of keys that a tile of 128 queries needs, from the first on and before the second.

    With a causal mask those from ``2 * tile`` on cross the diagonal.
    """
    begin = jnp.int32(0)
    if not mask.causal:
        return begin, jnp.int32(keys // ROWS)
    if first_ref is not None:
        begin = lax.div(first_ref[b, tile * (2 * ROWS)], jnp.int32(ROWS))
    return begin, 2 * tile + 2


def _take_turn(turn) -> None:
    """Both warpgroups arrive; each goes on when the other has."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)
