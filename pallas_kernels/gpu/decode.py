"""Decode attention for Hopper GPUs (Mosaic GPU): few new tokens of each row over a long cache.

Shape suffixes: B rows (sequences), T new tokens of a row, N query heads, K key/value heads (those
that are read), G = N / K, H head width, S slots of a row, P splits, L pages of a pool, M pages of a
row, F = H / 2 frequencies, R = T * G query rows of a key head, Q those rows padded to a multiple of
64, I partial results, C the 64 slots of a tile.

The work of all rows is one list of tiles of 64 slots (``pallas_kernels.decode_plan``), cut into as
many equal splits as the device has multiprocessors, whatever the rows' lengths are. A block works
off one split for one key head. Split p has at most one partial result for row b, and no other pair
has the same p + b: that is its index, so P + B - 1 partial results are all there can be.
``combine`` adds them up, in a fixed order. Both kernels are in ``decode_kernels``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_call import DecodeCall, Support
from pallas_kernels.decode_plan import make_plan
from pallas_kernels.gpu.attention import SM_COUNT
from pallas_kernels.gpu.attention_tiles import ROWS
from pallas_kernels.gpu.common import check_device
from pallas_kernels.gpu.decode_kernels import TILE, Static, combine, partial_results

WIDTHS = (128, 256)
SUPPORT = Support("GPU decode kernel", ("bfloat16",), ("bfloat16", "float8_e4m3fn"))


def check(call: DecodeCall, splits: int | None = None) -> None:
    """Raises ValueError for what :func:`decode` does not support, naming what it does."""
    SUPPORT.check(call, splits)
    H, page = call.q_BTNH.shape[3], call.page
    if H not in WIDTHS:
        raise ValueError(f"head width {H}; the GPU decode kernel supports {WIDTHS}")
    if call.paged and (page % 8 or (page % TILE and TILE % page)):
        raise ValueError(
            f"pages of {page} slots; the GPU decode kernel supports 8, 16, 32 and multiples of "
            f"{TILE}"
        )
    if call.slots < TILE:
        raise ValueError(f"{call.slots} slots; the GPU decode kernel needs {TILE} at least")


def decode(call: DecodeCall, *, splits: int | None = None, device=None, interpret=None):
    """Attention of new tokens over a cache that already holds them: the same bits in every run.

    Args:
      call: queries in bfloat16, H 128 or 256; caches in bfloat16 or float8_e4m3fn, S at least 64,
        pages of 8, 16, 32 or a multiple of 64 slots.
      splits: pieces the work is cut into; None for one on every multiprocessor.
      device: one of those compiled for; None for the default.
      interpret: ``plgpu.InterpretGPUParams()`` to run on a CPU.

    Returns:
      (B, T, N, H) bfloat16; zeros where a query sees nothing.

    Raises:
      ValueError: an unsupported width, dtype, page size, number of slots or device, or arguments
        that do not fit each other.
    """
    check(call, splits)
    check_device("decode attention", device, interpret)
    B, T, _, H = call.q_BTNH.shape
    heads = _Heads.of(call)
    R = T * heads.per_key
    if splits is None:
        splits = max(1, SM_COUNT // (heads.keys * pl.cdiv(R, ROWS)))
    static = Static(
        B=B, K=heads.keys, R=R, H=H, slots=call.slots, page=call.page, splits=splits,
        paged=call.paged, cached_heads=call.kv_heads, dtype=call.k_cache.dtype.name,
        own_values=call.v_cache is not None, rotates=call.frequency_F is not None,
    )  # fmt: skip
    inputs, row_B8 = _inputs(call, static, heads)
    caches = [c.reshape(-1, call.page, call.kv_heads * H) for c in call.caches]
    o_IKQH, lse_IKQ = partial_results(static, inputs, caches, interpret)
    o_BTNH = heads.scatter(combine(o_IKQH, lse_IKQ, row_B8, rows=R, interpret=interpret), T)
    if call.v_scale is not None:
        o_BTNH = o_BTNH * call.scales_K(call.v_scale)[heads.key_of_head_N][:, None]
    return o_BTNH.astype(call.q_BTNH.dtype)


def _inputs(call: DecodeCall, static: Static, heads: _Heads):
    """(what the kernel reads beside the caches, row_B8 of :func:`_work`)."""
    plan = make_plan(call.positions_BT, call.lengths_B, static.slots, TILE, call.window)
    first_BT, last_BT = _visible(plan, call.positions_BT, call.window)
    split_P4, row_B8 = _work(plan, static.splits, first_BT, last_BT)
    padding = (0, -static.R % ROWS)

    def of_rows(x_BT):
        x_BR = jnp.repeat(x_BT, heads.per_key, axis=1)
        return jnp.pad(x_BR, ((0, 0), padding), mode="edge")

    inputs = [
        split_P4,
        row_B8,
        jnp.stack([call.first_part(), heads.first]),
        # base-2 exponentials: the logarithm's factor goes into the scale
        (call.scale * np.log2(np.e) * call.scales_K(call.k_scale)).astype(jnp.float32),
        of_rows(first_BT),
        of_rows(last_BT),
        *([call.page_table_BM] if call.paged else []),
        *(_rotation_tables(call.frequency_F) if static.rotates else []),
        jnp.pad(heads.gather(call.q_BTNH), ((0, 0), (0, 0), padding, (0, 0))),
    ]
    return inputs, row_B8


class _Heads(NamedTuple):
    """Query heads sorted by the key heads they share.

    keys: key heads that are read. per_key: query heads of each. first: number of the first key head
    in the cache, a traced int32. key_of_head_N: number in the cache of every query head's key head.
    begin_K: query head that is the first of a key head; None if they lie in order.
    """

    keys: int
    per_key: int
    first: Any
    key_of_head_N: Any
    begin_K: Any

    @classmethod
    def of(cls, call: DecodeCall) -> _Heads:
        N, K, G = call.q_BTNH.shape[2], call.kv_heads, call.heads_per_key
        if G is None or K == 1 or (call.first_head is None and N == K * G):
            per_key = N // K
            return cls(K, per_key, jnp.int32(0), jnp.arange(N, dtype=jnp.int32) // per_key, None)
        # a slice that starts inside a key head's queries meets one key head more
        keys = min(K, (N - 2) // G + 2)
        key_N = call.key_head_N()
        # all key heads that are read exist: the last of them is never behind the cache's
        first = jnp.minimum(key_N[0], K - keys)
        first_head = 0 if call.first_head is None else jnp.asarray(call.first_head, jnp.int32)
        begin_K = (first + jnp.arange(keys, dtype=jnp.int32)) * G - first_head
        return cls(keys, min(N, G), first, key_N, jnp.maximum(begin_K, 0))

    def gather(self, q_BTNH):
        """(B, K, R, H), token by token; rows of no head hold another head's queries."""
        B, T, N, H = q_BTNH.shape
        if self.begin_K is not None:
            head_KG = self.begin_K[:, None] + jnp.arange(self.per_key)
            q_BTNH = q_BTNH[:, :, jnp.minimum(head_KG, N - 1).reshape(-1)]
        q_BTKGH = q_BTNH.reshape(B, T, self.keys, self.per_key, H)
        return q_BTKGH.swapaxes(1, 2).reshape(B, self.keys, T * self.per_key, H)

    def scatter(self, o_BKRH, T: int):
        """(B, T, N, H) from what :meth:`gather` arranged."""
        B, K, _, H = o_BKRH.shape
        o_BTKGH = o_BKRH.reshape(B, K, T, self.per_key, H).swapaxes(1, 2)
        if self.begin_K is None:
            return o_BTKGH.reshape(B, T, K * self.per_key, H)
        key_N = self.key_of_head_N - self.first
        group_N = jnp.arange(key_N.shape[0]) - self.begin_K[key_N]
        return o_BTKGH[:, :, key_N, group_N]


def _visible(plan, positions_BT, window: int | None):
    """First and last position that each query sees, int32 (B, T); last < first for none."""
    first_BT = jnp.broadcast_to(plan.oldest_B[:, None], positions_BT.shape)
    if window is not None:
        first_BT = jnp.maximum(first_BT, positions_BT - (window - 1))
    return first_BT, jnp.minimum(plan.end_B[:, None] - 1, positions_BT)


def _work(plan, splits: int, first_BT, last_BT):
    """What a block reads to know its work, int32.

    Returns:
      split_P4: first item, end of the items, row of the first and of the last item.
      row_B8: first item, end of the items, number of the first item's tile, the positions between
        which every query sees everything, first and end of the row's partial results, last
        position that is read.
    """
    total = plan.start_B1[-1]
    per_split = jnp.maximum(-(-total // splits), 1)
    begin_P = jnp.minimum(jnp.arange(splits, dtype=jnp.int32) * per_split, total)
    end_P = jnp.minimum(begin_P + per_split, total)

    def row_of(item_P):
        return jnp.sum(item_P[:, None] >= plan.start_B1[None, 1:], axis=1, dtype=jnp.int32)

    split_P4 = jnp.stack([begin_P, end_P, row_of(begin_P), row_of(end_P - 1)], axis=1)
    start_B, stop_B = plan.start_B1[:-1], plan.start_B1[1:]
    row_B = jnp.arange(start_B.shape[0], dtype=jnp.int32)
    last_split_B = jnp.where(stop_B > start_B, (stop_B - 1) // per_split + 1, 0)
    row_B8 = jnp.stack(
        [
            start_B,
            stop_B,
            plan.first_B,
            jnp.max(first_BT, axis=1),
            jnp.min(last_BT, axis=1),
            row_B + jnp.where(stop_B > start_B, start_B // per_split, 0),
            row_B + last_split_B,
            plan.end_B - 1,
        ],
        axis=1,
    )
    return split_P4, row_B8


def _rotation_tables(frequency_F):
    """(frequencies twice (H,), cosines and sines of the offsets in a tile (C, F)) float32."""
    frequency_F = frequency_F.astype(jnp.float32)
    angle_CF = jnp.arange(TILE, dtype=jnp.float32)[:, None] * frequency_F
    return [jnp.tile(frequency_F, 2), jnp.cos(angle_CF), jnp.sin(angle_CF)]
