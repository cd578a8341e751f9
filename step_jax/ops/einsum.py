"""The one entry point for products of activations and weights."""

from __future__ import annotations

import jax.numpy as jnp


def einsum(equation: str, x, w):
    """``jnp.einsum`` of an activation and a weight in the activation's dtype.

    Every weight product of every model goes through here, so that low-precision and adapter
    weights can become leaves of another type without the models knowing.

    Args:
      equation: as in ``jnp.einsum``; letters are the shape suffixes of the two arrays.
      x: the activation, of the compute dtype.
      w: the weight; cast to ``x.dtype``.
    """
    return jnp.einsum(equation, x, w.astype(x.dtype))
