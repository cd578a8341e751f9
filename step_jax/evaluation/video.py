"""How near one clip is to another: PSNR, SSIM, LPIPS, the seams of chunks; and how near one set of
clips is to another: a Frechet distance of features.

Everything reads values in [-1, 1].

Shape suffixes: N pictures or clips, T frames, H height, W width, C channels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from step_jax.core.errors import ConfigError
from step_jax.models.video.perceptual import Perceptual

_RANGE = 2.0  # of the values
_SIGMA, _RADIUS = 1.5, 5  # of the window of SSIM: 11 x 11, a Gaussian
_AT_ONCE = 64  # pictures that the network sees


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in decibels; infinite for equal clips."""
    error = np.mean(np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)))
    return float("inf") if error == 0 else float(10 * np.log10(_RANGE**2 / error))


def ssim(a_THWC: np.ndarray, b_THWC: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of frames, averaged over them and their channels.

    Raises:
      ConfigError: frames smaller than its window.
    """
    from scipy.ndimage import gaussian_filter

    if min(a_THWC.shape[1:3]) <= 2 * _RADIUS:
        raise ConfigError(f"SSIM needs frames of more than {2 * _RADIUS} pixels a side")

    def mean(x):
        return gaussian_filter(x, (0, _SIGMA, _SIGMA, 0), radius=(0, _RADIUS, _RADIUS, 0))

    a, b = (np.asarray(x, np.float64) for x in (a_THWC, b_THWC))
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    both = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    similarity = top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    inner = slice(_RADIUS, -_RADIUS)
    return float(similarity[:, inner, inner].mean())


def seam_ratio(a_THWC: np.ndarray, chunk: int) -> float | None:
    """Mean change between frames across borders of chunks, over that within them; 1 is no seam.

    None for a clip without a border, or in which nothing changes.
    """
    change_T = np.abs(np.diff(np.asarray(a_THWC, np.float64), axis=0)).mean((1, 2, 3))
    border = np.arange(1, len(a_THWC)) % chunk == 0
    if not border.any() or border.all() or not change_T[~border].any():
        return None
    return float(change_T[border].mean() / change_T[~border].mean())


class Lpips:
    """LPIPS of clips, and features of them, by a network whose weights are loaded once."""

    def __init__(self, network: Perceptual):
        """See ``Perceptual.load`` for what it raises."""
        self.network, self._params = network, network.load()
        self._distance: Callable = jax.jit(network.distance)
        self._features: Callable = jax.jit(
            lambda p, x: network.features(p, x)[-1].mean((1, 2))  # one vector a frame
        )

    def distance(self, a_THWC: np.ndarray, b_THWC: np.ndarray) -> float:
        """The mean over the frames."""
        self.network.check_size(*a_THWC.shape[1:3])
        parts = [
            self._distance(self._params, a_THWC[i : i + _AT_ONCE], b_THWC[i : i + _AT_ONCE])
            for i in range(0, len(a_THWC), _AT_ONCE)
        ]
        return float(np.concatenate(parts).mean())

    def features(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """(N, 2 F): of each clip the mean of its frames' last features, and how much they change
        from frame to frame, so that motion counts and not only looks."""
        rows = []
        for clip_THWC in clips:
            frames_TF = np.asarray(self._features(self._params, clip_THWC), np.float64)
            change_TF = np.diff(frames_TF, axis=0, prepend=frames_TF[:1])
            rows.append(np.concatenate([frames_TF.mean(0), np.abs(change_TF).mean(0)]))
        return np.stack(rows)

    @property
    def frechet_name(self) -> str:
        """What a Frechet distance of its features is called; it is no FVD, whose network is I3D."""
        return f"fd_{self.network.network}"


def frechet_distance(real_NF: np.ndarray, made_NF: np.ndarray) -> float:
    """Frechet distance of two Gaussians with the sets' means and covariances (arXiv 1706.08500).

    Of few clips it is too large: compare it with that of two halves of the real ones.
    """
    means = [x.mean(0) for x in (real_NF, made_NF)]
    real, made = (np.cov(x, rowvar=False, bias=True) for x in (real_NF, made_NF))
    # tr sqrt(AB) = sum of the singular values of sqrt(A) sqrt(B): both roots are of symmetric ones
    cross = np.linalg.svd(_root(real) @ _root(made), compute_uv=False).sum()
    return float(np.square(means[0] - means[1]).sum() + np.trace(real + made) - 2 * cross)


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def judge_reconstructions(
    originals: Sequence[np.ndarray],
    made: Sequence[np.ndarray],
    *,
    chunk: int,
    lpips: Lpips | None = None,
) -> dict[str, float]:
    """The table of an autoencoder: clips (T, H, W, C) against what became of them.

    Returns:
      - ``psnr`` of the mean squared error of all clips, ``ssim``;
      - with ``lpips``: ``lpips``, and the Frechet distance under the network's name, if there are
        at least two clips;
      - ``seam``: the ratio of ``seam_ratio`` in what was made over that in the originals, if any
        clip has a border of chunks.
    """
    made = [np.clip(clip, -1, 1) for clip in made]
    pairs = list(zip(originals, made, strict=True))
    error = np.concatenate([np.square(a - b, dtype=np.float64).ravel() for a, b in pairs]).mean()
    result: dict[str, Any] = {
        "psnr": float(10 * np.log10(_RANGE**2 / max(error, 1e-12))),
        "ssim": float(np.mean([ssim(a, b) for a, b in pairs])),
    }
    if lpips is not None:
        result["lpips"] = float(np.mean([lpips.distance(a, b) for a, b in pairs]))
        if len(pairs) > 1:
            features = (lpips.features(clips) for clips in (originals, made))
            result[lpips.frechet_name] = frechet_distance(*features)
    seams = [(seam_ratio(a, chunk), seam_ratio(b, chunk)) for a, b in pairs]
    if known := [b / a for a, b in seams if a and b]:
        result["seam"] = float(np.mean(known))
    return result
