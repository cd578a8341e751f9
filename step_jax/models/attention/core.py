"""What every attention kind shares: the seam it fills and the step between projections.

Shape suffixes: B batch, T tokens, S keys, D model width, N query heads, K key/value heads, H width
of queries and keys, V width of values.

An attention kind is a frozen dataclass with the methods of :class:`Attention`, in one file, named
in ``step_jax/models/attention/__init__.py``. Its cache is a tuple of (B, slots, ...) arrays with
one entry per token; ``through_cache`` does all there is to do with it.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax

from step_jax.models.context import Context
from step_jax.models.initialisation import Initialisation
from step_jax.models.positions import Position, alibi
from step_jax.ops import attention as ops_attention


class Attention(Protocol):
    """The seam between a block and its attention."""

    heads: int
    window: int | None

    def specs(self, width: int, init: Initialisation) -> Any:
        """The parameters, as a tree of ParamSpec."""

    def apply(self, p, x_BTD, ctx: Context, cache: tuple | None = None) -> tuple[Any, tuple | None]:
        """(y_BTD, cache with this call's tokens stored)."""

    def cache_entries(self) -> tuple[tuple[int, ...], ...]:
        """Shape of what is stored per token and layer, one entry per cached array."""

    def score_and_value_widths(self) -> tuple[int, int]:
        """Widths whose sum, times heads, is the multiply-adds per query and key when training."""


def attend(
    q_BTNH,
    k_BSKH,
    v_BSKV,
    ctx: Context,
    kv_positions_BS=None,
    *,
    scale: float,
    window: int | None,
    position: Position | None,
):
    """Attention across the mesh: (B, T, N, V).

    Queries stay where their tokens are. With a context axis, keys and values are gathered along it
    (2 C numbers per token for a shared head: cheaper than any exchange of queries), or travel
    around the ring if ``ctx.sharding.ring`` says so and there are several heads to save.
    """
    implementation = ctx.execution.attention
    mask = ctx.mask(kv_positions_BS, window)
    sharding = ctx.sharding
    bias = alibi(position)
    q_BTNH = ctx.constrain(q_BTNH, "batch", "sequence", "heads", None)
    context = 1 if sharding is None else sharding.size("context")
    kv_heads = k_BSKH.shape[2]
    if context > 1 and sharding.ring and kv_heads > 1 and kv_positions_BS is None:
        o_BTNV = _ring(q_BTNH, k_BSKH, v_BSKV, mask, sharding, scale, bias)
    else:
        if context > 1 and kv_positions_BS is None:
            # projected where the tokens are: else the partitioner gathers x to project it whole
            k_BSKH = ctx.constrain(k_BSKH, "batch", "sequence", "kv_heads", None)
            v_BSKV = ctx.constrain(v_BSKV, "batch", "sequence", "kv_heads", None)
            mask = mask.replace(in_order=False)  # a block of queries would cut across devices
        k_BSKH = ctx.constrain(k_BSKH, "batch", None, "kv_heads", None)
        v_BSKV = ctx.constrain(v_BSKV, "batch", None, "kv_heads", None)
        o_BTNV = ops_attention.attention(
            q_BTNH, k_BSKH, v_BSKV, mask, scale=scale, alibi=bias, implementation=implementation
        )
    return ctx.constrain(o_BTNV, "batch", "sequence", "heads", None)


def _ring(q_BTNH, k_BSKH, v_BSKV, mask, sharding, scale, bias):
    if bias is not None and sharding.size("tensor") > 1:
        raise ValueError("ring attention with ALiBi needs all heads on a device: set ring: false")
    tokens = sharding.spec(("batch", "sequence"), q_BTNH.shape[:2])
    heads = sharding.spec(("batch", "sequence", "kv_heads", None), k_BSKH.shape)
    masks = jax.tree.map(lambda _: tokens, mask)

    def local(q_BTNH, k_BSKH, v_BSKV, mask):
        return ops_attention.ring(q_BTNH, k_BSKH, v_BSKV, mask, scale, bias, "context")

    return sharding.shard_map(local, (heads, heads, heads, masks), heads)(
        q_BTNH, k_BSKH, v_BSKV, mask
    )
