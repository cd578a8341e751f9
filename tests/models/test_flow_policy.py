"""Steps of a sampler as choices, against the equations of arXiv 2505.05470 in float64 NumPy.

There time runs from noise at 1 to data at 0, and the velocity is noise less data.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from step_jax.core.errors import ConfigError
from step_jax.models.video import flow
from step_jax.models.video.flow_policy import Choices, divergence, log_density, step_mean

A = 0.7
TIMES = flow.schedule(8, 3.0)
MEAN, DEVIATION = 1.5, 0.4  # of normal data, whose velocity is known


def paper_step(x, velocity, sigma, sigma_next, noise_level):
    """(mean, deviation) of equation 9, in the paper's time and of its velocity."""
    step = sigma_next - sigma  # negative
    s = noise_level * np.sqrt(sigma / (1 - min(sigma, sigma_next if sigma == 1 else sigma)))
    drift = velocity + s**2 / (2 * sigma) * (x + (1 - sigma) * velocity)
    return x + drift * step, s * np.sqrt(-step)


def paper_divergence(velocity, reference, sigma, sigma_next, noise_level):
    """The paper's closed form of the KL of a step."""
    s = noise_level * np.sqrt(sigma / (1 - sigma))
    factor = (sigma - sigma_next) / 2 * (s * (1 - sigma) / (2 * sigma) + 1 / s) ** 2
    return factor * np.sum((velocity - reference) ** 2)


def test_a_step_is_that_of_the_papers_equation_in_its_own_time():
    rng = np.random.default_rng(0)
    deviation_S = Choices(A).deviations(TIMES)
    for i, (t, end) in enumerate(zip(TIMES[:-1], TIMES[1:], strict=True)):
        x, v = rng.standard_normal((2, 1, 4, 3)).astype(np.float32)
        sigma, sigma_next = 1 - float(t), 1 - float(end)
        mean, deviation = paper_step(x.astype(np.float64), -v, sigma, sigma_next, A)
        assert deviation_S[i] == pytest.approx(deviation, rel=1e-5)
        np.testing.assert_allclose(step_mean(x, v, t, end, deviation_S[i]), mean, atol=2e-6)


def test_density_and_divergence_are_those_of_the_step_s_normal_distribution():
    rng = np.random.default_rng(1)
    x, v, reference, end = rng.standard_normal((4, 1, 4, 3))
    i, deviation_S = 3, Choices(A).deviations(TIMES)
    t, after, deviation = (float(a[i]) for a in (TIMES[:-1], TIMES[1:], deviation_S))
    mean, other = (paper_step(x, -u, 1 - t, 1 - after, A)[0] for u in (v, reference))
    density = -0.5 * ((end - mean) / deviation) ** 2 - np.log(deviation * np.sqrt(2 * np.pi))
    found = log_density(*map(np.float32, (end, mean)), np.array([deviation], np.float32))
    assert found[0] == pytest.approx(np.mean(density), rel=1e-5)
    of_paper = paper_divergence(-v, -reference, 1 - t, 1 - after, A) / v.size
    found = divergence(*map(np.float32, (mean, other)), np.array([deviation], np.float32))
    assert found[0] == pytest.approx(of_paper, rel=1e-5)
    # of draws of the one, the mean difference of their log-densities is the divergence
    drawn = mean + deviation * rng.standard_normal((4000, 4, 3))
    apart = np.mean(((drawn - other) ** 2 - (drawn - mean) ** 2) / (2 * deviation**2))
    assert apart == pytest.approx(of_paper, rel=0.05)


def velocity(x, t):
    """The mean of data - noise given x."""
    variance = (1 - t) ** 2 + (t * DEVIATION) ** 2
    off = (x - t * MEAN) / variance
    return MEAN + t * DEVIATION**2 * off - (1 - t) * off


def moments(times, deviation_AS):
    """(mean, deviation) of x at every time, (S + 1, 2, A), for each amount of noise; without a
    draw: a step of normal x is affine in it."""
    mean, variance = np.zeros(len(deviation_AS)), np.ones(len(deviation_AS))
    found = [(mean, np.sqrt(variance))]
    with jax.enable_x64(True):
        for t, end, d in zip(times[:-1], times[1:], deviation_AS.T, strict=True):
            at = np.array([[0.0], [1.0]])
            low, high = np.asarray(step_mean(at, velocity(at, t), t, end, d))
            mean, variance = low + (high - low) * mean, (high - low) ** 2 * variance + d**2
            found.append((mean, np.sqrt(variance)))
    return np.array(found)


@pytest.mark.parametrize(("steps", "falls"), [(None, 0.75), ((0.25, 0.75), 0.55)])
def test_what_is_drawn_by_chance_is_distributed_as_what_follows_the_flow(steps, falls):
    """At every time, with any noise, as the steps get short: of normal data, whose flow is known.

    Of n steps the first from pure noise has an error that does not get smaller with n, and of which
    a share of n to the power of -a^2 is left later.
    """
    errors = []
    for n in (50, 100, 200):
        times = np.linspace(0, 1, n + 1)
        exact = np.stack([times * MEAN, np.sqrt((1 - times) ** 2 + (times * DEVIATION) ** 2)], -1)
        window = steps and (int(steps[0] * n), int(steps[1] * n))
        noises = [Choices(a, window).deviations(times) for a in (1e-6, A, 1.5)]
        made = moments(times, np.array(noises, np.float64))
        errors.append(np.abs(made - exact[..., None])[n // 4 :].max((0, 1)))
    assert (errors[2] < 0.015).all()
    assert (errors[2] < falls * errors[1]).all() and (errors[1] < falls * errors[0]).all()


def test_steps_that_are_not_chosen_follow_the_flow():
    deviation_S = Choices(A, (2, 4)).deviations(TIMES)
    assert (deviation_S > 0).tolist() == [False, False, True, True, False, False, False, False]
    x, v = np.ones((2, 1, 2, 2), np.float32)
    np.testing.assert_allclose(step_mean(x, v, 0.25, 0.5, 0.0), x + 0.25 * v)
    with pytest.raises(ConfigError, match="choices.steps ends at 9, and the sampler has 8 steps"):
        Choices(A, (2, 9)).deviations(TIMES)
    with pytest.raises(ConfigError, match="use 0 <= first < behind the last"):
        Choices(A, (2, 2)).validate()
