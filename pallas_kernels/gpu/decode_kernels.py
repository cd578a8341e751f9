"""The kernels of ``decode``: one split of the work for one key head, and the sum of the splits.

Shape suffixes: B rows (sequences), K key/value heads that are read, H head width, P splits,
F = H / 2 frequencies, R query rows of a key head, Q those rows padded to a multiple of 64,
I partial results, C the 64 slots of a tile; within a block Q is 64.

The query heads of a key head are the rows of the matrix products. Three warpgroups share the work:
one brings tiles in by TMA; one turns cached numbers into bfloat16 matrices for the tensor core,
where they are not such already (float8, keys cached before rotation); one attends.

Keys that were cached before rotation are rotated after reading, by the angle of the tile's first
position, whose H / 2 sines are computed once a tile, plus the angle of the offset in the tile,
which comes from a table: no trigonometric function per key. The table stays in registers, of which
the second warpgroup has enough, as the accumulators are in the third's.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import attention_tiles as tiles
from pallas_kernels.gpu.attention_tiles import MASKED, ROWS, Ring

TILE = ROWS  # slots
SHARED_BYTES = 224 << 10  # of one block's matrices; at most 227 KiB with barriers and reductions
LARGEST_RING = 4  # tiles
PIECE = 64  # columns that are prepared at once
READ_AHEAD = 8  # partial results that are under way at once


class Static(NamedTuple):
    """Everything static about one call.

    B, K, R, H, slots: as in the shape suffixes; ``K`` of ``cached_heads`` are read.
    page: slots that lie together, of a page or of a row.
    splits: of the work. paged: whether there is a page table.
    dtype: name of the caches' dtype. own_values: whether values are another cache than the keys.
    rotates: whether keys are rotated after reading.
    """

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
    def of(cls, call: Static, item, row_ref, b) -> _Tile:
        number = row_ref[b, 2] + item - row_ref[b, 0]
        lap = lax.div(number, jnp.int32(call.per_lap))
        begin = (number - lap * call.per_lap) * TILE
        slot = jnp.minimum(begin, call.slots - TILE)
        return cls(slot, lap * call.slots + slot, lap * call.slots + begin)


def partial_results(call: Static, inputs, caches, interpret):
    """What every split makes of every row that it has tiles of.

    Args:
      call: the static part.
      inputs: split_P4 and row_B8 from ``decode``; [first part of the layer, first key head] int32;
        scale_K float32 by which scores are multiplied, base 2; first_BQ and last_BQ int32 positions
        that the queries see; the page table if ``paged``; frequency_H, cos_CF and sin_CF float32 if
        ``rotates``; q_BKQH bfloat16.
      caches: keys, and values if ``own_values``: (parts, page, cached heads * H).
      interpret: ``plgpu.InterpretGPUParams()`` to run on a CPU.

    Returns:
      o_IKQH and lse_IKQ float32, normalised results and the base-2 logarithms of their weights;
      split p has written row b to ``p + b``, if it has tiles of it.
    """
    raw_slots, prepared_slots = call.ring_slots()
    buffers = 2 if call.own_values else 1
    partials, Q = call.splits + call.B - 1, -(-call.R // ROWS) * ROWS
    prepared = [tiles.smem(prepared_slots, TILE, call.H)] * (
        (2 if call.own_prepared_values else 1) if call.prepares else 0
    )
    scratch = {
        "q": tiles.smem(1, ROWS, call.H),
        "raw": [_raw_smem(call, raw_slots)] * buffers,
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


def _raw_smem(call: Static, slots: int):
    """Shared memory for tiles as they are cached, of which float8 ones are read in pieces."""
    if not call.converts:
        return tiles.smem(slots, TILE, call.H)
    return plgpu.SMEM(
        (slots, TILE, call.H),
        jnp.dtype(call.dtype),
        transforms=(plgpu.TilingTransform((8, PIECE)), plgpu.SwizzleTransform(PIECE)),
    )


class _Block:
    """One split of one key head and 64 query rows, worked off by three warpgroups."""

    def __init__(self, call: Static, refs, scratch, interpreted: bool):
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
        self.items = self.split_ref[self.split, 1] - self.begin

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
        self.raw.drain(self.items)

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
                    if call.converts and call.own_values:
                        self.convert(raw.buffers[1].at[slot], prepared.buffers[1].at[to])
                    self.rotate(slot, to, tables)
                else:
                    for source, target in zip(raw.buffers, prepared.buffers, strict=True):
                        self.convert(source.at[slot], target.at[to])
                plgpu.commit_smem()
                plgpu.barrier_arrive(prepared.ready.at[to])
                if call.converts:
                    raw.release(slot)

        self.rows(of_row)
        self.prepared.drain(self.items)

    def convert(self, source, target) -> None:
        for column in range(0, self.call.H, PIECE):
            columns = pl.ds(column, PIECE)
            target[:, columns] = _load(source.at[:, columns]).astype(target.dtype)

    def load_tables(self):
        """What stays in registers: the frequencies, once in each half of a vector, and cosines and
        sines of the offsets piece by piece."""
        frequency_ref, cos_ref, sin_ref = self.rotation
        strided = plgpu.Layout.WG_STRIDED((self.call.H,), self.call.H // 128)
        return plgpu.load(frequency_ref, layout=strided), [
            tuple(
                plgpu.load(
                    ref.at[:, pl.ds(column, PIECE)], layout=plgpu.Layout.WGMMA, optimized=False
                )
                for ref in (cos_ref, sin_ref)
            )
            for column in range(0, self.call.H // 2, PIECE)
        ]

    def rotate(self, slot, to, tables) -> None:
        call = self.call
        source, target = self.raw.buffers[0].at[slot], self.prepared.buffers[0].at[to]
        values = self.prepared.buffers[1].at[to] if call.converts and not call.own_values else None
        for column, (cos_CF, sin_CF) in zip(range(0, call.H // 2, PIECE), tables, strict=True):
            halves = pl.ds(column, PIECE), pl.ds(column + call.H // 2, PIECE)
            a, b = (_load(source.at[:, half]) for half in halves)
            if values is not None:
                values[:, halves[0]] = a.astype(jnp.bfloat16)
                values[:, halves[1]] = b.astype(jnp.bfloat16)
            # by the offset and then by the tile's first position: fewer registers than one turn by
            # the sum of the angles, for as many products
            a, b = a * cos_CF - b * sin_CF, b * cos_CF + a * sin_CF
            cos, sin = (
                tiles.along(
                    plgpu.load(
                        self.turn_smem.at[i, pl.ds(column, PIECE)],
                        layout=plgpu.Layout.WGMMA.reduce(0),
                        optimized=False,
                    ),
                    cos_CF.shape,
                    1,
                )
                for i in (0, 1)
            )
            target[:, halves[0]] = (a * cos - b * sin).astype(jnp.bfloat16)
            target[:, halves[1]] = (b * cos + a * sin).astype(jnp.bfloat16)

    # --- the third: attention ---------------------------------------------------------------------

    def attend(self) -> None:
        rows = pl.ds(self.tile * ROWS, ROWS)
        scale = self.scale_ref[self.base_ref[1] + self.head]

        def of_row(b, item, end):
            plgpu.copy_gmem_to_smem(
                self.q_ref.at[b, self.head, rows], self.q_smem.at[0], self.q_ready
            )
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
        q_smem = self.q_smem.at[tiles.not_hoisted(jnp.int32(0))]
        s_QC = tiles.product(q_smem, k_smem.at[k_slot].transpose((1, 0)))
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
