"""Compiling a recipe's train step for devices that are not here."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.data.config import TRAIN_TOKENIZER
from step_jax.planning import hlo
from step_jax.planning.memory import out_of_memory
from step_jax.planning.topology import Topology
from step_jax.runs import device_memory
from step_jax.trainers.pretrain import (
    PretrainConfig,
    compile_step,
    optimizer_and_state,
    with_vocabulary,
)
from step_jax.training.state import TrainState


@dataclass(frozen=True)
class Program:
    """A train step that was compiled, or whose compilation ended for want of memory.

    Attributes:
      state_like: see ``abstract_state``.
      hlo_text, assignment, live_range: what XLA dumped of the optimised program.
      code_bytes: of the program itself; 0 if it does not fit.
      memory_bytes: what the compiler says that the program takes in all; None if it does not fit.
      compile_seconds: CPU seconds of tracing, lowering and compiling.
      overflow: the compiler's message if the program needs more memory than there is, else "".
    """

    sharding: Sharding
    rows: int
    state_like: TrainState
    hlo_text: str
    assignment: str
    live_range: str
    code_bytes: float
    memory_bytes: int | None
    compile_seconds: float
    overflow: str = ""

    @property
    def local_parameter_shapes(self) -> list[tuple[int, ...]]:
        """A device's piece of every parameter."""
        return [p.sharding.shard_shape(p.shape) for p in jax.tree.leaves(self.state_like.params)]


def with_known_vocabulary(config: PretrainConfig) -> PretrainConfig:
    """The recipe with its vocabulary. Raises ConfigError if only the tokenizer knows it."""
    model = config.model
    if not model.vocab:
        if config.data.tokenizer != TRAIN_TOKENIZER:
            raise ConfigError(
                "a plan does not open the tokenizer: set model.vocab to the size of its vocabulary"
            )
        model = with_vocabulary(model, config.data.vocab_size)
    return replace(config, model=model)


def resolved(config: PretrainConfig, devices: int) -> PretrainConfig:
    """The recipe with its vocabulary, and its mesh in numbers.

    Raises:
      ConfigError: no vocabulary without the tokenizer, or a mesh of another number of devices.
    """
    return replace(with_known_vocabulary(config), parallel=config.parallel.resolve(devices))


def rows_of(config: PretrainConfig, sharding: Sharding) -> int:
    """Rows of a batch. Raises ConfigError if microbatches of them do not divide over the mesh."""
    ways = sharding.ways("batch")
    rows = config.training.rows(config.data.sequence_length, ways)
    accumulation = config.training.accumulation
    if rows % (ways * accumulation):
        raise ConfigError(
            f"a batch of {rows} rows in {accumulation} microbatches does not divide over the "
            f"{ways} devices that share it: training.batch_size must be a multiple of "
            f"{ways * accumulation}"
        )
    return rows


def compile_program(config: PretrainConfig, topology: Topology) -> Program:
    """Compiles the train step of a recipe (see ``resolved``), once.

    Raises:
      ConfigError: a mesh, batch or sequence that does not fit, or devices only known on paper.
    """
    if topology.devices is None:
        raise ConfigError(f"nothing can be compiled for {topology.name} here")
    sharding = Sharding.build(config.parallel, topology.devices)
    rows = rows_of(config, sharding)
    start = time.process_time()
    optimizer, state_like = optimizer_and_state(config, sharding, rows)
    overflow, code_bytes, memory_bytes = "", 0.0, None
    with _dump() as folder:
        options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
        try:
            compiled = compile_step(config, optimizer, sharding, state_like, rows, options)
            code_bytes = float(compiled.memory_analysis().generated_code_size_in_bytes)
            memory_bytes = device_memory.needed(compiled)
        except jax.errors.JaxRuntimeError as error:
            if out_of_memory(str(error)) is None:
                raise
            overflow = str(error)
        seconds = time.process_time() - start
        hlo, assignment, live = (_read(folder, name) for name in _FILES)
    return Program(
        sharding,
        rows,
        state_like,
        hlo,
        assignment,
        live,
        code_bytes,
        memory_bytes,
        seconds,
        overflow,
    )


_FILES = ("after_optimizations.txt", "-buffer-assignment.txt", "-live-range.txt")


@contextlib.contextmanager
def _dump() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="step_jax_plan_") as folder:
        yield Path(folder)


def _read(folder: Path, ending: str) -> str:
    """The text of the train step in XLA's dump; of several attempts to fit it the last."""
    found = [p for p in folder.iterdir() if "train_step" in p.name and p.name.endswith(ending)]
    if not found:
        return ""
    return max(found, key=lambda p: p.stat().st_mtime).read_text(encoding="utf-8")


def parsed(program: Program) -> hlo.Module:
    if not program.hlo_text:
        raise RuntimeError(f"the compiler left no program to read: {program.overflow[:500]}")
    return hlo.parse(program.hlo_text)
