"""Array trees in object stores, by TensorStore alone: Orbax knows no s3:// and, for gs://, needs
three packages more for its metadata.

The layout is that of Orbax (``ocdbt.process_<k>``, a database of each process, and one that joins
them; an array is a zarr3 under its name), so that a step copied to a disk or from it is read there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from step_jax.core import storage
from step_jax.core.storage import Objects

_DATA_OBJECT_BYTES = 256 << 20  # an object is written in one request
_CHUNK_BYTES = 256 << 20
_READ_BYTES = 4 << 30  # that are read at a time, by one process


class Upload:
    """This process's part of a save, under way; see :func:`start_write`."""

    def __init__(self, base: dict[str, Any], flat: dict[str, Any]):
        self._base = base
        self._pieces: dict[str, tuple[Any, list[tuple[tuple[Any, ...], np.ndarray]]]] = {
            name: (_metadata(x), _pieces(x)) for name, x in flat.items()
        }

    def result(self) -> None:
        """Writes the arrays, and waits for the store to have them."""
        try:
            transaction = ts.Transaction()  # one commit: stores limit how often an object is set
            opened = {
                name: ts.open(
                    _array(self._base, name) | {"metadata": metadata},
                    create=True,
                    context=storage.context(),
                    transaction=transaction,
                )
                for name, (metadata, pieces) in self._pieces.items()
                if pieces
            }
            copies = []
            for name, array in opened.items():
                target = array.result()
                for index, values in self._pieces[name][1]:
                    part = target[index]
                    # Nobody changes them until the end: TensorStore need not hold copies.
                    written = part.write(values, can_reference_source_data_indefinitely=True)
                    copies.append(written.copy)
            for copy in copies:
                copy.result()
            transaction.commit_async().result()
            self._pieces = {}
        except Exception as error:  # noqa: BLE001 - TensorStore has one for every status
            raise storage.failure(error, f"write the arrays in {_shown(self._base)}") from error


def start_write(arrays: Objects, flat: dict[str, Any]) -> Upload:
    """Copies what this process writes to its memory; ``.result()`` uploads it.

    As :func:`step_jax.checkpoint.arrays.start_write`.
    """
    return Upload((arrays / f"ocdbt.process_{jax.process_index()}").spec, flat)


def join(arrays: Objects) -> None:
    """Makes one database of those of all processes; only their indices are copied."""
    parts = [arrays / f"ocdbt.process_{k}" for k in range(jax.process_count())]
    try:
        whole = _database(arrays.spec).result()
        transaction = ts.Transaction()
        opened = [_database(part.spec) for part in parts]
        copies = [
            part.result().experimental_copy_range_to(whole.with_transaction(transaction))
            for part in opened
        ]
        for copy in copies:
            copy.result()
        transaction.commit_async().result()
    except Exception as error:  # noqa: BLE001
        raise storage.failure(error, f"write the arrays in {arrays}") from error


def read(base: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Reads leaves: on their ``.sharding``, or as NumPy arrays where it is None.

    Args:
      base: TensorStore's specification of the key-value store that the database is in.
      wanted: by name, with the shapes and dtypes that they have there.
    """
    loaded: dict[str, Any] = {}
    waiting: dict[str, Callable[[], Any]] = {}
    size = 0
    try:
        opened = {
            name: ts.open(_array(base, name), open=True, read=True, context=storage.context())
            for name in wanted
        }
        for name, x in wanted.items():
            waiting[name] = _reading(opened[name].result(), x)
            size += math.prod(x.shape) * x.dtype.itemsize
            if size > _READ_BYTES:
                loaded |= {name: finish() for name, finish in waiting.items()}
                waiting, size = {}, 0
        return loaded | {name: finish() for name, finish in waiting.items()}
    except Exception as error:  # noqa: BLE001
        raise storage.failure(error, f"read the arrays in {_shown(base)}") from error


def _reading(array: Any, x: Any) -> Callable[[], Any]:
    """Starts reading an array; what is returned waits for it."""
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        whole = array.read()
        return lambda: np.asarray(whole.result())
    parts: dict[str, Any] = {}
    for index in sharding.addressable_devices_indices_map(x.shape).values():
        if str(index) not in parts:
            parts[str(index)] = array[index].read()
    return lambda: jax.make_array_from_callback(
        x.shape, sharding, lambda index: parts[str(index)].result()
    )


def _pieces(x: Any) -> list[tuple[tuple[Any, ...], np.ndarray]]:
    """What this process writes of an array: each part of it is written by one process."""
    if not isinstance(x, jax.Array):
        return [((...,), x)] if jax.process_index() == 0 else []
    return [
        (shard.index, np.array(shard.data))
        for shard in x.addressable_shards
        if not shard.replica_id
    ]


def _metadata(x: Any) -> dict[str, Any]:
    part = x.sharding.shard_shape(x.shape) if isinstance(x, jax.Array) else x.shape
    return {
        "shape": x.shape,
        "data_type": np.dtype(x.dtype).name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": _chunk(part, x.dtype.itemsize)},
        },
        "codecs": [{"name": "bytes"}],  # training state is noise: compression gains 8 %
    }


def _chunk(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """The largest parts of a shard, all alike, that are no larger than an object should be."""
    chunk = list(shape)
    axis = 0
    while math.prod(chunk) * itemsize > _CHUNK_BYTES and axis < len(chunk):
        divisor = next((d for d in range(2, chunk[axis] + 1) if chunk[axis] % d == 0), None)
        if divisor is None:
            axis += 1
        else:
            chunk[axis] //= divisor
    return chunk


def _array(base: dict[str, Any], name: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": _database_spec(base) | {"path": f"{name}/"}}


def _database(base: dict[str, Any]) -> Any:
    return ts.KvStore.open(_database_spec(base), context=storage.context())


def _database_spec(base: dict[str, Any]) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": base, "target_data_file_size": _DATA_OBJECT_BYTES}


def _shown(base: dict[str, Any]) -> str:
    return "/".join(base[part].strip("/") for part in ("bucket", "path") if part in base)
