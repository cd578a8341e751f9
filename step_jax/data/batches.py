"""From the rows that a process reads to the arrays that a mesh computes on."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding

#: logical axes of a batch's leading dimensions; further ones are not sharded
BATCH_AXES = ("batch", "sequence")


def batch_sharding(sharding: Sharding, shape: tuple[int, ...], axes=BATCH_AXES):
    """NamedSharding of a global batch array (B, ...): ``axes`` name its leading dimensions."""
    names = (*axes[: len(shape)], *(None,) * (len(shape) - len(axes)))
    return sharding.named(names, shape)


def process_rows(sharding: Sharding, batch_size: int) -> tuple[int, int]:
    """(index, count): this process reads the ``index``-th of ``count`` equal parts of a batch.

    Processes that share rows (their devices differ along context or tensor) read the same part.
    """
    spread = batch_sharding(sharding, (batch_size,)).addressable_devices_indices_map((batch_size,))
    rows = [(s.start or 0, batch_size if s.stop is None else s.stop) for (s,) in spread.values()]
    low, high = min(r[0] for r in rows), max(r[1] for r in rows)
    size = high - low
    if batch_size % size or low % size:
        raise ConfigError(
            f"the devices of process {jax.process_index()} hold rows {low}..{high - 1} of "
            f"{batch_size}: give every process a block of the batch of equal size"
        )
    return low // size, batch_size // size


def to_mesh(sharding: Sharding, batch: Any, batch_size: int, axes=BATCH_AXES) -> Any:
    """A tree of global arrays (batch_size, ...) from this process's rows as NumPy arrays."""
    if sharding.mesh.size == 1:
        return jax.device_put(batch, sharding.mesh.devices.flat[0])
    index, count = process_rows(sharding, batch_size)
    low = index * (batch_size // count)

    def leaf(local: np.ndarray):
        shape = (batch_size, *local.shape[1:])

        def piece(where: tuple[slice, ...]):
            rows = slice((where[0].start or 0) - low, (where[0].stop or batch_size) - low)
            return local[(rows, *where[1:])]

        return jax.make_array_from_callback(shape, batch_sharding(sharding, shape, axes), piece)

    return jax.tree.map(leaf, batch)


def abstract_batch(sharding: Sharding, batch: Any, batch_size: int, axes=BATCH_AXES) -> Any:
    """Shapes, dtypes and shardings of ``to_mesh(sharding, batch, batch_size)``."""

    def leaf(local):
        shape = (batch_size, *local.shape[1:])
        return jax.ShapeDtypeStruct(
            shape, local.dtype, sharding=batch_sharding(sharding, shape, axes)
        )

    return jax.tree.map(leaf, batch)
