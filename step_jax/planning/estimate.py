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
from step_jax.models.flops import attention_core_flops, forward_flops_per_token, mean_keys
from step_jax.models.layers.block import Block
from step_jax.models.layers.moe import MoE
from step_jax.models.text.decoder import Decoder
from step_jax.planning.collectives import BETWEEN_SLICES, Traffic
from step_jax.planning.compiled import extent
from step_jax.planning.layers import PRODUCTS
from step_jax.planning.topology import Topology, crosses_slices
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

    @property
    def touched(self) -> float:
        """Bytes that a step cannot but read and write: all of it once, of what is frozen half."""
        return self.parameters + self.trained + 2 * (self.optimizer + self.average)


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
      outputs, attention_outputs: bytes that its products, and attention's, give per token.
      keys: bytes of keys and values per token.
      experts: its mixture, if it has one.
      flops: (layer, kind) -> operations of a token's products with weights, forward, over all
        devices.
    """

    block: Block
    repeat: int
    pipelined: bool
    weights: tuple[_Weight, ...]
    outputs: float
    attention_outputs: float
    keys: float
    experts: MoE | None
    flops: tuple[tuple[tuple[str, str], float], ...]

    @property
    def expert_flops(self) -> float:
        """Of a token's routed experts alone."""
        return dict(self.flops).get(("experts", "experts"), 0.0)

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
        specs = model.trunk.block_specs(block)
        leaves = jax.tree.leaves(specs, is_leaf=spec_lib.is_spec)
        matrices = [s for s in leaves if s.role == "matrix"]
        outputs = _outputs(leaves) * itemsize
        of_attention = _outputs(jax.tree.leaves(specs.attention, is_leaf=spec_lib.is_spec))
        keys = sum(math.prod(entry) for entry in block.attention.cache_entries())
        found.append(
            _Block(
                block,
                stack.repeat,
                pipeline.is_pipelined(stack.repeat, sharding),
                tuple(_weight(s, sharding, itemsize) for s in matrices),
                outputs / sharding.size("tensor"),
                of_attention * itemsize / sharding.size("tensor"),
                keys * itemsize,
                block.mlp if isinstance(block.mlp, MoE) else None,
                tuple(_products(specs, block).items()),
            )
        )
    return tuple(found)


@functools.lru_cache(maxsize=512)
def _ends(model, dtype: str, sharding: Sharding) -> tuple[_Weight, ...]:
    """Embedding and head."""
    specs = jax.tree.leaves(model.specs(), is_leaf=spec_lib.is_spec)
    itemsize = jnp.dtype(dtype).itemsize
    return tuple(_weight(s, sharding, itemsize) for s in specs if s.role in ("embedding", "head"))


_forward_flops = functools.lru_cache(maxsize=64)(forward_flops_per_token)


def train_flops(model: Decoder, length: int) -> float:
    """``flops.train_flops_per_token``, kept for the next mesh."""
    return 3.0 * _forward_flops(model, length)


def _outputs(specs: list[spec_lib.ParamSpec]) -> float:
    """Numbers that a token's products with matrices give."""
    return sum(s.active * s.matrix_shape[2] for s in specs if s.role == "matrix")


def _products(specs, block: Block) -> dict[tuple[str, str], float]:
    """(layer, kind) -> operations of a token's products with a layer's weights, forward."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    parts = {"attention": specs.attention}
    parts["experts" if isinstance(block.mlp, MoE) else "mlp"] = specs.mlp
    for layer, part in parts.items():
        for s in jax.tree.leaves(part, is_leaf=spec_lib.is_spec):
            if s.role in ("matrix", "router"):
                kind = "experts" if "experts" in s.axes and s.role == "matrix" else "dense"
                found[layer, kind] += 2.0 * s.active * s.size
    return found


#: How much of the widest products, of the rows that are sorted for experts and sent, and of what
#: all shards gather lies in memory at a time: by the compiled steps of ``tests/planning/golden``.
_OF_OUTPUTS, _OF_ROWS, _OF_GATHERED = 1.4, 2.5, 5.5


def _dispatched(b: _Block, case: Case, ragged: bool) -> float:
    """Bytes of a token that a mixture holds for its experts, for every unit of width."""
    m, shards = b.experts, case.sharding.size("expert")
    if m is None:
        return 0.0
    if shards > 1 and not _sends_rows(m, ragged):
        return _OF_GATHERED * shards * 4  # summed in float32
    tokens = case.sequence // case.sharding.ways("sequence")
    rows = m.buffer_rows(case.sequence, case.sharding.ways("sequence"), shards) / tokens
    return _OF_ROWS * (m.router.top_k + rows) * jnp.dtype(case.execution.dtype).itemsize


def _sends_rows(m: MoE, ragged: bool) -> bool:
    """Whether rows travel to their experts alone, and not all tokens to all shards."""
    return (m.exchange or ("ragged" if ragged else "gather")) == "ragged"


def memory(case: Case) -> dict[str, float]:
    """Bytes of a device by class (see ``planning.memory.CLASSES``), as expected."""
    ragged = has_ragged_all_to_all(case.sharding.mesh.devices.flat[0])
    execution, sharding, held = case.execution, case.sharding, case.held
    itemsize = jnp.dtype(execution.dtype).itemsize
    cast = itemsize / 4 if itemsize < 4 else 0.0  # copies in the compute dtype
    local_BT = case.local_tokens / case.accumulation
    blocks = _blocks(case.model, execution.dtype, sharding)
    D, V = case.model.width, case.model.vocab
    kept = {"full": 0.0, "dots": 1.0, "none": 2.5}[execution.remat]
    activations = sum(b.repeat * local_BT * (D * itemsize + kept * b.outputs) for b in blocks)
    widest = max(b.outputs for b in blocks)
    tensor = sharding.size("tensor")
    temporaries = max(b.nbytes for b in blocks)
    temporaries += local_BT / execution.loss_chunks * V * 4 / tensor  # logits
    temporaries += _OF_OUTPUTS * local_BT * widest
    temporaries += max(_dispatched(b, case, ragged) for b in blocks) * local_BT * D
    head = D * V / tensor
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


#: Times that a pass over a layer moves a token's vector, and what attention's products give; and
#: that a step moves a token's logits: by Llama-3.1-8B's step as compiled for v6e.
_OVER_WIDTH, _OVER_OUTPUTS, _OVER_LOGITS = 5.5, 3.0, 2.0
#: Times that a pass over a mixture moves a token's vector for each of its experts: sorted, sorted
#: back and summed, read and written each time, partly in float32.
_OVER_ASSIGNMENT = 8.0
#: Of a gated MLP's three products the last is not computed again: no gradient needs it.
_REPEATED = {"mlp": 2 / 3}
#: Keys and queries that attention's kernels compute at a time, whether or not all are seen.
_BLOCK = 1024
#: Kind of work -> its gradients in forward passes: attention's take five products for two.
_BACKWARD = {"attention": 2.5, "dense": 2.0, "experts": 2.0}


def work(case: Case) -> dict[tuple[str, str], float]:
    """(layer, kind of work) -> operations or bytes of a step on one device, see ``layers``.

    Forward, backward, recomputed, and on padding.
    """
    model, execution, remat = case.model, case.execution, case.execution.remat
    itemsize = jnp.dtype(execution.dtype).itemsize
    stretch = 1 / (1 - bubble(case.rows, case.accumulation, case.sharding)[1])
    share = case.tokens / case.sharding.mesh.size  # products divide over every axis
    found: dict[tuple[str, str], float] = defaultdict(float)
    blocks = _blocks(model, execution.dtype, case.sharding)
    for b in blocks:
        forward = dict(b.flops)
        forward["attention", "attention"] = _computed_core(b.block, case.sequence)
        for (layer, kind), flops in forward.items():
            again = float(remat == "full" or (remat == "dots" and kind != "dense"))
            again *= _REPEATED.get(layer, 1.0)
            again += b.pipelined and remat != "none"  # a stage is run again before its layers are
            passes = 1 + _BACKWARD[kind] + again
            found[layer, kind] += b.repeat * share * passes * flops * stretch
        runs = (1 if remat == "none" else 2) + 2
        times = b.repeat * case.local_tokens * runs * stretch
        found["attention", "elementwise"] += times * _OVER_OUTPUTS * b.attention_outputs
        found["rest", "elementwise"] += times * _OVER_WIDTH * model.width * itemsize
        if b.experts is not None:
            assigned = b.experts.router.top_k * model.width * itemsize
            found["experts", "elementwise"] += times * _OVER_ASSIGNMENT * assigned
    logits = model.vocab / case.sharding.size("tensor") * 4
    per_layer = (b.repeat * sum(dict(b.flops).values()) for b in blocks)
    cores = (b.repeat * attention_core_flops(b.block, case.sequence) for b in blocks)
    heads = _forward_flops(model, case.sequence) - sum(per_layer) - sum(cores)
    found["head", "dense"] += 3 * heads * share  # computed with its gradients, once
    found["head", "elementwise"] += _OVER_LOGITS * case.local_tokens * logits
    held = case.held
    state = held.parameters + held.average + held.optimizer + held.trained
    found["optimizer", "optimizer"] = 2 * state
    return dict(found)


def _computed_core(block: Block, length: int) -> float:
    """Operations of a token's attention in whole blocks: on average half a block at every edge."""
    window = block.attention.window
    edges = 1 if window is None or window >= length else 2
    keys = mean_keys(length, window)
    computed = min(float(length), keys + edges * min(_BLOCK, length) / 2)
    return attention_core_flops(block, length) * computed / keys


def operations(case: Case) -> float:
    """Operations of a step on one device: forward, backward, recomputed, and on padding."""
    return sum(amount for (_, kind), amount in work(case).items() if kind in PRODUCTS)


def sent(case: Case, topology: Topology) -> list[Traffic]:
    """What a device sends in a step, as ``collectives.sent``, by kind and mesh axes.

    Gathers stand for the scatters of their gradients too, and for sums, which are both.
    """
    sharding = case.sharding
    ragged = has_ragged_all_to_all(topology.devices[0])
    bytes_by: dict[tuple[str, Axes], float] = defaultdict(float)
    itemsize = jnp.dtype(case.execution.dtype).itemsize
    local_BT = case.local_tokens
    pieces, idle = bubble(case.rows, case.accumulation, sharding)
    A, D, remat = case.accumulation, case.model.width, case.execution.remat
    tokens = (*sharding.mesh_axes("batch"), *sharding.mesh_axes("sequence"))

    def send(axes: Axes, nbytes: float, round_trips: int):
        """Of what n devices hold together: (n-1)/n once to gather or scatter, twice to sum."""
        axes = tuple(a for a in axes if sharding.size(a) > 1)
        n = sharding.size(*axes)
        bytes_by["all-gather", axes] += round_trips * nbytes * (n - 1) / n

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
            kind, nbytes = _exchanged(b.experts, nbytes, sharding, forwards, ragged)
            bytes_by[kind, ("expert",)] += nbytes
    for w in _ends(case.model, case.execution.dtype, sharding):
        fsdp(w, A, 1, tokens)
    if pieces:  # hidden states to the neighbour and rows to their stage, there and back
        per_step = local_BT / A * sharding.size(pipeline.AXIS) / pieces * D * itemsize
        steps = pipeline.steps(sharding.size(pipeline.AXIS), sharding.rounds, pieces)
        bytes_by["collective-permute", (pipeline.AXIS,)] += A * steps * per_step * 4
    return [
        traffic
        for (kind, axes), nbytes in bytes_by.items()
        if axes and nbytes
        for traffic in _crossing(kind, axes, nbytes, sharding, topology)
    ]


def _crossing(
    kind: str, axes: Axes, nbytes: float, sharding: Sharding, topology: Topology
) -> list[Traffic]:
    """A collective inside a slice, and what of it goes from slice to slice."""
    names = "+".join(axes)
    inside = Traffic(kind, names, 1.0, nbytes)
    if topology.slices == 1 or not crosses_slices(sharding.mesh, axes):
        return [inside]
    # first inside every slice, so that each device has its part to send to the next one
    members = max(1.0, sharding.size(*axes) / topology.slices)
    return [inside, Traffic(kind, names + BETWEEN_SLICES, 1.0, nbytes / members)]


def _exchanged(
    m: MoE, nbytes: float, sharding: Sharding, forwards: int, ragged: bool
) -> tuple[str, float]:
    """(kind, bytes) that a mixture's tokens of ``nbytes`` send to their experts and back.

    At an even load.
    """
    shards = sharding.size("expert")
    if shards == 1:
        return "all-gather", 0.0
    if not _sends_rows(m, ragged):
        return "all-gather", (forwards + 3) * nbytes * (shards - 1)
    away = (shards - 1) / shards
    return "ragged-all-to-all", (forwards + 1) * nbytes * 2 * m.router.top_k * away
