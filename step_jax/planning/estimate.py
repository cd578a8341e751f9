"""Memory and time of a decoder's step as expected before compiling, from shapes and the mesh alone.

Good enough to rank meshes; the compiled program has the last word. Other models have no estimates.

Shape suffixes as in the models: B rows, T tokens, D width.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from step_jax.core.fsdp import fold
from step_jax.core.hardware import from_device_kind, has_ragged_all_to_all
from step_jax.core.sharding import Sharding
from step_jax.models import pipeline
from step_jax.models.context import Execution, Named
from step_jax.models.flops import attention_core_flops, forward_flops_per_token, mean_keys
from step_jax.models.layers.block import Block
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.moe import MoE
from step_jax.models.text.decoder import Decoder
from step_jax.planning import blocks
from step_jax.planning.blocks import Axes, Layer, Weight
from step_jax.planning.case import Case
from step_jax.planning.collectives import BETWEEN_SLICES, PART_OF, Traffic
from step_jax.planning.layers import PRODUCTS
from step_jax.planning.topology import Topology, crosses_slices
from step_jax.planning.topology import along as devices_along

_forward_flops = functools.lru_cache(maxsize=64)(forward_flops_per_token)


def train_flops(model: Decoder, length: int) -> float:
    """``flops.train_flops_per_token``, kept for the next mesh."""
    return 3.0 * _forward_flops(model, length)


#: Bytes of float32, in which a mixture that gathers all tokens sums them, and how many of such
#: arrays lie in memory at a time: by the compiled steps of ``tests/planning/golden``.
_FLOAT32, _OF_GATHERED = 4, 4.5
#: Arrays of a token's width in float32 that a layer keeps without remat, its input and the sums
#: between its halves among them, and one more of a mixture, for its router: by compiled steps
#: (``benchmarks/plan_search.py``).
_IN_FLOAT32, _OF_ROUTER = 6, 1


def _buffer_rows(b: Layer, case: Case) -> float:
    """Rows of a mixture's buffer for a token."""
    assert b.experts is not None
    parts, shards = case.sharding.ways("sequence"), case.sharding.size("expert")
    return b.experts.buffer_rows(case.sequence, parts, shards) / (case.sequence // parts)


def _sends_rows(m: MoE, case: Case) -> bool:
    """Whether rows travel to their experts, and to them alone: not all tokens to all shards."""
    if case.sharding.size("expert") == 1:
        return False
    ragged = has_ragged_all_to_all(case.sharding.mesh.devices.flat[0])
    return (m.exchange or ("ragged" if ragged else "gather")) == "ragged"


def _residual(b: Layer, case: Case) -> float:
    """Bytes of a token that a layer's gradients need of its forward pass, its input apart."""
    D = case.model.width
    numbers = b.heads.total + 3 * b.hidden + 3 * D  # normed twice, and between the two halves
    if b.experts is not None:
        # a row before and after its expert, its hidden units' two factors and their product
        numbers += _buffer_rows(b, case) * (2 * D + 3 * b.expert_hidden)
        if _sends_rows(b.experts, case):
            numbers += b.experts.router.top_k * D  # what came back
    return numbers * _itemsize(case)


def _working(b: Layer, case: Case) -> float:
    """Bytes of a token that the gradients of a layer take beside what they need."""
    D = case.model.width
    numbers = max(b.heads.queries, b.hidden) + D
    nbytes = 0.0
    if b.experts is not None:
        numbers += _buffer_rows(b, case) * D
        shards = case.sharding.size("expert")
        if shards > 1 and not _sends_rows(b.experts, case):
            nbytes = _OF_GATHERED * shards * _FLOAT32 * D
    return nbytes + numbers * _itemsize(case)


def _itemsize(case: Case) -> int:
    return jnp.dtype(case.execution.dtype).itemsize


def memory(case: Case) -> dict[str, float]:
    """Bytes of a device by class (see ``planning.memory.CLASSES``), as expected.

    At the fullest moment: in the backward pass, while the last group's layers are taken.
    """
    held, itemsize = case.held, _itemsize(case)
    cast = itemsize / 4 if itemsize < 4 else 0.0  # copies in the compute dtype
    # one microbatch's gradients are updated from as they come, those of several are summed first
    summed = 1.0 if case.accumulation > 1 or not cast else 0.0
    return {
        "parameters": held.parameters * (1 + cast) + held.average,
        "optimizer": held.optimizer,
        "gradients": held.trained * (summed + cast),
        "activations": _activations(case),
        "temporaries": _temporaries(case),
        "gaps": 0.0,
        "program": 0.0,
    }


def _local_tokens(case: Case) -> float:
    """Of a microbatch, on one device."""
    return case.local_tokens / case.accumulation


def _groups(case: Case) -> list[list[Layer]]:
    """The layers that are run, and run again, together."""
    found: dict[int, list[Layer]] = defaultdict(list)
    for b in blocks.layers(case.model, case.execution.dtype, case.sharding):
        found[b.group].append(b)
    return list(found.values())


def _tokens_at_a_time(b: Layer, case: Case) -> float:
    """Tokens on a device that a layer computes together: of a pipeline those of its microbatch."""
    if not b.pipelined:
        return _local_tokens(case)
    pieces, _ = bubble(case.rows, case.accumulation, case.sharding)
    return _local_tokens(case) * case.sharding.size(pipeline.AXIS) / pieces


def _kept(b: Layer, case: Case) -> float:
    """Bytes of a device that wait for a layer's backward pass beside its input.

    Without remat its gathered matrices do too, what its norms and sums have in float32 (its input
    is not kept twice), and attention's outputs as its kernel lays them out beside the tokens'. What
    comes out of experts is not needed once it is sent back.
    """
    remat, tokens, D = case.execution.remat, _tokens_at_a_time(b, case), case.model.width
    if remat == "none":
        floats = (_IN_FLOAT32 + _OF_ROUTER * (b.experts is not None)) * D * _FLOAT32
        numbers = b.heads.outputs * (1 + b.gated) - D  # of three arrays of its width one is float32
        if b.experts is not None and _sends_rows(b.experts, case):
            numbers -= _buffer_rows(b, case) * D
        return tokens * (_residual(b, case) + numbers * _itemsize(case) + floats) + b.nbytes
    numbers = b.kept_dots if remat == "dots" else _named(b, case, case.execution.keep)
    return tokens * numbers * _itemsize(case)


def _named(b: Layer, case: Case, names: Sequence[Named]) -> float:
    """Numbers of a token that an execution may name, but for the layer's input."""
    rows = 0.0 if b.experts is None else _buffer_rows(b, case)
    factors = 2 if isinstance(b.block.mlp, SwiGLU | MoE) else 1
    numbers = {
        "layer": 0.0,
        "qkv": b.heads.total - b.heads.outputs,
        "attention": b.heads.outputs,
        "mlp": factors * (b.hidden + rows * b.expert_hidden),
    }
    return sum(numbers[name] for name in names)


def host_bytes(case: Case) -> float:
    """Bytes that a device sends to its host in a step, and gets back."""
    names, D = case.execution.offload, case.model.width
    stacks = blocks.layers(case.model, case.execution.dtype, case.sharding)
    inputs = D if "layer" in names else 0.0
    numbers = sum(b.repeat * (inputs + _named(b, case, names)) for b in stacks)
    return case.local_tokens * numbers * _itemsize(case) + case.held.offloaded


def _activations(case: Case) -> float:
    """Bytes that wait for the backward pass: of every turn its input and what remat keeps."""
    total, execution = 0.0, case.execution
    for group in _groups(case):
        first = _tokens_at_a_time(group[0], case) * case.model.width * _itemsize(case)
        inputs = 0.0 if execution.remat == "none" else float("layer" not in execution.offload)
        if "layer" in execution.keep:
            inputs = float(len(group))
        turn, turns = inputs * first + sum(_kept(b, case) for b in group), float(group[0].repeat)
        if group[0].pipelined:
            turns, handed = _of_a_pipeline(group[0], case)
            total += handed * first
        total += turns * turn
    return total


def _of_a_pipeline(b: Layer, case: Case) -> tuple[float, float]:
    """(turns that wait for the backward pass at a time, inputs of stages beside them).

    With remat a stage is run again before its layers are, so that the turns of one wait, and of
    every step what the stage was handed; the rows themselves are there once more, see the carousel.
    """
    stages, rounds = case.sharding.size(pipeline.AXIS), case.sharding.rounds
    pieces, _ = bubble(case.rows, case.accumulation, case.sharding)
    steps, layers = pipeline.steps(stages, rounds, pieces), b.repeat / (stages * rounds)
    sets = pieces / stages + 1
    return (layers * steps, sets) if case.execution.remat == "none" else (layers, steps + sets)


def _temporaries(case: Case) -> float:
    """Bytes of a turn's backward pass, or of the head if that takes more."""
    turns = []
    for group in _groups(case):
        tokens = _tokens_at_a_time(group[0], case)
        again = 0.0
        if case.execution.remat != "none":  # what its layers keep is there again for all of them
            again = sum(_residual(b, case) for b in group)
        working = max(_working(b, case) for b in group)
        gradient = max(w.nbytes for b in group for w in b.weights)  # before it is scattered
        turns.append(tokens * (again + working) + sum(b.nbytes for b in group) + gradient)
    return max(turns) + _head(case)


def _head(case: Case) -> float:
    """Bytes of a piece's logits, or of the head's gradient, which lies in their place and waits."""
    model, tensor = case.model, case.sharding.size("tensor")
    piece = _local_tokens(case) / case.execution.loss_chunks
    return max(piece, model.width) * model.vocab * _FLOAT32 / tensor


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
    for b in blocks.layers(case.model, case.execution.dtype, case.sharding):
        if b.experts is None:
            continue
        rows = b.experts.buffer_rows(case.sequence, parts, shards)
        full = rows / (case.sequence // parts * b.experts.router.top_k)
        total += b.repeat * passes * b.expert_flops * (full - 1)
    return total * case.tokens / case.sharding.mesh.size


#: Times that a pass over a layer moves a token's vector, and of them the layer's input, which lies
#: with those of all layers; and that a step moves a token's logits: by Llama-3.1-8B's step as
#: compiled for v6e.
_OVER_WIDTH, _OVER_INPUT, _OVER_LOGITS = 5.5, 2.0, 2.0
#: (forward, backward) moves of a number: of queries and keys, which are turned in float32 and laid
#: out for the kernel; of what a gate multiplies; of a row in a mixture's buffer and of an
#: assignment's row that are sorted, sent and sent back; of a row that stays; of a row's hidden
#: units, which no product takes in: by compiled steps of ``benchmarks/plan_search.py``.
_OVER_QUERIES, _OVER_GATED = (5.0, 7.0), (3.0, 5.0)
_OVER_SENT, _OVER_ASSIGNED = (5.0, 12.0), (3.0, 9.0)
_OVER_ROWS, _OVER_HIDDEN = (0.0, 6.0), (3.0, 5.0)
#: Remat policy -> times that what it keeps is moved: written by the product that makes it and read,
#: or copied to its place as well.
_OVER_KEPT = {"none": 2.7, "dots": 2.0, "full": 0.0}
#: Arrays that an element-wise pass has at a time, and the share of on-chip memory that is theirs.
_AT_A_TIME, _OF_VMEM = 3, 0.75
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
    stretch = 1 / (1 - bubble(case.rows, case.accumulation, case.sharding)[1])
    share = case.tokens / case.sharding.mesh.size  # products divide over every axis
    found: dict[tuple[str, str], float] = defaultdict(float)
    stacks = blocks.layers(model, execution.dtype, case.sharding)
    for b in stacks:
        forward = dict(b.flops)
        forward["attention", "attention"] = _computed_core(b.block, case)
        for (layer, kind), flops in forward.items():
            again = float(remat == "full" or (remat == "dots" and kind != "dense"))
            again *= _REPEATED.get(layer, 1.0) * _unnamed(layer, kind, b, execution)
            again += b.pipelined and remat != "none"  # a stage is run again before its layers are
            passes = 1 + _BACKWARD[kind] + again
            found[layer, kind] += b.repeat * share * passes * flops * stretch
        for layer, nbytes in _moved(b, case).items():
            found[layer, "elementwise"] += b.repeat * case.local_tokens * nbytes * stretch
        times = case.accumulation * b.repeat * _local_tokens(case) / _tokens_at_a_time(b, case)
        found["rest", "elementwise"] += _OVER_KEPT[remat] * times * _kept(b, case) * stretch
    logits = model.vocab / case.sharding.size("tensor") * 4
    per_layer = (b.repeat * sum(dict(b.flops).values()) for b in stacks)
    cores = (b.repeat * attention_core_flops(b.block, case.sequence) for b in stacks)
    heads = _forward_flops(model, case.sequence) - sum(per_layer) - sum(cores)
    found["head", "dense"] += 3 * heads * share  # computed with its gradients, once
    found["head", "elementwise"] += _OVER_LOGITS * case.local_tokens * logits
    held = case.held
    state = held.parameters + held.average + held.optimizer + held.offloaded + held.trained
    found["optimizer", "optimizer"] = 2 * state
    return dict(found)


def _unnamed(layer: str, kind: str, b: Layer, execution: Execution) -> float:
    """The share of a layer's products whose results an execution does not keep by their names."""
    names = (*execution.keep, *execution.offload)
    if layer == "attention" and kind == "attention":
        return float("attention" not in names)
    if layer == "attention":
        return b.last_share if "qkv" in names else 1.0
    return float("mlp" not in names)


def _moved(b: Layer, case: Case) -> dict[str, float]:
    """Layer -> bytes that element-wise passes of a step move of a token.

    Arrays that lie in on-chip memory beside each other cost nothing.
    """
    itemsize, D = _itemsize(case), case.model.width
    again, tokens = case.execution.remat != "none", _tokens_at_a_time(b, case)

    def moved(numbers: float, times: tuple[float, float]) -> float:
        forward, backward = times
        stays = _stays(numbers * tokens, case)
        return 0.0 if stays else numbers * (forward * (1 + again) + backward)

    found = {"attention": moved(b.heads.queries + b.heads.keys, _OVER_QUERIES)}
    if b.gated:
        found["attention"] += moved(b.heads.outputs, _OVER_GATED)
    passes = 3 + again
    found["rest"] = passes * D * (_OVER_INPUT if _stays(D * tokens, case) else _OVER_WIDTH)
    if b.experts is not None:
        rows, sends = _buffer_rows(b, case), _sends_rows(b.experts, case)
        found["experts"] = moved(rows * b.expert_hidden, _OVER_HIDDEN)
        found["experts"] += moved(rows * D, _OVER_SENT if sends else _OVER_ROWS)
        if sends:
            found["experts"] += moved(b.experts.router.top_k * D, _OVER_ASSIGNED)
    return {layer: numbers * itemsize for layer, numbers in found.items()}


def _stays(numbers: float, case: Case) -> bool:
    """Whether an array of so many numbers stays on chip between two passes over it."""
    device = case.sharding.mesh.devices.flat[0]
    chip = from_device_kind(device.device_kind)
    if chip is None or device.platform != "tpu":
        return False
    return _AT_A_TIME * numbers * _itemsize(case) <= _OF_VMEM * chip.vmem_bytes


def _computed_core(block: Block, case: Case) -> float:
    """Operations of a token's attention in whole blocks: on average half a block at every edge.

    Of a sequence that is cut the device with the last tokens has most to do, and all wait for it.
    """
    length, window, sharding = case.sequence, block.attention.window, case.sharding
    edges = 1 if window is None or window >= length else 2
    keys = last = mean_keys(length, window)
    pieces = sharding.size("context")
    if pieces > 1 and block.attention.kv > 1 and sharding.ring:
        last = float(length)  # what is hidden is computed as well
    elif pieces > 1 and not (block.attention.kv > 1 and sharding.ulysses):
        rest = length - length // pieces
        last = pieces * keys - rest / (length / pieces) * mean_keys(rest, window)
    computed = min(float(length), last + edges * min(_BLOCK, length) / 2)
    return attention_core_flops(block, length) * computed / keys


def operations(case: Case) -> float:
    """Operations of a step on one device: forward, backward, recomputed, and on padding."""
    return sum(amount for (_, kind), amount in work(case).items() if kind in PRODUCTS)


def sent(case: Case, topology: Topology) -> list[Traffic]:
    """What a device sends in a step, as ``collectives.sent``, by kind and mesh axes.

    Gathers stand for the scatters of their gradients too, and for sums, which are both.
    """
    sharding = case.sharding
    bytes_by: dict[tuple[str, Axes, tuple[int, ...]], float] = defaultdict(float)
    pieces_of_fsdp = _pieces_of_fsdp(sharding)
    itemsize = jnp.dtype(case.execution.dtype).itemsize
    local_BT = case.local_tokens
    pieces, idle = bubble(case.rows, case.accumulation, sharding)
    A, D, remat = case.accumulation, case.model.width, case.execution.remat
    tokens = (*sharding.mesh_axes("batch"), *sharding.mesh_axes("sequence"))

    def send(axes: Axes, nbytes: float, round_trips: int):
        """Of what n devices hold together: (n-1)/n once to gather or scatter, twice to sum."""
        axes = tuple(a for a in axes if sharding.size(a) > 1)
        n = sharding.size(*axes)
        bytes_by["all-gather", axes, ()] += round_trips * nbytes * (n - 1) / n

    @functools.cache
    def adds_up(axes: Axes) -> bool:
        return len(axes) > 0 and fold(devices_along(sharding.mesh, axes), sharding.mesh.size) > 1

    def scatter(axis: str, nbytes: float):
        for group in pieces_of_fsdp if axis == "fsdp" else ():
            n = len(group)
            bytes_by["reduce-scatter", (axis,), group] += nbytes * (n - 1) / n
            nbytes /= n
        if axis != "fsdp" or not pieces_of_fsdp:
            send((axis,), nbytes, 1)

    def fsdp(w: Weight, times: float, gathers: int, along: Axes):
        """Gathered axis by axis, the gradient scattered so and summed over the rest (core.fsdp)."""
        cut = [a for a in w.gathered if sharding.size(a) > 1]
        nbytes = times * w.nbytes
        for axis in cut:
            send((axis,), nbytes, gathers)
            scatter(axis, nbytes)
            nbytes /= sharding.size(axis)
        send(tuple(a for a in along if a not in cut), nbytes, 2)

    for b in blocks.layers(case.model, case.execution.dtype, sharding):
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
            # all axes at once, see models.moe; what would have to be folded is a sum, of all of it
            send(w.gathered, turns * w.nbytes, forwards + 1 + adds_up(w.gathered))
            others = tuple(a for a in along if a not in ("expert", *w.gathered))
            send(others, turns * w.nbytes / sharding.size(*w.gathered), 2)
        x = b.repeat * local_BT * stretch
        send(("context",), x * b.keys * sharding.size("context"), forwards + 1)
        sums = 3 + forwards - (remat == "dots")  # the last is not made again, dots keeps the other
        send(("tensor",), x * D * itemsize, 2 * sums)
        if b.experts is not None:
            kind, nbytes = _exchanged(b.experts, x * D * itemsize, case, forwards)
            bytes_by[kind, ("expert",), ()] += nbytes
    for w in blocks.ends(case.model, case.execution.dtype, sharding):
        fsdp(w, A, 1, tokens)
    if pieces:  # hidden states to the neighbour and rows to their stage, there and back
        per_step = local_BT / A * sharding.size(pipeline.AXIS) / pieces * D * itemsize
        steps = pipeline.steps(sharding.size(pipeline.AXIS), sharding.rounds, pieces)
        bytes_by["collective-permute", (pipeline.AXIS,), ()] += A * steps * per_step * 4
    found: list[Traffic] = []
    for (kind, axes, group), nbytes in bytes_by.items():
        if group and nbytes:
            found.append(Traffic(kind, PART_OF + axes[0], 1.0, nbytes, group))
        elif axes and nbytes:
            found += _crossing(kind, axes, nbytes, sharding, topology)
    return found


def _pieces_of_fsdp(sharding: Sharding) -> tuple[tuple[int, ...], ...]:
    """Where the devices of the outer and the inner part of a folded FSDP axis stand: core.fsdp."""
    mesh = sharding.mesh
    at = mesh.axis_names.index("fsdp")
    places = np.moveaxis(np.arange(mesh.size).reshape(mesh.devices.shape), at, -1)
    line = places.reshape(-1, mesh.devices.shape[at])[0]
    inner = fold([mesh.devices.flat[n] for n in line], mesh.size)
    if inner == 1:
        return ()
    parts = line[::inner].tolist(), line[:inner].tolist()
    return tuple(tuple(part) for part in parts if len(part) > 1)


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


def _exchanged(m: MoE, nbytes: float, case: Case, forwards: int) -> tuple[str, float]:
    """(kind, bytes) that a mixture's tokens of ``nbytes`` send to their experts and back.

    At an even load.
    """
    shards = case.sharding.size("expert")
    if not _sends_rows(m, case):
        return "all-gather", (forwards + 3) * nbytes * (shards - 1)
    away = (shards - 1) / shards
    return "ragged-all-to-all", (forwards + 1) * nbytes * 2 * m.router.top_k * away
