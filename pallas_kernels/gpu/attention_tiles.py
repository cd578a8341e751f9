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

    def apply(self, s, q_index, k_index, *, first_q=None, last_k=None):
        """Scores with hidden entries replaced; the arguments broadcast against ``s``."""
        if not self.causal:
            return s
        visible = q_index >= k_index
        if first_q is not None:
            visible = visible & (k_index >= first_q)
        if last_k is not None:
            visible = visible & (q_index <= last_k)
        return jnp.where(visible, s, MASKED)


def smem(*shape: int, dtype=jnp.bfloat16):
    """Shared memory for matrices read by wgmma and TMA: (8, 64) tiles, 128-byte swizzle."""
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
    )


def iota_QK(shape, dimension: int):
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA)


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
    there it is a plain product.
    """
    if interpret:
        return acc + jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b_ref))(plgpu.ACC.init(acc))


def zeros(*shape: int):
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


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
        pl.when(step >= self.slots)(lambda: plgpu.barrier_wait(self.free.at[slot]))
        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(
                source,
                buffer.at[slot],
                self.ready.at[slot],
                collective_axes=shared_by(self.pair),
            )

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


def in_warpgroups(producer: Callable[[], None], *consumers: Callable[[], None]) -> None:
    """Runs each consumer in its own warpgroup and the producer in the last.

    Registers are moved from the producer to the consumers (24 and 240 of the 168 each is born
    with; three warpgroups).
    """
    wg = lax.axis_index("wg")
    for index, consumer in enumerate(consumers):

        @pl.when(wg == index)
        def _(consumer=consumer):
            plgpu.set_max_registers(240, action="increase")
            consumer()

    @pl.when(wg == len(consumers))
    def _():
        plgpu.set_max_registers(24, action="decrease")
        producer()
