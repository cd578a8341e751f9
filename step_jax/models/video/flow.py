"""Flow matching (arXiv 2210.02747, 2209.03003) in the convention of Step-Video (arXiv 2502.10248).

``x_t = (1 - t) x_0 + t x_1`` with noise x_0 at t = 0 and data x_1 at t = 1; the velocity is
``x_1 - x_0``. Others (Stable Diffusion 3, Flux, Wan) run time the other way round, with the
opposite sign: :func:`other_convention`.

Shape suffixes: B rows, G samples of a row, T tokens, P numbers in a patch, Q points of a grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.core import checks, rng

#: Below this distance from t = 1 data are not divided by it (arXiv 2511.13720).
LEAST_REST = 0.05


@dataclass(frozen=True)
class Uniform:
    """All times alike."""

    kind: ClassVar[str] = "uniform"

    def time(self, u):
        """The time below which a share ``u`` in (0, 1) of all is."""
        return u


@dataclass(frozen=True)
class LogitNormal:
    """The logit of the time is normal (arXiv 2403.03206): most times are in the middle."""

    kind: ClassVar[str] = "logit_normal"
    mean: float = 0.0
    deviation: float = 1.0

    def validate(self):
        checks.above(self, deviation=0)

    def time(self, u):
        """The time below which a share ``u`` in (0, 1) of all is."""
        return jax.nn.sigmoid(self.mean + self.deviation * jax.scipy.special.ndtri(u))


@dataclass(frozen=True)
class UShaped:
    """Density ``cosh(a (t - 1/2))``: most times are at the ends (arXiv 2405.20320).

    Step-Video distils with a = 5.
    """

    kind: ClassVar[str] = "u_shaped"
    a: float = 5.0

    def validate(self):
        checks.above(self, a=0)

    def time(self, u):
        """The time below which a share ``u`` in (0, 1) of all is."""
        return 0.5 + jnp.arcsinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a


Density = Uniform | LogitNormal | UShaped


@dataclass(frozen=True)
class Flow:
    """Which times are trained, and how much each counts.

    density: of the times, before they are shifted.
    shift: s moves times towards the noise, ``sigma -> s sigma / (1 + (s - 1) sigma)`` of the share
      of noise sigma = 1 - t (arXiv 2403.03206).
    shift_tokens: how many tokens that shift is for; it grows with the root of a sample's. None: the
      same shift for all sizes.
    min_snr: weights errors of the data by ``min(snr, min_snr)`` (arXiv 2303.09556), divided by the
      mean of that over all times. None weights all velocities alike.
    """

    density: Density = Uniform()
    shift: float = 1.0
    shift_tokens: int | None = None
    min_snr: float | None = None

    def validate(self):
        checks.above(self, shift=0, min_snr=0)
        checks.at_least(self, shift_tokens=1)

    def times(self, u, tokens):
        """Times of samples of so many tokens, of shares ``u`` in (0, 1) of all their times."""
        return shifted(self.density.time(u), self.shift_of(tokens))

    def shift_of(self, tokens):
        """The shift of a sample of so many tokens."""
        if self.shift_tokens is None:
            return self.shift
        return self.shift * jnp.sqrt(tokens / self.shift_tokens)

    def weight(self, time_BG, tokens_BG):
        """What the squared error of the velocity counts, 1 on average over all times: (B, G)."""
        if self.min_snr is None:
            return jnp.ones_like(time_BG)
        u_Q = (jnp.arange(256, dtype=jnp.float32) + 0.5) / 256
        grid_BGQ = self.times(u_Q, jnp.asarray(tokens_BG, jnp.float32)[..., None])
        mean_BG = jnp.mean(_of_min_snr(grid_BGQ, self.min_snr), -1)
        return _of_min_snr(time_BG, self.min_snr) / mean_BG


def _of_min_snr(time, most: float):
    """``min(snr, most)`` of an error of the data is so much of the same error as a velocity."""
    return jnp.minimum(jnp.square(time), most * jnp.square(1 - time))


def shifted(time, shift):
    """A time moved towards the noise; works on NumPy arrays too."""
    return time / (time + shift * (1 - time))


def other_convention(time, velocity):
    """(time, velocity) where noise is at 1 and data at 0, and back: it is its own inverse."""
    return 1 - time, -velocity


def at(time_BT1, noise_BTP, data_BTP):
    """The point between noise and data at a time."""
    return (1 - time_BT1) * noise_BTP + time_BT1 * data_BTP


def velocity_of(prediction: str, out_BTP, x_BTP, time_BT1):
    """The velocity at ``x_BTP`` that a model's output means (``VideoDiT.prediction``)."""
    if prediction == "velocity":
        return out_BTP
    return (out_BTP - x_BTP) / jnp.maximum(1 - time_BT1, LEAST_REST)


def shares(seed, sample_BG):
    """Of each sample the share of all times that its own is at, float32 (B, G), never 0 or 1.

    Args:
      seed: of the run, an integer or a key.
      sample_BG: uint32 numbers of samples.
    """

    def one(sample):
        return jax.random.uniform(rng.fold(seed, sample, "time"), minval=1e-6, maxval=1 - 1e-6)

    return jax.vmap(jax.vmap(one))(sample_BG)


def noise(seed, sample_BT, place_BTA, numbers: int):
    """Normal noise of each patch, float32 (B, T, P): of its sample and its place alone.

    So a sample has the same noise in a batch, in a pack and alone, on any mesh.

    Args:
      seed: of the run, an integer or a key.
      sample_BT: uint32, the number of each token's sample.
      place_BTA: (time, row, column), each below 1024.
      numbers: in a patch.
    """
    index_BT = place_BTA[..., 0] * 2**20 + place_BTA[..., 1] * 2**10 + place_BTA[..., 2]

    def one(sample, index):
        return jax.random.normal(rng.fold(seed, sample, "noise", index), (numbers,))

    return jax.vmap(jax.vmap(one))(sample_BT, index_BT)


def schedule(steps: int, shift: float) -> np.ndarray:
    """Times of a sampler's steps from 0 to 1, float32 (steps + 1,)."""
    return shifted(np.linspace(0.0, 1.0, steps + 1, dtype=np.float64), shift).astype(np.float32)
