"""Compiling a loop's train step for devices that are not here."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax

from step_jax.core.errors import ConfigError
from step_jax.core.kept_programs import not_kept
from step_jax.core.sharding import Sharding
from step_jax.data.schema import Schema
from step_jax.models.context import Execution
from step_jax.planning import hlo
from step_jax.planning.memory import out_of_memory
from step_jax.planning.topology import Topology
from step_jax.runs import device_memory
from step_jax.training.program import Phase, Program


class Loop(Protocol):
    """What a plan asks of a loop: the program of a configuration on a mesh.

    One that runs others between its steps has ``phases``, of the same arguments, too.
    """

    def program(self, config: Any, sharding: Sharding) -> Program: ...


@dataclass(frozen=True)
class Dumped:
    """A program that was compiled, or whose compilation ended for want of memory.

    Attributes:
      hlo_text, assignment, live_range: what XLA dumped of the optimised program.
      code_bytes: of the compiled program itself; 0 if it does not fit.
      memory_bytes: what the compiler says that it takes in all; None if it does not fit.
      compile_seconds: CPU seconds of tracing, lowering and compiling.
      overflow: the compiler's message if it needs more memory than there is, else "".
    """

    hlo_text: str
    assignment: str
    live_range: str
    code_bytes: float
    memory_bytes: int | None
    compile_seconds: float
    overflow: str


@dataclass(frozen=True)
class Compiled(Dumped):
    """A train step that was compiled."""

    program: Program

    @property
    def local_parameter_shapes(self) -> list[tuple[int, ...]]:
        """A device's piece of every parameter of every learner."""
        learners = self.program.state_like.learners.values()
        leaves = jax.tree.leaves([learner.params for learner in learners])
        return [p.sharding.shard_shape(p.shape) for p in leaves]


def resolved(config: Any, devices: int) -> Any:
    """A loop's configuration with its mesh in numbers.

    Raises:
      ConfigError: a mesh of another number of devices.
    """
    return replace(config, parallel=config.parallel.resolve(devices - config.parallel.spare))


def execution_of(config: Any) -> Execution | None:
    """How the steps of a loop's configuration are computed; None where it has no say in it."""
    return getattr(config, "execution", None)


def program_for(loop: Loop, config: Any, topology: Topology) -> Program:
    """The program of a configuration (see ``resolved``) on a topology.

    Raises:
      ConfigError: a mesh, batch or sequence that does not fit.
    """
    program = loop.program(config, Sharding.build(config.parallel, topology.devices))
    check_rows(program.schema, program.sharding, program.accumulation)
    return program


def phases_for(loop: Loop, config: Any, topology: Topology) -> tuple[Phase, ...]:
    """What runs between the steps of a configuration (see ``resolved``) on a topology."""
    of = getattr(loop, "phases", None)
    return () if of is None else of(config, Sharding.build(config.parallel, topology.devices))


def extent(schema: Schema) -> tuple[int | None, int | None]:
    """(rows, length of the sequence) of a batch, of its texts if it has some; None for none.

    Arrays of unlike sizes have none that stands for the batch.
    """
    fields = [f for f in schema.values() if f.row_axis is not None]
    texts = [f for f in fields if "sequence" in f.axes]
    rows = {f.shape[f.row_axis] for f in texts or fields if f.row_axis is not None}
    lengths = {f.shape[f.axes.index("sequence")] for f in texts}
    return tuple(only.pop() if len(only) == 1 else None for only in (rows, lengths))  # type: ignore


def check_rows(schema: Schema, sharding: Sharding, accumulation: int) -> None:
    """Raises ConfigError unless every device has its rows of every microbatch."""
    ways = sharding.ways("batch")
    for name, field in schema.items():
        rows = None if field.row_axis is None else field.shape[field.row_axis]
        if rows is not None and rows % (ways * accumulation):
            raise ConfigError(
                f"a batch of {rows} rows ({name}) in {accumulation} microbatches does not divide "
                f"over the {ways} devices that share it: make the rows a multiple of "
                f"{ways * accumulation}"
            )


def compile_step(program: Program, topology: Topology) -> Compiled:
    """Compiles the step of a program for its devices, once.

    Raises:
      ConfigError: devices that are only known on paper.
    """
    found = dumped(program.compile, program.step.__name__, topology)
    return Compiled(**vars(found), program=program)


def dumped(
    compile_program: Callable[[dict[str, Any]], jax.stages.Compiled], name: str, topology: Topology
) -> Dumped:
    """Compiles a function of that name by ``compile_program(compiler options)``.

    Raises:
      ConfigError: devices that are only known on paper.
    """
    if topology.on_paper:
        raise ConfigError(f"nothing can be compiled for {topology.name} here")
    start = time.process_time()
    overflow, code_bytes, memory_bytes = "", 0.0, None
    with _dump() as folder:
        try:
            compiled = compile_program({"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})
            if (memory := compiled.memory_analysis()) is not None:
                code_bytes = float(memory.generated_code_size_in_bytes)
            memory_bytes = device_memory.needed(compiled)
        except jax.errors.JaxRuntimeError as error:
            if out_of_memory(str(error)) is None:
                raise
            overflow = str(error)
        seconds = time.process_time() - start
        texts = read_dump(folder, name)
    return Dumped(*texts, code_bytes, memory_bytes, seconds, overflow)


def read_dump(folder: Path, name: str) -> tuple[str, str, str]:
    """The first three texts of ``Dumped`` for the function of that name; "" is not there."""
    program, assignment, live_range = (_read(folder, name, ending) for ending in _FILES)
    return program, assignment, live_range


_FILES = ("after_optimizations.txt", "-buffer-assignment.txt", "-live-range.txt")


@contextlib.contextmanager
def _dump() -> Iterator[Path]:
    # a program of a run that was kept on disk comes without what XLA dumps
    with not_kept(), tempfile.TemporaryDirectory(prefix="step_jax_plan_") as folder:
        yield Path(folder)


def _read(folder: Path, step: str, ending: str) -> str:
    """The text of the step of that name in XLA's dump; of several attempts to fit it the last."""
    found = [p for p in folder.iterdir() if step in p.name and p.name.endswith(ending)]
    if not found:
        return ""
    return max(found, key=lambda p: p.stat().st_mtime).read_text(encoding="utf-8")


def parsed(compiled: Dumped) -> hlo.Module:
    if not compiled.hlo_text:
        raise RuntimeError(f"the compiler left no program to read: {compiled.overflow[:500]}")
    return hlo.parse(compiled.hlo_text)
