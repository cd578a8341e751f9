"""Reading a compiled program: XLA's HLO text as computations, with how often each one runs.

A compiled program's own cost analysis counts the body of a loop once. Here every computation has a
number of executions, from the loops around it.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field

ITEM_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128, "f4e2m1fn": 4, "f8e4m3": 8, "f8e4m3fn": 8, "f8e5m2": 8,
    "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2fnuz": 8, "f8e8m0fnu": 8,
}  # fmt: skip

#: Instructions that exchange data between devices.
COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)

#: The memory space of a device's host.
HOST = 5

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+(?:#\d+)?)")  # %x#2 is element 2 of %x
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Attributes:
      dtype, dims: as in HLO, dims of one device.
      space: memory space; 0 is the device's main memory, others are on chip (or the host).
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes without the padding of a tiled layout; 0 for tokens and opaque values."""
        return -(-self.size * ITEM_BITS.get(self.dtype, 0) // 8)


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape's text, those of a tuple one after the other."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = _MEMORY_SPACE.search(layout)
        sizes = tuple(int(d) for d in dims.split(",") if d)
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


@dataclass
class Instruction:
    """One line of a computation.

    Attributes:
      shape: text of the result's shape.
      operands: names of instructions of the same computation.
      arguments, attributes: the text between the parentheses, and after them.
    """

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        return _NAME.findall(self.arguments)

    @functools.cached_property
    def outputs(self) -> tuple[Array, ...]:
        return arrays(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.outputs)

    @functools.cached_property
    def op_name(self) -> str:
        """What of the traced program this comes from, such as ``jit(step)/jvp()/while/body``."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def calls(self, *keys: str) -> list[str]:
        """Names of the computations in attributes such as ``body=%b`` or ``calls={%a, %b}``."""
        names: list[str] = []
        for key in keys:
            for one, many in re.findall(
                rf"\b{key}=(?:%([\w.\-]+)|\{{([^}}]*)\}})", self.attributes
            ):
                names += [one] if one else _NAME.findall(many)
        return names

    def number(self, key: str) -> int | None:
        found = re.search(rf"\b{key}=(\d+)", self.attributes)
        return int(found[1]) if found else None

    def numbers(self, key: str) -> tuple[int, ...]:
        found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        found = [i for i in self.instructions.values() if i.root]
        return found[0] if found else list(self.instructions.values())[-1]

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.arguments): i for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {}
        for i in self.instructions.values():
            for name in i.operands:
                found.setdefault(name, []).append(i)
        return found


@dataclass
class Module:
    """A program.

    Attributes:
      computations: by name.
      entry: name of the one that it starts with.
      sources: number of a stack frame -> files of the traced program, the innermost call first.
    """

    computations: dict[str, Computation]
    entry: str
    sources: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def files(self, i: Instruction) -> tuple[str, ...]:
        """The files that an instruction was traced in, the innermost first; () if none is told."""
        frame = i.number("stack_frame_id")
        return () if frame is None else self.sources.get(frame, ())


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` closes."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "(":
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if not depth:
                return i
    raise ValueError(f"unbalanced parentheses in HLO: {text[:200]}")


def parse(text: str) -> Module:
    """The module of an HLO text (``compiled.as_text()``). Raises ValueError for anything else."""
    computations: dict[str, Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], Computation(header[2]))
                entry = header[2] if header[1] else entry
        elif line == "}" or line.startswith("}, execution_thread="):  # that of another core
            current = None
        elif found := _LINE.match(line):
            instruction = _instruction(found[2], found[3], bool(found[1]))
            current.instructions[instruction.name] = instruction
        elif current.instructions:  # attributes with line breaks in them
            list(current.instructions.values())[-1].attributes += line
    for computation in computations.values():
        _name_elements(computation)
    if not entry:
        raise ValueError("this is no HLO text: it has no ENTRY computation")
    return Module(computations, entry, _sources(text))


_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


def _sources(text: str) -> dict[int, tuple[str, ...]]:
    """Stack frame -> files, from the tables before the computations.

    A frame names its parent by a number that is one too high: 1 is none.
    """
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    rows: dict[int, str] = {}
    for line in text.splitlines():
        if line in tables:
            rows = tables[line]
        elif found := re.match(r"(\d+) (.*)", line):
            rows[int(found[1])] = found[2]
        elif _HEADER.match(line):
            break
    places = {n: _number(row, "file_name_id") for n, row in tables["FileLocations"].items()}
    found_files: dict[int, tuple[str, ...]] = {0: ()}
    for n, row in sorted(tables["StackFrames"].items()):  # parents come first
        file = tables["FileNames"][places[_number(row, "file_location_id")]].strip('"')
        found_files[n] = (file, *found_files[_number(row, "parent_frame_id") - 1])
    return found_files


def _number(row: str, key: str) -> int:
    found = re.search(rf"\b{key}=(\d+)", row)
    return int(found[1]) if found else 1


def _name_elements(computation: Computation) -> None:
    """Adds the ``get-tuple-element`` that an operand written ``%x#2`` stands for."""
    known = computation.instructions
    for i in list(known.values()):
        for name in i.operands:
            if "#" in name and name not in known:
                source, index = name.split("#")
                shape = _elements(known[source].shape)[int(index)]
                known[name] = Instruction(
                    name, shape, "get-tuple-element", f"%{source}", f", index={index}", False
                )


def continued(module: Module) -> set[tuple[str, str]]:
    """(computation, instruction) of collectives that an earlier fusion has begun.

    The TPU compiler spreads a collective over a chain of fusions: one starts it, some compute
    beside it, one waits for its end. Each repeats the instruction with the number of the chain.
    """
    found: set[tuple[str, str]] = set()
    for computation in module.computations.values():
        begun: set[tuple[int | None, str]] = set()
        fusions = (i for i in computation.instructions.values() if i.opcode == "fusion")
        for name in (name for fusion in fusions for name in fusion.calls("calls")):
            for i in module.computations[name].instructions.values():
                if chain := re.search(r'\bchain_id="(\d+)"', i.attributes):
                    key = i.number("channel_id"), chain[1]
                    if key in begun:
                        found.add((name, i.name))
                    begun.add(key)
    return found


def _elements(shape: str) -> list[str]:
    """The texts of a tuple's elements."""
    parts, depth = [""], 0
    for c in shape.strip()[1:-1]:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.index(" ")
    shape, rest = rest[:end], rest[end + 1 :]
    start = rest.index("(")
    close = _closing(rest, start)
    return Instruction(name, shape, rest[:start], rest[start + 1 : close], rest[close + 1 :], root)


# --- How often -----------------------------------------------------------------------------------


def executions(module: Module) -> tuple[dict[str, float], list[str]]:
    """(computation -> how often it runs, names of the loops whose length the text does not tell).

    Such a loop is counted as one turn. Computations inside fusions are those of their fusion. Of a
    conditional each branch counts as if it were taken.
    """
    counts: dict[str, float] = {}
    unknown: list[str] = []

    def visit(name: str, times: float):
        counts[name] = counts.get(name, 0.0) + times
        for i in module.computations[name].instructions.values():
            if i.opcode == "while":
                trips = trip_count(module, module.computations[name], i)
                if trips is None:
                    unknown.append(i.name)
                visit(i.calls("body")[0], times * (1 if trips is None else trips))
            elif not i.opcode.endswith(("-done", "-update")):
                for callee in _callees(i):
                    if callee in module.computations:
                        visit(callee, times)

    visit(module.entry, 1.0)
    return counts, unknown


def _callees(i: Instruction) -> list[str]:
    keys = ["calls", "branch_computations", "called_computations"]
    keys += ["true_computation", "false_computation"]
    if i.opcode in ("call", "async-start", "call-start"):
        keys.append("to_apply")
    return i.calls(*keys)


def trip_count(module: Module, around: Computation, loop: Instruction) -> int | None:
    """Turns of a ``while``: XLA's own word, or that of a counter compared with a constant."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known[1])
    condition = module.computations[loop.calls("condition")[0]]
    body = module.computations[loop.calls("body")[0]]
    compare = _compare(module, condition)
    if compare is None:
        return None
    direction, left, right = compare
    start = _initial(module, around, loop, left)
    stop = right if isinstance(right, int) else _invariant(module, around, loop, body, right)
    step = _increment(body, left)
    if start is None or stop is None or not step:
        return None
    span = stop - start if step > 0 else start - stop
    if direction in ("LE", "GE"):
        span += 1
    elif direction not in ("LT", "GT", "NE"):
        return None
    return max(0, -(-span // abs(step)))


class _Element(str):
    """The number of an element of a loop's tuple."""


def _compare(module: Module, condition: Computation):
    """(direction, element of the counter, limit as a number or an element), or None."""
    root, where, outer = condition.root, condition, {}
    if root.opcode == "fusion":
        fused = module.computations[root.calls("calls")[0]]
        outer = {
            p.name: condition.instructions[root.operands[n]] for n, p in fused.parameters.items()
        }
        root, where = fused.root, fused
    direction = re.search(r"direction=(\w+)", root.attributes)
    if root.opcode != "compare" or not direction:
        return None
    sides: list[int | _Element] = []
    for name in root.operands:
        i = _plain(where, where.instructions[name])
        i = _plain(condition, outer[i.name]) if i.name in outer else i
        if i.opcode == "constant":
            sides.append(int(i.arguments))
        elif i.opcode == "get-tuple-element":
            sides.append(_Element(i.number("index")))
        else:
            return None
    if not isinstance(sides[0], _Element):
        return None
    return direction[1], sides[0], sides[1]


def _plain(where: Computation, i: Instruction) -> Instruction:
    """What an instruction is a copy of."""
    while i.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start") and i.operands:
        i = where.instructions[i.operands[0]]
    return i


def _initial(module: Module, around: Computation, loop: Instruction, element: str) -> int | None:
    value = around.instructions[loop.operands[0]]
    for _ in range(8):
        value = _plain(around, value)
        if value.opcode != "tuple":
            return None
        value = _plain(around, around.instructions[value.operands[int(element)]])
        if value.opcode == "constant":
            return int(value.arguments) if value.arguments.lstrip("-").isdigit() else None
        if value.opcode != "get-tuple-element":
            return None
        source = around.instructions[value.operands[0]]
        if source.opcode != "while":
            return None
        element, inner = str(value.number("index")), source
        body = module.computations[inner.calls("body")[0]]
        if not _is_carried(body, element):
            return None
        value = around.instructions[inner.operands[0]]
    return None


def _is_carried(body: Computation, element: str) -> bool:
    """A loop's element that its body hands on as it is."""
    out = _plain(body, body.instructions[body.root.operands[int(element)]])
    return out.opcode == "get-tuple-element" and str(out.number("index")) == element


def _invariant(module, around, loop, body: Computation, element: str) -> int | None:
    if body.root.opcode != "tuple" or not _is_carried(body, element):
        return None
    return _initial(module, around, loop, element)


def _increment(body: Computation, element: str) -> int | None:
    if body.root.opcode != "tuple":
        return None
    out = _plain(body, body.instructions[body.root.operands[int(element)]])
    if out.opcode == "fusion":
        return 1  # a counter that is part of a fusion: every loop that JAX makes counts by one
    if out.opcode != "add":
        return None
    for name in out.operands:
        i = _plain(body, body.instructions[name])
        if i.opcode == "constant":
            return int(i.arguments)
        if i.opcode == "get-tuple-element" and str(i.number("index")) != element:
            return 1  # the one that a widened loop carries along
    return None
