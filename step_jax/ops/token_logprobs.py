"""How likely tokens are, and how uncertain a model was: full logits never exist.

For losses that are any function of log-probabilities (ratios of policies, entropy bonuses), where
``ops.cross_entropy`` needs its weights beforehand. The backward pass makes each chunk's logits a
second time.

Shape suffixes: those of ``ops.cross_entropy``.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from step_jax.core.fsdp import whole
from step_jax.core.sharding import Sharding
from step_jax.ops.cross_entropy import gradients, pieces
from step_jax.ops.einsum import product


def token_logprobs(
    x_BTD,
    w_DV,
    targets_BT,
    *,
    temperature: float = 1.0,
    chunks: int = 1,
    sharding: Sharding | None = None,
):
    """Log-probability of every target, and entropy, under ``softmax(x w / temperature)``.

    Args:
      x_BTD: hidden states in the compute dtype.
      w_DV: the head, in any dtype; the products are made in ``x_BTD.dtype`` and accumulated in
        float32.
      targets_BT: int32.
      temperature: above 0.
      chunks: into how many parts each sequence is cut (the nearest divisor below is used).
      sharding: of the arrays; None on one device.

    Returns:
      (logprobs_BT, entropy_BT), float32, in nats; both are differentiable.

    Raises:
      ValueError: arrays that the mesh does not divide.
    """
    split, joined = pieces(targets_BT.shape, chunks, sharding)
    logprobs, entropy = _logprobs(split(x_BTD), w_DV, split(targets_BT), temperature, sharding)
    return joined(logprobs), joined(entropy)


def _chunk(x_RbCtD, w_DV, targets_RbCt, temperature):
    """(logprobs, entropy, log-softmax, one-hot mask) of one chunk, all float32."""
    logits_RbCtV = product("RbCtD,DV->RbCtV", x_RbCtD, w_DV, jnp.float32)
    log_RbCtV = jax.nn.log_softmax(logits_RbCtV / temperature, axis=-1)
    # a comparison, not a gather: it stays local when the vocabulary is sharded
    hot_RbCtV = jnp.arange(w_DV.shape[1], dtype=jnp.int32) == targets_RbCt[..., None]
    logprobs_RbCt = jnp.sum(jnp.where(hot_RbCtV, log_RbCtV, 0.0), axis=-1)
    entropy_RbCt = -jnp.sum(jnp.exp(log_RbCtV) * log_RbCtV, axis=-1)
    return logprobs_RbCt, entropy_RbCt, log_RbCtV, hot_RbCtV


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _logprobs(x_nRbCtD, w_DV, targets_nRbCt, temperature, sharding):
    w_DV = whole(w_DV.astype(x_nRbCtD.dtype), ("embed", "vocab"), sharding)

    def body(_, inputs):
        return None, _chunk(inputs[0], w_DV, inputs[1], temperature)[:2]

    return jax.lax.scan(body, None, (x_nRbCtD, targets_nRbCt))[1]


def _forward(x_nRbCtD, w_DV, targets_nRbCt, temperature, sharding):
    out = _logprobs(x_nRbCtD, w_DV, targets_nRbCt, temperature, sharding)
    return out, (x_nRbCtD, w_DV, targets_nRbCt)


def _backward(temperature, sharding, residuals, cotangents):
    x_nRbCtD, w_stored_DV, targets_nRbCt = residuals
    w_DV = whole(w_stored_DV.astype(x_nRbCtD.dtype), ("embed", "vocab"), sharding)

    def chunk(x_RbCtD, targets_RbCt, slope_RbCt, entropy_slope_RbCt):
        _, entropy_RbCt, log_RbCtV, hot_RbCtV = _chunk(x_RbCtD, w_DV, targets_RbCt, temperature)
        p_RbCtV = jnp.exp(log_RbCtV)
        d_RbCtV = slope_RbCt[..., None] * (hot_RbCtV - p_RbCtV)
        uneven_RbCtV = p_RbCtV * (log_RbCtV + entropy_RbCt[..., None])
        return (d_RbCtV - entropy_slope_RbCt[..., None] * uneven_RbCtV) / temperature, None

    inputs = (x_nRbCtD, targets_nRbCt, *cotangents)
    dx, dw_DV, _ = gradients(chunk, inputs, w_DV, sharding)
    zero = jnp.zeros(targets_nRbCt.shape, jax.dtypes.float0)
    return dx, dw_DV.astype(w_stored_DV.dtype), zero


_logprobs.defvjp(_forward, _backward)
