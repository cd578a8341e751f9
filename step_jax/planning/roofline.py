"""The least time that a step can take on given devices, and what sets it."""

from __future__ import annotations

from dataclasses import dataclass

from step_jax.core import hardware
from step_jax.planning import topology as topology_lib
from step_jax.planning.collectives import BETWEEN_SLICES, Traffic
from step_jax.planning.operations import Operations
from step_jax.planning.topology import Topology


@dataclass(frozen=True)
class Bound:
    """Seconds of a step, each as if nothing else had to be done.

    Attributes:
      compute: operations at the peak of the compute precision.
      memory: traffic at the memory's bandwidth, every intermediate result written and read once.
      network: mesh axes -> their collectives at the bandwidth of the links they use.
    """

    compute: float
    memory: float
    network: dict[str, float]

    @property
    def step(self) -> float:
        """If everything overlaps perfectly: a bound, no forecast."""
        return max(self.compute, self.memory, *self.network.values(), 0.0)

    @property
    def serial(self) -> float:
        """If communication overlaps with nothing."""
        return max(self.compute, self.memory) + sum(self.network.values())

    @property
    def by(self) -> str:
        """What sets ``step``."""
        times = {"compute": self.compute, "memory bandwidth": self.memory}
        times |= {f"network ({axes})": t for axes, t in self.network.items()}
        return max(times, key=lambda name: times[name])


def peak(topology: Topology, dtype: str) -> float:
    """FLOP/s of one device."""
    if topology.chip is None:
        return hardware.measured_cpu_peak() / topology.count
    return topology.chip.peak(hardware.PRECISION[dtype])


def bound(
    operations: Operations,
    collectives: list[Traffic],
    topology: Topology,
    mesh,
    dtype: str,
) -> Bound:
    """The bound of a program's counts (of one device) on a topology.

    Args:
      mesh: ``jax.sharding.Mesh`` over the topology's devices; collectives name its axes.
      dtype: of the products.
    """
    network: dict[str, float] = {}
    for c in collectives:
        names = c.axes.removeprefix("part of ").removesuffix(BETWEEN_SLICES)
        between = c.axes.endswith(BETWEEN_SLICES)
        speed = topology_lib.bandwidth(topology, mesh, names.split("+"), between)
        network[c.axes] = network.get(c.axes, 0.0) + c.nbytes / speed
    memory = operations.traffic / topology.chip.hbm_bandwidth if topology.chip else 0.0
    return Bound(operations.flops / peak(topology, dtype), memory, network)
