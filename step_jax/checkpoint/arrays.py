"""Array trees on disk: the only file that knows Orbax. In object stores: ``remote_arrays``.

A state is written as one flat dictionary {dotted leaf path: array}. The files therefore do not
depend on Python classes, and a part of a state ("params") can be read alone.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.checkpoint.errors import CheckpointError, CheckpointMismatch
from step_jax.core.storage import Objects

ARRAYS = "arrays"
_SHOWN = 20


def flatten(tree: Any, subtree: str = "") -> dict[str, Any]:
    """Leaves by dotted path, such as ``params.layers.query``; None is no leaf.

    ``subtree`` is where the tree hangs in the whole state, such as ``params``.
    """
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        below = jax.tree_util.keystr(path, simple=True, separator=".")
        name = ".".join(part for part in (subtree, below) if part) or "value"
        if name in flat:
            raise CheckpointError(f"two leaves of the state share the path {name!r}: rename one")
        flat[name] = leaf
    return flat


def describe(flat: dict[str, Any]) -> dict[str, list]:
    """{path: [shape, dtype name]} of arrays or ShapeDtypeStructs."""
    for name, leaf in flat.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise CheckpointError(
                f"state leaf {name!r} is a {type(leaf).__name__}, not an array: "
                "put it into the metadata or make it an array"
            )
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise CheckpointError(
                f"state leaf {name!r} is a typed random key: store jax.random.key_data(key)"
            )
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in flat.items()}


def check_match(stored: dict[str, list], expected: dict[str, list], where: str) -> None:
    """Raises CheckpointMismatch that names every differing leaf."""
    lines = [f"  {n}: not in the checkpoint" for n in sorted(expected.keys() - stored.keys())]
    lines += [f"  {n}: only in the checkpoint" for n in sorted(stored.keys() - expected.keys())]
    for name in sorted(stored.keys() & expected.keys()):
        (shape, dtype), (want_shape, want_dtype) = stored[name], expected[name]
        if shape != want_shape or dtype != want_dtype:
            lines.append(f"  {name}: stored {dtype}{shape}, expected {want_dtype}{want_shape}")
    if not lines:
        return
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    raise CheckpointMismatch(
        "\n".join(
            [
                f"{where} holds another state than this configuration makes "
                f"({len(lines)} of {len(stored.keys() | expected.keys())} leaves differ):",
                *lines[:_SHOWN],
                *more,
                "Use the configuration that made the checkpoint, or another run directory.",
            ]
        )
    )


def nbytes(flat: dict[str, Any]) -> int:
    """Bytes of the whole state on disk, all processes together."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in flat.values())


class HostSnapshot:
    """Copies of arrays in host buffers that are used again for every save.

    Fresh memory would cost a page fault for every 4 kB, ten times the copy itself. The price is
    that the process holds one more state in host memory from the first save on; that is why
    only states that live in host memory anyway (CPU devices, NumPy) are copied this way.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def take(self, flat: dict[str, Any]) -> dict[str, Any] | None:
        """The values as NumPy arrays, valid until the next call; None for accelerator arrays.

        NumPy leaves (replay buffers and the like) are copied too: callers change them in place.
        """
        devices = {d for x in flat.values() if isinstance(x, jax.Array) for d in x.devices()}
        if any(d.platform != "cpu" for d in devices):
            return None
        return {name: self._copy(name, x) for name, x in flat.items()}

    def _copy(self, name: str, x: Any) -> np.ndarray:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != x.shape or buffer.dtype != x.dtype:
            buffer = self._buffers[name] = np.empty(x.shape, x.dtype)
        if isinstance(x, jax.Array):
            for shard in x.addressable_shards:
                if shard.replica_id == 0:
                    buffer[shard.index] = np.asarray(shard.data)
        else:
            buffer[...] = x
        return buffer


@jax.jit
def _sum_of_zeros(arrays: list[jax.Array]) -> jax.Array:
    # x * 0 is 0 for every finite x and NaN otherwise: one pass, no overflow, and half the
    # compile time of isfinite(x).all().
    return sum((jnp.sum(x * jnp.zeros((), x.dtype), dtype=x.dtype) for x in arrays), jnp.zeros(()))


def all_finite(flat: dict[str, Any]) -> jax.Array | np.ndarray:
    """Scalar that is 0 if every floating-point leaf is finite, else NaN (not waited for)."""
    floating = [x for x in flat.values() if jnp.issubdtype(x.dtype, jnp.inexact) and x.size]
    return _sum_of_zeros(floating) if floating else np.zeros(())


@functools.cache
def _orbax() -> Any:
    from orbax.checkpoint import v1  # half a CPU-second: not before the first save or restore

    return v1


def _context() -> Any:
    context = _orbax().Context()
    saving = context.array.saving
    saving.use_compression = False  # training state is noise: zstd costs seconds and saves 8 %
    saving.enable_write_sharding_file = False  # the reader always states its own shardings
    saving.array_metadata_store = None
    saving.enable_post_merge_validation = False  # the manifest's checksums see more
    context.memory.deepcopy_host_arrays = False  # `HostSnapshot` has copied them
    context.pytree.loading.partial_load = True
    return context


def start_write(path: Path | Objects, flat: dict[str, Any]) -> Any:
    """Write arrays; returns what has a ``.result()`` that waits for the files.

    On return JAX arrays may be donated; NumPy arrays must stay as they are until the end.
    Collective: every process calls it, from its main thread if there are several. Once all have
    written, one calls `join`.
    """
    stored = {name: x for name, x in flat.items() if x.size}  # Orbax rejects empty arrays
    if isinstance(path, Objects):
        return _remote().start_write(path / ARRAYS, stored)
    with _context():
        return _orbax().save_async(str(path), stored, checkpointable_name=ARRAYS)


def join(path: Path | Objects) -> None:
    """Make one set of arrays of what the processes have written; Orbax has done it itself."""
    if isinstance(path, Objects):
        _remote().join(path / ARRAYS)


def _remote() -> Any:
    from step_jax.checkpoint import remote_arrays  # TensorStore: not before it is needed

    return remote_arrays


def read(path: Path | Objects, wanted: dict[str, Any]) -> dict[str, Any]:
    """Read the named leaves: on their ``.sharding``, or as NumPy arrays where it is None.

    Shapes and dtypes must have been checked before: Orbax casts silently.
    """

    def abstract(x: Any) -> Any:
        sharding = getattr(x, "sharding", None)
        if sharding is None:
            return np.broadcast_to(np.zeros((), x.dtype), x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    request = {name: abstract(x) for name, x in wanted.items()}
    empty = {n: _zeros(x) for n, x in request.items() if not np.prod(x.shape)}
    request = {n: x for n, x in request.items() if n not in empty}
    if not request:
        return empty
    if isinstance(path, Objects):
        return {**_remote().read((path / ARRAYS).spec, request), **empty}
    if not (path / ARRAYS / "_METADATA").exists():  # a step that was copied from an object store
        base = {"driver": "file", "path": f"{path / ARRAYS}/"}
        return {**_remote().read(base, request), **empty}
    with _context():
        loaded = _orbax().load(str(path), request, checkpointable_name=ARRAYS)
    return {**loaded, **empty}


def _zeros(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.zeros(x.shape, x.dtype)
    return jax.jit(lambda: jnp.zeros(x.shape, x.dtype), out_shardings=x.sharding)()
