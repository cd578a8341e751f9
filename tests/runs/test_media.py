"""Clips and pictures as files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from step_jax.core.errors import ConfigError
from step_jax.runs.media import grid, pixels, save_clip, save_grid

CLIP_FHWC = np.linspace(-1, 1, 3 * 4 * 6, dtype=np.float32).reshape(3, 4, 6, 1)


def test_values_become_bytes_and_grey_becomes_colour():
    got = pixels(np.array([[[-2.0], [0.0], [1.0]]]), zoom=2)
    assert got.shape == (2, 6, 3) and got.dtype == np.uint8
    np.testing.assert_array_equal(got[0, ::2, 1], [0, 128, 255])


def test_a_clip_is_a_gif_of_frames_or_a_picture_of_them_side_by_side(tmp_path):
    gif = Image.open(save_clip(CLIP_FHWC, tmp_path / "a.gif", fps=5))
    assert (gif.n_frames, gif.size, gif.info["duration"]) == (3, (6, 4), 200)
    png = np.asarray(Image.open(save_clip(CLIP_FHWC, tmp_path / "a.png", zoom=3)))
    assert png.shape == (12, 54, 3)
    np.testing.assert_array_equal(png[::3, ::3], np.concatenate(list(pixels(CLIP_FHWC)), axis=1))
    with pytest.raises(ConfigError, match="the ending says what to write"):
        save_clip(CLIP_FHWC, tmp_path / "a.jpg")


def test_clips_stand_in_rows_with_a_frame_around_each():
    clips = np.stack([np.full((1, 2, 2, 1), v, np.float32) for v in (0.1, 0.2, 0.3)])
    (got,) = grid(clips, 2)[..., 0]
    assert got.shape == (8, 8)
    corners = [got[1, 1], got[1, 5], got[5, 1], got[5, 5]]
    np.testing.assert_allclose(corners, [0.1, 0.2, 0.3, 0.0])


def test_latents_are_kept_as_they_are(tmp_path):
    latents = np.zeros((2, 1, 2, 2, 5), np.float32)
    (path,) = save_grid(latents, 1, tmp_path / "step_3", 8.0)
    np.testing.assert_array_equal(np.load(path), latents)
    (path,) = save_grid(latents[..., :1], 1, tmp_path / "step_3", 8.0)
    assert path.suffix == ".png" and Image.open(path).size == (4 * 16, 8 * 16)


def test_mp4_holds_the_frames(tmp_path):
    av = pytest.importorskip("av")
    path = save_clip(np.zeros((5, 32, 34, 3)), tmp_path / "a.mp4", fps=10)
    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == 5 and frames[0].shape == (32, 34, 3)
    assert abs(int(frames[2].mean()) - 128) < 4


def test_mp4_without_pyav_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ConfigError, match="pip install av"):
        save_clip(CLIP_FHWC, tmp_path / "a.mp4")
