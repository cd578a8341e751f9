"""Devices to plan for: ``v5p:8x8x16``, several slices of them, simulated CPUs, GPUs on paper."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from step_jax.core.errors import ConfigError
from step_jax.core.hardware import CHIPS, Chip

#: Name -> (shapes that are sold, JAX devices of a chip). v4, v5p and TPU7x pods are three-
#: dimensional, of cubes of 4x4x4 from 64 chips on; v5e and v6e slices are two-dimensional.
TPUS: dict[str, tuple[tuple[str, ...], int]] = {
    "v5e": (("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"), 1),
    "v6e": (("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"), 1),
    "v5p": (
        ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12")
        + ("8x8x16", "8x16x16", "16x16x16", "16x16x24"),
        1,
    ),
    "tpu7x": (
        ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
        + ("8x16x16", "16x16x16", "16x16x24"),
        2,
    ),
}
GPUS = tuple(name for name in CHIPS if name[0] in "ABGH")

INSTALL_LIBTPU = "pip install 'jax[tpu]'"

#: GPUs that NVLink joins: the eight of a host, or the 72 of a rack (NVL72).
_HOST, ISLANDS = 8, {"GB200": 72}


@dataclass(frozen=True)
class Topology:
    """Where a step is to run.

    Attributes:
      name: as on the command line.
      platform: ``tpu``, ``cpu`` or ``gpu``.
      chip: figures of one device, None for a CPU.
      count: JAX devices over all slices.
      chips: what is rented: a TPU7x chip is two devices.
      slices: pods that only the data centre's network joins.
      torus: chips along each dimension of a slice, empty where there is no torus.
      island: GPUs that NVLink joins; each has an adapter of its own to the others.
      devices: abstract or host devices, or such as stand on paper.
      on_paper: whether nothing can be compiled for the devices here (GPUs).
    """

    name: str
    platform: str
    chip: Chip | None
    count: int
    chips: int
    slices: int
    torus: tuple[int, ...]
    devices: Sequence[Any]
    on_paper: bool = False
    island: int = 1


@dataclass(frozen=True)
class PaperDevice:
    """What stands for a device in a mesh where only shapes and layouts are asked for.

    TPUs stand in a line: JAX lays a mesh out by where they are.
    """

    id: int
    platform: str
    device_kind: str
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        return (self.id, 0, 0)


def paper_devices(platform: str, kind: str, count: int) -> list[PaperDevice]:
    """``count`` devices of a platform and kind, as JAX names them."""
    return [PaperDevice(i, platform, kind) for i in range(count)]


def describe_all() -> str:
    """Every topology that ``parse`` accepts, in words."""
    lines = [f"  {name}: {' '.join(shapes)}" for name, (shapes, _) in TPUS.items()]
    gpus = f"  {', '.join(GPUS)}: gpu:h200x64 (on paper: nothing is compiled)"
    return "\n".join([*lines, "  cpu:N (N simulated devices of this machine)", gpus])


def parse(name: str, slices: int = 1) -> Topology:
    """The topology of a name such as ``v5p:4x4x4``, ``cpu:8`` or ``gpu:h200x16``.

    Raises:
      ConfigError: an unknown name or shape; the message lists those that exist.
    """
    kind, _, shape = name.partition(":")
    if slices < 1:
        raise ConfigError(f"--slices is {slices}; it must be at least 1")
    if kind in TPUS:
        return _tpu(name, kind, shape, slices)
    if slices > 1:
        raise ConfigError(f"slices are joined TPU pods; {name} has none")
    if kind == "cpu" and shape.isdigit() and int(shape) >= 1:
        return _cpu(name, int(shape))
    if kind == "gpu" and (found := re.fullmatch(r"([a-z]+\d+)x(\d+)", shape.lower())):
        chip = next((CHIPS[n] for n in GPUS if n.lower() == found[1]), None)
        if chip is not None and int(found[2]) >= 1:
            count = int(found[2])
            devices = paper_devices("gpu", f"NVIDIA {chip.name}", count)
            island = ISLANDS.get(chip.name, _HOST)
            return Topology(name, "gpu", chip, count, count, 1, (), devices, True, island)
    raise ConfigError(f"no topology {name!r}; there are:\n{describe_all()}")


def _tpu(name: str, kind: str, shape: str, slices: int) -> Topology:
    shapes, per_chip = TPUS[kind]
    if shape not in shapes:
        raise ConfigError(f"{kind} has no shape {shape!r}; it has: {', '.join(shapes)}")
    torus = tuple(int(n) for n in shape.split("x"))
    devices = _tpu_devices(kind, shape, torus, slices)
    return Topology(
        name if slices == 1 else f"{slices} slices of {name}",
        "tpu",
        CHIPS[kind],
        len(devices),
        len(devices) // per_chip,
        slices,
        torus,
        devices,
    )


def _tpu_devices(kind: str, shape: str, torus: tuple[int, ...], slices: int) -> list:
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ConfigError(
            f"{kind}:{shape} is compiled for by libtpu, which is not installed: {INSTALL_LIBTPU}"
        )
    # libtpu looks for a TPU machine's metadata and for other users of the chips: there are none
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{kind}-8")
    from jax.experimental import topologies

    # unless told, libtpu compiles for a grid without the links that close its rings
    rings = [_is_ring(torus, size) for size in torus]
    options: dict[str, Any] = {"wrap": rings + [False] * (3 - len(rings))}
    if slices > 1:
        options["num_slices"] = slices
    if int(np.prod(torus)) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        found = topologies.get_topology_desc(f"{kind}:{shape}", platform="tpu", **options)
    except Exception as error:  # the plugin raises what it likes
        raise ConfigError(
            f"libtpu cannot describe {kind}:{shape} ({str(error).splitlines()[0]}); what JAX was "
            f"tested with comes by {INSTALL_LIBTPU}"
        ) from error
    return list(found.devices)


def _cpu(name: str, count: int) -> Topology:
    import jax

    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"{name} needs {count} simulated devices, and JAX started with {len(devices)}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return Topology(name, "cpu", None, count, count, 1, (), devices[:count])


# --- Bandwidth ----------------------------------------------------------------------------------

#: Bytes per second of a chip into the data centre's network, one direction: v5p 50 Gbit/s and v5e
#: 6.4 Tbit/s of 256 chips from docs.cloud.google.com/tpu/docs/{v5p-training,v5e}; v6e and TPU7x
#: 100 Gbit/s were not read at a source: check before relying. GPUs have an adapter each: 200 Gbit/s
#: beside an A100 (DGX A100), 400 beside the others (DGX H100, H200, B200, GB200 NVL72).
NETWORK = {
    "v5e": 3.125e9, "v5p": 6.25e9, "v6e": 12.5e9, "tpu7x": 12.5e9,
    "A100": 25e9, "H100": 50e9, "H200": 50e9, "B200": 50e9, "GB200": 50e9,
}  # fmt: skip


def crosses_slices(mesh: Any, axes: Sequence[str]) -> bool:
    """Whether devices that differ along these mesh axes lie in several slices."""
    return len({getattr(d, "slice_index", 0) for d in along(mesh, axes)}) > 1


def along(mesh: Any, axes: Sequence[str]) -> list[Any]:
    """The first device and those that differ from it along these mesh axes alone."""
    index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    return list(np.asarray(mesh.devices[index]).flat)


def seconds(topology: Topology, group: Sequence[Any], kind: str, nbytes: float) -> float:
    """The least time in which a device of a group sends its ``nbytes`` of a collective.

    Args:
      group: devices of the topology that share the collective.
      kind: of ``hlo.COLLECTIVES``.
      nbytes: that it sends on a ring, see ``collectives.sent``.
    """
    if topology.platform == "cpu":
        return 0.0  # simulated devices share one memory
    if topology.platform == "gpu":
        return _gpu_seconds(topology, group, kind, nbytes)
    return nbytes / bandwidth(topology, group)


def seconds_between_slices(topology: Topology, nbytes: float) -> float:
    """The same for what a device sends over the data centre's network."""
    assert topology.chip is not None, "only simulated devices have no chip"
    return nbytes / NETWORK[topology.chip.name]


def bandwidth(topology: Topology, group: Sequence[Any]) -> float:
    """Bytes per second that a TPU can send inside its slice in a collective of a group.

    Every dimension of the torus that the group spans adds its links: two if the group goes all the
    way around a ring, else one. A line's end has a single neighbour, and where others lie between
    the members of a group, their groups take the same links.
    """
    chip = topology.chip
    assert chip is not None, "only simulated devices have no chip"
    first = getattr(group[0], "slice_index", 0)
    group = [d for d in group if getattr(d, "slice_index", 0) == first]
    links = 0
    for dimension, size in enumerate(topology.torus):
        span = len({d.coords[dimension] for d in group})
        links += 0 if span == 1 else 2 if span == size and _is_ring(topology.torus, size) else 1
    if not links:  # two cores of one chip
        return chip.interconnect
    return links * chip.link_bandwidth


#: Collectives whose pieces differ for every receiver: no host can pass one on for its others.
_TO_EACH = ("all-to-all", "ragged-all-to-all")


def _gpu_seconds(topology: Topology, group: Sequence[Any], kind: str, nbytes: float) -> float:
    """Over NVLink inside an island, over every GPU's adapter between islands, both at once.

    What is gathered, scattered or summed crosses between islands once: each of the m members of an
    island exchanges its part with its like elsewhere, and NVLink hands it to the other m - 1.
    """
    chip = topology.chip
    assert chip is not None
    network = NETWORK[chip.name]
    islands = [d.id // topology.island for d in group]
    n, m = len(group), max(islands.count(i) for i in set(islands))
    if m == n:
        return nbytes / chip.interconnect
    if kind == "collective-permute":
        return nbytes / network
    outside = nbytes * (n - m) / (n - 1)  # the rest is for members of the same island
    if kind not in _TO_EACH:
        outside /= m
    return max((nbytes - outside) / chip.interconnect, outside / network)


def _is_ring(torus: tuple[int, ...], size: int) -> bool:
    """Whether a dimension's ends are joined: cubes of 4 in three dimensions, full pods in two."""
    if len(torus) == 3:
        return size % 4 == 0 and min(torus) >= 4
    return size == 16
