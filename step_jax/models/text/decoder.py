"""The Step decoder: an embedding, a trunk of layers, an output head, and heads further ahead.

Shape suffixes: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct

from step_jax.core import checks
from step_jax.core import spec as specs_lib
from step_jax.core.errors import ConfigError
from step_jax.core.fsdp import gathered
from step_jax.core.spec import ParamSpec
from step_jax.models.context import Context
from step_jax.models.layers.block import Block, BlockParams
from step_jax.models.layers.initialisation import FanIn, Initialisation
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.trunk import Cache, Group, Trunk
from step_jax.ops.einsum import einsum, product
from step_jax.ops.embedding import embed


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


@dataclass(frozen=True)
class Decoder:
    """A causal language model.

    vocab: 0 takes the tokenizer's.
    tied: the output head is the transposed embedding.
    """

    kind: ClassVar[str] = "decoder"
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

    @functools.cached_property
    def trunk(self) -> Trunk:
        """The layers, without those of multi-token prediction."""
        return Trunk(self.width, self.layers, self.norm, self.init)

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
            groups=self.trunk.specs(),
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
        return specs_lib.init(self.specs(), key, self.layers_of)

    def layers_of(self, name: str) -> tuple[int, int]:
        """(index of the first layer, stride) of the parameter at a path such as groups/0/1/mlp."""
        if name.startswith("mtp/"):
            return self.trunk.depth, 1
        stacks = (s for s in self.trunk.walk() if name.startswith(f"{s.path}/"))
        return next(((s.first, s.stride) for s in stacks), (0, 1))

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
        """Embeds and runs all layers; arguments and results are those of ``Trunk.apply``.

        Returns:
          (x_BTD before the final norm, the cache with these tokens stored or None, stats).
        """
        x_BTD = self.embed(p, tokens_BT, ctx)
        return self.trunk.apply(p.groups, x_BTD, ctx, cache, routing)

    def normed(self, p: DecoderParams, x_BTD):
        """What the output head multiplies."""
        return self.norm.apply(p.final_norm_D, x_BTD)

    def logits(self, p: DecoderParams, x_BTD, ctx: Context):
        """float32 (B, T, V) from hidden states; training uses the chunked loss instead."""
        head_DV = gathered(self.head(p).astype(x_BTD.dtype), ("embed", "vocab"), ctx.sharding)
        return product("BTD,DV->BTV", self.normed(p, x_BTD), head_DV, jnp.float32)

    def init_cache(self, batch: int, length: int, dtype=jnp.bfloat16) -> Cache:
        """An empty cache for ``length`` tokens a row."""
        return self.trunk.init_cache(batch, length, dtype)
