"""Memory and time of a step as expected before compiling, from the recipe and the mesh alone.

Good enough to rank meshes; the compiled program has the last word.

Shape suffixes as in the models: B rows, T tokens, D width.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from step_jax.core import spec as spec_lib
from step_jax.core.hardware import has_ragged_all_to_all
from step_jax.core.sharding import GATHERED_AXES, Sharding, axes_of_entry
from step_jax.models import pipeline
from step_jax.models.context import Execution
from step_jax.models.flops import attention_core_flops, forward_flops_per_token
from step_jax.models.layers.expert_parallel import rows_needed
from step_jax.models.layers.moe import MoE
from step_jax.planning import roofline
from step_jax.planning import topology as topology_lib
from step_jax.planning.topology import Topology
from step_jax.trainers.pretrain import PretrainConfig, optimizer_and_state

Axes = tuple[str, ...]


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


@functools.lru_cache(maxsize=512)
def _state_bytes(config: PretrainConfig, sharding: Sharding, rows: int) -> tuple[float, ...]:
    """Bytes on a device of (parameters, optimizer, moving average)."""
    _, state = optimizer_and_state(config, sharding, rows)

    def local(tree) -> float:
        shapes = (
            (a.sharding.shard_shape(a.shape), a.dtype.itemsize) for a in jax.tree.leaves(tree)
        )
        return float(sum(math.prod(shape) * itemsize for shape, itemsize in shapes))

    return local(state.params), local(state.opt_state), local(state.ema)


def local_tokens(config: PretrainConfig, sharding: Sharding, rows: int) -> float:
    """Tokens of a step that one device has."""
    return rows * config.data.sequence_length / sharding.ways("batch") / sharding.ways("sequence")


def memory(config: PretrainConfig, sharding: Sharding, rows: int) -> dict[str, float]:
    """Bytes of a device by class (see ``planning.memory.CLASSES``), as expected.

    Raises:
      ConfigError: a size that the mesh does not divide.
    """
    # of the state nothing depends on how the step is computed
    plain = replace(
        config, execution=Execution(), training=replace(config.training, accumulation=1)
    )
    parameters, optimizer, average = _state_bytes(plain, sharding, rows)
    itemsize = jnp.dtype(config.execution.dtype).itemsize
    copies = parameters / 4 * itemsize if itemsize < 4 else 0.0
    local_BT = local_tokens(config, sharding, rows) / config.training.accumulation
    blocks = _blocks(config.model, config.execution.dtype, sharding)
    D = config.model.width
    kept = {"full": 0.0, "dots": 1.0, "none": 2.5}[config.execution.remat]
    activations = sum(b.repeat * local_BT * (D * itemsize + kept * b.outputs) for b in blocks)
    widest = max(b.outputs for b in blocks)
    logits = local_BT / config.execution.loss_chunks * config.model.vocab * 4
    temporaries = max(b.nbytes for b in blocks) * 2
    temporaries += max(2 * logits / sharding.size("tensor"), 3 * local_BT * widest)
    head = D * config.model.vocab / sharding.size("tensor")
    temporaries += head * (4 + itemsize)  # the head's gradient is summed whole, see cross_entropy
    return {
        "parameters": parameters + copies + average,
        "optimizer": optimizer,
        "gradients": parameters + copies,
        "activations": activations,
        "temporaries": temporaries,
        "gaps": 0.0,
        "program": 0.0,
    }


# --- Time ---------------------------------------------------------------------------------------


def bubble(config: PretrainConfig, sharding: Sharding, rows: int) -> tuple[int, float]:
    """(microbatches of the pipeline, share of its steps that a device idles); (0, 0) without one.

    Raises:
      ConfigError: rows that do not make microbatches.
    """
    stages = sharding.size(pipeline.AXIS)
    if stages == 1:
        return 0, 0.0
    pieces = pipeline.microbatches(rows // config.training.accumulation, sharding)
    return pieces, pipeline.bubble_fraction(stages, sharding.rounds, pieces)


def expert_excess(config: PretrainConfig, sharding: Sharding, rows: int) -> float:
    """Operations of a step that a shard of experts has beyond an even load if its buffers are full.

    All others wait for it: the most that unlike loads can cost before assignments are dropped.
    """
    shards = sharding.size("expert")
    N = round(local_tokens(config, sharding, rows)) // config.training.accumulation
    passes = 3 if config.execution.remat == "none" else 4  # no policy keeps the experts' products
    total = 0.0
    for b in _blocks(config.model, config.execution.dtype, sharding):
        if b.experts is None:
            continue
        K, E = b.experts.router.top_k, b.experts.total
        full = rows_needed(N, K, shards, E // shards, b.experts.capacity) / (N * K)
        total += b.repeat * passes * b.expert_flops * (full - 1)
    tokens = rows * config.data.sequence_length
    return total * tokens / sharding.mesh.size


def operations(config: PretrainConfig, sharding: Sharding, rows: int) -> float:
    """Operations of a step on one device: forward, backward, recomputed, and on padding."""
    T, model, remat = config.data.sequence_length, config.model, config.execution.remat
    forward = forward_flops_per_token(model, T)
    blocks = _blocks(model, config.execution.dtype, sharding)
    head = 2.0 * model.vocab * model.width  # computed with its gradients, once
    kernels = sum(b.repeat * b.expert_flops for b in blocks)
    kernels += sum(s.repeat * attention_core_flops(s.block, T) for s in model.trunk.walk())
    again = {"none": 0.0, "dots": kernels, "full": forward - head}[remat]
    if any(b.pipelined for b in blocks) and remat != "none":
        again += forward - head  # a stage is run again before its layers are
    _, idle = bubble(config, sharding, rows)
    per_token = 3 * head + (3 * (forward - head) + again) / (1 - idle)
    return rows * T * per_token / sharding.mesh.size


def sent(
    config: PretrainConfig, topology: Topology, sharding: Sharding, rows: int
) -> dict[Axes, float]:
    """Mesh axes -> bytes that a device sends along them in a step, as ``collectives.sent``."""
    ragged = topology.devices is not None and has_ragged_all_to_all(topology.devices[0])
    bytes_by: dict[Axes, float] = defaultdict(float)
    itemsize = jnp.dtype(config.execution.dtype).itemsize
    local_BT = local_tokens(config, sharding, rows)
    pieces, idle = bubble(config, sharding, rows)
    A, D, remat = config.training.accumulation, config.model.width, config.execution.remat
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

    for b in _blocks(config.model, config.execution.dtype, sharding):
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
            axes, nbytes = _exchanged(b.experts, x * D * itemsize, sharding, forwards, ragged)
            bytes_by[axes] += nbytes
    for s in jax.tree.leaves(config.model.specs(), is_leaf=spec_lib.is_spec):
        if s.role in ("embedding", "head"):
            fsdp(_weight(s, sharding, itemsize), A, 1, tokens)
    if pieces:  # hidden states to the neighbour and rows to their stage, there and back
        per_step = local_BT / A * sharding.size(pipeline.AXIS) / pieces * D * itemsize
        steps = pipeline.steps(sharding.size(pipeline.AXIS), sharding.rounds, pieces)
        bytes_by[(pipeline.AXIS,)] += A * steps * per_step * 4
    return {axes: nbytes for axes, nbytes in bytes_by.items() if axes and nbytes}


def _exchanged(
    m: MoE, nbytes: float, sharding: Sharding, forwards: int, ragged: bool
) -> tuple[Axes, float]:
    """(axis, bytes) that a mixture's tokens of ``nbytes`` send to their experts and back."""
    shards = sharding.size("expert")
    if shards == 1:
        return ("expert",), 0.0
    if (m.exchange or ("ragged" if ragged else "gather")) == "gather":
        return ("expert",), (forwards + 3) * nbytes * (shards - 1)
    K, many = m.router.top_k, 8192  # tokens enough for the rounding of buffers not to matter
    room = rows_needed(many, K, shards, m.total // shards, m.capacity) / many
    return ("expert",), (forwards + 1) * nbytes * (K + room)


def step_seconds(
    config: PretrainConfig, topology: Topology, sharding: Sharding, rows: int
) -> tuple[float, float]:
    """(all overlapped, communication overlapped with nothing) seconds of a step, as expected."""
    compute = operations(config, sharding, rows) / roofline.peak(topology, config.execution.dtype)
    network = []
    for axes, nbytes in sent(config, topology, sharding, rows).items():
        network.append(nbytes / topology_lib.bandwidth(topology, sharding.mesh, axes))
        if topology.slices > 1 and topology_lib.crosses_slices(sharding.mesh, axes):
            # first inside every slice, so that each device has its part to send to the next one
            inside = max(1.0, sharding.size(*axes) / topology.slices)
            speed = topology_lib.bandwidth(topology, sharding.mesh, axes, between=True)
            network.append(nbytes / inside / speed)
    return max([compute, *network]), compute + sum(network)
