"""How attention knows distance: rotary embeddings and ALiBi.

Shape suffixes: B batch, T tokens, A axes of a place, N heads, H head width, F rotated pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np

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

    axes: for places of several coordinates, the widths of the head's consecutive pieces, one for
      each: piece a is rotated by coordinate a as a head of its own width would be. Step-Video has
      [64, 32, 32] for (time, row, column) (arXiv 2502.10248). What is left over stays unrotated.
    """

    kind: ClassVar[str] = "rope"
    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: RopeScaling | None = None
    axes: tuple[int, ...] = ()

    def validate(self):
        if not 0.0 < self.fraction <= 1.0:
            raise ConfigError(f"rope fraction is {self.fraction}; it must be in (0, 1]")
        if self.theta <= 1.0:
            raise ConfigError(f"rope theta is {self.theta}; it must be above 1")
        if not self.axes:
            return
        if len(self.axes) == 1 or any(width < 2 or width % 2 for width in self.axes):
            raise ConfigError(
                f"rope axes are {list(self.axes)}; they must be two or more even widths"
            )
        if self.fraction != 1.0:
            raise ConfigError("rope axes say how much of a head is rotated: leave fraction at 1")

    def rotated_width(self, head_dim: int) -> int:
        """How many of a head's coordinates are rotated.

        Raises:
          ConfigError: they are odd in number, or more than the head has.
        """
        width = sum(self.axes) if self.axes else int(head_dim * self.fraction)
        if width > head_dim:
            raise ConfigError(
                f"rope axes {list(self.axes)} take {width} coordinates of a head of {head_dim}"
            )
        if width % 2:
            raise ConfigError(f"rope rotates {width} of {head_dim} coordinates, an odd number")
        return width

    def apply(self, x_BTNH, places_BTA):
        """Rotates by angles ``coordinate * theta**(-2i/width)``, scaled; computed in float32.

        Raises:
          ConfigError: the places have another number of coordinates than this has axes.
        """
        found, axes = places_BTA.shape[-1], len(self.axes) or 1
        if found != axes:
            raise ConfigError(
                f"tokens have places of {found} coordinate(s), and rope rotates by {axes} "
                f"(axes: {list(self.axes)})"
            )
        rotated = self.rotated_width(x_BTNH.shape[-1])
        if not self.axes:
            return rope.rotate(x_BTNH, places_BTA[..., 0], self._frequencies_F(rotated))
        pieces = jnp.split(x_BTNH, np.cumsum(self.axes), axis=-1)
        turned = [
            rope.rotate(pieces[a], places_BTA[..., a], self._frequencies_F(width))
            for a, width in enumerate(self.axes)
        ]
        return jnp.concatenate([*turned, pieces[-1]], axis=-1)

    def frequencies_F(self, head_dim: int):
        """Radians per position of every rotated pair, float32; of a rope without ``axes``."""
        return self._frequencies_F(self.rotated_width(head_dim))

    def _frequencies_F(self, width: int):
        frequency_F = rope.frequencies_F(self.theta, width // 2)
        return frequency_F if self.scaling is None else self.scaling.apply(frequency_F)


@dataclass(frozen=True)
class Alibi:
    """Linear biases (arXiv 2108.12409); ``sqrt``: of the distance's square root (Step-1)."""

    kind: ClassVar[str] = "alibi"
    distance: Literal["linear", "sqrt"] = "linear"


Position = Rope | Alibi


def check(position: Position | None, head_dim: int):
    """Raises ConfigError if a head of the width cannot be rotated as ``position`` says."""
    if isinstance(position, Rope):
        position.rotated_width(head_dim)


def rotate(position: Position | None, x_BTNH, places_BTA):
    """Applies ``position`` if it is rotary."""
    return position.apply(x_BTNH, places_BTA) if isinstance(position, Rope) else x_BTNH


def alibi(position: Position | None):
    """The ``alibi`` argument of ``ops.attention``."""
    return position.distance if isinstance(position, Alibi) else None
