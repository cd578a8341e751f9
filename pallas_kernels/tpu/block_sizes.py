"""Block sizes of the attention kernels: a small table by chip, fitted to each shape.

Shape suffixes: none; there are no arrays here.

``block_sizes.json`` holds, for each chip, the largest sizes to use; :func:`fit` makes them divide a
shape. ``python -m pallas_kernels.tpu.tune_block_sizes`` regenerates it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

TABLE = Path(__file__).with_name("block_sizes.json")
WIDTHS = (64, 128, 192, 256)
LANES = 128
MIB = 2**20


@dataclass(frozen=True)
class Chip:
    """vmem: bytes of vector memory a core has. cores: tensor cores of one JAX device."""

    vmem: int
    cores: int = 1

    @property
    def vmem_limit(self) -> int:
        """What a kernel may use; the rest is the compiler's."""
        return self.vmem * 15 // 16


#: by ``jax.Device.device_kind``
CHIPS = {
    "TPU v5 lite": Chip(vmem=128 * MIB),
    "TPU v5": Chip(vmem=64 * MIB, cores=2),
    "TPU v6 lite": Chip(vmem=128 * MIB),
    "TPU7x": Chip(vmem=64 * MIB),
}


@dataclass(frozen=True)
class Shape:
    """What block sizes depend on.

    groups: query heads of one key head. queries, keys: tokens. width, value_width: of a head.
    itemsize: bytes of a number.
    """

    groups: int
    queries: int
    keys: int
    width: int
    value_width: int
    itemsize: int


@dataclass(frozen=True)
class ForwardSizes:
    """heads * q_block rows of queries meet kv_block keys, kv_inner at a time."""

    heads: int
    q_block: int
    kv_block: int
    kv_inner: int

    def vmem(self, shape: Shape) -> int:
        """Bytes: two buffers of what moves, scratch, and the scores of two heads."""
        rows, widths = self.heads * self.q_block, shape.width + shape.value_width
        moving = 2 * (rows + self.kv_block) * widths * shape.itemsize
        scratch = rows * (2 * LANES + shape.value_width) * 4
        return moving + scratch + 2 * self.q_block * self.kv_inner * (8 + shape.itemsize)


@dataclass(frozen=True)
class BackwardSizes:
    """As ForwardSizes; the gradients of ``chunk`` keys stay in VMEM."""

    heads: int
    q_block: int
    kv_block: int
    chunk: int

    def vmem(self, shape: Shape) -> int:
        rows, widths = self.heads * self.q_block, shape.width + shape.value_width
        gradient = 4 if self.chunk < shape.keys else shape.itemsize  # bytes of a number of dQ
        moving = 2 * (rows + self.kv_block) * widths * shape.itemsize
        moving += 4 * rows * shape.width * gradient + 2 * self.chunk * widths * 4
        scratch = rows * shape.width * 4
        return moving + scratch + 2 * self.q_block * self.kv_block * (12 + 2 * shape.itemsize)


Sizes = tuple[ForwardSizes, BackwardSizes]


@functools.cache
def table() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(TABLE.read_text())


def unsupported(chip: str, shape: Shape, dtype: str) -> str | None:
    """Why the kernels cannot do this, or None."""
    if chip not in CHIPS:
        return f"the device {chip!r} is none of {', '.join(CHIPS)}"
    if dtype not in ("bfloat16", "float32"):
        return f"the dtype {dtype} is neither bfloat16 nor float32"
    if shape.width not in WIDTHS or shape.value_width not in WIDTHS:
        widths = ", ".join(map(str, WIDTHS))
        return (
            f"head widths {shape.width} (scores) and {shape.value_width} (values) are not among "
            f"{widths}"
        )
    try:
        fit(chip, shape)
    except ValueError as error:
        return str(error)
    return None


def _even(length: int, block: int) -> int:
    """The block that cuts ``length`` into as few pieces as ``block`` does, with least padding."""
    pieces = -(-length // block)
    return -(-length // (pieces * LANES)) * LANES


def _divisor(n: int, limit: int, of: int = 1) -> int:
    """The largest divisor of ``n``, multiple of ``of`` and at most ``limit``; else ``of``."""
    return max((d for d in range(of, n + 1, of) if n % d == 0 and d <= limit), default=of)


def fit(chip: str, shape: Shape) -> Sizes:
    """The table's sizes for this shape; blocks divide the padded shape.

    Raises:
      ValueError: even they need more VMEM than the chip has.
    """
    forward, backward = table()[chip]["forward"], table()[chip]["backward"]
    q_block = _even(shape.queries, forward["q_block"])
    kv_block = _even(shape.keys, forward["kv_block"])
    inner = _divisor(kv_block, forward["kv_inner"], LANES)
    heads = _divisor(shape.groups, forward["rows"] // q_block)
    forward_sizes = ForwardSizes(heads, q_block, kv_block, inner)

    q_block = _even(shape.queries, backward["q_block"])
    kv_block = _even(shape.keys, backward["kv_block"])
    blocks = -(-shape.keys // kv_block)
    chunk = kv_block * min(blocks, max(1, backward["chunk"] // kv_block))
    heads = _divisor(_heads_of_part(chip, shape.groups), backward["rows"] // q_block)
    sizes = forward_sizes, BackwardSizes(heads, q_block, kv_block, chunk)
    check(chip, shape, sizes)
    return sizes


def parts(chip: str, groups: int) -> int:
    """Into how many parts the backward pass cuts query heads, so that each core has one."""
    cores = CHIPS[chip].cores
    return cores if groups % cores == 0 else 1


def _heads_of_part(chip: str, groups: int) -> int:
    return groups // parts(chip, groups)


def check(chip: str, shape: Shape, sizes: Sizes) -> None:
    """Raises ValueError for sizes that break a limit, and says which."""
    forward, backward = sizes
    for name, s in (("forward", forward), ("backward", backward)):
        if s.q_block % LANES or s.kv_block % LANES:
            raise ValueError(f"{name}: the blocks of {s} must be multiples of {LANES} tokens")
        heads = shape.groups if s is forward else _heads_of_part(chip, shape.groups)
        if heads % s.heads:
            raise ValueError(f"{name}: {s.heads} heads at a time do not divide {heads}")
        need, limit = s.vmem(shape), CHIPS[chip].vmem_limit
        if need > limit:
            raise ValueError(
                f"{name}: {s} needs about {need / MIB:.0f} MiB of vector memory (VMEM), and a "
                f"kernel may use {limit / MIB:.0f} MiB of a {chip}'s"
            )
    if forward.kv_inner % LANES or forward.kv_block % forward.kv_inner:
        raise ValueError(f"forward: kv_inner of {forward} must be a divisor, of whole {LANES}s")
    if backward.chunk % backward.kv_block:
        raise ValueError(f"backward: the chunk of {backward} must be whole blocks of keys")


def padded(shape: Shape, s: ForwardSizes | BackwardSizes) -> Shape:
    """The shape with whole blocks."""
    up = lambda n, block: -(-n // block) * block  # noqa: E731
    return replace(shape, queries=up(shape.queries, s.q_block), keys=up(shape.keys, s.kv_block))
