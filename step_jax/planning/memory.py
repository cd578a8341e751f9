"""What a compiled program keeps in a device's main memory, by class, when it keeps most.

The source is the compiler's own buffer assignment: which value lies where, and from which to which
instruction it is needed. The compiler only says how large the whole is; what the bytes are for is
read from where each value comes from in the traced program.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from step_jax.planning.hlo import HOST, Array, Instruction, Module, arrays

CLASSES = (
    "parameters",
    "optimizer",
    "gradients",
    "activations",
    "temporaries",
    "gaps",
    "program",
)

_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+),? ?(.*)$")
_VALUE = re.compile(
    r"^ value: <\d+ (\S+?)(\{[\d,]*\})?( \(phi\))? @(\d+)> \(size=(\d+),offset=(\d+)\): (.*)$"
)
_RANGE = re.compile(r"^\s+(\S+?)\{([\d,]*)\}:(\d+)-(\d+)$")
_BACKWARD = re.compile(r"transpose\(.*(dot_general|rematted_computation|pallas_call)")
_PRODUCTS = ("dot", "convolution", "custom-call")
_INDEXED = re.compile(r"^\s+(\d+):(\S+)$")


@dataclass(frozen=True)
class Value:
    """A value of the program inside an allocation, needed from ``start`` to ``stop``."""

    name: str
    shape: str
    nbytes: int
    offset: int
    start: int
    stop: int


@dataclass
class Allocation:
    """A piece of main memory.

    Attributes:
      parameter: its number among the program's arguments, or None.
      temporary: for the values that come and go (one heap), not for results or constants.
    """

    nbytes: int
    parameter: int | None
    temporary: bool
    values: list[Value]


@dataclass(frozen=True)
class Buffer:
    """Memory that is in use at the fullest moment: its largest value and what it is for."""

    nbytes: int
    shape: str
    source: str
    kind: str


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      classes: bytes of each of ``CLASSES`` at the fullest moment.
      compiler: the total that the compiler reserves.
      arguments: what of it the program is given: state and batch.
      host: that the program takes of the host's memory, of which every device has its own.
      buffers: what is in use then, the largest first.
    """

    classes: dict[str, float]
    compiler: float
    arguments: float
    host: float
    buffers: tuple[Buffer, ...]

    @property
    def total(self) -> float:
        return sum(self.classes.values())


def parse_assignment(assignment: str, live_range: str) -> tuple[list[Allocation], list[str]]:
    """(allocations of main memory, names of the instructions in the order of their execution).

    Args:
      assignment, live_range: texts of XLA's dump, ``*-buffer-assignment.txt`` and
        ``*-live-range.txt``.
    """
    ranges, order = _live_ranges(live_range)
    allocations: list[Allocation] = []
    current: Allocation | None = None
    for line in assignment.splitlines():
        if found := _ALLOCATION.match(line):
            current = None
            flags = found[3]
            on_chip = re.search(r"color (\d+)", flags)
            if "thread-local" in flags or (on_chip and on_chip[1] != "0"):
                continue
            number = re.search(r"parameter (\d+)", flags)
            current = Allocation(
                int(found[2]),
                int(number[1]) if number else None,
                "preallocated-temp" in flags,
                [],
            )
            allocations.append(current)
        elif current is not None and (found := _VALUE.match(line)):
            index = (found[2] or "{}")[1:-1]
            start, stop = ranges.get((found[1], index), (0, len(order)))
            current.values.append(
                Value(found[1], found[7], int(found[5]), int(found[6]), start, stop)
            )
    return allocations, order


def host_bytes(assignment: str) -> int:
    """Bytes of the allocations that lie in the host's memory; ``assignment`` as above."""
    lines = filter(None, map(_ALLOCATION.match, assignment.splitlines()))
    return sum(int(line[2]) for line in lines if re.search(rf"color {HOST}\b", line[3]))


def _live_ranges(text: str) -> tuple[dict[tuple[str, str], tuple[int, int]], list[str]]:
    ranges: dict[tuple[str, str], tuple[int, int]] = {}
    order: list[str] = []
    for line in text.splitlines():
        if found := _RANGE.match(line):
            ranges[found[1], found[2]] = (int(found[3]), int(found[4]))
        elif (found := _INDEXED.match(line)) and int(found[1]) == len(order):
            order.append(found[2])
        elif "Live ranges at" in line:
            break
    return ranges, order


def analyse(
    module: Module,
    assignment: str,
    live_range: str,
    parameter_shapes: Iterable[tuple[int, ...]],
    program_bytes: float = 0.0,
    compiler: float | None = None,
) -> Memory:
    """Sorts a program's memory into classes.

    Args:
      module: the compiled program.
      assignment, live_range: see ``parse_assignment``.
      parameter_shapes: a device's piece of every parameter.
      program_bytes: size of the program itself, which lies in the same memory.
      compiler: the compiler's own total; None (it gave up) for that of its assignment.
    """
    allocations, order = parse_assignment(assignment, live_range)
    instructions = {
        i.name: i for c in module.computations.values() for i in c.instructions.values()
    }
    arguments = {n: i.op_name for n, i in module.computations[module.entry].parameters.items()}
    classify = _Classifier(module, instructions, order, set(map(tuple, parameter_shapes)))
    classes: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
    classes["program"] = program_bytes
    buffers: list[Buffer] = []
    for a in allocations:
        if a.temporary:
            lives = _lives(a.values)
            found = [_buffer(group, lives, classify) for group in _fullest(a.values)]
            # where nothing lies at that moment, since what is made later would not fit elsewhere
            classes["gaps"] += a.nbytes - sum(b.nbytes for b in found)
        else:
            source = arguments.get(a.parameter, "") if a.parameter is not None else "result"
            shape = a.values[0].shape if a.values else ""
            found = [Buffer(a.nbytes, shape, source, _argument_class(source))]
        for buffer in found:
            classes[buffer.kind] += buffer.nbytes
        buffers += found
    if compiler is None:
        compiler = sum(a.nbytes for a in allocations) + program_bytes
    buffers.sort(key=lambda b: -b.nbytes)
    given = sum(a.nbytes for a in allocations if a.parameter is not None)
    return Memory(classes, compiler, given, host_bytes(assignment), tuple(buffers))


def _argument_class(source: str) -> str:
    if ".params" in source or ".average" in source:
        return "parameters"
    return "optimizer" if ".opt_state" in source else "temporaries"


def _lives(values: list[Value]) -> dict[Value, list[Value]]:
    """For each value the ones that hand its place on without a gap, itself included.

    An array that a loop carries has a value before the loop, in it and after it, all in one place.
    """
    places: dict[tuple[int, int], list[Value]] = defaultdict(list)
    for v in values:
        places[v.offset, v.nbytes].append(v)
    lives: dict[Value, list[Value]] = {}
    for place in places.values():
        chain: list[Value] = []
        end = -1
        for v in sorted(place, key=lambda v: v.start):
            if v.start > end:  # without an instruction in common: another array
                chain = []
            chain.append(v)
            end = max(end, v.stop) if len(chain) > 1 else v.stop
            lives[v] = chain
    return lives


def _fullest(values: list[Value]) -> list[list[Value]]:
    """Groups of values that share memory, at the moment when most of an allocation is in use."""
    changes = sorted({v.start for v in values}) or [0]
    by_start: dict[int, list[Value]] = defaultdict(list)
    for v in values:
        by_start[v.start].append(v)
    live: list[Value] = []
    best: list[list[Value]] = []
    best_size = -1
    for moment in changes:
        live = [v for v in live if v.stop >= moment] + by_start[moment]
        groups = _groups(live)
        size = sum(_extent(g) for g in groups)
        if size > best_size:
            best, best_size = groups, size
    return best


def _groups(values: list[Value]) -> list[list[Value]]:
    """Values whose places overlap belong to one group."""
    groups: list[list[Value]] = []
    end = -1
    for v in sorted(values, key=lambda v: v.offset):
        if v.offset < end:
            groups[-1].append(v)
        else:
            groups.append([v])
        end = max(end, v.offset + v.nbytes)
    return groups


def _extent(group: list[Value]) -> int:
    return max(v.offset + v.nbytes for v in group) - group[0].offset


def _buffer(group: list[Value], lives, classify: _Classifier) -> Buffer:
    """The buffer of values in one place; what it is for is what most of the place is for."""
    largest = max(group, key=lambda v: v.nbytes)
    life = lives[largest]
    source = next((s for s in map(classify.source, life) if s), largest.name)
    return Buffer(_extent(group), largest.shape, source, classify(life))


def _multiplies(module: Module, i: Instruction) -> bool:
    """Whether an instruction is a product or a fusion with one in it."""
    if i.opcode == "fusion":
        inner = module.computations[i.calls("calls")[0]]
        return any(_multiplies(module, part) for part in inner.instructions.values())
    return i.opcode in _PRODUCTS


class _Classifier:
    """What a value in temporary memory is for, from all the values in its place over its life."""

    def __init__(
        self, module: Module, instructions: dict[str, Instruction], order: list[str], shapes: set
    ):
        self.instructions = instructions
        self.shapes = shapes
        # zeros to sum gradients in may be made long before: a product shows that it has begun
        self.backward = next(
            (
                n
                for n, name in enumerate(order)
                if _BACKWARD.search(self._op_name(name)) and _multiplies(module, instructions[name])
            ),
            len(order),
        )

    def _op_name(self, name: str) -> str:
        return self.instructions[name].op_name if name in self.instructions else ""

    def source(self, value: Value) -> str:
        return self._op_name(value.name)

    def __call__(self, life: list[Value]) -> str:
        parameters = [a for v in life for a in arrays(v.shape) if self._is_parameter(a)]
        if parameters:
            backward = any("transpose(" in self.source(v) for v in life)
            is_gradient = backward or any(a.dtype == "f32" for a in parameters)
            return "gradients" if is_gradient else "parameters"
        before = [v for v in life if v.start < self.backward]
        after = [v for v in life if v.start >= self.backward]
        is_needed = max(v.stop for v in life) >= self.backward
        if before and is_needed and not any(map(self._is_made, after)):
            return "activations"
        return "temporaries"

    def _is_made(self, value: Value) -> bool:
        """Computed there, not handed into a loop or out of it."""
        i = self.instructions.get(value.name)
        return i is not None and i.opcode not in ("parameter", "while", "get-tuple-element")

    def _is_parameter(self, array: Array) -> bool:
        # small ones look like anything
        return array.size >= 1 << 14 and array.dims in self.shapes


# --- Out of memory ------------------------------------------------------------------------------

_NAMES = ("get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "async-done")


def largest(module: Module, count: int = 8) -> list[Buffer]:
    """The largest arrays of a program, whether or not they are in use at the same time."""
    fused = {
        name
        for c in module.computations.values()
        for i in c.instructions.values()
        if i.opcode != "while"
        for name in i.calls("calls", "to_apply")
    }
    found: dict[tuple[str, str], Buffer] = {}
    for c in module.computations.values():
        for i in c.instructions.values() if c.name not in fused else ():
            given = i.opcode == "parameter"
            if i.opcode in _NAMES or (given and c.name != module.entry):
                continue
            kind = _argument_class(i.op_name) if given else "intermediate result"
            nbytes = sum(a.nbytes for a in i.outputs if a.space == 0)
            found.setdefault((i.op_name, i.shape), Buffer(nbytes, i.shape, i.op_name, kind))
    return sorted(found.values(), key=lambda b: -b.nbytes)[:count]


_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def out_of_memory(message: str) -> tuple[float | None, float | None, list[Buffer]] | None:
    """(bytes needed, bytes available, largest buffers) of a compiler's error, None if another.

    Compilers that list their largest allocations are understood; libtpu lists none, and its buffer
    assignment has to be read instead.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    needed, available = _figures(message)
    rows = re.findall(
        r"Size: ([\d.]+)([KMGT]?)i?B?\s+(?:Operator: op_name=\"([^\"]*)\".*?\s+)?Shape: (\S+)",
        message,
    )
    buffers = [
        Buffer(int(float(n) * _SIZES[unit]), shape, source, "temporaries")
        for n, unit, source, shape in rows
    ]
    return needed, available, sorted(buffers, key=lambda b: -b.nbytes)


def _figures(message: str) -> tuple[float | None, float | None]:
    amount = r"([\d.]+)([KMGT])"
    patterns = (
        rf"\({amount}\) exceeds available HBM \({amount}\)",
        rf"Used {amount} of {amount} hbm",
    )
    for pattern in patterns:
        if found := re.search(pattern, message):
            a, a_unit, b, b_unit = found.groups()
            return float(a) * _SIZES[a_unit], float(b) * _SIZES[b_unit]
    return None, None
