"""Sampling from flow-matching models.

Shape suffixes: B images, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.core import rng
from step_jax.core.sharding import Sharding
from step_jax.models.context import Execution
from step_jax.models.vision.image_transformer import ImageTransformer


def euler(velocity: Callable[[jax.Array, jax.Array], jax.Array], x, steps: int):
    """Integrates dx/dt = ``velocity(x, t)`` from noise at t = 0 to data at t = 1 (Euler's method).

    Args:
      velocity: (x, float32 times (B,)) -> what x has, of x's shape.
      x: noise (B, ...), float32.
    """

    def step(i, x):
        return x + velocity(x, jnp.full(x.shape[:1], i / steps, jnp.float32)) / steps

    return jax.lax.fori_loop(0, steps, step, x)


def draw(
    params,
    model: ImageTransformer,
    classes_B,
    *,
    steps: int,
    seed: int,
    execution: Execution,
    sharding: Sharding,
) -> np.ndarray:
    """Images of the given classes: float32 (B, H, W, C), whole on every process.

    Args:
      classes_B: int32.
      steps: of Euler's method.
      seed: of the noise.
    """
    key, count = rng.fold(seed, 0, "noise"), len(classes_B)
    more = -count % sharding.ways("batch")  # so that every device has as many
    classes_B = np.pad(np.asarray(classes_B, np.int32), (0, more))

    def images(params):
        shape = (count, model.size, model.size, model.channels)

        def velocity(x_BHWC, time_B):
            x_BHWC = sharding.constrain(x_BHWC, "batch", None, None, None)
            return model.apply(params, x_BHWC, time_B, classes_B, execution, sharding)

        noise_BHWC = jnp.pad(jax.random.normal(key, shape), ((0, more), *((0, 0),) * 3))
        return euler(velocity, noise_BHWC, steps)

    return np.asarray(jax.jit(images, out_shardings=sharding.replicated())(params))[:count]
