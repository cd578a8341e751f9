"""Attention of a model's tokens over states of something else: of a text, a picture.

Shape suffixes: B batch, T tokens, S states, D model width, N heads, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax import struct

from step_jax.core.spec import ParamSpec
from step_jax.models.context import Context
from step_jax.models.layers.attention.core import attend_across
from step_jax.models.layers.initialisation import Initialisation
from step_jax.models.layers.norm import RMSNorm
from step_jax.ops.attention import Mask
from step_jax.ops.einsum import einsum


@struct.dataclass
class CrossAttentionParams:
    query_DNH: Any
    key_DNH: Any
    value_DNH: Any
    output_NHD: Any
    query_norm_H: Any
    key_norm_H: Any


@dataclass(frozen=True)
class CrossAttention:
    """Queries of the tokens, keys and values of the states, both of the model's width.

    qk_norm: normalises every head's query and key.
    """

    heads: int
    head_dim: int
    qk_norm: RMSNorm | None = None

    def specs(self, width: int, init: Initialisation) -> CrossAttentionParams:
        N, H = self.heads, self.head_dim
        read = ParamSpec((width, N, H), ("embed", "heads", None), init.matrix(width))
        norm = None if self.qk_norm is None else self.qk_norm.specs(H)
        return CrossAttentionParams(
            query_DNH=read,
            key_DNH=read,
            value_DNH=read,
            output_NHD=ParamSpec(
                (N, H, width), ("heads", None, "embed"), init.attention_output(N * H), fan_in=2
            ),
            query_norm_H=norm,
            key_norm_H=norm,
        )

    def apply(self, p: CrossAttentionParams, x_BTD, states_BSD, mask: Mask, ctx: Context):
        """(B, T, D); a token that may see no state gets zeros.

        Args:
          mask: which states a token sees.
        """
        q_BTNH = einsum("BTD,DNH->BTNH", x_BTD, p.query_DNH)
        k_BSNH = einsum("BSD,DNH->BSNH", states_BSD, p.key_DNH)
        v_BSNH = einsum("BSD,DNH->BSNH", states_BSD, p.value_DNH)
        if self.qk_norm is not None:
            q_BTNH = self.qk_norm.apply(p.query_norm_H, q_BTNH)
            k_BSNH = self.qk_norm.apply(p.key_norm_H, k_BSNH)
        o_BTNH = attend_across(q_BTNH, k_BSNH, v_BSNH, mask, ctx, scale=self.head_dim**-0.5)
        return einsum("BTNH,NHD->BTD", o_BTNH, p.output_NHD)
