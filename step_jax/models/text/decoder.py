"""The Step decoder: groups of scanned layers with exchangeable attention and MLP.

Shape suffixes: B batch, T tokens, D model width, V vocabulary, L layers of one stack.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from step_jax.core import checks
from step_jax.core import spec as specs_lib
from step_jax.core.errors import ConfigError
from step_jax.core.fsdp import gathered
from step_jax.core.spec import ParamSpec
from step_jax.models import pipeline
from step_jax.models.context import Context
from step_jax.models.layers.attention import AttentionKind
from step_jax.models.layers.initialisation import FanIn, Initialisation
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.moe import ExpertStats, MoE
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.trunk import gather, run_layers
from step_jax.ops.einsum import einsum
from step_jax.ops.embedding import embed

MLP = SwiGLU | MoE


@struct.dataclass
class BlockParams:
    attention_norm_D: Any
    attention: Any
    mlp_norm_D: Any
    mlp: Any


@dataclass(frozen=True)
class Block:
    """One layer: ``x += attention(norm(x))``, then ``x += mlp(norm(x))``."""

    attention: AttentionKind
    mlp: MLP

    def specs(self, width: int, norm: RMSNorm, init: Initialisation) -> BlockParams:
        return BlockParams(
            attention_norm_D=norm.specs(width),
            attention=self.attention.specs(width, init),
            mlp_norm_D=norm.specs(width),
            mlp=self.mlp.specs(width, init),
        )

    def apply(
        self, p: BlockParams, norm: RMSNorm, x_BTD, ctx: Context, cache=None, chosen_BTK=None
    ):
        """(x_BTD, cache, ExpertStats of a mixture or None); ``chosen_BTK`` replays its routing."""
        y_BTD, cache = self.attention.apply(
            p.attention, norm.apply(p.attention_norm_D, x_BTD), ctx, cache
        )
        x_BTD = ctx.constrain(x_BTD + y_BTD, "batch", "sequence", None)
        y_BTD, stats = self.mlp.apply(p.mlp, norm.apply(p.mlp_norm_D, x_BTD), ctx, chosen_BTK)
        return ctx.constrain(x_BTD + y_BTD, "batch", "sequence", None), cache, stats


@dataclass(frozen=True)
class Group:
    """``repeat`` times the layers of ``blocks`` in turn; scanned, so one turn is compiled."""

    repeat: int
    blocks: tuple[Block, ...]

    def validate(self):
        if self.repeat < 1 or not self.blocks:
            raise ConfigError(f"a group needs a block and a repeat of at least 1: {self.repeat}")


@struct.dataclass
class MTPParams:
    hidden_norm_D: Any
    embedding_norm_D: Any
    join_2DD: Any
    block: BlockParams


@dataclass(frozen=True)
class MTP:
    """Multi-token prediction (arXiv 2412.19437, 2.2; Step-3.5-Flash, arXiv 2602.10604).

    Head k sees ``join[norm(hidden); norm(embedding of the token k ahead)]`` through a block of its
    own and predicts the token k + 1 ahead with the shared output head. ``weight`` multiplies the
    mean of the heads' losses, each a sum over its targets divided by the main loss's weight.
    """

    heads: int
    block: Block
    weight: float = 0.3

    def validate(self):
        checks.at_least(self, heads=1, weight=0)

    def specs(self, width: int, norm: RMSNorm, init: Initialisation) -> MTPParams:
        return MTPParams(
            hidden_norm_D=norm.specs(width),
            embedding_norm_D=norm.specs(width),
            join_2DD=ParamSpec(
                (2, width, width), (None, "embed", None), init.matrix(2 * width), fan_in=2
            ),
            block=self.block.specs(width, norm, init),
        )

    def apply(self, p: MTPParams, norm: RMSNorm, x_BTD, embedded_BTD, ctx: Context):
        """(hidden state of one head (B, T, D), ExpertStats of its mixture or None)."""
        pair_BT2D = jnp.stack(
            [norm.apply(p.hidden_norm_D, x_BTD), norm.apply(p.embedding_norm_D, embedded_BTD)], 2
        )
        joined_BTD = einsum("BTPD,PDE->BTE", pair_BT2D, p.join_2DD)
        x_BTD, _, stats = self.block.apply(p.block, norm, joined_BTD, ctx)
        return x_BTD, stats


@struct.dataclass
class DecoderParams:
    embedding_VD: Any
    groups: tuple[tuple[BlockParams, ...], ...]
    final_norm_D: Any
    head_DV: Any
    mtp: tuple[MTPParams, ...]


@struct.dataclass
class Cache:
    """What decoding keeps: per group and block a tuple of (L, B, slots, ...) arrays."""

    layers: tuple[tuple[tuple[jax.Array, ...], ...], ...]
    lengths_B: jax.Array

    def nbytes(self) -> int:
        """Bytes of keys, values or latents held for all layers."""
        return sum(a.nbytes for a in jax.tree.leaves(self.layers))


@dataclass(frozen=True)
class Decoder:
    """A causal language model.

    vocab: 0 takes the tokenizer's.
    tied: the output head is the transposed embedding.
    """

    width: int
    layers: tuple[Group, ...]
    vocab: int = 0
    tied: bool = False
    norm: RMSNorm = RMSNorm()
    init: Initialisation = field(default_factory=FanIn)
    mtp: MTP | None = None

    def validate(self):
        if self.width < 1 or self.vocab < 0 or not self.layers:
            raise ConfigError("a decoder needs a positive width and at least one group of layers")

    @property
    def depth(self) -> int:
        """Number of layers, without those of multi-token prediction."""
        return sum(g.repeat * len(g.blocks) for g in self.layers)

    def specs(self) -> DecoderParams:
        """The parameter table.

        Raises:
          ConfigError: the vocabulary is still that of no tokenizer.
        """
        if not self.vocab:
            raise ConfigError("model.vocab is 0: set it, or let a tokenizer set it")
        V, D = self.vocab, self.width
        return DecoderParams(
            embedding_VD=ParamSpec(
                (V, D), ("vocab", "embed"), self.init.embedding(D, self.tied), role="embedding"
            ),
            groups=tuple(
                tuple(specs_lib.stack(b.specs(D, self.norm, self.init), g.repeat) for b in g.blocks)
                for g in self.layers
            ),
            final_norm_D=self.norm.specs(D),
            head_DV=None
            if self.tied
            else ParamSpec((D, V), ("embed", "vocab"), self.init.head(D), role="head"),
            mtp=()
            if self.mtp is None
            else tuple(self.mtp.specs(D, self.norm, self.init) for _ in range(self.mtp.heads)),
        )

    def initialise(self, key) -> DecoderParams:
        """Fresh float32 parameters; each one's values depend on its own name and ``key`` alone."""
        return specs_lib.init(self.specs(), key, self._layers_of)

    def _layers_of(self, name: str) -> tuple[int, int]:
        """(index of the first layer, stride) of the parameter at a path such as groups/0/1/mlp."""
        parts = name.split("/")
        if parts[0] == "mtp":
            return self.depth, 1
        if parts[0] != "groups":
            return 0, 1
        group, block = int(parts[1]), int(parts[2])
        below = sum(g.repeat * len(g.blocks) for g in self.layers[:group])
        return below + block, len(self.layers[group].blocks)

    # --- forward -------------------------------------------------------------------------------

    def embed(self, p: DecoderParams, tokens_BT, ctx: Context):
        """Embeddings in the compute dtype: (B, T, D)."""
        return embed(p.embedding_VD.astype(ctx.execution.dtype), tokens_BT, ctx.sharding)

    def head(self, p: DecoderParams):
        """The output head (D, V)."""
        return p.embedding_VD.T if self.tied else p.head_DV

    def hidden(
        self, p: DecoderParams, tokens_BT, ctx: Context, cache: Cache | None = None, routing=None
    ):
        """Runs all layers.

        Args:
          routing: decisions to replay, see :func:`routing_of`; None to decide.

        Returns:
          (x_BTD before the final norm, the cache with these tokens stored or None, stats: per group
          and block the ExpertStats of its layers, stacked, or None for one without experts).
        """
        pipeline.check([(g.repeat * len(g.blocks), g.repeat) for g in self.layers], ctx.sharding)
        x_BTD = self.embed(p, tokens_BT, ctx)
        if cache is not None:
            ctx = ctx.replace(lengths_B=cache.lengths_B)
        layers, stats = [], []
        for i, group in enumerate(self.layers):
            nothing = (None,) * len(group.blocks)
            caches = nothing if cache is None else cache.layers[i]
            chosen = nothing if routing is None else routing[i]
            x_BTD, caches, group_stats = self._group(group, p.groups[i], x_BTD, ctx, caches, chosen)
            layers.append(caches)
            stats.append(group_stats)
        if cache is not None:
            cache = Cache(tuple(layers), ctx.lengths_after_B())
        return x_BTD, cache, tuple(stats)

    def _group(self, group: Group, params, x_BTD, ctx: Context, caches, chosen):
        """(x_BTD, caches, stats), the last two a tuple with an entry for every block.

        The caches of all layers go from layer to layer, each of which changes its own part: they
        are neither cut apart nor put together again.
        """
        specs = tuple(b.specs(self.width, self.norm, self.init) for b in group.blocks)

        def layers(x_BTD, params, caches, chosen, ctx):
            out = []
            for block, block_specs, p, cache, choice in zip(
                group.blocks, specs, params, caches, chosen, strict=True
            ):
                p = gather(block_specs, p, ctx)
                x_BTD, *rest = block.apply(p, self.norm, x_BTD, ctx, cache, choice)
                out.append(rest)
            return x_BTD, *zip(*out, strict=True)

        if jax.tree.leaves(caches):

            def cached_turn(carry, inputs, ctx, _):
                x_BTD, caches = carry
                params, chosen, layer = inputs
                x_BTD, caches, stats = layers(
                    x_BTD, params, caches, chosen, ctx.replace(layer=layer)
                )
                return (x_BTD, caches), stats

            inputs = (params, chosen, jnp.arange(group.repeat))
            carry = (x_BTD, caches)
            (x_BTD, caches), stats = run_layers(
                cached_turn, carry, inputs, group.repeat, ctx, pipelined=False
            )
            return x_BTD, caches, stats

        def turn(x_BTD, inputs, ctx, _):
            params, chosen = inputs
            x_BTD, _, stats = layers(x_BTD, params, caches, chosen, ctx)
            return x_BTD, stats

        of_rows = ctx.record_routing or jax.tree.leaves(chosen)
        x_BTD, stats = run_layers(
            turn, x_BTD, (params, chosen), group.repeat, ctx, pipelined=not of_rows
        )
        return x_BTD, caches, stats

    def normed(self, p: DecoderParams, x_BTD):
        """What the output head multiplies."""
        return self.norm.apply(p.final_norm_D, x_BTD)

    def logits(self, p: DecoderParams, x_BTD, ctx: Context):
        """float32 (B, T, V) from hidden states; training uses the chunked loss instead."""
        head_DV = gathered(self.head(p).astype(x_BTD.dtype), ("embed", "vocab"), ctx.sharding)
        return jnp.einsum(
            "BTD,DV->BTV", self.normed(p, x_BTD), head_DV, preferred_element_type=jnp.float32
        )

    # --- cache ---------------------------------------------------------------------------------

    def init_cache(self, batch: int, length: int, dtype=jnp.bfloat16) -> Cache:
        """An empty cache for ``length`` tokens a row; a windowed layer holds one window."""

        def block_cache(block: Block, repeat: int):
            window = block.attention.window
            slots = length if window is None else min(length, window)
            return tuple(
                jnp.zeros((repeat, batch, slots, *entry), dtype)
                for entry in block.attention.cache_entries()
            )

        layers = tuple(tuple(block_cache(b, g.repeat) for b in g.blocks) for g in self.layers)
        return Cache(layers, jnp.zeros((batch,), jnp.int32))


def routing_of(stats):
    """The routing decisions in a pass's stats (``ctx.record_routing``), for ``hidden`` to replay.

    Per group and block int32 (L, B, T, K), or None for a block without experts.
    """
    return jax.tree.map(lambda s: s.chosen_BTK, stats, is_leaf=lambda x: isinstance(x, ExpertStats))
