"""Rotary position embedding (arXiv 2104.09864) as an operation.

Shape suffixes: B batch, T tokens, N heads, H head width, F rotated pairs of coordinates.
"""

from __future__ import annotations

import jax.numpy as jnp


def frequencies_F(theta: float, pairs: int):
    """``theta**(-i / pairs)`` for i = 0 .. pairs - 1, float32: radians per position."""
    return jnp.float32(theta) ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)


def rotate(x_BTNH, positions_BT, frequency_F):
    """Rotates the pairs ``(i, i + F)`` of the first 2 F coordinates by ``position * frequency``.

    Angles and products are float32; the result has the dtype of ``x_BTNH``.
    """
    pairs = frequency_F.shape[0]
    angle_BT1F = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_F
    cos_BT1F, sin_BT1F = jnp.cos(angle_BT1F), jnp.sin(angle_BT1F)
    x32 = x_BTNH[..., : 2 * pairs].astype(jnp.float32)
    a, b = x32[..., :pairs], x32[..., pairs:]
    rotated = jnp.concatenate(
        [a * cos_BT1F - b * sin_BT1F, b * cos_BT1F + a * sin_BT1F], axis=-1
    ).astype(x_BTNH.dtype)
    if 2 * pairs == x_BTNH.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x_BTNH[..., 2 * pairs :]], axis=-1)
