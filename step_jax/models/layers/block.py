"""One layer of a trunk: attention and an MLP around a residual stream.

Shape suffixes: B batch, T tokens, D model width, K experts chosen for a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax import struct

from step_jax.models.context import Context
from step_jax.models.layers.attention import AttentionKind
from step_jax.models.layers.initialisation import Initialisation
from step_jax.models.layers.mlp import GELU, SwiGLU
from step_jax.models.layers.moe import MoE
from step_jax.models.layers.norm import Norm

MLP = SwiGLU | GELU | MoE


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

    def specs(self, width: int, norm: Norm, init: Initialisation) -> Any:
        """The parameters, as a tree of ParamSpec."""
        return BlockParams(
            attention_norm_D=norm.specs(width),
            attention=self.attention.specs(width, init),
            mlp_norm_D=norm.specs(width),
            mlp=self.mlp.specs(width, init),
        )

    def apply(
        self, p, norm: Norm, x_BTD, ctx: Context, cache=None, chosen_BTK=None, condition=None
    ):
        """One layer of a model.

        Args:
          cache: of the kind's entries, see ``through_cache``; None without one.
          chosen_BTK: the routing of a mixture of experts to replay; None to decide.
          condition: arrays (B, ...) that kinds of blocks read of each row; this one none.

        Returns:
          (x_BTD, cache, ExpertStats of a mixture or None).
        """
        y_BTD, cache = self.attention.apply(
            p.attention, norm.apply(p.attention_norm_D, x_BTD), ctx, cache
        )
        x_BTD = ctx.constrain(x_BTD + y_BTD, "batch", "sequence", None)
        y_BTD, stats = self.mlp.apply(p.mlp, norm.apply(p.mlp_norm_D, x_BTD), ctx, chosen_BTK)
        return ctx.constrain(x_BTD + y_BTD, "batch", "sequence", None), cache, stats
