"""How attention knows distance: rotary embeddings and ALiBi.

Shape suffixes: B batch, T tokens, N heads, H head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp

from step_jax.core.errors import ConfigError
from step_jax.ops import rope


@dataclass(frozen=True)
class RopeScaling:
    """Slower rotations for a longer context, as Llama 3.1 (arXiv 2407.21783) and Step-3.5-Flash.

    A rotation that turns less than ``low`` times within ``length`` tokens (the context before
    extension) is slowed down ``factor`` times, one that turns more than ``high`` times is left as
    it is, and between the two the slowdown is interpolated.
    """

    factor: float
    length: int
    low: float = 1.0
    high: float = 4.0

    def validate(self):
        if self.factor < 1.0 or self.length < 1:
            raise ConfigError(
                f"rope scaling needs a factor and a length of at least 1, not {self.factor} "
                f"and {self.length}"
            )
        if not 0.0 < self.low < self.high:
            raise ConfigError(f"rope scaling needs 0 < low < high, not {self.low} and {self.high}")

    def apply(self, frequency):
        """Radians per token, scaled; of any shape."""
        turns = self.length * frequency / (2 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return frequency * (kept + (1.0 - kept) / self.factor)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864) on the first ``fraction`` of a head's width.

    The two coordinates of a rotation are half of the rotated width apart (the convention of Llama
    and of the released Step models).
    """

    kind: ClassVar[str] = "rope"
    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: RopeScaling | None = None

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
        """Rotates by angles ``position * theta**(-2i/width)``, scaled; computed in float32."""
        return rope.rotate(x_BTNH, positions_BT, self.frequencies_F(x_BTNH.shape[-1]))

    def frequencies_F(self, head_dim: int):
        """Radians per position of every rotated pair, float32."""
        frequency_F = rope.frequencies_F(self.theta, self.rotated_width(head_dim) // 2)
        return frequency_F if self.scaling is None else self.scaling.apply(frequency_F)


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
