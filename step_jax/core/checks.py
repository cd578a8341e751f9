"""Bounds of numbers in configurations, for ``validate``; the caller adds the key path and the file.

A value of None passes: it says that there is none.
"""

from __future__ import annotations

import math

from step_jax.core.errors import ConfigError

#: Seeds that give different random numbers: a key is made of 32 bits.
SEEDS = 2**32


def at_least(config: object, **bounds: float) -> None:
    """Raises ConfigError if a field is below its bound, or infinite."""
    for name, bound in bounds.items():
        value = getattr(config, name)
        if value is not None and not bound <= value < math.inf:
            raise ConfigError(f"{name} is {value}; it must be at least {bound}")


def above(config: object, **bounds: float) -> None:
    """Raises ConfigError if a field is not above its bound, or infinite."""
    for name, bound in bounds.items():
        value = getattr(config, name)
        if value is not None and not bound < value < math.inf:
            raise ConfigError(f"{name} is {value}; it must be above {bound}")


def decay(config: object, *names: str) -> None:
    """Raises ConfigError if a field is not the decay of an average, in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"{name} is {value}; use a number in [0, 1)")


def seed(value: int, name: str = "seed") -> None:
    """Raises ConfigError unless ``value`` is a seed that no other one equals."""
    if not 0 <= value < SEEDS:
        raise ConfigError(f"{name} is {value}; it must be from 0 to {SEEDS - 1}")
