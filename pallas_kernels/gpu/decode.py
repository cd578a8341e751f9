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

from pallas_kernels.decode_arguments import Support, check_call, of_heads_K
from pallas_kernels.decode_plan import make_plan
from pallas_kernels.gpu.attention import SM_COUNT
from pallas_kernels.gpu.attention_tiles import ROWS
from pallas_kernels.gpu.common import check_device
from pallas_kernels.gpu.decode_kernels import TILE, Call, combine, partial_results

WIDTHS = (128, 256)
SUPPORT = Support("GPU decode kernel", ("bfloat16",), ("bfloat16", "float8_e4m3fn"))


def check(
    q_BTNH, k_cache, v_cache, frequency_F, *, paged: bool = False, heads_per_key: int | None = None
) -> None:
    """Raises ValueError for arrays that :func:`decode` does not support, naming what it does."""
    SUPPORT.check_arrays(q_BTNH, k_cache, v_cache, frequency_F, heads_per_key)
    H, page = q_BTNH.shape[3], k_cache.shape[-3]
    if H not in WIDTHS:
        raise ValueError(f"head width {H}; the GPU decode kernel supports {WIDTHS}")
    if paged and (page % 8 or (page % TILE and TILE % page)):
        raise ValueError(
            f"pages of {page} slots; the GPU decode kernel supports 8, 16, 32 and multiples of "
            f"{TILE}"
        )
    if not paged and page < TILE:
        raise ValueError(f"{page} slots; the GPU decode kernel needs {TILE} at least")


def decode(
    q_BTNH,
    k_cache,
    v_cache,
    positions_BT,
    lengths_B,
    *,
    scale: float,
    window: int | None = None,
    frequency_F=None,
    k_scale=None,
    v_scale=None,
    page_table_BM=None,
    layer=None,
    first_head=0,
    heads_per_key: int | None = None,
    splits: int | None = None,
    device=None,
    interpret=None,
):
    """Attention of new tokens over a cache that already holds them: the same bits in every run.

    Args:
      q_BTNH: bfloat16; H 128 or 256.
      k_cache, v_cache: bfloat16 or float8_e4m3fn; S at least 64; pages of 8, 16, 32 or a multiple
        of 64 slots.
      positions_BT, lengths_B, scale, window, frequency_F, k_scale, v_scale, page_table_BM, layer,
        first_head, heads_per_key: as all decode kernels (``pallas_kernels.decode_arguments``).
      splits: pieces the work is cut into; None for one on every multiprocessor.
      device: one of those compiled for; None for the default.
      interpret: ``plgpu.InterpretGPUParams()`` to run on a CPU.

    Returns:
      (B, T, N, H) bfloat16; zeros where a query sees nothing.

    Raises:
      ValueError: an unsupported width, dtype, page size, number of slots or device, or arguments
        that do not fit each other.
    """
    paged = page_table_BM is not None
    check(q_BTNH, k_cache, v_cache, frequency_F, paged=paged, heads_per_key=heads_per_key)
    check_call(
        q_BTNH, k_cache, positions_BT, lengths_B, window=window, page_table_BM=page_table_BM,
        layer=layer, splits=splits,
    )  # fmt: skip
    check_device("decode attention", device, interpret)
    B, T, N, H = q_BTNH.shape
    parts, page, cached_heads = k_cache.shape[-4:-1]
    slots = page * page_table_BM.shape[1] if paged else page
    if slots < TILE:
        raise ValueError(f"{slots} slots; the GPU decode kernel needs {TILE} at least")
    heads = _Heads.of(N, cached_heads, first_head, heads_per_key)
    R = T * heads.per_key
    if splits is None:
        splits = max(1, SM_COUNT // (heads.keys * pl.cdiv(R, ROWS)))
    call = Call(
        B=B, K=heads.keys, R=R, H=H, slots=slots, page=page, splits=splits, paged=paged,
        cached_heads=cached_heads, dtype=k_cache.dtype.name, own_values=v_cache is not None,
        rotates=frequency_F is not None,
    )  # fmt: skip
    # base-2 exponentials: the logarithm's factor goes into the scale
    scale_K = (scale * np.log2(np.e) * of_heads_K(k_scale, cached_heads)).astype(jnp.float32)
    first_part = jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32) * parts
    inputs, row_B8 = _inputs(
        call, heads, q_BTNH, positions_BT, lengths_B, window,
        part_and_head_2=jnp.stack([first_part, heads.first]), scale_K=scale_K,
        tables=[page_table_BM] if paged else [], frequency_F=frequency_F,
    )  # fmt: skip
    caches = [c.reshape(-1, page, cached_heads * H) for c in (k_cache, v_cache) if c is not None]
    o_IKQH, lse_IKQ = partial_results(call, inputs, caches, interpret)
    o_BTNH = heads.scatter(combine(o_IKQH, lse_IKQ, row_B8, rows=R, interpret=interpret), T)
    if v_scale is not None:
        v_scale_K = of_heads_K(v_scale, cached_heads)
        o_BTNH = o_BTNH * v_scale_K[heads.key_of_head_N][:, None]
    return o_BTNH.astype(q_BTNH.dtype)


def _inputs(
    call: Call, heads: _Heads, q_BTNH, positions_BT, lengths_B, window, *, part_and_head_2,
    scale_K, tables, frequency_F,
):  # fmt: skip
    """(what the kernel reads beside the caches, row_B8 of :func:`_work`)."""
    plan = make_plan(positions_BT, lengths_B, call.slots, TILE, window)
    first_BT, last_BT = _visible(plan, positions_BT, window)
    split_P4, row_B8 = _work(plan, call.splits, first_BT, last_BT)
    padding = (0, -call.R % ROWS)

    def of_rows(x_BT):
        x_BR = jnp.repeat(x_BT, heads.per_key, axis=1)
        return jnp.pad(x_BR, ((0, 0), padding), mode="edge")

    inputs = [
        split_P4,
        row_B8,
        part_and_head_2,
        scale_K,
        of_rows(first_BT),
        of_rows(last_BT),
        *tables,
        *(_rotation_tables(frequency_F) if call.rotates else []),
        jnp.pad(heads.gather(q_BTNH), ((0, 0), (0, 0), padding, (0, 0))),
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
    def of(cls, N: int, K: int, first_head, heads_per_key: int | None) -> _Heads:
        whole = isinstance(first_head, int) and first_head == 0 and N == K * (heads_per_key or 0)
        if heads_per_key is None or K == 1 or whole:
            per_key = N // K
            return cls(K, per_key, jnp.int32(0), jnp.arange(N, dtype=jnp.int32) // per_key, None)
        # a slice that starts inside a key head's queries meets one key head more
        keys = min(K, (N - 2) // heads_per_key + 2)
        head_N = jnp.asarray(first_head, jnp.int32) + jnp.arange(N, dtype=jnp.int32)
        key_N = head_N // heads_per_key
        # all key heads that are read exist: the last of them is never behind the cache's
        first = jnp.minimum(key_N[0], K - keys)
        begin_K = (first + jnp.arange(keys, dtype=jnp.int32)) * heads_per_key - head_N[0]
        per_key = min(N, heads_per_key)
        return cls(keys, per_key, first, key_N, jnp.maximum(begin_K, 0))

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
