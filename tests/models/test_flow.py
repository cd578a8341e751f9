"""The terms of flow matching: times, weights, noise, the two conventions.

Shape suffixes: B rows, T tokens, A axes of a place, P numbers in a patch.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from step_jax.core.config import parse_config
from step_jax.core.errors import ConfigError
from step_jax.models.video import flow
from step_jax.models.video.flow import Flow, LogitNormal, Uniform, UShaped

SHARES = np.linspace(0.005, 0.995, 199)


def test_logit_normal_times_have_normal_logits():
    t = np.asarray(LogitNormal(0.5, 2.0).time(SHARES), np.float64)
    expected = [NormalDist(0.5, 2.0).inv_cdf(u) for u in SHARES]
    np.testing.assert_allclose(np.log(t / (1 - t)), expected, rtol=2e-4, atol=2e-4)


def test_u_shaped_times_have_the_density_of_the_hyperbolic_cosine():
    """The share below a time is the integral of cosh(a (t - 1/2)), taken numerically."""
    a, grid = 5.0, np.linspace(0, 1, 20001)
    density = np.cosh(a * (grid - 0.5))
    below = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    t = np.asarray(UShaped(a).time(SHARES))
    np.testing.assert_allclose(np.interp(t, grid, below / below[-1]), SHARES, atol=1e-5)
    ends = (t < 0.1).mean(), (t > 0.9).mean()
    assert ends[0] == pytest.approx(ends[1], abs=0.02) and min(ends) > 0.15


def test_a_shift_multiplies_the_ratio_of_noise_to_data():
    """Of the share of noise: sigma -> s sigma / (1 + (s - 1) sigma)."""
    for s in (1.0, 3.0, 13.0):
        sigma = 1 - SHARES
        np.testing.assert_allclose(
            1 - flow.shifted(SHARES, s), s * sigma / (1 + (s - 1) * sigma), rtol=1e-9
        )
    assert flow.shifted(0.0, 7.0) == 0 and flow.shifted(1.0, 7.0) == 1


def test_a_shift_by_size_grows_with_the_root_of_the_tokens():
    by_size = Flow(shift=3.0, shift_tokens=256)
    assert [float(by_size.shift_of(n)) for n in (256, 1024, 64)] == [3.0, 6.0, 1.5]
    np.testing.assert_allclose(by_size.times(0.5, 1024), flow.shifted(0.5, 6.0), rtol=1e-6)
    assert Flow(shift=3.0).shift_of(1024) == 3.0


def test_the_other_convention_is_the_same_line_walked_the_other_way():
    """There x = (1 - s) data + s noise with velocity noise - data; the step from x is the same."""
    rng = np.random.default_rng(0)
    noise, data, t = rng.standard_normal(5), rng.standard_normal(5), 0.3
    time, velocity = flow.other_convention(t, data - noise)
    np.testing.assert_allclose((1 - time) * data + time * noise, flow.at(t, noise, data))
    np.testing.assert_allclose(velocity, noise - data)
    back = flow.other_convention(time, velocity)
    np.testing.assert_allclose(back[0], t)
    np.testing.assert_array_equal(back[1], data - noise)
    ahead = flow.at(t + 0.1, noise, data)
    np.testing.assert_allclose(flow.at(t, noise, data) - 0.1 * velocity, ahead)


def test_predicted_data_mean_the_velocity_that_leads_to_them():
    rng = np.random.default_rng(0)
    noise, data, t = rng.standard_normal(5), rng.standard_normal(5), 0.3
    x = flow.at(t, noise, data)
    np.testing.assert_allclose(flow.velocity_of("data", data, x, t), data - noise, rtol=1e-5)
    assert flow.velocity_of("velocity", data, x, t) is data
    at_the_end = flow.velocity_of("data", data + 1, data, 1.0)
    np.testing.assert_allclose(at_the_end, np.full(5, 1 / flow.LEAST_REST), rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("density", [Uniform(), LogitNormal(), UShaped()])
def test_min_snr_weights_errors_of_the_data_and_is_one_on_average(density):
    c = Flow(density, shift=3.0, min_snr=5.0)
    shares = (np.arange(4096, dtype=np.float32) + 0.5)[None] / 4096
    times = np.asarray(c.times(shares, 64.0))
    weight = np.asarray(c.weight(times, np.full_like(times, 64.0)))
    assert weight.mean() == pytest.approx(1.0, abs=0.01)
    snr = (times / (1 - times)) ** 2
    of_data = weight / (1 - times) ** 2  # an error of the data is one of the velocity by 1 - t
    np.testing.assert_allclose(of_data / np.minimum(snr, 5.0), of_data[0, 0] / snr[0, 0], rtol=2e-3)
    assert np.asarray(Flow(density).weight(times, times)).tolist() == np.ones_like(times).tolist()


def test_noise_and_time_are_of_the_sample_and_its_place_alone():
    sample_BT = np.array([[4, 4, 9], [9, 9, 9]], np.uint32)
    place_BTA = np.array([[[0, 0, 0], [0, 0, 1], [2, 1, 0]], [[2, 1, 0], [0, 0, 1], [0, 1, 0]]])
    noise = np.asarray(flow.noise(3, sample_BT, place_BTA, 2))
    np.testing.assert_array_equal(noise[0, 2], noise[1, 0])
    numbers = np.unique(noise.ravel())
    assert len(numbers) == 2 * 5  # six patches, two of which are the same
    times = np.asarray(flow.shares(3, np.array([[4, 9], [9, 4]], np.uint32)))
    assert times[0, 0] == times[1, 1] != times[0, 1] == times[1, 0]
    assert (np.asarray(flow.noise(4, sample_BT, place_BTA, 2)) != noise).all()
    many = np.asarray(flow.shares(0, np.arange(20_000, dtype=np.uint32)[None]))
    assert abs(many.mean() - 0.5) < 0.01 and abs((many < 0.1).mean() - 0.1) < 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shift: 0", "shift is 0"),
        ("min_snr: -1", "min_snr is -1"),
        ("density: {kind: u_shaped, a: 0}", "a is 0"),
        ("density: {kind: logit_normal, deviation: 0}", "deviation is 0"),
    ],
)
def test_numbers_that_cannot_work_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(Flow, text)
