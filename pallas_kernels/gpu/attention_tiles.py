"""What the forward and backward attention kernels for Hopper share: tiles, masks, the TMA ring.

Shape suffixes: B batch, T queries, S keys, N query heads, H head width; within a kernel Q rows of
a query tile, K rows of a key tile.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

ROWS = 64  # rows of one wgmma; every tile is this many queries or keys per warpgroup
LOG2E = math.log2(math.e)
# A power of two: its product with any scale is exact, so exp2(scale * MASKED - m) has no rounding
# residue of 2**76 when a whole row of a tile is masked, and no infinity can meet another.
MASKED = -(2.0**100)
PAIR = "pair"  # cluster axis


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query may see, as far as it is known when the kernel is built.

    Attributes:
      causal: keys after the query are hidden.
      bounded: every query also has a first key and every key a last query (a window, packed
        documents), given to the kernels as int32 arrays; needs ``causal``.
    """

    causal: bool
    bounded: bool = False

    def hide(self, s, crossing, q_axis: int, q_base, k_base, *, first_Q=None, last_K=None):
        """The scores of a tile with what is hidden replaced.

        Args:
          s: float32 scores of 64 queries and 64 keys.
          crossing: scalar, whether the tile crosses the diagonal; otherwise all of it lies before.
          q_axis: where the queries lie in ``s``, 0 or 1.
          q_base, k_base: index of the first query and key of the tile.
          first_Q: first key of each query, needed if ``bounded`` and ``q_axis`` is 0.
          last_K: last query of each key, needed if ``bounded`` and ``q_axis`` is 1.
        """
        if not self.causal:
            return s

        # All in columns of the tile: what depends on the tile is added to one number a row. An
        # index of every element would be made before the loop and held, and spill at width 256.
        ahead = q_base - k_base if q_axis == 0 else k_base - q_base

        def hidden(s):
            column = iota(s.shape, 1)
            diagonal = along(row_iota(s.shape[0]) + ahead, s.shape, 0)
            visible = column <= diagonal if q_axis == 0 else column >= diagonal
            if first_Q is not None:
                visible = visible & (column >= along(first_Q - k_base, s.shape, 0))
            if last_K is not None:
                visible = visible & (column <= along(last_K - q_base, s.shape, 0))
            return jnp.where(visible, s, MASKED)

        return hidden(s) if self.bounded else lax.cond(crossing, hidden, lambda s: s, s)


def smem(*shape: int, dtype=jnp.bfloat16):
    """Shared memory for matrices read by wgmma and TMA: (8, 64) tiles, 128-byte swizzle."""
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
    )


def iota(shape, dimension: int):
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA)


def row_iota(rows: int):
    """Indices of the rows of a tile, one number each as :func:`per_row`."""
    return plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=plgpu.Layout.WGMMA.reduce(1))


def along(x, shape, axis: int):
    """A row or column vector broadcast over a tile; ``axis`` is where it lies."""
    return lax.broadcast_in_dim(x, shape, [axis])


def product(a, b):
    """``a @ b`` in float32, a fresh wgmma accumulator. Shapes (64, k) and (k, n)."""

    def body(acc_ref):
        plgpu.wgmma(acc_ref, a, b)
        return acc_ref[...]

    return pl.run_scoped(body, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def add_product(acc, a, b_ref, *, interpret: bool):
    """``acc + a @ b`` in the registers of ``acc``; ``a`` is in registers, ``b`` in shared memory.

    The interpreter knows neither ``pl.run_state`` on an accumulator nor operands in registers, so
    there it is a plain product. Its read of ``b`` is fenced, as that of a wgmma needs not be: the
    race detector would otherwise see the next copy into ``b`` overtake it.
    """
    if interpret:
        b = b_ref[...]
        plgpu.commit_smem()
        return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b_ref))(plgpu.ACC.init(acc))


def zeros(*shape: int):
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def per_row(ref):
    """One number for each of the 64 rows of a tile, from global memory to registers."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def shared_by(pair: int) -> str | None:
    """Cluster axis over which a copy is multicast, None without a pair."""
    return PAIR if pair == 2 else None


def freed(slots: int, arrivals: int, pair: int):
    """Barriers on which the readers of a ring's slots arrive, in every block of the cluster."""
    if pair == 2:
        return plgpu.ClusterBarrier(
            collective_axes=(PAIR,), num_arrivals=arrivals, num_barriers=slots
        )
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots)


@dataclasses.dataclass(frozen=True)
class Ring:
    """A buffer of ``slots`` tiles filled by TMA from one warpgroup and read by others.

    Attributes:
      buffers: SMEM refs whose leading axis is the slot, filled together.
      ready: barriers, one a slot, with one arrival per buffer.
      free: barriers from :func:`freed`.
      pair: blocks in the cluster, all of which fill the same tiles in the same order.
    """

    buffers: Sequence[Any]
    ready: Any
    free: Any
    slots: int
    pair: int

    def fill(self, step, sources: Sequence[Any]) -> None:
        """Starts the copies of tile ``step`` once the readers have left its slot."""
        slot = lax.rem(step, jnp.int32(self.slots))
        self.wait_free(step, slot)
        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(
                source,
                buffer.at[slot],
                self.ready.at[slot],
                collective_axes=shared_by(self.pair),
            )

    def wait_free(self, step, slot) -> None:
        """Waits until the readers of the tile before ``step`` have left ``slot``."""
        pl.when(step >= self.slots)(lambda: plgpu.barrier_wait(self.free.at[slot]))

    def drain(self, steps) -> None:
        """Waits for the readers of the last tiles, so that no block of a cluster ends while
        another still sends to it."""
        for slot in range(self.slots):
            pl.when(slot < steps)(lambda slot=slot: plgpu.barrier_wait(self.free.at[slot]))

    def wait(self, step):
        """Waits for tile ``step``; returns its slot."""
        slot = lax.rem(step, jnp.int32(self.slots))
        plgpu.barrier_wait(self.ready.at[slot])
        return slot

    def release(self, slot) -> None:
        plgpu.barrier_arrive(self.free.at[slot])


def split_registers(producer: Callable[[], None], *consumers: Callable[[], None]) -> None:
    """Runs ``producer`` in the third warpgroup of three and the consumers in the first two.

    One consumer is run by both (it asks for its index itself), two are run by one each. Of the 168
    registers a thread is born with, the producer keeps 24 and the consumers get 240.
    """
    wg = lax.axis_index("wg")

    @pl.when(wg == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        producer()

    for index, consumer in enumerate(consumers):
        mine = wg == index if len(consumers) == 2 else wg < 2

        @pl.when(mine)
        def _(consumer=consumer):
            plgpu.set_max_registers(240, action="increase")
            consumer()


def not_hoisted(index):
    """``index``, of which the compiler does not know that it stays the same through a loop.

    The operands that stay in shared memory for a whole loop would otherwise have the addresses of
    all their wgmma slices computed once before it and held in registers, which spill at width 256.
    """
    return lax.optimization_barrier(index)
