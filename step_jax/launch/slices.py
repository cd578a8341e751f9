"""TPU slices as clouds name them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from step_jax.core.errors import ConfigError
from step_jax.planning.topology import TPUS

#: kind -> (node label of GKE, what Cloud TPU calls a slice of n chips, its runtime). v5p is counted
#: in cores, two a chip; TPU7x is there in GKE alone.
_NAMES: dict[str, tuple[str, str | None, str | None]] = {
    "v5e": ("tpu-v5-lite-podslice", "v5litepod-{chips}", "v2-alpha-tpuv5-lite"),
    "v5p": ("tpu-v5p-slice", "v5p-{cores}", "v2-alpha-tpuv5"),
    "v6e": ("tpu-v6e-slice", "v6e-{chips}", "v2-alpha-tpuv6e"),
    "tpu7x": ("tpu7x", None, None),
}
_CHIPS_PER_HOST = 4


@dataclass(frozen=True)
class Slice:
    """One TPU slice.

    Attributes:
      name: ``v5p:4x4x4``, as ``step-jax plan`` has it.
      kind, shape: its two halves.
      chips: of the slice.
      hosts: virtual machines, each with a process.
      devices: that JAX sees.
      gke_label: value of the node label ``cloud.google.com/gke-tpu-accelerator``.
      accelerator: Cloud TPU's name, None where it has none.
      runtime: of the virtual machines of Cloud TPU.
    """

    name: str
    kind: str
    shape: str
    chips: int
    hosts: int
    devices: int
    gke_label: str
    accelerator: str | None
    runtime: str | None


def parse(name: str) -> Slice:
    """The slice of a name. Raises ConfigError listing those that exist."""
    kind, _, shape = name.partition(":")
    if kind not in TPUS or shape not in TPUS[kind][0]:
        known = "\n".join(f"  {k}: {' '.join(shapes)}" for k, (shapes, _) in TPUS.items())
        raise ConfigError(f"no TPU slice {name!r}; there are:\n{known}")
    chips = math.prod(int(n) for n in shape.split("x"))
    # Up to eight chips of the two-dimensional kinds sit in one machine.
    flat = kind in ("v5e", "v6e")
    hosts = 1 if flat and chips <= 8 else max(1, chips // _CHIPS_PER_HOST)
    label, accelerator, runtime = _NAMES[kind]
    if accelerator is not None:
        accelerator = accelerator.format(chips=chips, cores=2 * chips)
    devices = chips * TPUS[kind][1]
    return Slice(name, kind, shape, chips, hosts, devices, label, accelerator, runtime)


def check_slices(count: int) -> None:
    if count < 1:
        raise ConfigError(f"slices is {count}; it must be at least 1")
