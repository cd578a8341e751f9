"""Decode attention for Hopper GPUs (Mosaic GPU): few new tokens of each row over a long cache.

Shape suffixes: B rows (sequences), T new tokens of a row, N query heads, K key/value heads (those
that are read), G = N / K, H head width, S slots of a row, P splits, L pages of a pool, M pages of a
row, F = H / 2 frequencies, R = T * G query rows of a key head, Q those rows padded to whole tiles of
64, I partial results, C the 64 slots of a tile.

The work of all rows is one list of tiles of 64 slots (``pallas_kernels.decode_plan``), cut into as
many equal splits as the device has multiprocessors, whatever the rows' lengths are. A block works
off one split for one key head. Split p has at most one partial result for row b, and no other pair
has the same p + b: that is its index, so P + B - 1 partial results are all there can be.
:func:`combine` adds them up, in a fixed order.

The query heads of a key head are the rows of the matrix products. Three warpgroups share the work:
one brings tiles in by TMA; one turns cached numbers into bfloat16 matrices for the tensor core,
where they are not such already (float8, keys cached before rotation); one attends.

Keys that were cached before rotation are rotated after reading, by the angle of the tile's first
position, whose H / 2 sines are computed once a tile, plus the angle of the offset in the tile,
which comes from a table: no trigonometric function per key.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.decode_plan import make_plan
from pallas_kernels.gpu import attention_tiles as tiles
from pallas_kernels.gpu.attention import SM_COUNT
from pallas_kernels.gpu.attention_tiles import MASKED, ROWS, Ring

TILE = ROWS  # slots
WIDTHS = (128, 256)
CACHE_DTYPES = ("bfloat16", "float8_e4m3fn")
SHARED_BYTES = 224 << 10  # of one block's matrices; 227 KiB with barriers and reductions
LARGEST_RING = 4  # tiles
READ_AHEAD = 8  # partial results that are under way at once


def check(
    q_BTNH, k_cache, v_cache, frequency_F, *, paged: bool = False, heads_per_key: int | None = None
) -> None:
    """Raises ValueError for what :func:`decode` does not support, naming what it does."""
    N, H = q_BTNH.shape[2:]
    page, K = k_cache.shape[-3:-1]
    if H not in WIDTHS:
        raise ValueError(f"head width {H}; the GPU decode kernel supports {WIDTHS}")
    if k_cache.shape[-1] != H or (v_cache is not None and v_cache.shape != k_cache.shape):
        raise ValueError(
            f"queries of width {H}, keys {k_cache.shape}, values "
            f"{None if v_cache is None else v_cache.shape}; the GPU decode kernel supports one "
            "width for all and caches of one shape"
        )
    if heads_per_key is None and N % K:
        raise ValueError(f"{N} query heads are not a multiple of {K} key/value heads")
    if q_BTNH.dtype != jnp.bfloat16:
        raise ValueError(f"queries are {q_BTNH.dtype}; the GPU decode kernel supports bfloat16")
    for cache in (k_cache, v_cache):
        if cache is not None and cache.dtype.name not in CACHE_DTYPES:
            raise ValueError(
                f"the cache is {cache.dtype.name}; the GPU decode kernel supports "
                + ", ".join(CACHE_DTYPES)
            )
    if v_cache is not None and v_cache.dtype != k_cache.dtype:
        raise ValueError(f"keys are {k_cache.dtype} and values {v_cache.dtype}, which must agree")
    if paged and (page % 8 or (page % TILE and TILE % page)):
        raise ValueError(
            f"pages of {page} slots; the GPU decode kernel supports 8, 16, 32 and multiples of "
            f"{TILE}"
        )
    if not paged and page < TILE:
        raise ValueError(f"{page} slots; the GPU decode kernel needs {TILE} at least")
    if frequency_F is not None and frequency_F.shape != (H // 2,):
        raise ValueError(
            f"{frequency_F.shape} frequencies for width {H}; the GPU decode kernel rotates keys "
            f"over their whole width, which takes ({H // 2},)"
        )


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
    interpret=None,
):
    """Attention of new tokens over a cache that already holds them.

    Args:
      q_BTNH: (B, T, N, H) bfloat16, rotated to their positions; H 128 or 256.
      k_cache, v_cache: (B, S, K, H) with S at least 64, or (L, page, K, H) with a page table, pages
        of 8, 16, 32 or a multiple of 64 and ``M * page`` at least 64; bfloat16 or float8_e4m3fn.
        Position p of a row lies in slot ``p % S`` (``S = M * page`` if paged). What was never
        written must be finite. ``v_cache`` None: values are the keys as cached.
      positions_BT: (B, T) int32 positions of the queries; a negative one sees nothing.
      lengths_B: (B,) int32 tokens stored, those of this call included.
      scale: multiplies the scores.
      window: a query sees itself and the ``window - 1`` positions before it; None for all.
      frequency_F: (H / 2,) float32; keys are cached unrotated and coordinate pairs ``(i, i + H/2)``
        are rotated by ``position * frequency_F[i]`` after reading. None: keys are used as cached.
      k_scale, v_scale: float32 scalar or (K,): what cached numbers are multiplied by, None for 1.
      page_table_BM: (B, M) int32 page of every M-th part of a row's slots; entries behind a row's
        last token are not read.
      layer: int32 scalar; the caches then have a leading axis of layers, of which one is read where
        it lies.
      first_head, heads_per_key: if the caller holds a slice of the query heads but all key heads:
        the number of its first head (may be traced) and G.
      splits: pieces the work is cut into; None for one on every multiprocessor.
      interpret: ``plgpu.InterpretGPUParams()`` to run on a CPU.

    Returns:
      (B, T, N, H) in the dtype of the queries; zeros where a query sees nothing. Scores, softmax
      and sums are float32, the same bits in every run.

    Raises:
      ValueError: an unsupported width, dtype, page size or number of slots.
    """
    paged = page_table_BM is not None
    check(q_BTNH, k_cache, v_cache, frequency_F, paged=paged, heads_per_key=heads_per_key)
    B, T, N, H = q_BTNH.shape
    parts, page, cached_heads = k_cache.shape[-4:-1]
    slots = page * page_table_BM.shape[1] if paged else page
    if slots < TILE:
        raise ValueError(f"{slots} slots; the GPU decode kernel needs {TILE} at least")
    heads = _Heads.of(N, cached_heads, first_head, heads_per_key)
    R = T * heads.per_key
    row_tiles = -(-R // ROWS)
    if splits is None:
        splits = max(1, SM_COUNT // (heads.keys * row_tiles))
    call = _Call(
        B=B, K=heads.keys, R=R, H=H, slots=slots, page=page, splits=splits, paged=paged,
        cached_heads=cached_heads, dtype=k_cache.dtype.name, own_values=v_cache is not None,
        rotates=frequency_F is not None,
    )  # fmt: skip

    plan = make_plan(positions_BT, lengths_B, slots, TILE, window)
    first_BT, last_BT = _visible(plan, positions_BT, window)
    rows = ((0, 0), (0, row_tiles * ROWS - R))
    first_BQ, last_BQ = (
        jnp.pad(jnp.repeat(x, heads.per_key, axis=1), rows, mode="edge")
        for x in (first_BT, last_BT)
    )
    split_P4, row_B8 = _work(plan, splits, first_BT, last_BT)
    first_part = jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32) * parts
    # base-2 exponentials: the logarithm's factor goes into the scale
    scale_K = jnp.broadcast_to(scale * np.log2(np.e) * _or_one(k_scale), (cached_heads,))
    inputs = [
        split_P4, row_B8, jnp.stack([first_part, heads.first]), scale_K.astype(jnp.float32),
        first_BQ, last_BQ,
    ]  # fmt: skip
    if paged:
        inputs.append(jnp.clip(page_table_BM, 0, parts - 1))
    if frequency_F is not None:
        inputs += _rotation_tables(frequency_F)
    q_BKRH = heads.gather(q_BTNH)
    inputs.append(jnp.pad(q_BKRH, ((0, 0), (0, 0), rows[1], (0, 0))))
    caches = [c.reshape(-1, page, cached_heads * H) for c in (k_cache, v_cache) if c is not None]
    o_IKQH, lse_IKQ = _partial_results(call, inputs, caches, interpret)
    o_BKRH = combine(o_IKQH, lse_IKQ, row_B8, rows=R, interpret=interpret)
    o_BTNH = heads.scatter(o_BKRH, T)
    if v_scale is not None:
        v_scale_K = jnp.broadcast_to(_or_one(v_scale), (cached_heads,))
        o_BTNH = o_BTNH * v_scale_K[heads.key_of_head_N][:, None]
    return o_BTNH.astype(q_BTNH.dtype)


def _or_one(scale):
    return jnp.float32(1.0) if scale is None else jnp.asarray(scale, jnp.float32)


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
        if heads_per_key is None or K == 1:
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


class _Call(NamedTuple):
    """Everything static about one call."""

    B: int
    K: int
    R: int
    H: int
    slots: int
    page: int
    splits: int
    paged: bool
    cached_heads: int
    dtype: str
    own_values: bool
    rotates: bool

    @property
    def converts(self) -> bool:
        return self.dtype != "bfloat16"

    @property
    def prepares(self) -> bool:
        """Whether the matrices that the tensor core reads are not those that the TMA brings."""
        return self.converts or self.rotates

    @property
    def own_prepared_values(self) -> bool:
        """Whether the values are prepared too, and are another matrix than the keys."""
        return self.converts and (self.own_values or self.rotates)

    @property
    def piece(self) -> int:
        """Columns that are in registers at once; 64 spill beside the tables of the rotation."""
        return 32 if self.rotates else 64

    @property
    def turn_size(self) -> int:
        return 2 * self.H if self.rotates else 0

    @property
    def copies(self) -> int:
        """Of one tile of one cache: one for every page that it lies in."""
        return -(-TILE // self.page) if self.paged else 1

    @property
    def per_lap(self) -> int:
        return -(-self.slots // TILE)

    def ring_slots(self) -> tuple[int, int]:
        """Tiles that the TMA may bring ahead, and prepared tiles, as far as there is memory."""
        tile = TILE * self.H
        prepared = 2 * tile * (2 if self.own_prepared_values else 1) if self.prepares else 0
        left = SHARED_BYTES - 2 * ROWS * self.H - 2 * prepared - 4 * self.turn_size
        raw = tile * jnp.dtype(self.dtype).itemsize * (2 if self.own_values else 1)
        return min(LARGEST_RING, left // raw), 2


class _Tile(NamedTuple):
    """Where an item of the list lies; positions and slots of a row.

    slot: its first. position: of that slot. first: the first position that is not part of the item
    before it; differs from ``position`` in the last tile of slots that 64 does not divide, which
    starts earlier.
    """

    slot: Any
    position: Any
    first: Any

    @classmethod
    def of(cls, call: _Call, item, row_ref, b) -> _Tile:
        number = row_ref[b, 2] + item - row_ref[b, 0]
        lap = lax.div(number, jnp.int32(call.per_lap))
        begin = (number - lap * call.per_lap) * TILE
        slot = jnp.minimum(begin, call.slots - TILE)
        return cls(slot, lap * call.slots + slot, lap * call.slots + begin)


def _partial_results(call: _Call, inputs, caches, interpret):
    """o_IKQH and lse_IKQ float32: normalised results, and base-2 logarithms of their weights."""
    raw_slots, prepared_slots = call.ring_slots()
    buffers = 2 if call.own_values else 1
    partials, Q = call.splits + call.B - 1, -(-call.R // ROWS) * ROWS
    prepared = [_smem(call, prepared_slots, TILE)] * (
        (2 if call.own_prepared_values else 1) if call.prepares else 0
    )
    scratch = {
        "q": _smem(call, ROWS),
        "raw": [_smem(call, raw_slots, TILE, dtype=jnp.dtype(call.dtype))] * buffers,
        "prepared": prepared,
        "turn": [plgpu.SMEM((2, call.H), jnp.float32)] if call.rotates else [],
        "q_ready": plgpu.Barrier(),
        "raw_ready": plgpu.Barrier(num_arrivals=buffers * call.copies, num_barriers=raw_slots),
        "raw_free": plgpu.Barrier(num_barriers=raw_slots),
        "prepared_ready": plgpu.Barrier(num_barriers=prepared_slots),
        "prepared_free": plgpu.Barrier(num_barriers=prepared_slots),
    }

    def kernel(*refs, **scratch):
        _Block(call, refs, scratch, interpret is not None).run()

    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((partials, call.K, Q, call.H), jnp.float32),
            jax.ShapeDtypeStruct((partials, call.K, Q), jnp.float32),
        ],
        scratch_types=scratch,
        grid=(Q // ROWS, call.K, call.splits),
        grid_names=("rows", "head", "split"),
        num_threads=3,
        thread_name="wg",
        kernel_name="decode_attention",
        interpret=interpret,
    )(*inputs, *caches)


def _smem(call: _Call, *shape: int, dtype=jnp.dtype(jnp.bfloat16)):
    """Shared memory for matrices that TMA and wgmma take, and warpgroups in pieces of columns."""
    return plgpu.SMEM(
        (*shape, call.H),
        dtype,
        transforms=(
            plgpu.TilingTransform((8, call.piece)),
            plgpu.SwizzleTransform(call.piece * dtype.itemsize),
        ),
    )


class _Block:
    """One split of one key head and 64 query rows, worked off by three warpgroups."""

    def __init__(self, call: _Call, refs, scratch, interpreted: bool):
        refs = list(refs)
        self.call, self.interpreted = call, interpreted
        self.split_ref, self.row_ref, self.base_ref, self.scale_ref = refs[:4]
        self.first_ref, self.last_ref = refs[4:6]
        del refs[:6]
        self.table_ref = refs.pop(0) if call.paged else None
        self.rotation = [refs.pop(0) for _ in range(3)] if call.rotates else None
        self.q_ref = refs.pop(0)
        self.cache_refs, (self.o_ref, self.lse_ref) = refs[:-2], refs[-2:]
        self.q_smem, self.q_ready = scratch["q"], scratch["q_ready"]
        self.turn_smem = scratch["turn"][0] if call.rotates else None
        raw_slots, prepared_slots = call.ring_slots()
        self.raw = Ring(scratch["raw"], scratch["raw_ready"], scratch["raw_free"], raw_slots, 1)
        self.prepared = Ring(
            scratch["prepared"], scratch["prepared_ready"], scratch["prepared_free"],
            prepared_slots, 1,
        )  # fmt: skip
        self.head, self.tile = lax.axis_index("head"), lax.axis_index("rows")
        self.split = lax.axis_index("split")
        self.begin = self.split_ref[self.split, 0]

    def run(self) -> None:
        prepare = self.prepare if self.call.prepares else lambda: None
        tiles.split_registers(self.produce, self.attend, prepare)

    def rows(self, work) -> None:
        """``work(b, item, end)`` for the rows of the split and their items in it."""
        p, stop = self.split, self.split_ref[self.split, 1]

        @pl.loop(self.split_ref[p, 2], self.split_ref[p, 3] + 1)
        def _(b):
            item = jnp.maximum(self.begin, self.row_ref[b, 0])
            end = jnp.minimum(stop, self.row_ref[b, 1])
            pl.when(item < end)(lambda: work(b, item, end))

    # --- the first role: bring tiles in -----------------------------------------------------------

    def produce(self) -> None:
        call = self.call
        first_part = self.base_ref[0]
        columns = pl.ds((self.base_ref[1] + self.head) * call.H, call.H)

        def of_row(b, item, end):
            @pl.loop(item, end)
            def _(i):
                slot = _Tile.of(call, i, self.row_ref, b).slot
                step = i - self.begin
                buffer = lax.rem(step, jnp.int32(self.raw.slots))
                self.raw.wait_free(step, buffer)
                for copy in range(call.copies):
                    if call.paged:
                        rows = min(TILE, call.page)
                        part, start = self.page_of(b, slot + copy * rows)
                    else:
                        rows, part, start = TILE, b, slot
                    for cache, smem in zip(self.cache_refs, self.raw.buffers, strict=True):
                        plgpu.copy_gmem_to_smem(
                            cache.at[first_part + part, pl.ds(start, rows), columns],
                            smem.at[buffer, pl.ds(copy * rows, rows)],
                            self.raw.ready.at[buffer],
                        )

        self.rows(of_row)

    def page_of(self, b, slot):
        """(page, slot within it) of a row's slot."""
        call = self.call
        index = lax.div(slot, jnp.int32(call.page))
        # Behind the row's last token the table holds anything: the page of that token instead. A
        # ring that has been filled has no such slots.
        last = jnp.minimum(self.row_ref[b, 7], call.slots - 1)
        kept = jnp.minimum(index, lax.div(jnp.maximum(last, 0), jnp.int32(call.page)))
        return self.table_ref[b, kept], slot - index * call.page

    # --- the second: bfloat16 matrices of rotated keys and of values ------------------------------

    def prepare(self) -> None:
        call, raw, prepared = self.call, self.raw, self.prepared
        frequency_H, tables = self.load_tables() if call.rotates else (None, None)

        def of_row(b, item, end):
            @pl.loop(item, end)
            def _(i):
                step = i - self.begin
                if call.rotates:
                    position = _Tile.of(call, i, self.row_ref, b).position
                    angle_H = frequency_H * position.astype(jnp.float32)
                    self.turn_smem[0], self.turn_smem[1] = jnp.cos(angle_H), jnp.sin(angle_H)
                slot = raw.wait(step)
                to = lax.rem(step, jnp.int32(prepared.slots))
                prepared.wait_free(step, to)
                if call.rotates:
                    self.rotate(slot, to, tables)
                else:
                    for source, target in zip(raw.buffers, prepared.buffers, strict=True):
                        self.convert(source.at[slot], target.at[to])
                if call.rotates and call.converts and call.own_values:
                    self.convert(raw.buffers[1].at[slot], prepared.buffers[1].at[to])
                plgpu.commit_smem()
                plgpu.barrier_arrive(prepared.ready.at[to])
                if call.converts:
                    raw.release(slot)

        self.rows(of_row)

    def convert(self, source, target) -> None:
        for column in range(0, self.call.H, self.call.piece):
            columns = pl.ds(column, self.call.piece)
            target[:, columns] = _load(source.at[:, columns]).astype(target.dtype)

    def load_tables(self):
        """What stays in registers: the frequencies, one in each half of a vector; cosine and sine of
        the offsets piece by piece."""
        frequency_ref, cos_ref, sin_ref = self.rotation
        piece = self.call.piece
        strided = plgpu.Layout.WG_STRIDED((self.call.H,), self.call.H // 128)
        return plgpu.load(frequency_ref, layout=strided), [
            tuple(
                plgpu.load(
                    ref.at[:, pl.ds(column, piece)], layout=plgpu.Layout.WGMMA, optimized=False
                )
                for ref in (cos_ref, sin_ref)
            )
            for column in range(0, self.call.H // 2, piece)
        ]

    def rotate(self, slot, to, tables) -> None:
        call, piece = self.call, self.call.piece
        source, target = self.raw.buffers[0].at[slot], self.prepared.buffers[0].at[to]
        values = (
            self.prepared.buffers[1].at[to] if call.converts and not call.own_values else None
        )
        for column, (cos_CF, sin_CF) in zip(range(0, call.H // 2, piece), tables, strict=True):
            halves = pl.ds(column, piece), pl.ds(column + call.H // 2, piece)
            base_cos, base_sin = (
                tiles.along(
                    plgpu.load(
                        self.turn_smem.at[i, pl.ds(column, piece)],
                        layout=plgpu.Layout.WGMMA.reduce(0),
                        optimized=False,
                    ),
                    cos_CF.shape,
                    1,
                )
                for i in (0, 1)
            )
            turned_cos = base_cos * cos_CF - base_sin * sin_CF
            turned_sin = base_sin * cos_CF + base_cos * sin_CF
            a, b = (_load(source.at[:, half]) for half in halves)
            target[:, halves[0]] = (a * turned_cos - b * turned_sin).astype(jnp.bfloat16)
            target[:, halves[1]] = (b * turned_cos + a * turned_sin).astype(jnp.bfloat16)
            if values is not None:
                values[:, halves[0]] = a.astype(jnp.bfloat16)
                values[:, halves[1]] = b.astype(jnp.bfloat16)

    # --- the third: attention ---------------------------------------------------------------------

    def attend(self) -> None:
        rows = pl.ds(self.tile * ROWS, ROWS)
        scale = self.scale_ref[self.base_ref[1] + self.head]

        def of_row(b, item, end):
            plgpu.copy_gmem_to_smem(self.q_ref.at[b, self.head, rows], self.q_smem, self.q_ready)
            first_Q = tiles.per_row(self.first_ref.at[b, rows])
            last_Q = tiles.per_row(self.last_ref.at[b, rows])
            plgpu.barrier_wait(self.q_ready)
            start = (
                tiles.zeros(ROWS, self.call.H),
                tiles.zeros(ROWS) + 0.5 * MASKED,
                tiles.zeros(ROWS),
            )
            step = functools.partial(self.step, b, scale, first_Q, last_Q)
            acc_QH, max_Q, sum_Q = lax.fori_loop(item, end, step, start)
            seen_Q = sum_Q > 0.0
            acc_QH *= tiles.along(1.0 / jnp.where(seen_Q, sum_Q, 1.0), acc_QH.shape, 0)
            index = self.split + b
            _store(self.o_ref.at[index, self.head, rows], acc_QH)
            lse_Q = jnp.where(seen_Q, max_Q + jnp.log2(sum_Q), MASKED)
            _store(self.lse_ref.at[index, self.head, rows], lse_Q)

        self.rows(of_row)

    def step(self, b, scale, first_Q, last_Q, i, carry):
        """One tile of online softmax (arXiv 2205.14135), exponentials to base 2."""
        call = self.call
        acc_QH, max_Q, sum_Q = carry
        ring, slot = self.raw, None
        k_smem, v_smem = self.raw.buffers[0], self.raw.buffers[-1]
        if not call.converts:
            slot = k_slot = self.raw.wait(i - self.begin)
        if call.prepares:
            k_slot, k_smem = self.prepared.wait(i - self.begin), self.prepared.buffers[0]
        if call.converts:
            ring, slot, v_smem = self.prepared, k_slot, self.prepared.buffers[-1]
        s_QC = tiles.product(self.q_smem, k_smem.at[k_slot].transpose((1, 0)))
        if call.prepares and not call.converts:
            self.prepared.release(k_slot)
        s_QC = self.hide(s_QC * scale, b, i, first_Q, last_Q)
        new_Q = jnp.maximum(max_Q, s_QC.max(axis=1))
        old_Q = jnp.exp2(max_Q - new_Q)
        p_QC = jnp.exp2(s_QC - tiles.along(new_Q, s_QC.shape, 0))
        acc_QH *= tiles.along(old_Q, acc_QH.shape, 0)
        sum_Q = sum_Q * old_Q + p_QC.sum(axis=1)
        acc_QH = tiles.add_product(
            acc_QH, p_QC.astype(jnp.bfloat16), v_smem.at[slot], interpret=self.interpreted
        )
        ring.release(slot)
        return acc_QH, new_Q, sum_Q

    def hide(self, s_QC, b, i, first_Q, last_Q):
        tile = _Tile.of(self.call, i, self.row_ref, b)

        def hidden(s_QC):
            position = tiles.iota(s_QC.shape, 1) + tile.position
            visible = position >= tiles.along(jnp.maximum(first_Q, tile.first), s_QC.shape, 0)
            visible = visible & (position <= tiles.along(last_Q, s_QC.shape, 0))
            return jnp.where(visible, s_QC, MASKED)

        partial = (
            (tile.first < self.row_ref[b, 3])
            | (tile.first + (TILE - 1) > self.row_ref[b, 4])
            | (tile.first != tile.position)
        )
        return lax.cond(partial, hidden, lambda s: s, s_QC)


def _load(ref):
    """Some columns of a tile from shared memory, float32."""
    x = plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
    return x.astype(jnp.float32)


def _store(ref, x) -> None:
    """Registers to global memory; JAX before 0.12 has no name for it."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def combine(o_IKQH, lse_IKQ, row_B8, *, rows: int, interpret=None):
    """One result of each row from its partial ones.

    Args:
      o_IKQH, lse_IKQ: from the splits; those that no row names may hold anything.
      row_B8: int32, a row's partial results are ``row_B8[b, 5]`` to ``row_B8[b, 6]``, end excluded.
      rows: R, at most Q.

    Returns:
      (B, K, R, H) float32, zeros for a row without partial results.
    """
    K, H = o_IKQH.shape[1], o_IKQH.shape[3]
    B = row_B8.shape[0]
    layout = plgpu.Layout.WG_STRIDED((H,), H // 128)

    def kernel(o_ref, lse_ref, row_ref, out_ref):
        b, k, r = (lax.axis_index(name) for name in ("row", "head", "query"))
        first, end = row_ref[b, 5], row_ref[b, 6]

        def step(i, carry):
            acc_H, top, total = carry
            begin = first + i * READ_AHEAD
            indices = [jnp.minimum(begin + j, end - 1) for j in range(READ_AHEAD)]
            parts = [plgpu.load(o_ref.at[j, k, r], layout=layout) for j in indices]
            lses = [
                jnp.where(begin + j < end, lse_ref[index, k, r], 2 * MASKED)
                for j, index in enumerate(indices)
            ]
            new = functools.reduce(jnp.maximum, lses, top)
            old = jnp.exp2(top - new)
            acc_H, total = acc_H * old, total * old
            for part_H, lse in zip(parts, lses, strict=True):
                weight = jnp.exp2(lse - new)
                acc_H, total = acc_H + part_H * weight, total + weight
            return acc_H, new, total

        zero_H = plgpu.layout_cast(jnp.zeros((H,), jnp.float32), layout)
        steps = lax.div(end - first + (READ_AHEAD - 1), jnp.int32(READ_AHEAD))
        acc_H, _, total = lax.fori_loop(
            0, steps, step, (zero_H, jnp.float32(MASKED), jnp.float32(0.0))
        )
        out_ref[b, k, r] = acc_H / jnp.where(total > 0.0, total, 1.0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((B, K, rows, H), jnp.float32),
        grid=(rows, K, B),
        grid_names=("query", "head", "row"),
        kernel_name="decode_combine",
        interpret=interpret,
    )(o_IKQH, lse_IKQ, row_B8)
