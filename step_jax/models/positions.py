"""How attention knows distance: rotary embeddings and ALiBi.

Shape suffixes: B batch, T tokens, N heads, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp

from step_jax.core.errors import ConfigError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864) on the first ``fraction`` of a head's width.

    The two coordinates of a rotation are half of the rotated width apart (the convention of Llama
    and of the released Step models).
    """

    kind: ClassVar[str] = "rope"
    theta: float = 10_000.0
    fraction: float = 1.0

    def validate(self):
        if not 0.0 < self.fraction <= 1.0:
            raise ConfigError(f"rope fraction is {self.fraction}; it must be in (0, 1]")
        if self.theta <= 1.0:
            raise ConfigError(f"rope theta is {self.theta}; it must be above 1")

    def rotated_width(self, head_dim: int) -> int:
        width = int(head_dim * self.fraction)
        if width % 2:
            raise ConfigError(f"rope rotates {width} of {head_dim} coordinates, an odd number")
        return width

    def apply(self, x_BTNH, positions_BT):
        """Rotates by angles ``position * theta**(-2i/width)``, computed in float32."""
        width = self.rotated_width(x_BTNH.shape[-1])
        half = width // 2
        frequency = jnp.float32(self.theta) ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angle_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
        cos_BT1h, sin_BT1h = jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)
        x32 = x_BTNH[..., :width].astype(jnp.float32)
        a, b = x32[..., :half], x32[..., half:]
        rotated = jnp.concatenate(
            [a * cos_BT1h - b * sin_BT1h, b * cos_BT1h + a * sin_BT1h], axis=-1
        ).astype(x_BTNH.dtype)
        if width == x_BTNH.shape[-1]:
            return rotated
        return jnp.concatenate([rotated, x_BTNH[..., width:]], axis=-1)


@dataclass(frozen=True)
class Alibi:
    """Linear biases (arXiv 2108.12409); ``sqrt``: of the distance's square root (Step-1)."""

    kind: ClassVar[str] = "alibi"
    distance: Literal["linear", "sqrt"] = "linear"


Position = Rope | Alibi


def rotate(position: Position | None, x_BTNH, positions_BT):
    """Applies ``position`` if it is rotary."""
    return position.apply(x_BTNH, positions_BT) if isinstance(position, Rope) else x_BTNH


def alibi(position: Position | None):
    """The ``alibi`` argument of ``ops.attention``."""
    return position.distance if isinstance(position, Alibi) else None
