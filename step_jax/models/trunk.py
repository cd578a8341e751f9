"""The trunk of a model: groups of equal layers that take vectors in and give vectors out.

What comes before and after (embeddings, patches, heads) is a model's own; how a stack of layers is
run (scanned or unrolled, rematerialised, pipelined, with FSDP undone per layer) is here.

Shape suffixes: B batch, T tokens, D model width, L layers of one stack, K experts of a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from step_jax.core import spec as specs_lib
from step_jax.core.errors import ConfigError
from step_jax.core.fsdp import gathered
from step_jax.core.sharding import GATHERED_AXES
from step_jax.core.spec import ParamSpec
from step_jax.models import pipeline
from step_jax.models.context import Context
from step_jax.models.layers.block import Block
from step_jax.models.layers.initialisation import Initialisation
from step_jax.models.layers.moe import ExpertStats
from step_jax.models.layers.norm import Norm


@dataclass(frozen=True)
class Group:
    """``repeat`` times the layers of ``blocks`` in turn; scanned, so one turn is compiled."""

    repeat: int
    blocks: tuple[Block, ...]

    def validate(self):
        if self.repeat < 1 or not self.blocks:
            raise ConfigError(f"a group needs a block and a repeat of at least 1: {self.repeat}")


class Stack(NamedTuple):
    """Equal layers whose parameters are stacked: block ``block_index`` of group ``group``.

    repeat: how many they are. Number 0 is layer ``first`` of the trunk, and each is ``stride``
      layers further up than the one before.
    """

    group: int
    block_index: int
    block: Block
    repeat: int
    first: int
    stride: int

    @property
    def path(self) -> str:
        """As in the names of the stack's parameters."""
        return f"groups/{self.group}/{self.block_index}"

    def layer(self, n: int) -> int:
        """Where number ``n`` of the stack is in the trunk."""
        return self.first + n * self.stride

    def of(self, tree):
        """This stack's part of parameters, caches or stats, which are nested as the groups are."""
        return tree[self.group][self.block_index]


@struct.dataclass
class Cache:
    """What decoding keeps: per group and block a tuple of (L, B, slots, ...) arrays."""

    layers: tuple[tuple[tuple[jax.Array, ...], ...], ...]
    lengths_B: jax.Array

    def nbytes(self) -> int:
        """Bytes of keys, values or latents held for all layers."""
        return sum(a.nbytes for a in jax.tree.leaves(self.layers))


@dataclass(frozen=True)
class Trunk:
    """A stack of layers of one width: vectors in, vectors out.

    Trees of a trunk (parameters, caches, stats, routing) are tuples of groups of tuples of blocks,
    each leaf with the layers of a stack along its first axis.
    """

    width: int
    groups: tuple[Group, ...]
    norm: Norm
    init: Initialisation

    def walk(self) -> Iterator[Stack]:
        """Every stack of layers, in order."""
        first = 0
        for i, group in enumerate(self.groups):
            stride = len(group.blocks)
            for j, block in enumerate(group.blocks):
                yield Stack(i, j, block, group.repeat, first + j, stride)
            first += group.repeat * stride

    def layers(self) -> list[tuple[Stack, int]]:
        """Every layer from the first to the last: its stack and its number there."""
        found = [(stack, n) for stack in self.walk() for n in range(stack.repeat)]
        return sorted(found, key=lambda layer: layer[0].layer(layer[1]))

    @property
    def depth(self) -> int:
        """Number of layers."""
        return sum(stack.repeat for stack in self.walk())

    @property
    def largest_repeat(self) -> int:
        """The repeat of the group with most layers, which is what a pipeline has to divide."""
        return max((s.repeat * s.stride, s.repeat) for s in self.walk())[1]

    def nested(self, f: Callable[[Stack], Any]) -> tuple[tuple[Any, ...], ...]:
        """A tree of the trunk from what ``f`` makes of each stack."""
        made: list[list[Any]] = [[] for _ in self.groups]
        for stack in self.walk():
            made[stack.group].append(f(stack))
        return tuple(map(tuple, made))

    def block_specs(self, block: Block):
        """The parameters of one layer, as a tree of ParamSpec."""
        return block.specs(self.width, self.norm, self.init)

    def specs(self) -> tuple[tuple[Any, ...], ...]:
        """The parameter table."""
        return self.nested(lambda s: specs_lib.stack(self.block_specs(s.block), s.repeat))

    def init_cache(self, batch: int, length: int, dtype=jnp.bfloat16) -> Cache:
        """An empty cache for ``length`` tokens a row; a windowed layer holds one window."""

        def empty(stack: Stack):
            attention = stack.block.attention
            slots = length if attention.window is None else min(length, attention.window)
            return tuple(
                jnp.zeros((stack.repeat, batch, slots, *entry), dtype)
                for entry in attention.cache_entries()
            )

        return Cache(self.nested(empty), jnp.zeros((batch,), jnp.int32))

    def apply(
        self, p, x_BTD, ctx: Context, cache: Cache | None = None, routing=None, condition=None
    ):
        """Runs all layers.

        Args:
          p: parameters, as :meth:`specs`.
          routing: decisions to replay, see :func:`routing_of`; None to decide.
          condition: a tree of arrays (B, ...), what the blocks read of each row besides ``ctx``.

        Returns:
          (x_BTD, the cache with these tokens stored or None, stats: the ExpertStats of the layers,
          stacked, or None for blocks without experts).

        Raises:
          ConfigError: the mesh has a pipeline that does not divide the layers.
        """
        pipeline.check(self.largest_repeat, ctx.sharding)
        if cache is not None:
            ctx = replace(ctx, lengths_B=cache.lengths_B)
        layers, stats = [], []
        for i, group in enumerate(self.groups):
            nothing = (None,) * len(group.blocks)
            caches = nothing if cache is None else cache.layers[i]
            chosen = nothing if routing is None else routing[i]
            x_BTD, caches, group_stats = self._group(
                group, p[i], x_BTD, ctx, caches, chosen, condition
            )
            layers.append(caches)
            stats.append(group_stats)
        if cache is not None:
            cache = Cache(tuple(layers), ctx.lengths_after_B())
        return x_BTD, cache, tuple(stats)

    def _group(self, group: Group, params, x_BTD, ctx: Context, caches, chosen, condition):
        """(x_BTD, caches, stats), the last two a tuple with an entry for every block.

        The caches of all layers go from layer to layer, each of which changes its own part: they
        are neither cut apart nor put together again.
        """
        specs = tuple(map(self.block_specs, group.blocks))

        def layers(x_BTD, params, caches, chosen, ctx, condition):
            out = []
            for block, block_specs, p, cache, choice in zip(
                group.blocks, specs, params, caches, chosen, strict=True
            ):
                x_BTD = checkpoint_name(x_BTD, "layer")
                p = gather(block_specs, p, ctx)
                x_BTD, *rest = block.apply(p, self.norm, x_BTD, ctx, cache, choice, condition)
                out.append(rest)
            return x_BTD, *zip(*out, strict=True)

        if jax.tree.leaves(caches):

            def cached_turn(carry, inputs, ctx, condition):
                x_BTD, caches = carry
                params, chosen, layer = inputs
                ctx = ctx.replace(layer=layer)
                x_BTD, caches, stats = layers(x_BTD, params, caches, chosen, ctx, condition)
                return (x_BTD, caches), stats

            inputs = (params, chosen, jnp.arange(group.repeat))
            (x_BTD, caches), stats = run_layers(
                cached_turn, (x_BTD, caches), inputs, group.repeat, ctx,
                rows=condition, pipelined=False,
            )  # fmt: skip
            return x_BTD, caches, stats

        def turn(x_BTD, inputs, ctx, condition):
            params, chosen = inputs
            x_BTD, _, stats = layers(x_BTD, params, caches, chosen, ctx, condition)
            return x_BTD, stats

        of_rows = ctx.record_routing or jax.tree.leaves(chosen)
        x_BTD, stats = run_layers(
            turn, x_BTD, (params, chosen), group.repeat, ctx, rows=condition, pipelined=not of_rows
        )
        return x_BTD, caches, stats


def routing_of(stats):
    """The routing decisions in a pass's stats (``ctx.record_routing``), for ``Trunk.apply``.

    Per group and block int32 (L, B, T, K), or None for a block without experts.
    """
    return jax.tree.map(lambda s: s.chosen_BTK, stats, is_leaf=lambda x: isinstance(x, ExpertStats))


def run_layers(
    turn: Callable, x_BTD, inputs: Any, repeat: int, ctx: Context, *, rows=None, pipelined=True
):
    """Calls ``turn`` once per layer, as ``ctx.execution`` and the mesh say.

    Args:
      turn: (x_BTD, inputs of one layer, ctx, rows) -> (x_BTD, outputs of the layer or None).
        ``ctx`` and ``rows`` are those of the tokens it is given: some of the batch in a pipeline.
      inputs: a tree of arrays with a leading axis of ``repeat`` layers.
      rows: a tree of arrays (B, ...), what the layers read of each row besides ``ctx``.
      pipelined: use the mesh's ``pipeline`` axis if it has one and the layers divide into its
        stages. False if inputs or outputs are of single rows (caches, routing decisions): then the
        axis is one more of data parallelism, and the layers' parameters are gathered along it.

    Returns:
      (x_BTD, outputs stacked along a leading axis or None). Those of a pipeline are sums over its
      microbatches.
    """
    if pipelined and pipeline.is_pipelined(repeat, ctx.sharding):
        return pipeline.run(functools.partial(_run, turn), x_BTD, inputs, repeat, ctx, rows)
    return _run(turn, x_BTD, inputs, repeat, ctx, rows)


def _run(turn: Callable, x_BTD, inputs: Any, repeat: int, ctx: Context, rows: Any):
    def layer(x_BTD, inputs):
        return turn(x_BTD, inputs, ctx, rows)

    scan = ctx.execution.scan and repeat > 1
    if (policy := ctx.execution.policy) is not None:
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=not scan)
    if scan:
        return jax.lax.scan(layer, x_BTD, inputs)
    outputs = []
    for i in range(repeat):
        x_BTD, out = layer(x_BTD, jax.tree.map(lambda a, i=i: a[i], inputs))
        outputs.append(out)
    return x_BTD, jax.tree.map(lambda *a: jnp.stack(a), *outputs)


@functools.partial(jax.named_call, name="gather")
def gather(specs, params, ctx: Context):
    """The parameters of one layer with FSDP undone: each device gets the whole width.

    This is where FSDP communicates: an all-gather before use here, a reduce-scatter of the
    gradient in its transpose. Inside a rematerialised layer the gathered copy is not kept.
    """

    def leaf(spec: ParamSpec, w):
        if not set(GATHERED_AXES) & set(spec.axes) or "experts" in spec.axes:
            return w  # experts are gathered where they compute (models.moe)
        return gathered(w, spec.axes, ctx.sharding)

    return specs_lib.map_specs(leaf, specs, params)
