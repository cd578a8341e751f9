"""The loss of pairs of clips: against float64, with shared and with independent noise.

Shape suffixes: B pairs, 2 winner and loser, T tokens, P numbers in a patch.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from step_jax.models.layers.attention import MHA
from step_jax.models.layers.mlp import GELU
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Rope
from step_jax.models.video import flow
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.flow import Flow, LogitNormal
from step_jax.models.video.text_inputs import States
from step_jax.training.losses.flow import FlowDPO, flow_preference
from tests.models import dit_oracle, small

WIDTHS = (4, 2, 2)
MODEL = VideoDiT(
    8, 1, MHA(2, 8, qk_norm=RMSNorm(1e-6), position=Rope(axes=WIDTHS)), GELU(12), channels=3,
    text=(States("clip", 4, 3, padding=True), States("llm", 4, 3, "mlp")),
)  # fmt: skip
HOW = FlowDPO(beta=3.0, velocity=0.25)
FLOW = Flow(LogitNormal(), shift=2.0)
SEED, B, T, P = 7, 3, 4, 3


def batch(shared: bool = True):
    rng = np.random.default_rng(0)
    place = np.stack(np.meshgrid([0], [0, 1], [0, 1], indexing="ij"), -1).reshape(T, 3)
    texts = rng.standard_normal((2, B, 1, 1, 3, 4)).astype(np.float32)
    number = np.arange(B, dtype=np.uint32)[:, None, None]
    return {
        "patches": rng.standard_normal((B, 2, T, P)).astype(np.float32),
        "places": np.broadcast_to(place, (B, 2, T, 3)).astype(np.int32),
        "samples": np.concatenate([number, number if shared else number + 100], 1),
        **{f"text/{n}": np.repeat(t, 2, 1) for n, t in zip(("clip", "llm"), texts, strict=True)},
        **{f"lengths/{n}": np.full((B, 2, 1), 3, np.int32) for n in ("clip", "llm")},
    }


@pytest.fixture(scope="module")
def params():
    return small.params(MODEL)


@pytest.fixture(scope="module")
def reference(params):
    """Errors of other parameters, by the oracle."""
    return errors(float64(small.params(MODEL, seed=1)), batch()).astype(np.float32)


@pytest.fixture(scope="module")
def of(params, reference):
    """batch -> ((loss, metrics), gradient)."""

    def loss(p, rows):
        rest = (FLOW, SEED, small.execution(), None)
        out = flow_preference(p, MODEL, rows, HOW, *rest)
        return sum(out.values().values()), {n: a / w for n, (a, w) in out.metrics.items()}

    example = batch() | {"reference": reference}
    f = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, example)
    f = f.compile(compiler_options=small.FAST_COMPILE)
    return lambda rows: jax.device_get(f(params, {"reference": reference} | rows))


def float64(params):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), params)


def errors(p, rows) -> np.ndarray:
    """Mean squared errors of the velocity by the oracle, float64 (B, 2)."""
    layers = [jax.tree.map(lambda a: a[0], p.blocks)]
    found = np.zeros((B, 2))
    time_B21 = np.asarray(FLOW.times(flow.shares(SEED, rows["samples"][..., 0]), T), np.float64)
    for b, side in np.ndindex(B, 2):
        samples_1T = np.full((1, T), rows["samples"][b, side, 0])
        places_TA = rows["places"][b, side]
        noise = np.asarray(flow.noise(SEED, samples_1T, places_TA[None], P)[0], np.float64)
        data, t = rows["patches"][b, side].astype(np.float64), time_B21[b, side]
        texts = [rows[f"text/{name}"][b, side, 0] for name in ("clip", "llm")]
        x = (1 - t) * noise + t * data
        out = dit_oracle.model(p, layers, x, t, places_TA, WIDTHS, texts, ())
        found[b, side] = np.mean((out - (data - noise)) ** 2)
    return found


def expected(p, rows, reference) -> float:
    """Step by step as FlowDPO's equation has it."""
    e = errors(p, rows)
    inside = -HOW.beta / 2 * ((e - reference)[:, 0] - (e - reference)[:, 1])
    return float(np.mean(np.log1p(np.exp(-inside))) + HOW.velocity * e[:, 0].mean())


@pytest.mark.thorough
def test_loss_and_gradient_are_those_of_float64(of, params, reference):
    """The gradient in three directions through all parameters, by differences of the oracle."""
    (loss, metrics), gradient = of(batch())
    p, ref = float64(params), reference.astype(np.float64)
    assert loss == pytest.approx(expected(p, batch(), ref), rel=1e-5)
    e = errors(p, batch())
    assert metrics["error_winner"] == pytest.approx(e[:, 0].mean(), rel=1e-5)
    assert metrics["error_loser"] == pytest.approx(e[:, 1].mean(), rel=1e-5)
    margin = -HOW.beta / 2 * ((e - ref)[:, 0] - (e - ref)[:, 1]).mean()
    assert metrics["reward_margin"] == pytest.approx(margin, rel=1e-4)
    rng = np.random.default_rng(1)
    for _ in range(3):
        way = jax.tree.map(lambda a: rng.standard_normal(a.shape), p)
        there, back = (
            expected(jax.tree.map(lambda a, d, s=s: a + s * d, p, way), batch(), ref)
            for s in (1e-5, -1e-5)
        )
        along = sum(
            np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, way)), strict=True)
        )
        assert along == pytest.approx((there - back) / 2e-5, rel=2e-4)


def test_of_a_clip_beside_itself_shared_noise_has_nothing_to_prefer(of):
    """With a noise for each, the same two clips differ by what was drawn."""
    for shared in (True, False):
        rows = batch(shared)
        rows["patches"][:, 1] = rows["patches"][:, 0]
        (_, metrics), _ = of(rows | {"reference": np.zeros((B, 2), np.float32)})
        apart = abs(metrics["error_winner"] - metrics["error_loser"])
        assert apart < 1e-6 if shared else apart > 1e-2


def test_shared_noise_makes_the_gradient_of_a_pair_less_noisy(of):
    """Of the same clips, over many draws: what is no signal is the same on both sides."""
    spread = {}
    for shared in (True, False):
        found = []
        for i in range(16):
            rows = batch(shared)
            rows["patches"][:, 1] = rows["patches"][:, 0] + 0.05
            rows["samples"] = rows["samples"] + np.uint32(1000 * i)
            (_, metrics), _ = of(rows | {"reference": np.zeros((B, 2), np.float32)})
            found.append(metrics["reward_margin"])
        spread[shared] = np.std(found)
    assert spread[True] < 0.2 * spread[False]
