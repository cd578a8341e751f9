"""Memory and time of a decoder's step as expected before compiling, from shapes and the mesh alone.

Good enough to rank meshes; the compiled program has the last word. Other models have no estimates.

Shape suffixes as in the models: B rows, T tokens, D width.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from step_jax.core import spec as spec_lib
from step_jax.core.hardware import has_ragged_all_to_all
from step_jax.core.sharding import GATHERED_AXES, Sharding, axes_of_entry
from step_jax.data.schema import Schema
from step_jax.models import pipeline
from step_jax.models.context import Execution
from step_jax.models.flops import attention_core_flops, forward_flops_per_token
from step_jax.models.layers.moe import MoE
from step_jax.models.text.decoder import Decoder
from step_jax.planning import roofline
from step_jax.planning import topology as topology_lib
from step_jax.planning.compiled import extent
from step_jax.planning.topology import Topology
from step_jax.training.learner import Learner, Learning
from step_jax.training.program import Program
from step_jax.training.state import state_shardings

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Held:
    """Bytes of a state on one device: parameters, those of them that learn, and what is beside."""

    parameters: float
    trained: float
    optimizer: float
    average: float


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
    total = [0.0] * 4
    for name, how in learnings.items():
        of_learner = _held(state.learners[name], shardings.learners[name], how)
        total = [a + b for a, b in zip(total, of_learner, strict=True)]
    return Held(*total)


def _held(held: Learner, layout: Learner, how: Learning) -> list[float]:
    def local(tree, layout) -> float:
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(layout), strict=True)
        return float(sum(math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize for a, s in pairs))

    trained = (spec_lib.trained(how.specs, tree) for tree in (held.params, layout.params))
    return [
        local(held.params, layout.params),
        local(*trained),
        local(held.opt_state, layout.opt_state),
        local(held.average, layout.average),
    ]


@dataclass(frozen=True)
class _Weight:
    """A matrix of a layer on one device: its bytes when gathered, and along which mesh axes."""

    nbytes: float
    gathered: Axes
    of_experts: bool


@dataclass(frozen=True)
class _Block:
    """A layer on one device in the compute dtype.

    Attributes:
      repeat: how many there are.
      pipelined: whether they are stages of a pipeline.
      outputs: bytes that its products give per token.
      keys: bytes of keys and values per token.
      experts: its mixture, if it has one.
      expert_flops: operations of a token's routed experts, forward, over all devices.
    """

    repeat: int
    pipelined: bool
    weights: tuple[_Weight, ...]
    outputs: float
    keys: float
    experts: MoE | None
    expert_flops: float

    @property
    def nbytes(self) -> float:
        return sum(w.nbytes for w in self.weights)


def _weight(s: spec_lib.ParamSpec, sharding: Sharding, itemsize: int) -> _Weight:
    spec = sharding.spec(s.axes, s.shape)
    cut = [
        axes_of_entry(entry)
        for name, entry in zip(s.axes, spec, strict=True)
        if name in GATHERED_AXES
    ]
    whole = [None if a in GATHERED_AXES else a for a in s.axes]
    local = sharding.named(whole, s.shape).shard_shape(s.shape)
    return _Weight(math.prod(local) * itemsize, sum(cut, ()), "experts" in s.axes)


@functools.lru_cache(maxsize=512)
def _blocks(model, dtype: str, sharding: Sharding) -> tuple[_Block, ...]:
    itemsize = jnp.dtype(dtype).itemsize
    found = []
    for stack in model.trunk.walk():
        block = stack.block
        leaves = jax.tree.leaves(model.trunk.block_specs(block), is_leaf=spec_lib.is_spec)
        matrices = [s for s in leaves if s.role == "matrix"]
        outputs = sum(s.active * s.matrix_shape[2] for s in matrices) * itemsize
        routed = sum(s.active * s.size for s in matrices if "experts" in s.axes)
        keys = sum(math.prod(entry) for entry in block.attention.cache_entries())
        found.append(
            _Block(
                stack.repeat,
                pipeline.is_pipelined(stack.repeat, sharding),
                tuple(_weight(s, sharding, itemsize) for s in matrices),
                outputs / sharding.size("tensor"),
                keys * itemsize,
                block.mlp if isinstance(block.mlp, MoE) else None,
                2.0 * routed,
            )
        )
    return tuple(found)


def memory(case: Case) -> dict[str, float]:
    """Bytes of a device by class (see ``planning.memory.CLASSES``), as expected."""
    execution, sharding, held = case.execution, case.sharding, case.held
    itemsize = jnp.dtype(execution.dtype).itemsize
    cast = itemsize / 4 if itemsize < 4 else 0.0  # copies in the compute dtype
    local_BT = case.local_tokens / case.accumulation
    blocks = _blocks(case.model, execution.dtype, sharding)
    D, V = case.model.width, case.model.vocab
    kept = {"full": 0.0, "dots": 1.0, "none": 2.5}[execution.remat]
    activations = sum(b.repeat * local_BT * (D * itemsize + kept * b.outputs) for b in blocks)
    widest = max(b.outputs for b in blocks)
    logits = local_BT / execution.loss_chunks * V * 4
    temporaries = max(b.nbytes for b in blocks) * 2
    temporaries += max(2 * logits / sharding.size("tensor"), 3 * local_BT * widest)
    head = D * V / sharding.size("tensor")
    temporaries += head * (4 + itemsize)  # the head's gradient is summed whole, see cross_entropy
    return {
        "parameters": held.parameters * (1 + cast) + held.average,
        "optimizer": held.optimizer,
        "gradients": held.trained * (1 + cast),
        "activations": activations,
        "temporaries": temporaries,
        "gaps": 0.0,
        "program": 0.0,
    }


# --- Time ---------------------------------------------------------------------------------------


def bubble(rows: int | None, accumulation: int, sharding: Sharding) -> tuple[int, float]:
    """(microbatches of the pipeline, share of its steps that a device idles); (0, 0) without one.

    Args:
      rows: of a batch; None if it has no one number of them, and nothing is known.

    Raises:
      ConfigError: rows that do not make microbatches.
    """
    stages = sharding.size(pipeline.AXIS)
    if stages == 1 or rows is None:
        return 0, 0.0
    pieces = pipeline.microbatches(rows // accumulation, sharding)
    return pieces, pipeline.bubble_fraction(stages, sharding.rounds, pieces)


def expert_excess(case: Case) -> float:
    """Operations of a step that a shard of experts has beyond an even load if its buffers are full.

    All others wait for it: the most that unlike loads can cost before assignments are dropped.
    """
    parts, shards = case.sharding.ways("sequence"), case.sharding.size("expert")
    passes = 3 if case.execution.remat == "none" else 4  # no policy keeps the experts' products
    total = 0.0
    for b in _blocks(case.model, case.execution.dtype, case.sharding):
        if b.experts is None:
            continue
        rows = b.experts.buffer_rows(case.sequence, parts, shards)
        full = rows / (case.sequence // parts * b.experts.router.top_k)
        total += b.repeat * passes * b.expert_flops * (full - 1)
    return total * case.tokens / case.sharding.mesh.size


def operations(case: Case) -> float:
    """Operations of a step on one device: forward, backward, recomputed, and on padding."""
    T, model, remat = case.sequence, case.model, case.execution.remat
    forward = forward_flops_per_token(model, T)
    blocks = _blocks(model, case.execution.dtype, case.sharding)
    head = 2.0 * model.vocab * model.width  # computed with its gradients, once
    kernels = sum(b.repeat * b.expert_flops for b in blocks)
    kernels += sum(s.repeat * attention_core_flops(s.block, T) for s in model.trunk.walk())
    again = {"none": 0.0, "dots": kernels, "full": forward - head}[remat]
    if any(b.pipelined for b in blocks) and remat != "none":
        again += forward - head  # a stage is run again before its layers are
    _, idle = bubble(case.rows, case.accumulation, case.sharding)
    per_token = 3 * head + (3 * (forward - head) + again) / (1 - idle)
    return case.tokens * per_token / case.sharding.mesh.size


def sent(case: Case, topology: Topology) -> dict[Axes, float]:
    """Mesh axes -> bytes that a device sends along them in a step, as ``collectives.sent``."""
    sharding = case.sharding
    ragged = has_ragged_all_to_all(topology.devices[0])
    bytes_by: dict[Axes, float] = defaultdict(float)
    itemsize = jnp.dtype(case.execution.dtype).itemsize
    local_BT = case.local_tokens
    pieces, idle = bubble(case.rows, case.accumulation, sharding)
    A, D, remat = case.accumulation, case.model.width, case.execution.remat
    tokens = (*sharding.mesh_axes("batch"), *sharding.mesh_axes("sequence"))

    def send(axes: Axes, nbytes: float, round_trips: int):
        """Of what n devices hold together: (n-1)/n once to gather or scatter, twice to sum."""
        axes = tuple(a for a in axes if sharding.size(a) > 1)
        n = sharding.size(*axes)
        bytes_by[axes] += round_trips * nbytes * (n - 1) / n

    def fsdp(w: _Weight, times: float, gathers: int, along: Axes):
        """Gathered axis by axis, the gradient scattered so and summed over the rest (core.fsdp)."""
        cut = [a for a in w.gathered if sharding.size(a) > 1]
        nbytes = times * w.nbytes
        for axis in cut:
            send((axis,), nbytes, gathers + 1)
            nbytes /= sharding.size(axis)
        send(tuple(a for a in along if a not in cut), nbytes, 2)

    for b in _blocks(case.model, case.execution.dtype, sharding):
        turns, along, stretch = float(A * b.repeat), tokens, 1.0
        forwards = 1 if remat == "none" else 2
        if b.pipelined:
            stages, rounds = sharding.size(pipeline.AXIS), sharding.rounds
            turns *= pipeline.steps(stages, rounds, pieces) / (stages * rounds)
            along = tuple(a for a in tokens if a != pipeline.AXIS)
            stretch = 1 / (1 - idle)
            forwards += remat != "none"
        for w in b.weights:
            if not w.of_experts:
                fsdp(w, turns, forwards, along)
                continue
            send(w.gathered, turns * w.nbytes, forwards + 1)  # all axes at once, see models.moe
            others = tuple(a for a in along if a not in ("expert", *w.gathered))
            send(others, turns * w.nbytes / sharding.size(*w.gathered), 2)
        x = b.repeat * local_BT * stretch
        send(("context",), x * b.keys * sharding.size("context"), forwards + 1)
        send(("tensor",), x * D * itemsize, 2 * (3 + forwards))  # the last sum is not made again
        if b.experts is not None:
            nbytes = x * D * itemsize
            axes, nbytes = _exchanged(b.experts, nbytes, case.sequence, sharding, forwards, ragged)
            bytes_by[axes] += nbytes
    for s in jax.tree.leaves(case.model.specs(), is_leaf=spec_lib.is_spec):
        if s.role in ("embedding", "head"):
            fsdp(_weight(s, sharding, itemsize), A, 1, tokens)
    if pieces:  # hidden states to the neighbour and rows to their stage, there and back
        per_step = local_BT / A * sharding.size(pipeline.AXIS) / pieces * D * itemsize
        steps = pipeline.steps(sharding.size(pipeline.AXIS), sharding.rounds, pieces)
        bytes_by[(pipeline.AXIS,)] += A * steps * per_step * 4
    return {axes: nbytes for axes, nbytes in bytes_by.items() if axes and nbytes}


def _exchanged(
    m: MoE, nbytes: float, sequence: int, sharding: Sharding, forwards: int, ragged: bool
) -> tuple[Axes, float]:
    """(axis, bytes) that a mixture's tokens of ``nbytes`` send to their experts and back."""
    shards = sharding.size("expert")
    if shards == 1:
        return ("expert",), 0.0
    if (m.exchange or ("ragged" if ragged else "gather")) == "gather":
        return ("expert",), (forwards + 3) * nbytes * (shards - 1)
    parts = sharding.ways("sequence")
    room = m.buffer_rows(sequence, parts, shards) / (sequence // parts)
    return ("expert",), (forwards + 1) * nbytes * (m.router.top_k + room)


def step_seconds(case: Case, topology: Topology) -> tuple[float, float]:
    """(all overlapped, communication overlapped with nothing) seconds of a step, as expected."""
    sharding = case.sharding
    compute = operations(case) / roofline.peak(topology, case.execution.dtype)
    network = []
    for axes, nbytes in sent(case, topology).items():
        network.append(nbytes / topology_lib.bandwidth(topology, sharding.mesh, axes))
        if topology.slices > 1 and topology_lib.crosses_slices(sharding.mesh, axes):
            # first inside every slice, so that each device has its part to send to the next one
            inside = max(1.0, sharding.size(*axes) / topology.slices)
            speed = topology_lib.bandwidth(topology, sharding.mesh, axes, between=True)
            network.append(nbytes / inside / speed)
    return max([compute, *network]), compute + sum(network)
