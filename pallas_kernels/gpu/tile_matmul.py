"""Products in tiles on Hopper (sm_90a): what the grouped matmul and the cross-entropy share.

A tile is 128 rows and up to 256 columns of a result, 64 rows in each of two warpgroups; a third
warpgroup brings in the operands by TMA, 64 of the summed dimension at a time. A block goes on to
its next tile without a pause (persistent), so the operands of that one arrive while the results of
the last are made and written. Two blocks, neighbouring columns of the same rows, form a cluster and
multicast the left operand: without that the L2 cache is the limit.

Shape suffixes: r the 64 rows of a warpgroup, f the columns of a tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import attention_tiles as tiles
from pallas_kernels.gpu.attention_tiles import PAIR, ROWS, Ring

TILE = 2 * ROWS
STEP = 64  # of the summed dimension in one slot: a swizzled row of bfloat16
BLOCKS = 132  # multiprocessors of an H100 or H200 SXM; others only balance less well
BAND = 6  # clusters of columns that are made together, so that both operands stay in the L2 cache
RING_BYTES = 144 * 2**10  # of 227 KiB; the tile that is written takes 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a result is cut up.

    Attributes:
      f: columns of a tile.
      pair: blocks in a cluster.
      columns: tiles of columns of a cluster.
      tiles: tiles of a cluster in the whole result.
    """

    f: int
    pair: int
    columns: int
    tiles: int

    @classmethod
    def of(cls, tiles_of_rows: int, F: int) -> Plan:
        f = 256 if F % 256 == 0 else 128
        pair = 2 if F // f % 2 == 0 else 1
        columns = F // f // pair
        return cls(f, pair, columns, tiles_of_rows * columns)

    @property
    def slots(self) -> int:
        return RING_BYTES // (2 * STEP * (TILE + self.f))

    def walk(self, body: Callable, step):
        """Folds ``step = body(tile of rows, first column, step)`` over the tiles of this block."""
        blocks = self.blocks
        mine, pair = lax.axis_index("block"), lax.axis_index(PAIR)
        count = lax.div(self.tiles - 1 - mine, jnp.int32(blocks)) + 1
        shape = self.tiles // self.columns, self.columns

        def tile(n, step):
            i, j = plgpu.planar_snake(mine + n * blocks, shape, 1, BAND)
            return body(i, (j * self.pair + pair) * self.f, step)

        return lax.fori_loop(0, count, tile, step)

    @property
    def blocks(self) -> int:
        return min(self.tiles, BLOCKS // self.pair)

    def kernel(self, body, out_type, out_smem, a_slot, b_slot, name: str, interpret, *scratch):
        """``body(*inputs, out, out_smem, *scratch, a_smem, b_smem, operands)`` in every block.

        ``a_smem`` holds (warpgroup, slot, *a_slot), ``b_smem`` (slot, *b_slot).
        """
        wide, slots = tiles.smem, self.slots

        def block(*refs):
            *refs, a_smem, b_smem, a_ready, b_ready, a_free, b_free = refs
            a_halves = [a_smem.at[0], a_smem.at[1]]  # one a warpgroup
            ring_a = Ring(a_halves, a_ready, a_free, slots, self.pair)
            ring_b = Ring([b_smem], b_ready, b_free, slots, 1)
            body(*refs, a_smem, b_smem, Operands(ring_a, ring_b))

        return plgpu.kernel(
            block,
            out_type=out_type,
            scratch_types=[
                out_smem,
                *scratch,
                wide(2, slots, *a_slot),
                wide(slots, *b_slot),
                plgpu.Barrier(num_arrivals=2, num_barriers=slots),
                plgpu.Barrier(num_barriers=slots),
                tiles.freed(slots, 2, self.pair),
                tiles.freed(slots, 2, 1),
            ],
            grid=(self.blocks,),
            grid_names=("block",),
            cluster=(self.pair,),
            cluster_names=(PAIR,),
            num_threads=3,
            thread_name="wg",
            kernel_name=name,
            compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
            interpret=interpret,
        )


@dataclasses.dataclass(frozen=True)
class Operands:
    """The two rings that feed a product.

    Attributes:
      a, b: rings of left and right operands, of the same number of slots; the left ones are the
        halves of the two warpgroups.
    """

    a: Ring
    b: Ring

    def fill(self, step, ahalves, b) -> None:
        self.a.fill(step, ahalves)
        self.b.fill(step, [b])

    def drain(self, steps) -> None:
        self.a.drain(steps)
        self.b.drain(steps)

    def wait(self, step):
        self.a.wait(step)
        return self.b.wait(step)

    def release(self, step) -> None:
        slot = lax.rem(step, jnp.int32(self.a.slots))
        self.a.release(slot)
        self.b.release(slot)

    def skip(self, step, count) -> None:
        """Lets ``count`` steps pass that this warpgroup does not need.

        In a cluster one thread releases for its warpgroup. Where a product does not hold the four
        warps together, a barrier must: one that fell behind would miss the slot's next phase.
        """

        @pl.loop(0, count)
        def _(k):
            self.wait(step + k)
            plgpu.commit_smem()  # nothing was written; it is the barrier of a warpgroup
            self.release(step + k)

    def add_products(self, acc_ref, step, count, left, right) -> None:
        """``acc_ref += left(slot) @ right(slot)`` over ``count`` steps.

        A product runs while the next is issued, so its slot is released one step later.
        """

        @pl.loop(0, count)
        def _(k):
            slot = self.wait(step + k)
            plgpu.wgmma(acc_ref, left(slot), right(slot))
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: self.release(step + k - 1))

        plgpu.wgmma_wait(0)
        pl.when(count > 0)(lambda: self.release(step + count - 1))


def halves(first):
    """First rows or columns of the two warpgroups' shares of a tile."""
    return first, first + ROWS


def row_rf(shape):
    """Index of the row in a (64, f) array."""
    return tiles.iota(shape, 0)
