"""Projection to the vocabulary and cross-entropy, in chunks: full logits never exist.

Shape suffixes: B batch, C pieces of the context axis, T sequence, t chunk of it, D width, V
vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def cross_entropy(
    x_BTD,
    w_DV,
    targets_BT,
    weights_BT,
    *,
    z_loss: float = 0.0,
    chunks: int = 1,
    pieces: int = 1,
    constrain=lambda x, *axes: x,
):
    """Weighted sum of ``-log p(target) + z_loss * logsumexp^2`` (z-loss: arXiv 2204.02311, 5.1).

    The gradients are computed in the same sweep as the loss, chunk by chunk, so the logits are
    neither stored nor computed twice; only float32 dw (D, V) and dx are kept for the backward pass.

    Args:
      x_BTD: hidden states in the compute dtype.
      w_DV: the head, in any dtype; the products are made in ``x_BTD.dtype`` and accumulated in
        float32.
      targets_BT: int32.
      weights_BT: float32; may be negative (a policy gradient's advantages) and is differentiable.
      z_loss: coefficient.
      chunks: into how many parts each sequence is cut (the nearest divisor below is used).
      pieces: over how many devices the sequence axis is sharded: chunks are cut inside a piece.
      constrain: fixes the layout of an array by logical axes (``Sharding.constrain``).

    Returns:
      (total, nll_BT): the differentiable float32 sum, and the float32 negative log-likelihood of
      every target (no gradient flows through it).
    """
    B, T, D = x_BTD.shape
    if T % pieces:
        raise ValueError(f"{pieces} pieces do not divide the sequence length {T}")
    local = T // pieces
    chunks = max(n for n in range(1, min(chunks, local) + 1) if local % n == 0)

    def split(a):  # (B, T, ...) -> (chunks, B, pieces, t, ...), no element leaves its device
        a = a.reshape(B, pieces, chunks, local // chunks, *a.shape[2:])
        a = constrain(a, "batch", "sequence", *(None,) * (a.ndim - 2))
        return jnp.moveaxis(a, 2, 0)

    def join(a):
        return jnp.moveaxis(a, 0, 2).reshape(B, T, *a.shape[4:])

    w_DV = constrain(w_DV.astype(x_BTD.dtype), None, "vocab")
    total, nll = _cross_entropy(
        split(x_BTD), w_DV, split(targets_BT), split(weights_BT.astype(jnp.float32)), z_loss
    )
    return total, join(nll)


def _chunk(x_BCtD, w_DV, targets_BCt, weights_BCt, z_loss):
    """(total, nll, z, logits, logsumexp, one-hot mask) of one chunk, all float32."""
    logits_BCtV = jnp.einsum("BCtD,DV->BCtV", x_BCtD, w_DV, preferred_element_type=jnp.float32)
    lse_BCt = jax.nn.logsumexp(logits_BCtV, axis=-1)
    # a comparison, not a gather: it stays local when the vocabulary is sharded
    hot_BCtV = jnp.arange(w_DV.shape[1], dtype=jnp.int32) == targets_BCt[..., None]
    nll_BCt = lse_BCt - jnp.sum(jnp.where(hot_BCtV, logits_BCtV, 0.0), axis=-1)
    cost_BCt = nll_BCt + z_loss * jnp.square(lse_BCt)
    return jnp.sum(weights_BCt * cost_BCt), nll_BCt, cost_BCt, logits_BCtV, lse_BCt, hot_BCtV


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(x_nBCtD, w_DV, targets_nBCt, weights_nBCt, z_loss):
    def body(total, inputs):
        chunk_total, nll_BCt, *_ = _chunk(inputs[0], w_DV, *inputs[1:], z_loss)
        return total + chunk_total, nll_BCt

    return jax.lax.scan(body, jnp.float32(0), (x_nBCtD, targets_nBCt, weights_nBCt))


def _forward(x_nBCtD, w_DV, targets_nBCt, weights_nBCt, z_loss):
    dtype = x_nBCtD.dtype

    def body(carry, inputs):
        total, dw_DV = carry
        x_BCtD, targets_BCt, weights_BCt = inputs
        chunk_total, nll_BCt, cost_BCt, logits_BCtV, lse_BCt, hot_BCtV = _chunk(
            x_BCtD, w_DV, targets_BCt, weights_BCt, z_loss
        )
        p_BCtV = jnp.exp(logits_BCtV - lse_BCt[..., None])
        d_BCtV = p_BCtV * (1.0 + 2.0 * z_loss * lse_BCt)[..., None] - hot_BCtV
        d_BCtV = (d_BCtV * weights_BCt[..., None]).astype(dtype)
        dx_BCtD = jnp.einsum("BCtV,DV->BCtD", d_BCtV, w_DV)
        dw_DV += jnp.einsum("BCtD,BCtV->DV", x_BCtD, d_BCtV, preferred_element_type=jnp.float32)
        return (total + chunk_total, dw_DV), (nll_BCt, cost_BCt, dx_BCtD)

    start = (jnp.float32(0), jnp.zeros(w_DV.shape, jnp.float32))
    (total, dw_DV), (nll, cost, dx) = jax.lax.scan(
        body, start, (x_nBCtD, targets_nBCt, weights_nBCt)
    )
    return (total, nll), (dx, dw_DV, cost, targets_nBCt, jnp.zeros((), w_DV.dtype))


def _backward(z_loss, residuals, cotangents):
    dx_nBCtD, dw_DV, cost_nBCt, targets_nBCt, w_like = residuals
    g, _ = cotangents  # nll carries no gradient by contract
    zero = jnp.zeros(targets_nBCt.shape, jax.dtypes.float0)
    return (
        (g * dx_nBCtD).astype(dx_nBCtD.dtype),
        (g * dw_DV).astype(w_like.dtype),
        zero,
        g * cost_nBCt,
    )


_cross_entropy.defvjp(_forward, _backward)
