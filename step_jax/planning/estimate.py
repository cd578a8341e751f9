"""Memory and time of a step as expected before compiling, from the recipe and the mesh alone.

Good enough to rank meshes; the compiled program has the last word.

Shape suffixes as in the models: B rows, T tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from step_jax.core import spec as spec_lib
from step_jax.core.sharding import GATHERED_AXES, Sharding
from step_jax.models.flops import train_flops_per_token
from step_jax.planning import roofline
from step_jax.planning import topology as topology_lib
from step_jax.planning.topology import Topology
from step_jax.trainers.pretrain import PretrainConfig, optimizer_and_state

#: Operations that recomputation adds to the three times forward of a step.
REMAT_COST = {"none": 1.0, "dots": 1.05, "full": 4 / 3}


def _local_bytes(tree) -> float:
    return float(
        sum(
            math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
            for a in jax.tree.leaves(tree)
        )
    )


@dataclass(frozen=True)
class _Layer:
    """One layer on one device: bytes of its whole-width weights, and its outputs per token."""

    weights: float
    outputs: float


def _layers(config: PretrainConfig, sharding: Sharding) -> list[tuple[int, _Layer]]:
    """(how often, layer) of every block, in the compute dtype."""
    itemsize = jnp.dtype(config.execution.dtype).itemsize
    model, found = config.model, []
    for group in model.layers:
        for block in group.blocks:
            leaves = jax.tree.leaves(
                block.specs(model.width, model.norm, model.init), is_leaf=spec_lib.is_spec
            )
            weights = outputs = 0.0
            for s in leaves:
                if s.role != "matrix":
                    continue
                gathered = [None if a in GATHERED_AXES else a for a in s.axes]
                whole = sharding.named(gathered, s.shape).shard_shape(s.shape)
                weights += math.prod(whole) * itemsize
                outputs += s.active * s.matrix_shape[2] * itemsize / sharding.size("tensor")
            found.append((group.repeat, _Layer(weights, outputs)))
    return found


def memory(config: PretrainConfig, sharding: Sharding, rows: int) -> dict[str, float]:
    """Bytes of a device by class (see ``planning.memory.CLASSES``), as expected."""
    _, state = optimizer_and_state(config, sharding, rows)
    itemsize = jnp.dtype(config.execution.dtype).itemsize
    parameters = _local_bytes(state.params)
    copies = parameters / 4 * itemsize if itemsize < 4 else 0.0
    local_BT = rows * config.data.sequence_length / config.training.accumulation
    local_BT /= sharding.ways("batch") * sharding.ways("sequence")
    layers = _layers(config, sharding)
    D = config.model.width
    kept = {"full": 0.0, "dots": 1.0, "none": 2.5}[config.execution.remat]
    activations = sum(n * local_BT * (D * itemsize + kept * layer.outputs) for n, layer in layers)
    widest = max(layer.outputs for _, layer in layers)
    logits = local_BT / config.execution.loss_chunks * config.model.vocab * 4
    temporaries = max(layer.weights for _, layer in layers) * 2
    temporaries += max(2 * logits / sharding.size("tensor"), 3 * local_BT * widest)
    head = D * config.model.vocab / sharding.size("tensor")
    temporaries += head * (4 + itemsize)  # the head's gradient is summed whole, see cross_entropy
    return {
        "parameters": parameters + copies + (_local_bytes(state.ema) if state.ema else 0.0),
        "optimizer": _local_bytes(state.opt_state),
        "gradients": parameters + copies,
        "activations": activations,
        "temporaries": temporaries,
        "program": 0.0,
    }


def step_seconds(
    config: PretrainConfig, topology: Topology, sharding: Sharding, rows: int
) -> tuple[float, float]:
    """(all overlapped, communication overlapped with nothing) seconds of a step, as expected."""
    T, accumulation = config.data.sequence_length, config.training.accumulation
    remat = config.execution.remat
    itemsize = jnp.dtype(config.execution.dtype).itemsize
    compute = rows * T * train_flops_per_token(config.model, T) / topology.count
    compute *= REMAT_COST[remat] / roofline.peak(topology, config.execution.dtype)
    local_BT = rows * T / (sharding.ways("batch") * sharding.ways("sequence"))
    layers = _layers(config, sharding)
    depth = sum(n for n, _ in layers)
    weights = sum(n * layer.weights for n, layer in layers)
    passes = 2 if remat == "none" else 3
    D = config.model.width

    def share(axis: str) -> float:
        size = sharding.size(axis)
        return (size - 1) / size

    sent = {
        # gathered in every pass, the gradient scattered once, for every microbatch
        "fsdp": weights * (passes + 1) * accumulation * share("fsdp"),
        "data": 2 * weights * 2 / sharding.size("fsdp") * share("data"),
        # two sums over the tensor axis a layer and pass
        "tensor": 2 * 2 * (passes + 1) * depth * local_BT * D * itemsize * share("tensor"),
        "expert": 2 * (passes + 1) * depth * local_BT * D * itemsize * share("expert"),
        "context": 2 * (passes + 1) * depth * local_BT * D * itemsize * share("context"),
    }
    network = []
    for axis, nbytes in sent.items():
        if nbytes:
            between = topology.slices > 1 and topology_lib.crosses_slices(sharding.mesh, [axis])
            speed = topology_lib.bandwidth(topology, sharding.mesh, [axis], between)
            network.append(nbytes / speed)
    return max([compute, *network]), compute + sum(network)
