"""The language-modelling loss of a decoder.

Shape suffixes: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from step_jax.core.sharding import Sharding
from step_jax.models import expert_health
from step_jax.models.context import Context, Execution
from step_jax.models.text.decoder import Decoder, DecoderParams
from step_jax.models.tokens import Tokens
from step_jax.models.trunk import gather
from step_jax.ops.cross_entropy import cross_entropy
from step_jax.training.step import LossOutput, Part


def token_losses(p: DecoderParams, c: Decoder, x_BTD, targets_BT, weights_BT, ctx, z_loss=0.0):
    """Weighted negative log-likelihood of targets from hidden states (before the final norm).

    Returns:
      (total, nll_BT) as ``ops.cross_entropy``; weights may be negative (policy gradients).
    """
    return cross_entropy(
        c.normed(p, x_BTD),
        c.head(p),
        targets_BT,
        weights_BT,
        z_loss=z_loss,
        chunks=ctx.execution.loss_chunks,
        sharding=ctx.sharding,
        implementation=ctx.execution.loss,
    )


def _ahead(a_BT, k: int):
    """``a`` of the token k places ahead, zero beyond the row's end."""
    return jnp.pad(a_BT[:, k:], ((0, 0), (0, k)))


def packed_text_loss(
    c: Decoder,
    execution: Execution,
    sharding: Sharding | None,
    z_loss: float = 0.0,
    balance: Literal["batch", "microbatch"] = "batch",
):
    """A function (params, batch) -> LossOutput: the next-token loss of packed text.

    Its parts are ``next_token``; ``mtp1``, ... for every head of multi-token prediction, each
    divided by its own number of targets; and ``routing`` of a mixture of experts whose router has a
    loss. The sums are the experts' stats. Mixtures keep to their capacity.

    Args:
      z_loss: coefficient of the squared log-partition.
      balance: ``batch`` takes the routers' losses of the loads of the whole batch, which are joint
        (``LossOutput.joint``); ``microbatch`` those of each call, weighted by their tokens.
    """
    joint = routing_loss(c)

    def loss(p: DecoderParams, batch: Mapping[str, Any]) -> LossOutput:
        ctx = Context(
            Tokens.packed(batch), within_capacity=True, sharding=sharding, execution=execution
        )
        parts, metrics, stats = token_parts(p, c, batch, ctx, z_loss)
        if joint is None or balance == "batch":
            return LossOutput(parts, metrics, stats, joint)
        return LossOutput(parts | own_routing(c, stats, ctx), metrics, stats)

    return loss


def own_routing(c: Decoder, stats, ctx: Context) -> dict[str, Part]:
    """What the mixtures add of one call's loads, weighted by its tokens."""
    joint = routing_loss(c)
    tokens = jnp.sum(ctx.tokens.counted_BT(), dtype=jnp.float32)
    values = {} if joint is None else joint(stats)
    return {name: Part(value * tokens, tokens) for name, value in values.items()}


def routing_loss(c: Decoder):
    """What mixtures of experts add to a loss, as ``LossOutput.joint``; None for nothing."""
    routers = [mixture.router for mixture in expert_health.mixtures(c)]
    if all(r.frozen or not (r.balance_loss or r.group_loss or r.z_loss) for r in routers):
        return None
    return lambda stats: {"routing": expert_health.routing_loss(c, stats)}


def token_parts(p: DecoderParams, c: Decoder, batch, ctx: Context, z_loss: float = 0.0):
    """(parts, metrics, the ExpertStats of every stack of layers) of packed text.

    The metrics are nats per token: ``nll`` and ``nll_mtp1``, ...
    """
    parts: dict[str, Part] = {}
    metrics: dict[str, tuple[jax.Array, jax.Array]] = {}

    def add(name: str, metric: str, x_BTD, targets_BT, weights_BT, coefficient: float):
        total, nll_BT = token_losses(p, c, x_BTD, targets_BT, weights_BT, ctx, z_loss)
        weight = jnp.sum(weights_BT)
        parts[name] = Part(total, weight, coefficient)
        metrics[metric] = (jnp.sum(jax.lax.stop_gradient(nll_BT) * weights_BT), weight)

    x_BTD, _, stats = c.hidden(p, batch["tokens"], ctx)
    weights_BT = batch["weights"]
    add("next_token", "nll", x_BTD, batch["targets"], weights_BT, 1.0)
    mtp = c.mtp
    for k, head in enumerate(p.mtp if mtp else (), start=1):
        assert mtp is not None
        # the token k ahead is the target k - 1 ahead; nothing is predicted across documents
        embedded_BTD = c.embed(p, _ahead(batch["targets"], k - 1), ctx)
        same_BT = _ahead(batch["segments"], k) == batch["segments"]
        specs = mtp.specs(c.width, c.norm, c.init)
        x_BTD, head_stats = mtp.apply(gather(specs, head, ctx), c.norm, x_BTD, embedded_BTD, ctx)
        stats = (stats, head_stats)
        targets_BT, weights_k_BT = _ahead(batch["targets"], k), _ahead(weights_BT, k) * same_BT
        coefficient = mtp.weight / mtp.heads
        add(f"mtp{k}", f"nll_mtp{k}", x_BTD, targets_BT, weights_k_BT, coefficient)
    return parts, metrics, expert_health.layers(stats)
