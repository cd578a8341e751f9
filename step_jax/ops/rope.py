"""Rotary position embedding (arXiv 2104.09864) as an operation.

Shape suffixes: B batch, T tokens, N heads, H head width, F rotated pairs of coordinates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def frequencies_F(theta: float, pairs: int):
    """``theta**(-i / pairs)`` for i = 0 .. pairs - 1, float32: radians per position."""
    return jnp.float32(theta) ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)


def rotate(x_BTNH, positions_BT, frequency_F, weight: float = 1.0):
    """Rotates the pairs ``(i, i + F)`` of the first 2 F coordinates by ``position * frequency``.

    What is rotated is multiplied by ``weight``. Angles and products are float32; the result has the
    dtype of ``x_BTNH``.
    """
    cos_BT1F, sin_BT1F = cos_and_sin(positions_BT, frequency_F)
    return turned(x_BTNH, weight * cos_BT1F, weight * sin_BT1F)


def cos_and_sin(positions_BT, frequency_F):
    """Of the angles ``position * frequency``, float32: two (B, T, 1, F)."""
    angle_BT1F = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_F
    return jnp.cos(angle_BT1F), jnp.sin(angle_BT1F)


def turned(x_BTNH, cos_BT1F, sin_BT1F):
    """:func:`rotate` by what :func:`cos_and_sin` gives."""
    pairs = cos_BT1F.shape[-1]
    rotated = _turned(x_BTNH[..., : 2 * pairs], cos_BT1F, sin_BT1F)
    if 2 * pairs == x_BTNH.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x_BTNH[..., 2 * pairs :]], axis=-1)


@jax.custom_vjp
def _turned(x_BTNH, cos_BT1F, sin_BT1F):
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    dtype = x_BTNH.dtype
    first = (a * cos_BT1F - b * sin_BT1F).astype(dtype)
    return jnp.concatenate([first, (b * cos_BT1F + a * sin_BT1F).astype(dtype)], axis=-1)


def _turned_forward(x_BTNH, cos_BT1F, sin_BT1F):
    return _turned(x_BTNH, cos_BT1F, sin_BT1F), (cos_BT1F, sin_BT1F)


def _turned_backward(residuals, dy_BTNH):
    """Turns back. Derived by JAX it keeps halves in float32, a gigabyte per layer of a 7B model."""
    cos_BT1F, sin_BT1F = residuals
    return _turned(dy_BTNH, cos_BT1F, -sin_BT1F), None, None


_turned.defvjp(_turned_forward, _turned_backward)
