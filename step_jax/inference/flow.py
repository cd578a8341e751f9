"""Sampling from flow-matching models."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def euler(velocity: Callable[[jax.Array, jax.Array], jax.Array], x, steps: int):
    """Integrates dx/dt = ``velocity(x, t)`` from noise at t = 0 to data at t = 1 (Euler's method).

    Args:
      velocity: (x, float32 times (B,)) -> what x has, of x's shape.
      x: noise (B, ...), float32.
    """

    def step(i, x):
        return x + velocity(x, jnp.full(x.shape[:1], i / steps, jnp.float32)) / steps

    return jax.lax.fori_loop(0, steps, step, x)
