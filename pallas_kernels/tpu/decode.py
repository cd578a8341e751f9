"""Decode attention for TPUs (Mosaic): few new tokens of each row over a long cache, read once.

Shape suffixes: B rows (sequences), T new tokens of a row, N query heads, K key/value heads,
G = N / K, H head width, S slots of a row, P splits, R = T * N query rows, C key rows (a slot's K
heads are K key rows of one matrix), L pages of a pool, M pages of a row, F = H / 2 frequencies.

The work is a list of cache blocks (``pallas_kernels.decode_plan``), passed ahead of the kernel as
scalars: its length is the grid, so time follows the true lengths and no length is compiled in.
All heads meet all K keys of a slot in one product and the wrong pairs are masked: the cache is read
as it lies, and the MXU, nearly empty with so few rows, does the rest for nothing.

Keys that were cached before rotation are rotated after reading. Of the position ``base + j`` the
kernel turns the R queries back by ``base`` (once per tile) and the keys by ``j`` (a constant
table): no trigonometric function per key, and one array read instead of two, as the values are the
keys before rotation.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_call import DecodeCall, Support
from pallas_kernels.decode_plan import combine, make_plan, touched_PB
from pallas_kernels.tpu.chips import ANYWHERE, TABLES

LANES = 128
TILE_ROWS = 512  # key rows of one product
STEP_BYTES = 1 << 19  # of one cached array read by one step of the grid, about
LARGEST_STEP_PAGES = 16
VMEM_BYTES = ANYWHERE * 4 // 5  # for buffers and results; the rest is the compiler's
MASKED = -1e30  # finite, so that a fully masked row has no NaN on its way to zero
SUPPORT = Support(
    "TPU decode kernel", ("bfloat16", "float32"), ("bfloat16", "float32", "float8_e4m3fn")
)


class Tiling(NamedTuple):
    """How a row's slots are cut, all in slots.

    block: read by one step of the grid. tile: of one product. page: of one copy (the block itself
    if the cache is not paged).
    """

    block: int
    tile: int
    page: int


def tiling(slots: int, kv_heads: int, head_dim: int, dtype, page: int | None = None) -> Tiling:
    """The cut for a cache; ``page`` is the size of its pages."""
    slot_bytes = kv_heads * head_dim * jnp.dtype(dtype).itemsize
    if page is not None:
        pages = min(max(1, STEP_BYTES // (page * slot_bytes)), LARGEST_STEP_PAGES, slots // page)
        if page * kv_heads >= TILE_ROWS:
            tile = page
            while tile % 2 == 0 and tile * kv_heads > TILE_ROWS:
                tile //= 2
            return Tiling(pages * page, tile, page)
        tile_pages = max(1, min(pages, TILE_ROWS // (page * kv_heads)))
        block = pages // tile_pages * tile_pages * page
        return Tiling(block, tile_pages * page, page)
    tile = max(32, TILE_ROWS // kv_heads // 32 * 32)
    if slots <= tile:
        return Tiling(slots, slots, slots)
    tiles = min(max(1, STEP_BYTES // (tile * slot_bytes)), slots // tile)
    return Tiling(tiles * tile, tile, tiles * tile)


def check(call: DecodeCall, splits: int | None = None, pieces: int = 1) -> None:
    """Raises ValueError for what :func:`decode` does not support, naming what it does.

    ``pieces``: of the call's rows, one of which the kernel is given.
    """
    SUPPORT.check(call, splits)
    H, K, dtype = call.q_BTNH.shape[3], call.kv_heads, call.k_cache.dtype
    if H % LANES:
        raise ValueError(f"head width {H}; the TPU decode kernel supports multiples of {LANES}")
    packed = 32 // dtype.itemsize  # rows of one register
    if call.paged and call.page * K % packed:
        raise ValueError(
            f"pages of {call.page} slots with {K} heads; page size times heads must be a multiple "
            f"of {packed} for a {dtype.name} cache"
        )
    static = _Static.of(call, splits or 1)
    static.check_memory(call.q_BTNH.dtype, dtype, own_values=call.v_cache is not None)
    static.check_tables(pieces, call.slots // call.page if call.paged else 0)


def decode(call: DecodeCall, *, splits: int = 1, interpret=False):
    """Attention of new tokens over a cache that already holds them.

    Args:
      call: queries in bfloat16 or float32, H a multiple of 128; caches in bfloat16, float32 or
        float8_e4m3fn, K times the slots of a page a multiple of a register's rows (8 in float32, 16
        in bfloat16, 32 in float8).
      splits: pieces the work is cut into for that many cores (``chips.Chip.cores``).
      interpret: as in ``pallas_call``.

    Returns:
      (B, T, N, H) in the dtype of the queries; zeros where a query sees nothing.

    Raises:
      ValueError: an unsupported width, dtype or page size, queries or page tables that do not fit
        the on-chip memory, or arguments that do not fit each other.
    """
    check(call, splits)
    q_BTNH, K = call.q_BTNH, call.kv_heads
    B, T, N, H = q_BTNH.shape
    static = _Static.of(call, splits)
    plan = make_plan(call.positions_BT, call.lengths_B, call.slots, static.cut.block, call.window)
    key_head_R1 = jnp.tile(call.key_head_N(), T)[:, None]
    constants = static.constants(key_head_R1, call)
    per_split = -(-plan.start_B1[-1] // splits)
    scalars = [*plan, jnp.stack([per_split, call.first_part()]), call.positions_BT.reshape(-1)]
    if call.paged:
        scalars.append(call.page_table_BM.reshape(-1))
    caches = [c.reshape(-1, call.page * K, H) for c in call.caches]
    out = static.run(per_split, scalars, q_BTNH.reshape(B, T * N, H), constants, caches, interpret)
    touched = touched_PB(plan, splits)
    if splits == 1:
        o_BRH = jnp.where(touched[0, :, None, None], out[0][0], 0)
    else:
        o_BRH = combine(out[0], out[1][..., 0], touched)
    if call.v_scale is not None:
        o_BRH = o_BRH * call.scales_K(call.v_scale)[key_head_R1]
    return o_BRH.astype(q_BTNH.dtype).reshape(B, T, N, H)


def _rotation_tables(frequency_F, tile: int, kv_heads: int):
    """(frequency_1H, cos_CH, sin_CH) of the offsets in a tile; sin has the sign of each half."""
    frequency_1H = jnp.concatenate([frequency_F, frequency_F])[None].astype(jnp.float32)
    offset_C1 = (jnp.arange(tile * kv_heads, dtype=jnp.int32)[:, None] // kv_heads).astype(
        jnp.float32
    )
    sign_1H = jnp.where(jnp.arange(frequency_1H.shape[1]) < frequency_F.shape[0], -1.0, 1.0)[None]
    angle_CH = offset_C1 * frequency_1H
    return [
        jnp.concatenate([frequency_1H, sign_1H.astype(jnp.float32)], axis=0),
        jnp.cos(angle_CH),
        sign_1H * jnp.sin(angle_CH),
    ]


class _Static(NamedTuple):
    """Everything static about one call."""

    B: int
    T: int
    N: int
    K: int
    H: int
    slots: int
    cut: Tiling
    window: int | None
    splits: int
    rotates: bool
    paged: bool

    @classmethod
    def of(cls, call: DecodeCall, splits: int) -> _Static:
        (B, T, N, H), K, slots = call.q_BTNH.shape, call.kv_heads, call.slots
        cut = tiling(slots, K, H, call.k_cache.dtype, call.page if call.paged else None)
        rotates = call.frequency_F is not None
        return cls(B, T, N, K, H, slots, cut, call.window, splits, rotates, call.paged)

    @property
    def rows(self) -> int:
        return self.T * self.N

    def check_tables(self, pieces: int, pages: int) -> None:
        """Raises ValueError if what is passed ahead of the kernel does not fit; pages: of a row."""
        rows, blocks = -(-self.B // pieces), self.per_lap + 1
        need = 4 * rows * (blocks + 4 + self.T + pages)
        if need > TABLES:
            raise ValueError(
                f"{rows} rows of {blocks} blocks and {pages} pages take {need} bytes of scalar "
                f"memory; the TPU decode kernel has {TABLES}: pass fewer rows a call, or larger "
                "pages"
            )

    def check_memory(self, dtype, cache_dtype, own_values: bool) -> None:
        """Raises ValueError if the buffers alone, without the products' results, do not fit."""
        rows, itemsize = self.rows, jnp.dtype(dtype).itemsize
        moving = 2 * rows * self.H * (itemsize + (itemsize if self.splits == 1 else 4))
        cached = 2 * self.cut.block * self.K * self.H * jnp.dtype(cache_dtype).itemsize
        scratch = 4 * rows * (self.H + 2 * LANES)
        scores = 4 * rows * self.cut.tile * self.K
        need = moving + cached * (2 if own_values else 1) + scratch + scores
        if need > VMEM_BYTES:
            raise ValueError(
                f"{self.T} tokens of {self.N} heads of {self.H} take at least {need} bytes of "
                f"on-chip memory beside blocks of {self.cut.block} slots of {self.K} key heads; "
                f"the TPU decode kernel has {VMEM_BYTES}: pass fewer tokens a call"
            )

    def constants(self, key_head_R1, call: DecodeCall) -> list:
        """What stays in VMEM: [token and key head of each row, its scale, rotation tables]."""
        token_R1 = jnp.arange(self.rows, dtype=jnp.int32)[:, None] // self.N
        # base-2 exponentials: the logarithm's factor goes into the scale
        scale_K = call.scale * np.log2(np.e) * call.scales_K(call.k_scale)
        rows = [
            jnp.concatenate([token_R1, key_head_R1], axis=1),
            scale_K[key_head_R1].astype(jnp.float32),
        ]
        if not self.rotates:
            return rows
        return rows + _rotation_tables(call.frequency_F, self.cut.tile, self.K)

    @property
    def per_lap(self) -> int:
        return -(-self.slots // self.cut.block)

    def run(self, per_split, scalars, q_BRH, constants, caches, interpret):
        P, B, R, H = self.splits, self.B, self.rows, self.H
        pages = self.cut.block // self.cut.page
        row_block = pl.BlockSpec((None, R, H), self._query_index)
        whole = [
            pl.BlockSpec(c.shape, lambda p, i, *scalars: (0,) * 2, pipeline_mode=pl.Buffered(1))
            for c in constants
        ]
        cache_blocks = [
            pl.BlockSpec((None, self.cut.page * self.K, H), functools.partial(self._cache_index, j))
            for _ in caches
            for j in range(pages)
        ]
        dtype = q_BRH.dtype if P == 1 else jnp.float32
        out_shape = [jax.ShapeDtypeStruct((P, B, R, H), dtype)]
        out_specs = [pl.BlockSpec((None, None, R, H), self._out_index)]
        if P > 1:
            out_shape.append(jax.ShapeDtypeStruct((P, B, R, LANES), jnp.float32))
            out_specs.append(pl.BlockSpec((None, None, R, LANES), self._out_index))
        return pl.pallas_call(
            functools.partial(_kernel, self),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(P, jnp.maximum(per_split, 1)),
                in_specs=[row_block, *whole, *cache_blocks],
                out_specs=out_specs,
                scratch_shapes=[
                    pltpu.VMEM((R, H), jnp.float32),
                    pltpu.VMEM((R, LANES), jnp.float32),
                    pltpu.VMEM((R, LANES), jnp.float32),
                ],
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=ANYWHERE
            ),
            cost_estimate=self.cost(caches),
            interpret=interpret,
            name="decode_attention",
        )(*scalars, q_BRH, *constants, *(c for cache in caches for c in [cache] * pages))

    def cost(self, caches) -> pl.CostEstimate:
        """Of full caches: the true lengths are not known when this is asked for."""
        keys = self.B * self.slots * self.K
        slot_bytes = sum(c.dtype.itemsize for c in caches) * self.H
        return pl.CostEstimate(
            flops=4 * keys * self.rows * self.H,
            transcendentals=keys * self.rows,
            bytes_accessed=keys * slot_bytes + 4 * self.B * self.rows * self.H,
        )

    def _item(self, p, i, row_I, start_B1, first_B, split_2):
        """(row, block of the row) of a step; the last item again where a split has run out."""
        s = jnp.clip(p * split_2[0] + i, 0, jnp.maximum(start_B1[self.B] - 1, 0))
        row = row_I[s]
        return row, first_B[row] + s - start_B1[row]

    def _query_index(self, p, i, row_I, start_B1, first_B, oldest_B, end_B, split_2, *_):
        row, _ = self._item(p, i, row_I, start_B1, first_B, split_2)
        return row, 0, 0

    def _out_index(self, p, i, row_I, start_B1, first_B, oldest_B, end_B, split_2, *_):
        row, _ = self._item(p, i, row_I, start_B1, first_B, split_2)
        return p, row, 0, 0

    def _cache_index(
        self, j, p, i, row_I, start_B1, first_B, oldest_B, end_B, split_2, position_BT, *table
    ):
        row, number = self._item(p, i, row_I, start_B1, first_B, split_2)
        block = number % self.per_lap
        if not self.paged:
            return split_2[1] + row, block, 0
        page = block * (self.cut.block // self.cut.page) + j
        # a row that has not filled its slots has no page behind its last token
        last_slot = jnp.clip(end_B[row] - 1, 0, self.slots - 1)
        page = jnp.minimum(page, last_slot // self.cut.page)
        return split_2[1] + table[0][row * (self.slots // self.cut.page) + page], 0, 0


def _kernel(
    call: _Static,
    row_I,
    start_B1,
    first_B,
    oldest_B,
    end_B,
    split_2,
    position_BT,
    *refs,
):
    refs = list(refs[1 if call.paged else 0 :])
    q_ref, row_ref, scale_ref = refs[:3]
    tables, refs = (refs[3:6], refs[6:]) if call.rotates else (None, refs[3:])
    acc_ref, max_ref, sum_ref = refs[-3:]
    outputs = refs[-3 - (1 if call.splits == 1 else 2) : -3]
    caches = refs[: len(refs) - 3 - len(outputs)]
    pages = call.cut.block // call.cut.page
    k_refs, v_refs = caches[:pages], caches[pages:]

    p, i = pl.program_id(0), pl.program_id(1)
    s = p * split_2[0] + i
    total = start_B1[call.B]
    row, number = call._item(p, i, row_I, start_B1, first_B, split_2)

    @pl.when(s < total)
    def _():
        @pl.when((i == 0) | (s == start_B1[row]))
        def _():
            acc_ref[...] = jnp.zeros_like(acc_ref)
            max_ref[...] = jnp.full_like(max_ref, MASKED)
            sum_ref[...] = jnp.zeros_like(sum_ref)

        slot = number % call.per_lap * call.cut.block
        lap_start = number // call.per_lap * call.slots
        for tile in range(call.cut.block // call.cut.tile):
            k_CH = _tile(call, k_refs, tile)
            v_CH = _tile(call, v_refs, tile) if v_refs else k_CH
            first_slot = slot + tile * call.cut.tile
            q_RH = q_ref[...]
            if call.rotates:
                q_RH, k_CH = _rotate(q_RH, k_CH, lap_start + first_slot, *tables)
            visible = functools.partial(
                _visible_RC, call, row_ref, position_BT, row, oldest_B[row], end_B[row]
            )
            _update(
                call, q_RH, k_CH, v_CH, scale_ref, visible, first_slot, lap_start,
                acc_ref, max_ref, sum_ref,
            )  # fmt: skip

        @pl.when((s + 1 == start_B1[row + 1]) | (i == split_2[0] - 1))
        def _():
            sum_R1 = sum_ref[:, :1]
            seen_R1 = sum_R1 > 0.0
            outputs[0][...] = (acc_ref[...] / jnp.where(seen_R1, sum_R1, 1.0)).astype(
                outputs[0].dtype
            )
            if call.splits > 1:
                outputs[1][...] = max_ref[...] + jnp.log2(sum_ref[...])


def _tile(call: _Static, page_refs, tile: int):
    """Key rows of one tile, from a part of a page or from several pages."""
    rows, page_rows = call.cut.tile * call.K, call.cut.page * call.K
    if rows <= page_rows:
        start = tile * rows
        return page_refs[start // page_rows][pl.ds(start % page_rows, rows), :]
    pages = rows // page_rows
    return jnp.concatenate([r[...] for r in page_refs[tile * pages : (tile + 1) * pages]], axis=0)


def _rotate(q_RH, k_CH, base, frequency_2H, cos_CH, sin_CH):
    """Keys by their offset in the tile, queries back by the tile's first position."""
    half = q_RH.shape[1] // 2
    k32_CH = k_CH.astype(jnp.float32)
    k32_CH = k32_CH * cos_CH[...] + pltpu.roll(k32_CH, half, 1) * sin_CH[...]
    q32_RH = q_RH.astype(jnp.float32)
    angle_1H = base.astype(jnp.float32) * frequency_2H[:1]
    sin_1H = frequency_2H[1:] * jnp.sin(angle_1H)
    q32_RH = q32_RH * jnp.cos(angle_1H) - pltpu.roll(q32_RH, half, 1) * sin_1H
    return q32_RH.astype(q_RH.dtype), k32_CH.astype(q_RH.dtype)


def _visible_RC(call: _Static, row_ref, position_BT, row, oldest, end, first_slot, lap_start):
    """Which key rows of a tile the query rows see."""
    rows = call.cut.tile * call.K
    key_row_1C = jax.lax.broadcasted_iota(jnp.int32, (1, rows), 1)
    offset_1C = key_row_1C if call.K == 1 else jax.lax.div(key_row_1C, jnp.int32(call.K))
    slot_1C = first_slot + offset_1C
    position_1C = lap_start + slot_1C
    real_1C = (position_1C >= oldest) & (position_1C < end) & (slot_1C < call.slots)
    position_1C = jnp.where(real_1C, position_1C, jnp.iinfo(jnp.int32).max)
    query_R1 = jnp.full((call.rows, 1), position_BT[row * call.T], jnp.int32)
    for t in range(1, call.T):
        query_R1 = jnp.where(row_ref[:, :1] == t, position_BT[row * call.T + t], query_R1)
    visible_RC = position_1C <= query_R1
    if call.window is not None:
        visible_RC &= position_1C > query_R1 - call.window
    if call.K > 1:
        head_1C = key_row_1C - offset_1C * call.K
        visible_RC &= head_1C == row_ref[:, 1:]
    return visible_RC


def _update(
    call, q_RH, k_CH, v_CH, scale_ref, visible, first_slot, lap_start, acc_ref, max_ref, sum_ref
):
    """One tile of online softmax (arXiv 2205.14135), exponentials to base 2."""
    precision = "highest" if q_RH.dtype == jnp.float32 else "default"
    product = functools.partial(
        jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision
    )
    s_RC = product(q_RH, k_CH.astype(q_RH.dtype), (((1,), (1,)), ((), ()))) * scale_ref[...]
    s_RC = jnp.where(visible(first_slot, lap_start), s_RC, MASKED)
    # far above MASKED: the exponentials of a row that sees nothing are 0, not 1
    new_R1 = jnp.maximum(
        max_ref[:, :1], jnp.maximum(jnp.max(s_RC, axis=1, keepdims=True), 0.5 * MASKED)
    )
    old_R1 = jnp.exp2(max_ref[:, :1] - new_R1)
    p_RC = jnp.exp2(s_RC - new_R1)
    v_CH = v_CH.astype(q_RH.dtype)
    if call.slots % call.cut.block:
        # behind the last slot the block holds anything, and 0 * NaN is NaN
        key_row_C1 = jax.lax.broadcasted_iota(jnp.int32, (v_CH.shape[0], 1), 0)
        v_CH = jnp.where(key_row_C1 < (call.slots - first_slot) * call.K, v_CH, 0)
    o_RH = product(p_RC.astype(q_RH.dtype), v_CH, (((1,), (0,)), ((), ())))
    acc_ref[...] = acc_ref[...] * old_R1 + o_RH
    sum_ref[...] = sum_ref[...] * old_R1 + jnp.sum(p_RC, axis=1, keepdims=True)
    max_ref[...] = jnp.broadcast_to(new_R1, max_ref.shape)
