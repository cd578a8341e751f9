"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Shape suffixes: B batch, T tokens, S keys, D model width, N heads, R rank of the key/value latent,
Q rank of the query latent, P un-rotated and E rotated width of queries and keys, H = P + E, V width
of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.core.spec import ParamSpec
from step_jax.models.context import Context, one_layer, through_cache
from step_jax.models.layers.attention.core import attend
from step_jax.models.layers.initialisation import Initialisation
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Rope, check, rotate, rotate_queries
from step_jax.ops.einsum import einsum


@struct.dataclass
class MLAParams:
    query_down_DQ: Any
    query_norm_Q: Any
    query_up_QNH: Any
    query_DNH: Any
    latent_DR: Any
    latent_norm_R: Any
    rotated_key_DE: Any
    key_up_RNP: Any
    value_up_RNV: Any
    output_NVD: Any


@dataclass(frozen=True)
class MLA:
    """Keys and values of all heads from one latent of width ``kv_rank``, plus a rotated key.

    query_rank: rank of the queries' own latent, None for a full projection.
    nope_dim, rope_dim: un-rotated and rotated width of a head's query and key.
    output_rate: multiplies the learning rate of the output weight.
    The cache holds the latent and the rotated key: ``kv_rank + rope_dim`` per token. With a cache,
    the up-projections are absorbed into queries and outputs, so nothing is expanded per key.
    """

    kind: ClassVar[str] = "mla"
    heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    query_rank: int | None = None
    window: int | None = None
    norm: RMSNorm = RMSNorm(eps=1e-6)
    position: Rope = Rope()
    output_rate: float = 1.0

    def validate(self):
        checks.at_least(self, heads=1, kv_rank=1, query_rank=1, value_dim=1)
        checks.at_least(self, nope_dim=0, rope_dim=0)
        checks.above(self, output_rate=0)
        if self.window is not None and self.window < 1:
            raise ConfigError(f"the attention window is {self.window}; it must be at least 1")
        if self.rope_dim % 2:
            raise ConfigError(f"rope_dim is {self.rope_dim}; it must be even")
        check(self.position, self.rope_dim)

    def specs(self, width: int, init: Initialisation) -> MLAParams:
        N, R, Q, V = self.heads, self.kv_rank, self.query_rank, self.value_dim
        H = self.nope_dim + self.rope_dim
        read, up = init.matrix(width), ("rank", "heads", None)
        names = ("query_down_DQ", "query_norm_Q", "query_up_QNH", "query_DNH")
        query: dict[str, Any] = dict.fromkeys(names)
        if Q is None:
            query["query_DNH"] = ParamSpec((width, N, H), ("embed", "heads", None), read)
        else:
            query["query_down_DQ"] = ParamSpec((width, Q), ("embed", None), read)
            query["query_norm_Q"] = self.norm.specs(Q)
            query["query_up_QNH"] = ParamSpec((Q, N, H), up, init.matrix(Q))
        return MLAParams(
            **query,
            latent_DR=ParamSpec((width, R), ("embed", None), read),
            latent_norm_R=self.norm.specs(R),
            rotated_key_DE=ParamSpec((width, self.rope_dim), ("embed", None), read),
            key_up_RNP=ParamSpec((R, N, self.nope_dim), up, init.matrix(R)),
            value_up_RNV=ParamSpec((R, N, V), up, init.matrix(R)),
            output_NVD=ParamSpec(
                (N, V, width),
                ("heads", None, "embed"),
                init.attention_output(N * V),
                fan_in=2,
                rate=self.output_rate,
            ),
        )

    @property
    def kv(self) -> int:
        return self.heads

    def cache_entries(self):
        return ((self.kv_rank,), (self.rope_dim,))

    def score_and_value_widths(self):
        return self.nope_dim + self.rope_dim, self.value_dim

    def _queries(self, p: MLAParams, x_BTD, ctx: Context):
        if self.query_rank is None:
            q_BTNH = einsum("BTD,DNH->BTNH", x_BTD, p.query_DNH)
        else:
            latent_BTQ = einsum("BTD,DQ->BTQ", x_BTD, p.query_down_DQ)
            latent_BTQ = self.norm.apply(p.query_norm_Q, latent_BTQ)
            q_BTNH = einsum("BTQ,QNH->BTNH", latent_BTQ, p.query_up_QNH)
        q_BTNE = q_BTNH[..., self.nope_dim :]
        rotated_BTNE = rotate_queries(self.position, q_BTNE, ctx.tokens.places_BTA)
        return q_BTNH[..., : self.nope_dim], rotated_BTNE

    def apply(self, p: MLAParams, x_BTD, ctx: Context, cache=None):
        q_BTNP, q_BTNE = self._queries(p, x_BTD, ctx)
        latent_BTR = einsum("BTD,DR->BTR", x_BTD, p.latent_DR)
        latent_BTR = self.norm.apply(p.latent_norm_R, latent_BTR)
        k_BTE = einsum("BTD,DE->BTE", x_BTD, p.rotated_key_DE)
        k_BTE = rotate(self.position, k_BTE[:, :, None], ctx.tokens.places_BTA)[:, :, 0]
        keys, kv_positions_BS, cache = through_cache((latent_BTR, k_BTE), cache, ctx)
        c_BSR, k_BSE = (a.astype(x_BTD.dtype) for a in one_layer(keys, ctx))
        if kv_positions_BS is None:
            o_BTNV = self._expanded(p, q_BTNP, q_BTNE, c_BSR, k_BSE, ctx)
        else:
            o_BTNV = self._absorbed(p, q_BTNP, q_BTNE, c_BSR, k_BSE, ctx, kv_positions_BS)
        return einsum("BTNV,NVD->BTD", o_BTNV, p.output_NVD), cache

    def _attend(self, q, k, v, ctx, kv_positions_BS):
        return attend(
            q,
            k,
            v,
            ctx,
            kv_positions_BS,
            scale=(self.nope_dim + self.rope_dim) ** -0.5 * self.position.score_factor,
            window=self.window,
            position=self.position,
        )

    def _expanded(self, p, q_BTNP, q_BTNE, c_BSR, k_BSE, ctx):
        k_BSNP = einsum("BSR,RNP->BSNP", c_BSR, p.key_up_RNP)
        v_BSNV = einsum("BSR,RNV->BSNV", c_BSR, p.value_up_RNV)
        k_BSNE = jnp.broadcast_to(k_BSE[:, :, None], (*k_BSNP.shape[:3], self.rope_dim))
        q_BTNH = jnp.concatenate([q_BTNP, q_BTNE], axis=-1)
        return self._attend(q_BTNH, jnp.concatenate([k_BSNP, k_BSNE], axis=-1), v_BSNV, ctx, None)

    def _absorbed(self, p, q_BTNP, q_BTNE, c_BSR, k_BSE, ctx, kv_positions_BS):
        q_BTNR = einsum("BTNP,RNP->BTNR", q_BTNP, p.key_up_RNP)
        q_BTNX = jnp.concatenate([q_BTNR, q_BTNE], axis=-1)
        k_BS1X = jnp.concatenate([c_BSR, k_BSE], axis=-1)[:, :, None]
        o_BTNR = self._attend(q_BTNX, k_BS1X, c_BSR[:, :, None], ctx, kv_positions_BS)
        return einsum("BTNR,RNV->BTNV", o_BTNR, p.value_up_RNV)
