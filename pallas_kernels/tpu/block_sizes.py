"""Block sizes of the attention kernels: a small table by chip, fitted to each shape.

Shape suffixes: none; there are no arrays here.

``block_sizes.json`` holds, for each chip, the largest sizes to use; :func:`fit` makes them divide a
shape, and smaller where they would not fit. ``python -m pallas_kernels.tpu.tune_block_sizes``
regenerates it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pallas_kernels.tpu import chips
from pallas_kernels.tpu.chips import CHIPS, MIB
from pallas_kernels.tpu.visits import MAX_KEY_BLOCKS, MAX_QUERY_BLOCKS

TABLE = Path(__file__).with_name("block_sizes.json")
WIDTHS = (64, 128, 192, 256)
LANES = 128


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
    """heads * q_block rows of queries meet kv_block keys, at most kv_inner at a time."""

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
    if reason := chips.unsupported(chip):
        return reason
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


def _divisor(n: int, limit: int) -> int:
    """The largest divisor of ``n`` that is at most ``limit``; 1 if the limit is less."""
    return max((d for d in range(1, n + 1) if n % d == 0 and d <= limit), default=1)


def _forward(chip: str, shape: Shape, most: dict[str, int]) -> ForwardSizes:
    q_block, kv_block = _even(shape.queries, most["q_block"]), _even(shape.keys, most["kv_block"])
    heads = _divisor(shape.groups, most["rows"] // q_block)
    # pieces of about one length: a last one of 128 keys would leave the units idle
    return ForwardSizes(heads, q_block, kv_block, _even(kv_block, most["kv_inner"]))


def _backward(chip: str, shape: Shape, most: dict[str, int]) -> BackwardSizes:
    q_block, kv_block = _even(shape.queries, most["q_block"]), _even(shape.keys, most["kv_block"])
    blocks = -(-shape.keys // kv_block)
    chunk = kv_block * min(blocks, max(1, most["chunk"] // kv_block))
    heads = _divisor(_heads_of_part(chip, shape.groups), most["rows"] // q_block)
    return BackwardSizes(heads, q_block, kv_block, chunk)


def _room(chip: str) -> int:
    """Bytes that blocks may need: the estimate counts scores, which are most of what is added."""
    return CHIPS[chip].most * 15 // 16


def _fitted(make: Callable[..., Any], chip: str, shape: Shape, most: dict[str, int]):
    """``make``'s sizes, their largest values halved where that saves most, until they fit."""

    def need(most):
        s = make(chip, shape, most)
        return s.vmem(padded(shape, s))

    while need(most) > _room(chip):
        smaller = [most | {name: n // 2} for name, n in most.items() if n > LANES]
        if not smaller:
            break
        most = min(smaller, key=need)
    return make(chip, shape, most)


def fit(chip: str, shape: Shape) -> Sizes:
    """The table's sizes for this shape, or smaller ones; blocks divide the padded shape.

    Raises:
      ValueError: even the smallest need more VMEM than the chip has.
    """
    most = table()[chip]
    sizes = (
        _fitted(_forward, chip, shape, most["forward"]),
        _fitted(_backward, chip, shape, most["backward"]),
    )
    check(chip, shape, sizes)
    return sizes


def computed_heads(chip: str, rows: int, groups: int) -> int:
    """Query heads of a key head that are computed, so that all cores have as much to do.

    One more than there are, of zeros, costs less than a core that waits.

    Args:
      rows: of the batch, times key heads: what cores take apart first.
      groups: query heads of one key head.
    """
    cores = CHIPS[chip].cores
    more = -(-groups // cores) * cores
    busiest = -(-rows // cores) * groups
    return more if groups > 1 and rows * more // cores < busiest else groups


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
        need, room = s.vmem(padded(shape, s)), _room(chip)
        if need > room:
            raise ValueError(
                f"{name}: {s} needs about {need / MIB:.0f} MiB of vector memory (VMEM), and blocks "
                f"may have {room / MIB:.0f} MiB of a {chip}'s"
            )
        blocks = -(-shape.queries // s.q_block), -(-shape.keys // s.kv_block)
        if blocks[0] > MAX_QUERY_BLOCKS or blocks[1] > MAX_KEY_BLOCKS:
            raise ValueError(
                f"{name}: {s} cuts {shape.queries} queries and {shape.keys} keys into more than "
                f"{MAX_QUERY_BLOCKS} or {MAX_KEY_BLOCKS} blocks, the most a visit can name"
            )
    if forward.kv_inner % LANES:
        raise ValueError(f"forward: kv_inner of {forward} must be a multiple of {LANES}")
    if backward.chunk % backward.kv_block:
        raise ValueError(f"backward: the chunk of {backward} must be whole blocks of keys")


def padded(shape: Shape, s: ForwardSizes | BackwardSizes) -> Shape:
    """The shape with whole blocks."""
    up = lambda n, block: -(-n // block) * block  # noqa: E731
    return replace(shape, queries=up(shape.queries, s.q_block), keys=up(shape.keys, s.kv_block))
