"""Operations and memory traffic of a compiled program, loops included.

A multiply-add is two operations, as in ``models.flops``; element-wise work is not counted.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass

import numpy as np

from step_jax.planning import layers
from step_jax.planning.hlo import (
    COLLECTIVES,
    HOST,
    Computation,
    Instruction,
    Module,
    continued,
)

#: Instructions that move nothing: names for what exists, and loops, whose bodies count themselves.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "domain", "opt-barrier", "async-start",
    "async-update", "async-done", "call-start", "call-done",
}  # fmt: skip
_COVERED = {"dot", "convolution", "custom-call", "send", "recv", *COLLECTIVES}
_SLICES = ("dynamic-slice", "slice", "gather")
#: Instructions that change an array in place -> the operand that says what is written there.
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}


@dataclass(frozen=True)
class Operations:
    """Of one device and one call of the program.

    Attributes:
      flops: of matrix products and convolutions, and what kernels declare of themselves.
      traffic: bytes between main memory and the chip, if every instruction reads its operands and
        writes its results once.
      to_host, from_host: bytes between main memory and the host's.
      silent_kernels: kernels without a declared cost; their operations are missing here.
      work: (layer, kind of work) -> operations of the products, bytes of what is ``layers.BYTES``;
        bytes that move while products or collectives run are in none.
    """

    flops: float
    traffic: float
    to_host: float
    from_host: float
    silent_kernels: tuple[str, ...]
    work: dict[tuple[str, str], float]


def count(module: Module, executions: dict[str, float], caches: bool = False) -> Operations:
    """Operations of a module whose computations run as often as ``hlo.executions`` says.

    Args:
      caches: kernels are given caches of all layers, of which they read one: their traffic is what
        they declare, not what their operands have.
    """
    flops = traffic = to_host = from_host = 0.0
    work: dict[tuple[str, str], float] = defaultdict(float)
    silent: set[str] = set()
    fused = {
        name
        for c in module.computations.values()
        for i in c.instructions.values()
        if i.opcode == "fusion"
        for name in i.calls("calls")
    }
    repeated = continued(module)
    for name, times in executions.items():
        computation = module.computations[name]
        for i in computation.instructions.values():
            made = _flops(computation, i)
            if made is None:
                silent.add(i.name)
            elif made:
                flops += times * made
                work[layers.of_product(module, i)] += times * made
            if name in fused:
                continue
            declared = kernel_bytes(i) if caches else None
            if declared is None:
                declared = moved(module, computation, i, repeated)
            traffic += times * declared
            out, back = crossing(computation, i)
            to_host += times * out
            from_host += times * back
            if out or back:  # beside what is computed
                continue
            if declared and not _is_covered(module, i):
                work[layers.of_bytes(module, i)] += times * declared
    return Operations(flops, traffic, to_host, from_host, tuple(sorted(silent)), dict(work))


def _flops(computation: Computation, i: Instruction) -> float | None:
    """Operations of one instruction; None of a kernel that does not tell."""
    if i.opcode == "dot":
        return dot_flops(computation, i)
    if i.opcode == "convolution":
        return convolution_flops(computation, i)
    if i.opcode != "custom-call":
        return 0.0
    declared = kernel_flops(i)
    return None if declared is None and "tpu_custom_call" in i.attributes else declared or 0.0


def _is_covered(module: Module, i: Instruction) -> bool:
    """Whether products, a kernel or a collective take the time in which its bytes move.

    Copies that are started and awaited run beside what is computed between the two.
    """
    if i.opcode == "fusion":
        inner = module.computations[i.calls("calls")[0]]
        return any(_is_covered(module, part) for part in inner.instructions.values())
    return i.opcode == "copy-start" or i.opcode.removesuffix("-start") in _COVERED


def dot_flops(computation: Computation, i: Instruction) -> float:
    """Of a ``dot``: two per element of the result and of the contracted dimensions."""
    left = computation.instructions[i.operands[0]].outputs[0]
    contracted = math.prod(left.dims[d] for d in i.numbers("lhs_contracting_dims"))
    return 2.0 * i.outputs[0].size * contracted


def convolution_flops(computation: Computation, i: Instruction) -> float:
    """Of a ``convolution``, which is also how the TPU compiler writes matrix products.

    Products with padding and with the holes of a dilated input are not work: batched products are
    written with such holes.
    """
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", i.attributes)
    if labels is None:
        raise ValueError(f"the convolution {i.name} has no dim_labels")
    lhs, rhs, out = labels.groups()
    left = computation.instructions[i.operands[0]].outputs[0]
    right = computation.instructions[i.operands[1]].outputs[0]
    batch = left.dims[lhs.index("b")] // (i.number("batch_group_count") or 1)
    features = right.dims[rhs.index("i")] * right.dims[rhs.index("o")]
    window = _window(i.attributes)
    positions = 1
    for n, digit in enumerate(sorted(c for c in out if c.isdigit())):
        positions *= _valid_positions(
            left.dims[lhs.index(digit)],
            right.dims[rhs.index(digit)],
            i.outputs[0].dims[out.index(digit)],
            *(window[key][n] if window[key] else fallback for key, fallback in _WINDOW.items()),
        )
    return 2.0 * batch * features * positions


_WINDOW = {"stride": 1, "pad": (0, 0), "lhs_dilate": 1, "rhs_dilate": 1}


def _window(attributes: str) -> dict[str, list]:
    """The lists of a ``window={size=... stride=... pad=...}``, empty where it says nothing."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    text = dict(re.findall(r"(\w+)=([\dx_\-]+)", found[1])) if found else {}
    window: dict[str, list] = {}
    for key in _WINDOW:
        parts = text[key].split("x") if key in text else []
        window[key] = [tuple(map(int, p.split("_"))) if key == "pad" else int(p) for p in parts]
    return window


@functools.cache
def _valid_positions(size, kernel, out, stride, pad, lhs_dilate, rhs_dilate) -> int:
    """Pairs of (place of the result, element of the kernel) that meet an element of the input."""
    reach = (size - 1) * lhs_dilate + 1
    total = 0
    places = np.arange(out) * stride - pad[0]
    for k in range(kernel):
        at = places + k * rhs_dilate
        total += int(np.sum((at >= 0) & (at < reach) & (at % lhs_dilate == 0)))
    return total


def kernel_flops(i: Instruction) -> float | None:
    """What a custom call declares as its cost, None if it declares nothing."""
    found = re.search(r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)', i.attributes)
    return float(found[1]) if found else None


def kernel_bytes(i: Instruction) -> float | None:
    """The traffic that a custom call declares, None if it declares nothing."""
    if i.opcode != "custom-call":
        return None
    found = re.search(r'"cost_estimate":\s*\{[^}]*"bytes_accessed":\s*"?(\d+)', i.attributes)
    return float(found[1]) if found else None


# --- Traffic ------------------------------------------------------------------------------------


def _main(instruction: Instruction) -> float:
    """Bytes of a result that lies in main memory."""
    return sum(a.nbytes for a in instruction.outputs if a.space == 0)


def moved(
    module: Module,
    computation: Computation,
    i: Instruction,
    repeated: Set[tuple[str, str]] = frozenset(),
) -> float:
    """Bytes that an instruction reads from and writes to main memory.

    Of an array that is only sliced the slice is read, and of one that is updated in place the
    update is written: loops over stacked layers would otherwise seem to move all layers each turn.
    What a fusion only hands on is not moved, nor what a collective under way (one of ``repeated``,
    see ``hlo.continued``) receives.
    """
    if i.opcode in _FREE or i.opcode.endswith("-done"):
        return 0.0
    operands = [computation.instructions[name] for name in i.operands]
    if i.opcode == "fusion":
        fused = module.computations[i.calls("calls")[0]]
        under_way = {name for where, name in repeated if where == fused.name}
        reads = (min(_main(o), _read(module, fused, n, under_way)) for n, o in enumerate(operands))
        return sum(reads) + _written(module, fused, i, under_way)
    if any(crossing(computation, i)):
        return sum(crossing(computation, i))
    if i.opcode in _UPDATES:
        return 2.0 * _main(operands[_UPDATES[i.opcode]])
    if i.opcode in _SLICES:
        return 2.0 * _main(i)
    if i.opcode == "copy-start":  # its result repeats its operand
        return _main(operands[0]) + (i.outputs[0].nbytes if i.outputs[0].space == 0 else 0)
    return sum(map(_main, operands)) + _main(i)


def crossing(computation: Computation, i: Instruction) -> tuple[float, float]:
    """Bytes that an instruction moves (to the host's memory, from it): copies, slices, updates."""
    name = i.opcode.removesuffix("-start")
    if name not in ("copy", "dynamic-slice", "dynamic-update-slice"):
        return 0.0, 0.0
    operands = [computation.instructions[operand] for operand in i.operands]
    whole = operands[0].outputs[0].space
    if name == "dynamic-update-slice":
        there, update = whole == HOST, operands[1].outputs[0]
        return (update.nbytes if there and update.space != HOST else 0.0), 0.0
    made = i.outputs[0]
    if (whole == HOST) == (made.space == HOST):
        return 0.0, 0.0
    return (0.0, made.nbytes) if whole == HOST else (made.nbytes, 0.0)


def _read(module: Module, fused: Computation, number: int, under_way: Set[str]) -> float:
    """Bytes that a fused computation reads of its parameter, those of slices alone if it slices."""
    parameter = fused.parameters.get(number)
    return 0.0 if parameter is None else _read_of(module, fused, parameter, under_way)


def _read_of(module: Module, fused: Computation, i: Instruction, under_way: Set[str]) -> float:
    total = 0.0
    for user in fused.users.get(i.name, []):
        if user.name in under_way or _marks(user) or (user.root and user.opcode == "tuple"):
            continue
        if user.opcode == "bitcast":
            total += _read_of(module, fused, user, under_way)
        elif _lays_out(module, user) and not user.root:
            # a slice of another layout, or an update in place, reads no more for it
            total += min(i.nbytes, _read_of(module, fused, user, under_way))
        elif user.opcode == "fusion":  # fusions hold fusions on TPU
            inner = module.computations[user.calls("calls")[0]]
            places = (n for n, name in enumerate(user.operands) if name == i.name)
            total += sum(_read(module, inner, n, frozenset()) for n in places)
        elif user.opcode in _SLICES and user.operands[0] == i.name:
            total += user.nbytes
        elif user.opcode not in _UPDATES or user.operands[0] != i.name:
            total += i.nbytes
    return total


def _lays_out(module: Module, i: Instruction) -> bool:
    """Whether an instruction inside a fusion only gives its operand another layout."""
    if i.opcode == "fusion" and len(i.operands) == 1:
        inner = module.computations[i.calls("calls")[0]].instructions.values()
        return all(part.opcode in ("parameter", "bitcast", "copy") for part in inner)
    return i.opcode == "copy"


def _marks(i: Instruction) -> bool:
    """The start or the end of a collective that several fusions share; computes nothing."""
    return i.opcode == "custom-call" and '"AsyncCollective' in i.attributes


def _written(module: Module, fused: Computation, fusion: Instruction, under_way: Set[str]) -> float:
    root = fused.root
    if _marks(root):
        made = [fused.instructions[n] for n in root.operands if n not in under_way]
        return sum(_main(i) for i in made if i.opcode != "parameter")
    parts = [fused.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(fusion.outputs):
        return _main(fusion)
    total = 0.0
    for part, array in zip(parts, fusion.outputs, strict=True):
        while part.opcode == "bitcast":
            part = fused.instructions[part.operands[0]]
        if array.space or part.opcode == "parameter" or part.name in under_way:
            continue
        total += _update(module, fused, part) or array.nbytes
    return total


def _update(module: Module, where: Computation, i: Instruction) -> float:
    """Bytes of the update if an instruction writes one into an array that is there, else 0."""
    while i.opcode == "bitcast":
        i = where.instructions[i.operands[0]]
    if i.opcode == "fusion":
        inner = module.computations[i.calls("calls")[0]]
        return _update(module, inner, inner.root)
    if i.opcode not in _UPDATES:
        return 0.0
    return where.instructions[i.operands[_UPDATES[i.opcode]]].nbytes
