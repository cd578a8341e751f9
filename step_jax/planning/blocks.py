"""A decoder's layers on one device, from shapes: matrices, operations, what a token leaves behind.

Numbers are counted in elements of the compute dtype. Of a mixture, R rows stand for a token in the
buffer of its device's experts: its assignments, or as many as the capacity has room for where rows
travel to their experts, since buffers are moved and kept whole.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp

from step_jax.core import spec as spec_lib
from step_jax.core.sharding import GATHERED_AXES, Sharding, axes_of_entry
from step_jax.models import pipeline
from step_jax.models.layers.block import Block
from step_jax.models.layers.moe import MoE
from step_jax.models.text.decoder import Decoder

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Weight:
    """A matrix of a layer on one device: its bytes when gathered, and along which mesh axes."""

    nbytes: float
    gathered: Axes
    of_experts: bool


@dataclass(frozen=True)
class Heads:
    """Numbers of a token's queries, keys, values and weighted values on one device."""

    queries: float
    keys: float
    values: float
    outputs: float

    @property
    def total(self) -> float:
        return self.queries + self.keys + self.values + self.outputs


@dataclass(frozen=True)
class Layer:
    """Equal layers on one device in the compute dtype.

    Attributes:
      group: the trunk's, whose layers are run, and run again, together.
      repeat: how many there are.
      pipelined: whether they are stages of a pipeline.
      heads: of its attention.
      hidden: numbers of a token's hidden units in a dense MLP or shared experts, and in an expert.
      kept_dots: numbers of a token that products with weights give and a gradient needs: not those
        of experts, which no policy keeps, nor the last of an MLP.
      last_share: what of the operations of its attention's products its output weight has.
      keys: bytes of keys and values per token.
      experts: its mixture, if it has one.
      flops: (layer, kind) -> operations of a token's products with weights, forward, over all
        devices.
    """

    block: Block
    group: int
    repeat: int
    pipelined: bool
    weights: tuple[Weight, ...]
    heads: Heads
    hidden: float
    expert_hidden: float
    kept_dots: float
    last_share: float
    keys: float
    experts: MoE | None
    flops: tuple[tuple[tuple[str, str], float], ...]

    @property
    def gated(self) -> bool:
        """Whether its attention's outputs are multiplied by a gate."""
        return getattr(self.block.attention, "output_gate", False)

    @property
    def expert_flops(self) -> float:
        """Of a token's routed experts alone."""
        return dict(self.flops).get(("experts", "experts"), 0.0)

    @property
    def nbytes(self) -> float:
        """Of its gathered matrices."""
        return sum(w.nbytes for w in self.weights)


def _weight(s: spec_lib.ParamSpec, sharding: Sharding, itemsize: int) -> Weight:
    spec = sharding.spec(s.axes, s.shape)
    cut = [
        axes_of_entry(entry)
        for name, entry in zip(s.axes, spec, strict=True)
        if name in GATHERED_AXES
    ]
    whole = [None if a in GATHERED_AXES else a for a in s.axes]
    local = sharding.named(whole, s.shape).shard_shape(s.shape)
    return Weight(prod(local) * itemsize, sum(cut, ()), "experts" in s.axes)


def _leaves(specs) -> list[spec_lib.ParamSpec]:
    return jax.tree.leaves(specs, is_leaf=spec_lib.is_spec)


@functools.lru_cache(maxsize=512)
def layers(model: Decoder, dtype: str, sharding: Sharding) -> tuple[Layer, ...]:
    """Every stack of equal layers of a model."""
    itemsize = jnp.dtype(dtype).itemsize
    found = []
    for stack in model.trunk.walk():
        block = stack.block
        specs = model.trunk.block_specs(block)
        matrices = [s for s in _leaves(specs) if s.role == "matrix"]
        tensor = sharding.size("tensor")
        mixture = block.mlp if isinstance(block.mlp, MoE) else None
        found.append(
            Layer(
                block,
                stack.group,
                stack.repeat,
                pipeline.is_pipelined(stack.repeat, sharding),
                tuple(_weight(s, sharding, itemsize) for s in matrices),
                _heads(block, tensor),
                _hidden(_leaves(specs.mlp)) / tensor,
                0.0 if mixture is None else _expert_hidden(mixture) / tensor,
                _kept_dots(specs, tensor),
                _last_share(specs),
                sum(prod(entry) for entry in block.attention.cache_entries()) * itemsize,
                mixture,
                tuple(_products(specs, block).items()),
            )
        )
    return tuple(found)


@functools.lru_cache(maxsize=512)
def ends(model: Decoder, dtype: str, sharding: Sharding) -> tuple[Weight, ...]:
    """Embedding and head."""
    itemsize = jnp.dtype(dtype).itemsize
    specs = _leaves(model.specs())
    return tuple(_weight(s, sharding, itemsize) for s in specs if s.role in ("embedding", "head"))


def _heads(block: Block, tensor: int) -> Heads:
    attention = block.attention
    score, value = attention.score_and_value_widths()
    heads = attention.heads / tensor
    kv = attention.kv / tensor if attention.kv % tensor == 0 else attention.kv
    return Heads(heads * score, kv * score, kv * value, heads * value)


def _hidden(specs: list[spec_lib.ParamSpec]) -> float:
    """Hidden units of an MLP, or of the experts that every token visits."""
    down = [s for s in specs if s.role == "matrix" and "experts" not in s.axes]
    return float(sum(s.matrix_shape[1] for s in down if s.axes[-1] == "embed"))


def _expert_hidden(m: MoE) -> float:
    """Hidden units of a row of a buffer: experts of each width compute all its rows."""
    return float(sum(e.hidden for e in m.experts))


def _kept_dots(specs, tensor: int) -> float:
    total = 0.0
    for s in _leaves(specs):
        if s.role != "matrix" or "experts" in s.axes:
            continue
        width = s.matrix_shape[2]
        if s.axes[-1] != "embed":
            total += width / tensor
        elif s in _leaves(specs.attention):
            total += width
    return total


def _last_share(specs) -> float:
    matrices = [s for s in _leaves(specs.attention) if s.role == "matrix"]
    last = sum(s.size for s in matrices if s.axes[-1] == "embed")
    return last / sum(s.size for s in matrices)


def _products(specs, block: Block) -> dict[tuple[str, str], float]:
    """(layer, kind) -> operations of a token's products with a layer's weights, forward."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for layer, part in (("attention", specs.attention), ("mlp", specs.mlp)):
        for s in _leaves(part):
            if s.role not in ("matrix", "router"):
                continue
            flops = 2.0 * s.active * s.size
            if s.role == "router":
                found["experts", "dense"] += flops
            elif "experts" in s.axes:
                found["experts", "experts"] += flops
            else:
                found[layer, "dense"] += flops
    return found
