"""Samplers against differential equations with known solutions, guidance, and drawing.

Shape suffixes: N samples, F frames, H height, W width, C channels.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core.config import parse_config
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.inference.flow import Sampler, coefficients, draw, euler, guided, multistep
from step_jax.models.context import Execution
from step_jax.models.layers.attention import MHA
from step_jax.models.layers.mlp import GELU
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.text_inputs import States
from tests.models import small

MEAN, DEVIATION = 1.5, 0.4  # of normal data, whose velocity is known


def velocity(x, t):
    """Of data that are normal: the mean of data - noise given x."""
    variance = (1 - t) ** 2 + (t * DEVIATION) ** 2
    data = MEAN + t * DEVIATION**2 / variance * (x - t * MEAN)
    noise = (1 - t) / variance * (x - t * MEAN)
    return data - noise


def exact(x):
    """Where the flow takes noise: quantiles go to quantiles."""
    return MEAN + DEVIATION * x


def error(method: str, steps: int) -> float:
    x = jnp.linspace(-2, 2, 9)
    with jax.enable_x64(True):
        sampler = Sampler(method, steps)
        got = sampler.integrate(velocity, x.astype(jnp.float64))
    return float(np.abs(np.asarray(got) - exact(np.linspace(-2, 2, 9))).max())


def test_euler_follows_the_field():
    """dx/dt = x: after n steps (1 + 1/n)^n; dx/dt = t: the left sum (n - 1) / 2n."""
    x, times = jnp.ones((3, 2)), np.linspace(0, 1, 9, dtype=np.float32)
    np.testing.assert_allclose(euler(lambda x, t: x, x, times), 1.125**8 * x, rtol=1e-6)
    np.testing.assert_allclose(euler(lambda x, t: 0 * x + t, 0 * x, times), 7 / 16 + 0 * x)


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 0.95), ("heun", 1.95), ("dpm", 1.65), ("unipc", 1.95)]
)
def test_errors_fall_with_the_order_of_the_method(method, order):
    """With twice the steps, by 2 to the power of the order. That of ``dpm`` shows late: its first
    steps, from pure noise, are of first order."""
    few, many = error(method, 128), error(method, 256)
    assert np.log2(few / many) > order
    assert few < (0.02 if method == "euler" else 0.001)


def test_a_correction_is_worth_more_than_it_costs():
    assert error("unipc", 12) < error("dpm", 12) < error("euler", 12)


def test_the_last_step_of_a_multistep_method_ends_at_the_predicted_data():
    predict, again = coefficients(np.array([0.0, 0.25, 0.5, 1.0]))
    np.testing.assert_allclose(predict[-1], [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(predict[0], [0.75, 0.25, 0], rtol=1e-6)  # as Euler's from noise
    np.testing.assert_allclose(again[:2, :1].ravel(), [1, 0.75])
    # data that do not change are reached whatever the steps
    np.testing.assert_allclose(predict[1:, 1:].sum(1), [1 / 3, 1.0], rtol=1e-5)
    x = jnp.array([3.0])
    constant = lambda x, t: (2.0 - x) / (1 - t)  # noqa: E731
    for correct in (False, True):
        got = multistep(constant, x, np.array([0.0, 0.25, 0.5, 0.75, 1.0], np.float32), correct)
        np.testing.assert_allclose(got, [2.0], rtol=1e-5)


# --- guidance ------------------------------------------------------------------------------------


def test_the_scale_of_guidance_in_time():
    assert float(Sampler(guidance=9.0).scale(0.5)) == 9.0
    turbo = Sampler(guidance=5.0, decay=9.0)  # max(c - 9 t (c - 1), 1)
    np.testing.assert_allclose([float(turbo.scale(t)) for t in (0.0, 0.05, 0.2)], [5.0, 3.2, 1.0])
    within = Sampler(guidance=9.0, interval=(0.2, 0.6))
    assert [float(within.scale(t)) for t in (0.1, 0.2, 0.6, 0.7)] == [1.0, 9.0, 9.0, 1.0]


def test_guidance_goes_on_from_no_text_through_the_text():
    with_text, without = jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])
    got = guided(lambda: with_text, lambda: without, jnp.float32(3.0))
    np.testing.assert_allclose(got, [3.0, -2.0])
    np.testing.assert_array_equal(guided(lambda: with_text, lambda: without, 1.0), with_text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 0", "steps is 0"),
        ("shift: 0", "shift is 0"),
        ("interval: [0.5, 0.2]", "use 0 <= from < to <= 1"),
        ("decay: -1", "decay is -1"),
    ],
)
def test_samplers_that_cannot_work_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(Sampler, text)


# --- drawing -------------------------------------------------------------------------------------

MODEL = VideoDiT(
    8, 1, MHA(1, 8, position=None), GELU(16), 2, patch=(1, 1, 2), text=(States("llm", 4, 3),),
    scalars=("fps", "frames"), first_frame=True, prediction="data",
)  # fmt: skip
SIZE = (2, 1, 4)
SAMPLER = Sampler("euler", 3, guidance=2.0)
RNG = np.random.default_rng(0)
TEXT_NSE, FIRST_NHWC = RNG.standard_normal((3, 3, 4)), RNG.standard_normal((3, 1, 4, 2))


def drawn(chosen, sharding=None, model=MODEL, **changes):
    texts = {"llm": (TEXT_NSE[chosen].astype(np.float32), np.full(len(chosen), 3, np.int32))}
    nothing = {"llm": (np.zeros_like(texts["llm"][0]), np.ones(len(chosen), np.int32))}
    given = {
        "seed": 5, "count": len(chosen), "execution": Execution(dtype="float32"),
        "sharding": sharding or Sharding.build(MeshConfig(), jax.devices()[:1]),
        "scalars": {"fps": 8.0}, "first_NHWC": FIRST_NHWC[chosen].astype(np.float32),
    } | changes  # fmt: skip
    return draw(small.params(MODEL), model, texts, nothing, SIZE, SAMPLER, **given)


@pytest.mark.slow
def test_a_sample_does_not_depend_on_what_is_drawn_with_it_nor_on_the_devices():
    three = drawn([0, 1, 2])
    assert three.shape == (3, *SIZE, 2) and np.isfinite(three).all()
    on_eight = drawn([0, 1, 2], Sharding.build(MeshConfig(fsdp=4, context=2)))
    np.testing.assert_allclose(on_eight, three, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(drawn([0]), three[:1], rtol=1e-4, atol=1e-5)
    assert np.abs(drawn([0, 1, 2], seed=6) - three).max() > 1e-2


def test_a_model_of_numbers_divided_by_their_deviation_draws_them_times_it():
    given = {"first_NHWC": FIRST_NHWC[[0, 1]].astype(np.float32)}
    half = drawn([0, 1], model=replace(MODEL, deviation=0.5), first_NHWC=0.5 * given["first_NHWC"])
    np.testing.assert_allclose(half, 0.5 * drawn([0, 1], **given), rtol=1e-6)


def test_what_the_model_asks_for_must_be_given():
    with pytest.raises(ConfigError, match="the model reads fps of a clip"):
        drawn([0], scalars=None)
    with pytest.raises(ConfigError, match="the model continues a picture: give one"):
        drawn([0], first_NHWC=None)
