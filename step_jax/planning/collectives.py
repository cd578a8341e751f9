"""What a compiled program communicates: bytes by kind of collective and by axis of the mesh."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from step_jax.planning.hlo import COLLECTIVES, Computation, Instruction, Module, continued

#: What stands before the axis of a collective whose groups are only pieces of it.
PART_OF = "part of "

#: What follows the axis of a collective that crosses from slice to slice.
BETWEEN_SLICES = " between slices"

#: The TPU compiler leaves what crosses slices to its runtime: a ``send`` to the host with a note.
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over one group of mesh axes, of one device and one call.

    Attributes:
      kind: of ``hlo.COLLECTIVES``.
      axes: mesh axes along which the devices of a group differ, joined by ``+``; with ``PART_OF``
        before it where a group is only a piece of them.
      calls: how many, loops included.
      nbytes: that a device sends with the best algorithm on a ring of n devices: (n-1)/n of what
        it holds for a reduce-scatter and an all-to-all, n-1 times for an all-gather, twice (n-1)/n
        for an all-reduce. Of a ragged all-to-all the rows of an even load.
      group: where the members of one group stand in the mesh, if it is only a piece of the axes.
    """

    kind: str
    axes: str
    calls: float
    nbytes: float
    group: tuple[int, ...] = field(default=(), compare=False, repr=False)

    @property
    def links(self) -> str:
        """The mesh axes whose links it takes, which pieces of an axis share with the whole."""
        return self.axes.removeprefix(PART_OF)

    @property
    def where(self) -> str:
        """In words: along which axes."""
        if not self.group:
            return self.axes
        return f"{self.links} in groups of {len(self.group)}"


def communication(
    module: Module,
    executions: dict[str, float],
    mesh_shape: dict[str, int],
    slices: tuple[str, int] | None = None,
) -> list[Traffic]:
    """All collectives of a module on a mesh, the largest first.

    Args:
      mesh_shape: axis -> size, in the order of the mesh.
      slices: the mesh axis that crosses the slices and their number, if there are several.
    """
    totals: dict[tuple[str, str, tuple[int, ...]], list[float]] = defaultdict(lambda: [0.0, 0.0])
    repeated = continued(module)
    for name, times in executions.items():
        computation = module.computations[name]
        for i in computation.instructions.values():
            kind = i.opcode.removesuffix("-start")
            if slices and i.opcode == "send" and (found := _BETWEEN.search(i.attributes)):
                kind = found[1].lower().replace("_", "-")
                entry = totals[kind, slices[0] + BETWEEN_SLICES, ()]
                entry[0] += times
                held = computation.instructions[i.operands[0]].nbytes
                entry[1] += times * sent(kind, held, slices[1])
                continue
            if kind not in COLLECTIVES or (name, i.name) in repeated:
                continue
            groups = replica_groups(i.attributes, math.prod(mesh_shape.values()))
            size = max(map(len, groups))
            if size < 2:
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # the TPU compiler's fusion of a sum and a slice of it
            axes = axes_of(groups, mesh_shape)
            piece = max(groups, key=len) if axes.startswith(PART_OF) else ()
            entry = totals[kind, axes, tuple(piece)]
            entry[0] += times
            entry[1] += times * sent(kind, operand_bytes(computation, i), size)
    rows = [
        Traffic(kind, axes, calls, nbytes, group)
        for (kind, axes, group), (calls, nbytes) in totals.items()
    ]
    return sorted(rows, key=lambda row: -row.nbytes)


def operand_bytes(computation: Computation, i: Instruction) -> float:
    """What a device holds of a collective; of a ragged all-to-all the rows of an even load.

    One side of that exchange is a device's own assignments, which are as many as it gets back at an
    even load; the other is a buffer with room for more.
    """
    names = i.operands
    if i.opcode.startswith("ragged-all-to-all"):
        rows, room = (computation.instructions[name].nbytes for name in names[:2])
        return min(rows, room)
    if i.opcode.startswith("collective-permute"):
        names = names[:1]
    return sum(computation.instructions[name].nbytes for name in names)


def sent(kind: str, nbytes: float, size: int) -> float:
    """Bytes that one device of ``size`` sends of its operand of ``nbytes``."""
    factor = {
        "all-gather": size - 1,
        "reduce-scatter": (size - 1) / size,
        "all-reduce": 2 * (size - 1) / size,
        "all-to-all": (size - 1) / size,
        "ragged-all-to-all": (size - 1) / size,
    }
    return nbytes * factor.get(kind, 1.0)


# --- Groups -------------------------------------------------------------------------------------

_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](.*?)\s*\{([^}]*)\}")
_DEVICES = re.compile(r"device_ids=\(?\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of a collective in any of HLO's notations; pairs of a permute, without own ones.

    Raises:
      ValueError: a notation that is not known.
    """
    if found := _LISTED.search(attributes):
        groups = [_ints(g) for g in re.findall(r"\{([\d,]*)\}", found[1])]
        if "source_target_pairs" in found[0]:
            return [g for g in groups if g[0] != g[1]] or [[0]]
        return groups or [list(range(devices))]
    if found := _IOTA.search(attributes):
        return _iota(_ints(found[2]), found[3]).reshape(_ints(found[1])).tolist()
    if found := _MESH.search(attributes):
        return _mesh_groups(*found.groups())
    if "replica_groups={}" in attributes or "replica_groups" not in attributes:
        return [list(range(devices))]
    raise ValueError(f"unknown notation of replica groups: {attributes[:200]}")


def _iota(dims: list[int], order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(_ints(order)) if order else ids


def _mesh_groups(sizes: str, between: str, chosen: str) -> list[list[int]]:
    """``mesh['a'=2,'b'=4] {'b'}``, with pieces of axes as ``'b':(1)2`` (after 1 part, 2 wide)."""
    axes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", sizes)}
    ids = np.arange(math.prod(axes.values()))
    if found := _DEVICES.search(between):
        ids = _iota(_ints(found[2]), found[3]) if found[2] else np.array(_ints(found[1]))
    pieces = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    shape: list[int] = []
    inside: list[int] = []
    order: dict[int, int] = {}
    for name, size in axes.items():
        cuts = [(n, int(before), int(width)) for n, before, width in pieces if n == name and before]
        if not cuts:
            if any(n == name for n, *_ in pieces):
                inside.append(len(shape))
                order[len(shape)] = [n for n, *_ in pieces].index(name)
            shape.append(size)
            continue
        (_, before, width), *_ = cuts
        inside.append(len(shape) + 1)
        order[len(shape) + 1] = [n for n, *_ in pieces].index(name)
        shape += [before, width, size // before // width]
    inside.sort(key=order.__getitem__)
    outside = [d for d in range(len(shape)) if d not in inside]
    grid = ids.reshape(shape).transpose(outside + inside)
    return grid.reshape(-1, math.prod(shape[d] for d in inside)).tolist()


def axes_of(groups: list[list[int]], mesh_shape: dict[str, int]) -> str:
    """The mesh axes along which members of a group differ; devices are numbered in mesh order."""
    names, sizes = list(mesh_shape), tuple(mesh_shape.values())
    varying: set[str] = set()
    widest = 1
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), sizes))
        varying |= {n for n, row in zip(names, places, strict=True) if len(set(row.tolist())) > 1}
        widest = max(widest, len(group))
    axes = [n for n in names if n in varying]
    whole = widest == math.prod(mesh_shape[a] for a in axes)
    is_permute = widest == 2 and len(groups) > math.prod(sizes) // 2
    return ("" if whole or is_permute else PART_OF) + "+".join(axes)
