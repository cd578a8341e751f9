"""Multi-head attention with any number of key/value heads: MHA, GQA (2305.13245), MQA (1911.02150).

Shape suffixes: B batch, T tokens, D model width, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from flax import struct

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.core.spec import ZEROS, ParamSpec
from step_jax.models.context import Context, through_cache
from step_jax.models.layers.attention.core import attend
from step_jax.models.layers.initialisation import Initialisation
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Position, Rope, check, rotate, rotate_queries
from step_jax.ops.einsum import einsum


@struct.dataclass
class MHAParams:
    query_DNH: Any
    key_DKH: Any
    value_DKH: Any
    output_NHD: Any
    query_norm_H: Any
    key_norm_H: Any
    gate_DN: Any
    query_bias_NH: Any
    key_bias_KH: Any
    value_bias_KH: Any


@dataclass(frozen=True)
class MHA:
    """``heads`` query heads on ``kv_heads`` key/value heads (None: as many; 1: MQA).

    qk_norm: normalises every head's query and key before rotation (Qwen3, Step-3.5-Flash).
    output_gate: multiplies head h by ``sigmoid(w_h . x)`` (Step-3.5-Flash, arXiv 2602.10604).
    qkv_bias: queries, keys and values have a bias (Qwen2).
    window: sliding window in tokens, None for full attention.
    output_rate: multiplies the learning rate of the output weight.
    """

    kind: ClassVar[str] = "mha"
    heads: int
    head_dim: int
    kv_heads: int | None = None
    window: int | None = None
    qk_norm: RMSNorm | None = None
    output_gate: bool = False
    qkv_bias: bool = False
    position: Position | None = Rope()
    output_rate: float = 1.0

    def validate(self):
        checks.at_least(self, heads=1, head_dim=1, kv_heads=1)
        checks.above(self, output_rate=0)
        if self.heads % self.kv:
            raise ConfigError(f"kv_heads {self.kv} does not divide heads {self.heads}")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"the attention window is {self.window}; it must be at least 1")
        check(self.position, self.head_dim)

    @property
    def kv(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    def specs(self, width: int, init: Initialisation) -> MHAParams:
        N, K, H = self.heads, self.kv, self.head_dim
        read = init.matrix(width)
        kv = ParamSpec((width, K, H), ("embed", "kv_heads", None), read)
        norm = None if self.qk_norm is None else self.qk_norm.specs(H)
        bias = ParamSpec((K, H), ("kv_heads", None), ZEROS, role="vector")
        query_bias = ParamSpec((N, H), ("heads", None), ZEROS, role="vector")
        return MHAParams(
            query_DNH=ParamSpec((width, N, H), ("embed", "heads", None), read),
            key_DKH=kv,
            value_DKH=kv,
            output_NHD=ParamSpec(
                (N, H, width),
                ("heads", None, "embed"),
                init.attention_output(N * H),
                fan_in=2,
                rate=self.output_rate,
            ),
            query_norm_H=norm,
            key_norm_H=norm,
            gate_DN=gate_specs(self, width, init),
            query_bias_NH=query_bias if self.qkv_bias else None,
            key_bias_KH=bias if self.qkv_bias else None,
            value_bias_KH=bias if self.qkv_bias else None,
        )

    def cache_entries(self):
        return ((self.kv, self.head_dim), (self.kv, self.head_dim))

    def score_and_value_widths(self):
        return self.head_dim, self.head_dim

    def apply(self, p: MHAParams, x_BTD, ctx: Context, cache=None):
        q_BTNH = einsum("BTD,DNH->BTNH", x_BTD, p.query_DNH)
        k_BTKH = einsum("BTD,DKH->BTKH", x_BTD, p.key_DKH)
        v_BTKH = einsum("BTD,DKH->BTKH", x_BTD, p.value_DKH)
        if self.qkv_bias:
            q_BTNH = q_BTNH + p.query_bias_NH.astype(q_BTNH.dtype)
            k_BTKH = k_BTKH + p.key_bias_KH.astype(k_BTKH.dtype)
            v_BTKH = v_BTKH + p.value_bias_KH.astype(v_BTKH.dtype)
        if self.qk_norm is not None:
            q_BTNH = self.qk_norm.apply(p.query_norm_H, q_BTNH)
            k_BTKH = self.qk_norm.apply(p.key_norm_H, k_BTKH)
        q_BTNH = rotate_queries(self.position, q_BTNH, ctx.tokens.places_BTA)
        k_BTKH = rotate(self.position, k_BTKH, ctx.tokens.places_BTA)
        (k_BSKH, v_BSKH), kv_positions_BS, cache = through_cache((k_BTKH, v_BTKH), cache, ctx)
        o_BTNH = attend(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            ctx,
            kv_positions_BS,
            scale=self.head_dim**-0.5,
            window=self.window,
            position=self.position,
        )
        o_BTNH = gated(p.gate_DN, o_BTNH, x_BTD)
        return einsum("BTNH,NHD->BTD", o_BTNH, p.output_NHD), cache


def gate_specs(c, width: int, init: Initialisation) -> ParamSpec | None:
    """The head-wise output gate's weight, if the kind ``c`` has one."""
    if not c.output_gate:
        return None
    return ParamSpec((width, c.heads), ("embed", "heads"), init.matrix(width))


def gated(gate_DN, o_BTNH, x_BTD):
    """Head h times ``sigmoid(w_h . x)``, or unchanged without a gate."""
    if gate_DN is None:
        return o_BTNH
    return o_BTNH * jax.nn.sigmoid(einsum("BTD,DN->BTN", x_BTD, gate_DN))[..., None]
