"""Multi-matrix factorisation attention and its key-reuse variants (arXiv 2412.19255).

Shape suffixes: B batch, T tokens, S keys, D model width, N query heads, C width of every head and
of the one shared key and value, R rank of the query factorisation.

The paper writes, for token i and heads c = 1..N (section 3)::

    O_i = sum_c softmax_j((x_i S_q Q_c) (x_j S_k)^T / sqrt(C)) (x_j S_v) O_c^T

with S_q in R^(D x R), Q_c in R^(R x C), S_k and S_v in R^(D x C) and O_c in R^(D x C); the paper
has R = C, the released Step-3 has R > C and a norm after S_q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from flax import struct

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.core.spec import ZEROS, ParamSpec
from step_jax.models.context import Context, through_cache
from step_jax.models.layers.attention.core import attend
from step_jax.models.layers.attention.mha import gate_specs, gated
from step_jax.models.layers.initialisation import Initialisation
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Position, Rope, check, rotate, rotate_queries
from step_jax.ops.einsum import einsum


@struct.dataclass
class MFAParams:
    query_down_DR: Any
    query_norm_R: Any
    query_up_RNC: Any
    key_DC: Any
    value_DC: Any
    reuse_CC: Any
    reuse_gate_C: Any
    output_NCD: Any
    gate_DN: Any


@dataclass(frozen=True)
class MFA:
    """MFA with ``heads`` query heads on one key and one value head of width ``head_dim`` (C).

    value: where values come from. ``projected``: their own projection (MFA, cache 2C per token).
      ``gated_key``: MFA-Key-Reuse, ``v = k + alpha * (k N)`` with the key before rotation and
      alpha zero at the start (cache C). ``key``: plain key reuse, ``v = k`` (the paper's ablation,
      cache C). Both reuse kinds cache the key unrotated and rotate it on reading.
    query_rank: R; None for the paper's R = C.
    query_norm: norm between the two query factors (released form), None for the paper form.
    window, output_gate: as in MHA.
    output_rate: multiplies the learning rate of the output weight. Many heads on one value start
      nearly alike, so that their updates add up; benchmarks/attention_ablation.md has figures.
    """

    kind: ClassVar[str] = "mfa"
    heads: int
    head_dim: int
    value: Literal["projected", "gated_key", "key"] = "projected"
    query_rank: int | None = None
    query_norm: RMSNorm | None = None
    window: int | None = None
    output_gate: bool = False
    position: Position | None = Rope()
    output_rate: float = 1.0

    def validate(self):
        checks.at_least(self, heads=1, head_dim=1, query_rank=1)
        checks.above(self, output_rate=0)
        if self.window is not None and self.window < 1:
            raise ConfigError(f"the attention window is {self.window}; it must be at least 1")
        check(self.position, self.head_dim)

    @property
    def rank(self) -> int:
        return self.head_dim if self.query_rank is None else self.query_rank

    def specs(self, width: int, init: Initialisation) -> MFAParams:
        N, C, R = self.heads, self.head_dim, self.rank
        read = init.matrix(width)
        shared = ParamSpec((width, C), ("embed", None), read)
        gated_key = self.value == "gated_key"
        return MFAParams(
            query_down_DR=ParamSpec((width, R), ("embed", None), read),
            query_norm_R=None if self.query_norm is None else self.query_norm.specs(R),
            query_up_RNC=ParamSpec((R, N, C), ("rank", "heads", None), init.matrix(R)),
            key_DC=shared,
            value_DC=shared if self.value == "projected" else None,
            reuse_CC=ParamSpec((C, C), (None, None), init.matrix(C)) if gated_key else None,
            reuse_gate_C=ParamSpec((C,), (None,), ZEROS, role="vector") if gated_key else None,
            output_NCD=ParamSpec(
                (N, C, width),
                ("heads", None, "embed"),
                init.attention_output(N * C),
                fan_in=2,
                rate=self.output_rate,
            ),
            gate_DN=gate_specs(self, width, init),
        )

    @property
    def kv(self) -> int:
        return 1

    def cache_entries(self):
        return ((self.head_dim,),) * (2 if self.value == "projected" else 1)

    def score_and_value_widths(self):
        return self.head_dim, self.head_dim

    def apply(self, p: MFAParams, x_BTD, ctx: Context, cache=None):
        latent_BTR = einsum("BTD,DR->BTR", x_BTD, p.query_down_DR)
        if self.query_norm is not None:
            latent_BTR = self.query_norm.apply(p.query_norm_R, latent_BTR)
        q_BTNC = einsum("BTR,RNC->BTNC", latent_BTR, p.query_up_RNC)
        q_BTNC = rotate_queries(self.position, q_BTNC, ctx.tokens.places_BTA)
        k_BTC = einsum("BTD,DC->BTC", x_BTD, p.key_DC)
        if self.value == "projected":
            o_BTNC, cache = self._projected(p, x_BTD, q_BTNC, k_BTC, ctx, cache)
        else:
            o_BTNC, cache = self._reused(p, q_BTNC, k_BTC, ctx, cache)
        o_BTNC = gated(p.gate_DN, o_BTNC, x_BTD)
        return einsum("BTNC,NCD->BTD", o_BTNC, p.output_NCD), cache

    def _projected(self, p, x_BTD, q_BTNC, k_BTC, ctx, cache):
        k_BTC = rotate(self.position, k_BTC[:, :, None], ctx.tokens.places_BTA)[:, :, 0]
        v_BTC = einsum("BTD,DC->BTC", x_BTD, p.value_DC)
        (k_BSC, v_BSC), kv_positions_BS, cache = through_cache((k_BTC, v_BTC), cache, ctx)
        return self._attend(q_BTNC, k_BSC, v_BSC, ctx, kv_positions_BS), cache

    def _reused(self, p, q_BTNC, k_BTC, ctx, cache):
        if cache is not None and ctx.tokens.place_BTA is not None:
            raise ConfigError(
                "key reuse caches keys unrotated and knows their places by their slots alone: "
                "tokens with places of their own cannot be cached; use value: projected"
            )
        (k_BSC,), kv_positions_BS, cache = through_cache((k_BTC,), cache, ctx)
        if kv_positions_BS is None:
            k_BSC = k_BSC.astype(q_BTNC.dtype)
            rotated_BSC = rotate(self.position, k_BSC[:, :, None], ctx.tokens.places_BTA)[:, :, 0]
            return self._attend(q_BTNC, rotated_BSC, self._value(p, k_BSC), ctx, None), cache
        # values are linear in keys: with a cache it is cheaper to average keys first
        return self._value(p, self._attend(q_BTNC, k_BSC, None, ctx, kv_positions_BS)), cache

    def _value(self, p, k):
        """``k + alpha * (k N)`` over the last axis of ``k``."""
        if self.value == "key":
            return k
        return k + p.reuse_gate_C.astype(k.dtype) * einsum("...C,CE->...E", k, p.reuse_CC)

    def _attend(self, q_BTNC, k_BSC, v_BSC, ctx, kv_positions_BS):
        return attend(
            q_BTNC,
            k_BSC[..., None, :],
            None if v_BSC is None else v_BSC[..., None, :],
            ctx,
            kv_positions_BS,
            scale=self.head_dim**-0.5,
            window=self.window,
            position=self.position,
        )
