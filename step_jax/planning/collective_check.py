"""Collectives over the devices of one host: whether they are right, and what they move a second.

Shape suffixes: n devices, C numbers of a device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

#: Numbers that a device holds, by platform: enough for the links to be what takes the time.
_NUMBERS = {"cpu": 1 << 10}
_MANY = 1 << 24
_REPEATS = 5
AXIS = "all"


@dataclass(frozen=True)
class Collective:
    """bytes_per_s: sent by a device on a ring; None where the devices are simulated."""

    name: str
    devices: int
    right: bool
    bytes_per_s: float | None


def _ring(x):
    n = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % n) for i in range(n)])


#: name -> (of a device's (C,) numbers, the same of all of them (n, C), bytes sent a byte held)
KINDS: dict[str, tuple[Callable, Callable, Callable[[int], float]]] = {
    "all-reduce": (
        lambda x: jax.lax.psum(x, AXIS),
        lambda a_nC: np.tile(a_nC.sum(0), (len(a_nC), 1)),
        lambda n: 2 * (n - 1) / n,
    ),
    "all-gather": (
        lambda x: jax.lax.all_gather(x, AXIS, tiled=True),
        lambda a_nC: np.tile(a_nC.reshape(-1), (len(a_nC), 1)),
        lambda n: n - 1,
    ),
    "reduce-scatter": (
        lambda x: jax.lax.psum_scatter(x, AXIS, tiled=True),
        lambda a_nC: a_nC.sum(0).reshape(len(a_nC), -1),
        lambda n: (n - 1) / n,
    ),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x, AXIS, 0, 0, tiled=True),
        lambda a_nC: a_nC.reshape(len(a_nC), len(a_nC), -1).swapaxes(0, 1).reshape(a_nC.shape),
        lambda n: (n - 1) / n,
    ),
    "collective-permute": (_ring, lambda a_nC: np.roll(a_nC, 1, axis=0), lambda n: 1.0),
}


def check_collectives(devices: Sequence[jax.Device]) -> list[Collective]:
    """Each of ``KINDS`` over all ``devices``, which are of this process; none for one device.

    Numbers are small integers, so that sums are exact in any order.
    """
    n = len(devices)
    if n == 1:
        return []
    simulated = devices[0].platform == "cpu"
    count = _NUMBERS.get(devices[0].platform, _MANY) // n * n
    a_nC = (np.arange(n)[:, None] + np.arange(count)[None] * 7) % 61
    mesh = Mesh(np.array(devices), (AXIS,))
    spec = PartitionSpec(AXIS)
    x_nC = jax.device_put(a_nC.astype(np.float32), NamedSharding(mesh, spec))
    found = []
    for name, (of_device, of_all, sent) in KINDS.items():

        def local(x_1C, of_device=of_device):
            return of_device(x_1C[0])[None]

        run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))
        got_nC = np.concatenate([np.asarray(s.data) for s in _in_order(run(x_nC))])
        right = bool(np.array_equal(got_nC, of_all(a_nC)))
        rate = None if simulated else sent(n) * 4 * count / _seconds(run, x_nC)
        found.append(Collective(name, n, right, rate))
    return found


def _in_order(x: jax.Array):
    return sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)


def _seconds(run: Callable, x: jax.Array) -> float:
    samples = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(x))
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)
