"""Normalisation: root mean square (arXiv 1910.07467), and of layers (arXiv 1607.06450)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x, scale, eps: float, zero_centred: bool = False):
    """``x / rms(x) * scale`` over the last axis, in float32, returned in ``x.dtype``.

    Args:
      x: (..., D).
      scale: (D,), or None for no scale.
      eps: added to the mean square.
      zero_centred: the scale is stored as its difference from one (Step-3.5-Flash, 2602.10604).
    """
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if scale is not None:
        scale = scale.astype(jnp.float32)
        y = y * (1.0 + scale if zero_centred else scale)
    return y.astype(x.dtype)


def layer_norm(x, scale, bias, eps: float):
    """``(x - mean(x)) / deviation(x) * scale + bias`` over the last axis, in float32.

    Args:
      x: (..., D).
      scale, bias: (D,), or both None for neither.
      eps: added to the variance.

    Returns:
      An array of ``x.dtype``.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return y.astype(x.dtype)
