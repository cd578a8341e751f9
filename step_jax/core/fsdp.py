"""Parameters that are split over devices: gathered at use, their gradients summed into the pieces.

Shape suffixes: R pieces of the batch, C pieces of the sequence (one of each on a device).

XLA for TPUs makes a reduce-scatter of a sum over a part of the mesh that lies in a plane of the
torus. Of one over the whole mesh, or in three dimensions, it makes an all-reduce and throws all but
a slice away: twice the bytes. Some gathers go the same way. So both are asked for axis by axis, and
for sums an FSDP axis that lies like that is *folded*: its outer part first, then its inner one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from step_jax.core.sharding import GATHERED_AXES, MeshAxes, Sharding, axes_of_entry

OUTER, INNER = "fsdp_outer", "fsdp_inner"


def whole(w, axes: tuple[str | None, ...], sharding: Sharding | None):
    """A parameter with these logical axes, whole along those that FSDP splits.

    For use in functions with a gradient rule of their own; else see :func:`gathered`.
    """
    if sharding is None or sharding.mesh.size == 1:
        return w
    stored = [_on(sharding.mesh, entry) for entry in sharding.spec(axes, w.shape)]
    for step in reversed(_steps(stored)):
        w = jax.lax.with_sharding_constraint(w, NamedSharding(sharding.mesh, step))
    return sharding.constrain(w, *(None if a in GATHERED_AXES else a for a in axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(w, axes: tuple[str | None, ...], sharding: Sharding | None):
    """:func:`whole`, with a gradient that goes straight to the parameter's layout.

    The transpose of a constraint is the same constraint: a whole gradient on every device.
    """
    return whole(w, axes, sharding)


def _forward(w, axes, sharding):
    return whole(w, axes, sharding), None


def _backward(axes, sharding, _, g):
    if sharding is None or sharding.mesh.size == 1:
        return (g,)
    mesh = _folded(sharding.mesh)
    spec = sharding.spec(axes, g.shape)
    for step in _steps([_on(mesh, entry) for entry in spec]):
        g = jax.lax.with_sharding_constraint(g, NamedSharding(mesh, step))
    return (jax.lax.with_sharding_constraint(g, NamedSharding(sharding.mesh, spec)),)


def _steps(stored: list[MeshAxes]) -> list[PartitionSpec]:
    """Layouts on the way from a whole array to one with these mesh axes, one more axis in each."""
    cut = max(stored, key=len)
    return [
        PartitionSpec(*(entry[:n] if entry is cut else entry for entry in stored))
        for n in range(1, len(cut))
    ]


gathered.defvjp(_forward, _backward)


def add_up(parts_RC, axes: Sequence[str | None], sharding: Sharding):
    """The sum of what every device adds to a parameter's gradient, in the parameter's layout.

    Args:
      parts_RC: (R, C, *shape), whole along what FSDP splits.
      axes: logical axes of the parameter.

    Returns:
      (*shape), of the same dtype.
    """
    if sharding.mesh.size == 1:
        return parts_RC.sum((0, 1))
    mesh = _folded(sharding.mesh)
    stored = tuple(_on(mesh, entry) for entry in sharding.spec(axes, parts_RC.shape[2:]))
    batch, sequence = (_on(mesh, sharding.mesh_axes(a)) for a in ("batch", "sequence"))
    adding = {*batch, *sequence}

    def local(x):
        x, done = x[0, 0], set()
        for dimension, names in enumerate(stored):
            for name in (a for a in names if a in adding):
                x = jax.lax.psum_scatter(x, name, scatter_dimension=dimension, tiled=True)
                # libtpu 0.0.52 fails when it looks for sums to take out of the loop of microbatches
                x = jax.lax.optimization_barrier(x)
                done.add(name)
        rest = tuple(sorted(adding - done))
        return jax.lax.psum(x, rest) if rest else x

    kept = (tuple(a for a in names if a not in adding) for names in stored)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=PartitionSpec(batch, sequence, *kept),
        out_specs=PartitionSpec(*stored),
    )(parts_RC)


# --- Folding ------------------------------------------------------------------------------------


def fold(devices: Sequence, everywhere: int) -> int:
    """Size of the inner part of an FSDP axis on ``devices``; 1 if the axis is better in one piece.

    The cut is where the axis' innermost dimension of the torus begins anew. GPUs need none.
    Simulated devices are cut in pairs, so that what a TPU computes can be tested.

    Args:
      devices: those along the axis.
      everywhere: devices of the mesh.
    """
    if len(devices) < 4 or devices[0].platform == "gpu":
        return 1
    whole_mesh = len(devices) == everywhere
    if devices[0].platform != "tpu":
        return 2 if whole_mesh and len(devices) % 2 == 0 else 1
    if len({getattr(d, "slice_index", 0) for d in devices}) > 1:
        return 1  # the compiler sums within slices first
    places = np.array([(*d.coords, d.core_on_chip) for d in devices])
    differs = places != places[0]
    if differs.any(axis=0).sum() < (2 if whole_mesh else 3):
        return 1
    innermost = differs[1]  # what tells the second device from the first
    run = int((~differs[:, ~innermost].any(axis=1)).cumprod().sum())
    return run if len(devices) % run == 0 else 1


@functools.lru_cache
def _folded(mesh: Mesh) -> Mesh:
    """The same devices with the FSDP axis as two; the mesh itself if it is better as one."""
    at = mesh.axis_names.index("fsdp")
    devices = np.moveaxis(mesh.devices, at, -1)
    inner = fold(devices.reshape(-1, devices.shape[-1])[0], mesh.size)
    if inner == 1:
        return mesh
    shape, names = list(mesh.devices.shape), list(mesh.axis_names)
    shape[at : at + 1] = [shape[at] // inner, inner]
    names[at : at + 1] = [OUTER, INNER]
    types = (AxisType.Auto,) * len(names)
    return Mesh(mesh.devices.reshape(shape), tuple(names), axis_types=types)


def _on(mesh: Mesh, entry: str | MeshAxes | None) -> MeshAxes:
    """An entry of a PartitionSpec on a mesh that may be folded, without axes of one device."""
    parts = {} if "fsdp" in mesh.axis_names else {"fsdp": (OUTER, INNER)}
    names = (part for a in axes_of_entry(entry) for part in parts.get(a, (a,)))
    return tuple(a for a in names if mesh.shape[a] > 1)
