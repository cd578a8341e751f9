"""The language-modelling objective of a decoder.

Shape suffixes: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from step_jax.models import expert_health
from step_jax.models.context import Context
from step_jax.models.text.decoder import Decoder, DecoderParams
from step_jax.models.trunk import gather
from step_jax.ops.cross_entropy import cross_entropy


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


def language_model_loss(
    p: DecoderParams, c: Decoder, batch: dict[str, Any], ctx: Context, z_loss: float = 0.0
):
    """Next-token loss of a packed batch, with multi-token prediction if the model has it.

    Args:
      batch: tokens, targets, segments int32 and weights float32, all (B, T).
      z_loss: coefficient of the squared log-partition.

    Returns:
      (total, weight, metrics, experts): the sum to differentiate, the weight to divide it by, sums
      with weights of what to report (``nll``, nats per token, one entry per MTP head beside it, and
      ``routing_loss`` of a mixture of experts), and the ExpertStats of every stack of layers.
    """
    x_BTD, _, stats = c.hidden(p, batch["tokens"], ctx)
    weights_BT = batch["weights"]
    total, nll_BT = token_losses(p, c, x_BTD, batch["targets"], weights_BT, ctx, z_loss)
    weight = jnp.sum(weights_BT)
    metrics = {"nll": (jnp.sum(jax.lax.stop_gradient(nll_BT) * weights_BT), weight)}
    for k, head in enumerate(p.mtp, start=1):
        # the token k ahead is the target k - 1 ahead; nothing is predicted across documents
        embedded_BTD = c.embed(p, _ahead(batch["targets"], k - 1), ctx)
        same_BT = _ahead(batch["segments"], k) == batch["segments"]
        weights_k_BT = _ahead(weights_BT, k) * same_BT
        specs = c.mtp.specs(c.width, c.norm, c.init)
        x_BTD, head_stats = c.mtp.apply(gather(specs, head, ctx), c.norm, x_BTD, embedded_BTD, ctx)
        stats = (stats, head_stats)
        total_k, nll_BT = token_losses(
            p, c, x_BTD, _ahead(batch["targets"], k), weights_k_BT, ctx, z_loss
        )
        # divided by the weight of the main loss like it (2412.19437, eq. 24), not by its own:
        # that would not add up over microbatches
        total += total_k * (c.mtp.weight / c.mtp.heads)
        nll_k = jnp.sum(jax.lax.stop_gradient(nll_BT) * weights_k_BT)
        metrics[f"nll_mtp{k}"] = (nll_k, jnp.sum(weights_k_BT))
    experts = expert_health.layers(stats)
    if experts:
        loss = expert_health.routing_loss(c, experts)
        total += loss * weight  # it is a mean, and the total is divided by the weight
        metrics["routing_loss"] = (jax.lax.stop_gradient(loss) * weight, weight)
    return total, weight, metrics, experts
