"""The one entry point for products of activations and weights, and products of float32.

What is computed in float32 (``execution.dtype: float32``, master weights) is multiplied in float32
on every kind of device: see ``pallas_kernels.rules.precision``.
"""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.rules import precision

__all__ = ["einsum", "precision", "product"]


def product(equation: str, a, b, dtype=None):
    """``jnp.einsum`` of two arrays; ``dtype`` is that of the sums and of the result, None for
    what the arrays have."""
    return jnp.einsum(equation, a, b, precision=precision(a, b), preferred_element_type=dtype)


def einsum(equation: str, x, w):
    """``jnp.einsum`` of an activation and a weight in the activation's dtype.

    Every weight product of every model goes through here, so that low-precision and adapter
    weights can become leaves of another type without the models knowing.

    Args:
      equation: as in ``jnp.einsum``; letters are the shape suffixes of the two arrays.
      x: the activation, of the compute dtype.
      w: the weight; cast to ``x.dtype``.
    """
    return product(equation, x, w.astype(x.dtype))
