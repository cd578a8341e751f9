"""The least time that a step can take on given devices, and what sets it.

Only what cannot be avoided is in it: the products of the program, the state that is read and
written once, the bytes that leave a device. ``planning.forecast`` says how long a step will take.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from step_jax.core import hardware
from step_jax.planning import topology as topology_lib
from step_jax.planning.collectives import BETWEEN_SLICES, Traffic
from step_jax.planning.topology import Topology


@dataclass(frozen=True)
class Bound:
    """Seconds of a step, each as if nothing else had to be done.

    Attributes:
      compute: operations at the peak of the compute precision.
      memory: the state that has to be read and written, at the memory's bandwidth.
      network: mesh axes -> their collectives at the bandwidth of the links they use.
      host: what goes to the host's memory or comes from it, whichever is more: both directions have
        a link of their own. 0 where its bandwidth is not known.
    """

    compute: float
    memory: float
    network: dict[str, float]
    host: float = 0.0

    @property
    def step(self) -> float:
        """If everything overlaps perfectly: a bound, no forecast."""
        return max(self.compute, self.memory, self.host, *self.network.values())

    @property
    def by(self) -> str:
        """What sets ``step``."""
        times = {"compute": self.compute, "memory bandwidth": self.memory}
        times |= {"the host's link": self.host}
        times |= {f"network ({axes})": t for axes, t in self.network.items()}
        return max(times, key=lambda name: times[name])


def peak(topology: Topology, dtype: str) -> float:
    """FLOP/s of one device."""
    if topology.chip is None:
        return hardware.measured_cpu_peak() / topology.count
    return topology.chip.peak(hardware.PRECISION[dtype])


def network(collectives: Iterable[Traffic], topology: Topology, mesh) -> dict[str, float]:
    """Mesh axes -> seconds of the collectives of one device along them, at all of their links.

    Groups that are only pieces of an axis count with the whole axis, whose links they take.

    Args:
      mesh: ``jax.sharding.Mesh`` over the topology's devices; collectives name its axes.
    """
    times: dict[str, float] = {}
    for c in collectives:
        times[c.links] = times.get(c.links, 0.0) + _seconds(c, topology, mesh)
    return times


def _seconds(c: Traffic, topology: Topology, mesh) -> float:
    if c.axes.endswith(BETWEEN_SLICES):
        return topology_lib.seconds_between_slices(topology, c.nbytes)
    if c.group:
        group = [mesh.devices.flat[i] for i in c.group]
    else:
        group = topology_lib.along(mesh, c.axes.split("+"))
    return topology_lib.seconds(topology, group, c.kind, c.nbytes)


def bound(
    flops: float,
    state_bytes: float,
    collectives: Iterable[Traffic],
    topology: Topology,
    mesh,
    dtype: str,
    host_bytes: float = 0.0,
) -> Bound:
    """The bound of a program's counts (of one device) on a topology.

    Args:
      state_bytes: that the program cannot but read and write in main memory.
      mesh: see ``network``.
      dtype: of the products.
      host_bytes: in the direction, to the host or from it, in which more go.
    """
    link = topology.chip.host_bandwidth if topology.chip else 0.0
    host = host_bytes / link if link else 0.0
    memory = state_bytes / topology.chip.hbm_bandwidth if topology.chip else 0.0
    return Bound(flops / peak(topology, dtype), memory, network(collectives, topology, mesh), host)
