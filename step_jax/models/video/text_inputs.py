"""What a text-conditioned model reads of a text: states of frozen encoders, or a tower of its own.

Each input makes states of the model's width; the model's cross-attention sees those of all inputs,
one after the other.

Shape suffixes: B texts, S tokens of a text, E width of the encoder, D width of the model, V
vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct

from step_jax.core import checks
from step_jax.core.spec import ZEROS, ParamSpec, count
from step_jax.models.context import Context
from step_jax.models.layers.attention import AttentionKind
from step_jax.models.layers.block import MLP, Block
from step_jax.models.layers.initialisation import FanIn, Initialisation
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.tokens import Tokens
from step_jax.models.trunk import Group, Trunk
from step_jax.ops.einsum import einsum
from step_jax.ops.norm import layer_norm

EPS = 1e-6


@struct.dataclass
class LinearParams:
    weight_ED: Any
    bias_D: Any


@struct.dataclass
class TwoLayerParams:
    in_ED: Any
    in_bias_D: Any
    out_DD: Any
    out_bias_D: Any

    def project(self, x_BSE):
        """(B, S, D): a layer, a GELU by the tanh approximation, and a layer."""
        x_BSD = jax.nn.gelu(_linear(self.in_ED, self.in_bias_D, x_BSE), approximate=True)
        return _linear(self.out_DD, self.out_bias_D, x_BSD)


def _linear_specs(rows: int, width: int, init: Initialisation) -> LinearParams:
    return LinearParams(
        ParamSpec((rows, width), (None, "embed"), init.matrix(rows)),
        ParamSpec((width,), (None,), ZEROS, role="vector"),
    )


def _linear(weight_ED, bias_D, x_BSE):
    return einsum("BSE,ED->BSD", x_BSE, weight_ED) + bias_D.astype(x_BSE.dtype)


@dataclass(frozen=True)
class States:
    """States that a frozen encoder made, brought to the model's width.

    name: of the encoder, by which a batch names its states.
    width: of the states.
    tokens: most of a text.
    projection: ``linear``, or ``mlp``: a norm without scale and two layers with a GELU between
      (Step-Video has the first for its CLIP and the second for Step-LLM, arXiv 2502.10248).
    padding: the states behind the end of a text are seen too, as those of Step-Video's CLIP are.
    """

    kind: ClassVar[str] = "states"
    name: str
    width: int
    tokens: int
    projection: Literal["linear", "mlp"] = "linear"
    padding: bool = False

    def validate(self):
        checks.at_least(self, width=1, tokens=1)

    def specs(self, width: int, init: Initialisation) -> LinearParams | TwoLayerParams:
        """The parameters for a model of this width."""
        first = _linear_specs(self.width, width, init)
        if self.projection == "linear":
            return first
        square = ParamSpec((width, width), ("embed", None), init.matrix(width))
        return TwoLayerParams(first.weight_ED, first.bias_D, square, first.bias_D)

    def apply(self, p, states_BSE, lengths_B, ctx: Context):
        """(B, S, D) states, and how many of each text are seen, int32 (B,).

        Args:
          states_BSE: of any float dtype.
          lengths_B: tokens of each text.
        """
        x = states_BSE.astype(ctx.execution.dtype)
        if self.padding:
            lengths_B = jnp.full_like(lengths_B, self.tokens)
        if isinstance(p, LinearParams):
            return _linear(p.weight_ED, p.bias_D, x), lengths_B
        return p.project(layer_norm(x, None, None, EPS)), lengths_B

    def matmul_flops(self, width: int) -> float:
        """Operations of one text's projection, forward."""
        return 2.0 * self.tokens * width * (self.width + (self.projection == "mlp") * width)


@struct.dataclass
class TowerParams:
    embedding_VE: Any
    groups: Any
    final_norm_E: Any
    projection: LinearParams


@dataclass(frozen=True)
class Tower:
    """A small text encoder that is part of the model and learns with it.

    Bidirectional, like the text side of a CLIP: every token sees its whole text.

    name: by which a batch names its tokens.
    tokens: most of a text.
    vocab: of its tokenizer.
    width, depth, attention, mlp: of its layers.
    """

    kind: ClassVar[str] = "tower"
    name: str
    tokens: int
    vocab: int
    width: int
    depth: int
    attention: AttentionKind
    mlp: MLP
    norm: RMSNorm = RMSNorm()
    init: Initialisation = field(default_factory=FanIn)

    def validate(self):
        checks.at_least(self, tokens=1, vocab=1, width=1, depth=1)

    @functools.cached_property
    def trunk(self) -> Trunk:
        """The layers, all of one stack."""
        group = Group(self.depth, (Block(self.attention, self.mlp),))
        return Trunk(self.width, (group,), self.norm, self.init)

    def specs(self, width: int, init: Initialisation) -> TowerParams:
        """The parameters for a model of this width."""
        V, E = self.vocab, self.width
        table = self.init.embedding(E, tied=False)
        return TowerParams(
            embedding_VE=ParamSpec((V, E), ("vocab", "embed"), table, role="embedding"),
            groups=self.trunk.specs(),
            final_norm_E=self.norm.specs(E),
            projection=_linear_specs(E, width, init),
        )

    def apply(self, p: TowerParams, tokens_BS, lengths_B, ctx: Context):
        """(B, S, D) states, and how many of each text are seen, int32 (B,).

        Args:
          tokens_BS: int32; padding behind a text's end is seen by nobody.
          lengths_B: tokens of each text.
        """
        states_BSE = self.states(p, tokens_BS, lengths_B, ctx)
        return _linear(p.projection.weight_ED, p.projection.bias_D, states_BSE), lengths_B

    def states(self, p: TowerParams, tokens_BS, lengths_B, ctx: Context):
        """(B, S, E): the normed last hidden states."""
        segments_BS = jnp.arange(tokens_BS.shape[1]) < lengths_B[:, None]
        tokens = Tokens.in_order(*tokens_BS.shape, causal=False)
        ctx = replace(ctx, tokens=replace(tokens, segments_BT=segments_BS.astype(jnp.int32)))
        x_BSE = p.embedding_VE.astype(ctx.execution.dtype)[tokens_BS]
        x_BSE, *_ = self.trunk.apply(p.groups, x_BSE, ctx)
        return self.norm.apply(p.final_norm_E, x_BSE)

    def matmul_flops(self, width: int) -> float:
        """Operations of one text, forward: its layers' weights, its attention, its projection."""
        weights = count(self.trunk.specs(), roles=("matrix",)) + self.width * width
        seen = sum(self.attention.score_and_value_widths()) * self.attention.heads * self.tokens
        return 2.0 * self.tokens * (weights + self.depth * seen)


TextInput = States | Tower
