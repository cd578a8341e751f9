"""One layer of the diffusion transformer of Step-Video (arXiv 2502.10248).

Shape suffixes: B rows, T tokens, D model width, G samples of a row, S text states of a row, M rows
of a modulation table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from step_jax.core.spec import ZEROS, ConstantRows, ParamSpec
from step_jax.models.context import Context
from step_jax.models.layers.block import Block
from step_jax.models.layers.cross_attention import CrossAttention
from step_jax.models.layers.initialisation import Initialisation
from step_jax.models.layers.norm import Norm
from step_jax.ops.attention import Mask
from step_jax.ops.einsum import product

#: Shift, scale and gate of attention, then of the MLP: shifts and scales of nothing, gates of 1.
OPEN = ConstantRows((0.0, 0.0, 1.0, 0.0, 0.0, 1.0))


@struct.dataclass
class Condition:
    """What the layers read of each row besides its tokens.

    Attributes:
      modulation_BGMD: shift, scale and gate of attention, then of the MLP, of each sample.
      sample_BTG: which sample a token is of, one-hot; None where a row is one sample.
      text_BSD: states of the texts of all samples; None for a model that reads no text.
      mask: which of them a token sees.
    """

    modulation_BGMD: jax.Array
    sample_BTG: jax.Array | None = None
    text_BSD: jax.Array | None = None
    mask: Mask | None = None

    def of_tokens(self, table_BGMD):
        """The M rows of each token's sample: arrays that broadcast to (B, T, D)."""
        rows = jnp.unstack(table_BGMD, axis=2)
        if self.sample_BTG is None:
            return rows
        return [product("BTG,BGD->BTD", self.sample_BTG, row_BGD) for row_BGD in rows]


@struct.dataclass
class ModulatedBlockParams:
    modulation_MD: Any
    attention_norm_D: Any
    attention: Any
    cross: Any
    mlp_norm_D: Any
    mlp: Any


@dataclass(frozen=True)
class ModulatedBlock(Block):
    """Attention among the tokens, attention over a text, and an MLP.

    The norms of the first and the last have shift, scale and gate from one table for all layers
    plus one of the layer's own (adaLN-single, arXiv 2310.00426). Attention over the text reads the
    stream itself, un-normalised, and adds to it without a gate.

    cross: None for a model that reads no text.
    unit_gates: a gate is 1 + g of the tables' g, else g itself. Either way it starts as 1, so that
      the last weights of the branches may start at zero.
    """

    cross: CrossAttention | None = None
    unit_gates: bool = True

    def specs(self, width: int, norm: Norm, init: Initialisation) -> ModulatedBlockParams:
        table = ZEROS if self.unit_gates else OPEN
        return ModulatedBlockParams(
            modulation_MD=ParamSpec((6, width), (None, None), table, role="vector"),
            attention_norm_D=norm.specs(width),
            attention=self.attention.specs(width, init),
            cross=None if self.cross is None else self.cross.specs(width, init),
            mlp_norm_D=norm.specs(width),
            mlp=self.mlp.specs(width, init),
        )

    def apply(
        self, p, norm: Norm, x_BTD, ctx: Context, cache=None, chosen_BTK=None, condition=None
    ):
        """As of :class:`Block`; ``condition`` is a :class:`Condition`."""
        c: Condition = condition
        table_BGMD = c.modulation_BGMD + p.modulation_MD.astype(x_BTD.dtype)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = c.of_tokens(table_BGMD)
        if self.unit_gates:
            gate_a, gate_m = 1 + gate_a, 1 + gate_m
        y_BTD = norm.apply(p.attention_norm_D, x_BTD) * (1 + scale_a) + shift_a
        y_BTD, cache = self.attention.apply(p.attention, y_BTD, ctx, cache)
        x_BTD = ctx.constrain(x_BTD + gate_a * y_BTD, "batch", "sequence", None)
        if self.cross is not None:
            assert c.mask is not None  # a model that reads texts says which
            x_BTD = x_BTD + self.cross.apply(p.cross, x_BTD, c.text_BSD, c.mask, ctx)
            x_BTD = ctx.constrain(x_BTD, "batch", "sequence", None)
        y_BTD = norm.apply(p.mlp_norm_D, x_BTD) * (1 + scale_m) + shift_m
        y_BTD, stats = self.mlp.apply(p.mlp, y_BTD, ctx, chosen_BTK)
        x_BTD = ctx.constrain(x_BTD + gate_m * y_BTD, "batch", "sequence", None)
        return x_BTD, cache, stats
