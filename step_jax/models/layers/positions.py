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

    kind: ClassVar[str] = "llama3"
    factor: float
    length: int
    low: float = 1.0
    high: float = 4.0

    def validate(self):
        _check_extension(self.factor, self.length)
        if not 0.0 < self.low < self.high:
            raise ConfigError(f"rope scaling needs 0 < low < high, not {self.low} and {self.high}")

    def apply(self, frequency_F, theta: float):
        """Radians per token, scaled."""
        turns_F = self.length * frequency_F / (2 * math.pi)
        kept_F = jnp.clip((turns_F - self.low) / (self.high - self.low), 0.0, 1.0)
        return frequency_F * (kept_F + (1.0 - kept_F) / self.factor)


@dataclass(frozen=True)
class LinearScaling:
    """All rotations ``factor`` times slower: positions are interpolated (arXiv 2306.15595)."""

    kind: ClassVar[str] = "linear"
    factor: float

    def validate(self):
        _check_extension(self.factor, 1)

    def apply(self, frequency_F, theta: float):
        """Radians per token, scaled."""
        return frequency_F / self.factor


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): what turns seldom is slowed down, and scores grow.

    Of the rotations, ordered by their speed, those that turn more than ``fast`` times within
    ``length`` tokens (the context before extension) are kept, those that turn less than ``slow``
    times are slowed down ``factor`` times, and between the two the slowdown goes linearly with
    their number.

    truncate: the two bounds are rounded outwards to whole rotations.
    attention_factor: multiplies rotated queries and keys; None is ``m(mscale) / m(mscale_all_dim)``
      if both are given and ``m(1)`` if not, with ``m(a) = 1 + 0.1 a ln(factor)``.
    mscale_all_dim: also multiplies all scores of MLA by ``m(mscale_all_dim)**2`` (DeepSeek).
    """

    kind: ClassVar[str] = "yarn"
    factor: float
    length: int
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def validate(self):
        _check_extension(self.factor, self.length)
        if not 0.0 < self.slow < self.fast:
            raise ConfigError(f"yarn needs 0 < slow < fast, not {self.slow} and {self.fast}")
        if self.attention_factor is not None and self.attention_factor <= 0.0:
            raise ConfigError(f"yarn needs a positive attention_factor: {self.attention_factor}")

    def _magnitude(self, mscale: float) -> float:
        return 1.0 + 0.1 * mscale * math.log(self.factor)

    @property
    def magnitude(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def score_factor(self) -> float:
        """What the scores of MLA are multiplied by."""
        return self._magnitude(self.mscale_all_dim) ** 2

    def apply(self, frequency_F, theta: float):
        """Radians per token, scaled."""
        F = frequency_F.shape[0]

        def number(turns):  # of the rotation that turns so often within the length
            return F * math.log(self.length / (turns * 2 * math.pi)) / math.log(theta)

        low, high = number(self.fast), number(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * F - 1)
        high = high if high != low else low + 0.001
        slowed_F = jnp.clip((jnp.arange(F, dtype=jnp.float32) - low) / (high - low), 0.0, 1.0)
        return frequency_F * (1.0 - slowed_F + slowed_F / self.factor)


Scaling = RopeScaling | LinearScaling | Yarn


def _check_extension(factor: float, length: int) -> None:
    if factor < 1.0 or length < 1:
        raise ConfigError(
            f"rope scaling needs a factor and a length of at least 1, not {factor} and {length}"
        )


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
    scaling: Scaling | None = None
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

    def apply(self, x_BTNH, places_BTA, weight: float = 1.0):
        """Rotates by angles ``coordinate * theta**(-2i/width)``, scaled; computed in float32.

        What is rotated is multiplied by ``weight``.

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
            frequency_F = self._frequencies_F(rotated)
            return rope.rotate(x_BTNH, places_BTA[..., 0], frequency_F, weight)
        pieces = jnp.split(x_BTNH, np.cumsum(self.axes), axis=-1)
        turned = [
            rope.rotate(pieces[a], places_BTA[..., a], self._frequencies_F(width), weight)
            for a, width in enumerate(self.axes)
        ]
        return jnp.concatenate([*turned, pieces[-1]], axis=-1)

    def frequencies_F(self, head_dim: int):
        """Radians per position of every rotated pair, float32; of a rope without ``axes``."""
        return self._frequencies_F(self.rotated_width(head_dim))

    def _frequencies_F(self, rotated: int):
        frequency_F = rope.frequencies_F(self.theta, rotated // 2)
        return frequency_F if self.scaling is None else self.scaling.apply(frequency_F, self.theta)

    @property
    def query_weight(self) -> float:
        """What rotated queries are multiplied by.

        YaRN multiplies queries and keys alike. Here queries have both factors: scores are the same,
        and keys enter caches and kernels as they are.
        """
        return self.scaling.magnitude**2 if isinstance(self.scaling, Yarn) else 1.0

    @property
    def score_factor(self) -> float:
        """What the scores of MLA are multiplied by."""
        return self.scaling.score_factor if isinstance(self.scaling, Yarn) else 1.0


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


def rotate_queries(position: Position | None, q_BTNH, places_BTA):
    """As ``rotate``, and with the factors that YaRN gives to scores."""
    if not isinstance(position, Rope):
        return q_BTNH
    return position.apply(q_BTNH, places_BTA, position.query_weight)


def alibi(position: Position | None):
    """The ``alibi`` argument of ``ops.attention``."""
    return position.distance if isinstance(position, Alibi) else None
