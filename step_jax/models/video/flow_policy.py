"""Steps of a sampler as choices of a policy: Flow-GRPO (arXiv 2505.05470).

The flow ``dx/dt = v`` and, for any s, the stochastic differential equation

    dx = (v - s^2 / (2 (1 - t)) (x - t v)) dt + s dW,    s = a sqrt((1 - t) / t),

have the same distribution of x at every time, since ``x - t v`` is the noise that x is expected to
hold and ``-(x - t v) / (1 - t)`` the score. The paper's time is 1 - t, its velocity -v. A step of
it from t to t + h by Euler and Maruyama is a draw of a normal distribution of deviation
``d = s sqrt(h)``, whose density is known: the step is a choice, and the sampler a policy.

Shape suffixes: N samples, T tokens, P numbers in a patch, S steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from step_jax.core import checks
from step_jax.core.errors import ConfigError


@dataclass(frozen=True)
class Choices:
    """Which steps of a sampler are drawn, and how freely; the others follow the flow.

    noise: a, how much is drawn.
    steps: the first that is drawn, and the first behind them that is not; None: all are. Noise of
      the last steps stays in what is drawn, and a few steps learn as well as all (Flow-GRPO-Fast).
    """

    noise: float = 0.7
    steps: tuple[int, int] | None = None

    def validate(self):
        checks.above(self, noise=0)
        if self.steps is not None and not 0 <= self.steps[0] < self.steps[1]:
            raise ConfigError(f"steps is {self.steps}; use 0 <= first < behind the last")

    def within(self, steps: int) -> tuple[int, int]:
        """The first chosen step of so many, and the first behind them.

        Raises:
          ConfigError: there are not so many.
        """
        first, end = self.steps or (0, steps)
        if end > steps:
            raise ConfigError(f"choices.steps ends at {end}, and the sampler has {steps} steps")
        return first, end

    def deviations(self, times) -> np.ndarray:
        """d of every step of a sampler, 0 of those that follow the flow: float32 (S,).

        s has no bound at t = 0; there the t below the root is that of the step's end.

        Args:
          times: from 0 to 1, (S + 1,).
        """
        t = np.asarray(times, np.float64)
        start, h = t[:-1], np.diff(t)
        drawn = self.noise * np.sqrt((1 - start) / np.maximum(start, t[1]) * h)
        first, end = self.within(len(h))
        steps = np.arange(len(h))
        return np.where((first <= steps) & (steps < end), drawn, 0.0).astype(np.float32)


def step_mean(x, velocity, time, end, deviation):
    """The mean of where a step ends; that of deviation 0 is Euler's step.

    Args:
      time, end, deviation: of the step, of shapes that broadcast to x.
    """
    noise = x - time * velocity
    pull = jnp.square(deviation) / (2 * (1 - time))
    return x + (end - time) * velocity - pull * noise


def log_density(x_NTP, mean_NTP, deviation_N):
    """The logarithm of the normal density, its mean over the numbers of a sample: float32 (N,).

    As in the authors' program, so that a ratio does not depend on the size of a clip; the paper's
    equation has the sum.
    """
    off_NTP = (x_NTP - mean_NTP) / deviation_N[:, None, None]
    constant = 0.5 * math.log(2 * math.pi)
    return -0.5 * jnp.mean(jnp.square(off_NTP), (1, 2)) - jnp.log(deviation_N) - constant


def divergence(mean_NTP, other_NTP, deviation_N):
    """KL of two normal distributions of one deviation, a mean over numbers: float32 (N,)."""
    off_NTP = (mean_NTP - other_NTP) / deviation_N[:, None, None]
    return 0.5 * jnp.mean(jnp.square(off_NTP), (1, 2))
