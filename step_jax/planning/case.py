"""One decoder's step on a mesh, as estimates take it: sizes, and bytes of its state."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax

from step_jax.core import spec as spec_lib
from step_jax.core.sharding import Sharding
from step_jax.data.schema import Schema
from step_jax.models.context import Execution
from step_jax.models.text.decoder import Decoder
from step_jax.planning.compiled import extent
from step_jax.training.learner import Learner, Learning
from step_jax.training.program import Program
from step_jax.training.state import HOST, state_shardings


@dataclass(frozen=True)
class Held:
    """Bytes of a state on one device: parameters, those of them that learn, and what is beside.

    offloaded: of the optimizer, in the host's memory.
    """

    parameters: float
    trained: float
    optimizer: float
    average: float
    offloaded: float = 0.0

    @property
    def touched(self) -> float:
        """Bytes that a step cannot but read and write: all of it once, of what is frozen half."""
        memory = self.optimizer + self.offloaded + self.average
        return self.parameters + self.trained + 2 * memory


@dataclass(frozen=True)
class Case:
    """What estimates are made of: one decoder's step on a mesh.

    Attributes:
      rows, sequence: of a batch of texts.
      accumulation: microbatches of it.
    """

    model: Decoder
    execution: Execution
    rows: int
    sequence: int
    accumulation: int
    sharding: Sharding
    held: Held

    @property
    def tokens(self) -> int:
        """Of a step, over all devices."""
        return self.rows * self.sequence

    @property
    def local_tokens(self) -> float:
        """Of a step, on one device."""
        return self.tokens / self.sharding.ways("batch") / self.sharding.ways("sequence")


def case_of(
    program: Program,
    execution: Execution | None,
    sharding: Sharding | None = None,
    held: Held | None = None,
) -> Case | None:
    """The case of a program; None unless it is one decoder that learns from texts.

    Args:
      execution: how it is computed, None if that is not known.
      sharding: another mesh than the program's.
      held: ``held_bytes`` of it, if they are known.

    Raises:
      ConfigError: a size that the mesh does not divide.
    """
    rows, sequence = extent(program.schema)
    models = list(program.models.values())
    if len(models) != 1 or not isinstance(models[0], Decoder):
        return None
    if execution is None or rows is None or sequence is None:
        return None
    rows *= _texts(program.schema)
    sharding = program.sharding if sharding is None else sharding
    held = held_bytes(program, sharding) if held is None else held
    return Case(models[0], execution, rows, sequence, program.accumulation, sharding, held)


def _texts(schema: Schema) -> int:
    """Texts side by side in a row of the batch: the two answers of a pair."""
    field = schema.get("tokens")
    if field is None:
        return 1
    named = zip(field.axes, field.shape, strict=True)
    return math.prod(size for axis, size in named if axis is None)


def held_bytes(program: Program, sharding: Sharding) -> Held:
    """What a program's state takes of a device of a mesh."""
    state, learnings = program.state_like, program.learnings
    shardings = state_shardings(state, learnings, sharding)
    total = [0.0] * 5
    for name, how in learnings.items():
        of_learner = _held(state.learners[name], shardings.learners[name], how)
        total = [a + b for a, b in zip(total, of_learner, strict=True)]
    return Held(*total)


def _held(held: Learner, layout: Learner, how: Learning) -> list[float]:
    def local(tree, layout, offloaded: bool = False) -> float:
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(layout), strict=True)
        there = [(a, s) for a, s in pairs if (s.memory_kind == HOST) == offloaded]
        return float(sum(math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize for a, s in there))

    trained = (spec_lib.trained(how.specs, tree) for tree in (held.params, layout.params))
    return [
        local(held.params, layout.params),
        local(*trained),
        local(held.opt_state, layout.opt_state),
        local(held.average, layout.average),
        local(held.opt_state, layout.opt_state, offloaded=True),
    ]
