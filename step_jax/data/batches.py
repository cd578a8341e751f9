"""A batch's way to the mesh, and into microbatches; see ``data.schema`` for what it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.data.schema import ROWS, Field, Schema, check


def process_rows(sharding: Sharding, rows: int) -> tuple[int, int]:
    """(index, count): this process reads the ``index``-th of ``count`` equal parts of the rows.

    Processes that share rows (their devices differ along context or tensor) read the same part.

    Raises:
      ConfigError: the mesh does not divide the rows, or this process's are no such part.
    """
    if rows % (ways := sharding.ways(ROWS)):
        fits = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise ConfigError(
            f"a batch of {rows} rows cannot be cut into {ways} equal parts, which the mesh does "
            f"(data, fsdp, expert and pipeline together): give it a multiple of {ways} rows. A run "
            f"that goes on keeps its batch, and goes on where it is cut into {fits}"
        )
    layout = sharding.named((ROWS,), (rows,)).addressable_devices_indices_map((rows,))
    slices = [where[0] for where in layout.values() if where is not None]
    spans = [(s.start or 0, rows if s.stop is None else s.stop) for s in slices]
    low, high = min(s[0] for s in spans), max(s[1] for s in spans)
    size = high - low
    if rows % size or low % size:
        raise ConfigError(
            f"the devices of process {jax.process_index()} hold rows {low}..{high - 1} of "
            f"{rows}: give every process a block of the batch of equal size"
        )
    return low // size, rows // size


def to_mesh(sharding: Sharding, schema: Schema, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Global arrays on the mesh from this process's part of a batch (NumPy arrays).

    Raises:
      DataError: see :func:`check`.
    """
    parts = {name: _part(sharding, field) for name, field in schema.items()}
    check(schema, batch, max((count for _, count in parts.values()), default=1))
    if sharding.mesh.size == 1:
        return jax.device_put(dict(batch), sharding.mesh.devices.flat[0])

    def array(name: str, field: Field):
        axis, (index, count) = field.row_axis, parts[name]
        low = 0 if axis is None else index * (field.shape[axis] // count)

        def piece(where: tuple[slice, ...] | None):
            assert where is not None  # a mesh's device has a part of the array
            if axis is not None:
                start, stop = where[axis].start or 0, where[axis].stop or field.shape[axis]
                where = (*where[:axis], slice(start - low, stop - low), *where[axis + 1 :])
            return batch[name][where]

        layout = sharding.named(field.axes, field.shape)
        return jax.make_array_from_callback(field.shape, layout, piece)

    return {name: array(name, field) for name, field in schema.items()}


def _part(sharding: Sharding, field: Field) -> tuple[int, int]:
    axis = field.row_axis
    return (0, 1) if axis is None else process_rows(sharding, field.shape[axis])


def abstract_batch(sharding: Sharding, schema: Schema) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of what ``to_mesh`` gives.

    Raises:
      ConfigError: an axis that the mesh does not divide; it names the array.
    """

    def leaf(name: str, field: Field):
        try:
            layout = sharding.named(field.axes, field.shape)
        except ConfigError as error:
            raise ConfigError(f"the batch's array {name}: {error}") from None
        return jax.ShapeDtypeStruct(field.shape, np.dtype(field.dtype), sharding=layout)

    return {name: leaf(name, field) for name, field in schema.items()}


def microbatches(schema: Schema, batch: Mapping[str, Any], count: int):
    """A function of i: microbatch i of ``count``; row r of an array is in number r % count.

    Rows lie in contiguous blocks on the devices, so every device keeps its own rows. An array
    without rows is in every microbatch.

    Raises:
      ConfigError: rows that do not divide; it names the array.
    """
    cut = {}  # name -> (array, the axis of its microbatches)
    for name, field in schema.items():
        axis, array = field.row_axis, batch[name]
        if axis is not None:
            rows = array.shape[axis]
            if rows % count:
                raise ConfigError(
                    f"a batch of {rows} rows ({name}) cannot be split into {count} microbatches; "
                    "make the batch a multiple of the accumulation"
                )
            # (count, rows / count) would tear every device's block apart
            shape = (*array.shape[:axis], rows // count, count, *array.shape[axis + 1 :])
            cut[name] = array.reshape(shape), axis + 1

    def microbatch(i):
        return {
            name: jax.lax.dynamic_index_in_dim(cut[name][0], i, cut[name][1], False)
            if name in cut
            else array
            for name, array in batch.items()
        }

    return microbatch
