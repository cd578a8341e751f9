"""The video autoencoder: the released one's outputs, equations in NumPy, pieces of clips, sizes.

Shape suffixes: B clips, T frames, H height, W width, C channels.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.models.layers.convolution import (
    Carry,
    CausalConv,
    NormParams,
    depth_to_space,
    mean_of_channels,
    repeated_channels,
    space_to_depth,
    spatial_group_norm,
)
from step_jax.models.video.vae import VideoVAE
from step_jax.models.video.vae_layers import DownHead, UpHead
from step_jax.models.video.vae_stream import Pieces, VideoCoder, tile_spans
from tests.golden.make_step_video_golden import weight
from tests.models.small import FAST_COMPILE

GOLDEN = Path(__file__).parents[1] / "golden" / "step_video_vae.npz"
RELEASED = VideoVAE(
    latents=4,
    stem=32,
    encoder_widths=(32, 64, 64),
    decoder_widths=(32, 64, 64),
    encoder_blocks=1,
    decoder_blocks=2,
    temporal=(False, True),
    chunk=9,
)
SMALL = VideoVAE(
    latents=2,
    stem=4,
    encoder_widths=(8,),
    decoder_widths=(8,),
    encoder_blocks=1,
    decoder_blocks=1,
    temporal=(),
    head_width=16,
    groups=4,
    chunk=5,
)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
jit = functools.partial(jax.jit, compiler_options=FAST_COMPILE)


@pytest.fixture(scope="module", autouse=True)
def quick():
    yield


def parameters(model: VideoVAE):
    """Alive in every leaf, of the names alone."""
    specs = model.specs()
    return spec_lib.map_specs(
        lambda s, name: jnp.asarray(weight(name, s.shape)), specs, spec_lib.map_names(str, specs)
    )


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def released():
    return parameters(RELEASED)


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(0)
    clip_THWC = rng.uniform(-1, 1, (10, 8, 8, 3)).astype(np.float32)
    params = parameters(SMALL)
    mean, logvar = jit(SMALL.encode)(params, clip_THWC[None])
    return params, clip_THWC, np.asarray(mean[0]), np.asarray(logvar[0])


# --- against the released model --------------------------------------------------------------


def test_the_released_encoder(golden, released):
    wanted = golden["encoded_BTHWC"]
    mean, logvar = jit(RELEASED.encode)(released, golden["clip_BTHWC"])
    np.testing.assert_allclose(mean, wanted[..., :4], **CLOSE)
    np.testing.assert_allclose(logvar, wanted[..., 4:], **CLOSE)


def test_the_released_decoder(golden, released):
    found = jit(RELEASED.decode)(released, golden["latent_BTHWC"])
    np.testing.assert_allclose(found, golden["decoded_BTHWC"], **CLOSE)


def test_seams_are_blended_one_after_the_other_as_released(golden):
    model = VideoVAE()
    np.testing.assert_allclose(
        model.blended(golden["seams_BTHWC"]), golden["mixed_BTHWC"], rtol=1e-6, atol=1e-6
    )
    line = np.zeros((1, 34, 1, 1, 1), np.float32)
    line[:, 17:] = 1.0
    mixed = np.asarray(model.blended(line)).ravel()
    np.testing.assert_allclose(mixed[15:19], [0, 0.4 * 0.6, 0.6, 1], atol=1e-6)


# --- against the equations, in float64 --------------------------------------------------------


def causal_conv(x, w, b, stride, before, after):
    """y[t, i, j] = b + sum w[a, c, d] x[s t + a - (k - 1), ...], zeros outside; loops over taps."""
    T, H, W, _ = x.shape
    k = w.shape[:3]
    padded = np.pad(x, ((k[0] - 1, 0), (before[0], after[0]), (before[1], after[1]), (0, 0)))
    sizes = [(n - m) // s + 1 for n, m, s in zip(padded.shape[:3], k, stride, strict=True)]
    y = np.zeros((*sizes, w.shape[-1])) + b
    for a, c, d in np.ndindex(*k):
        spans = [slice(o, o + s * n, s) for o, s, n in zip((a, c, d), stride, sizes, strict=True)]
        y += padded[tuple(s if len(range(*s.indices(10**6))) else s for s in spans)] @ w[a, c, d]
    return y


@pytest.mark.parametrize(
    ("conv", "before", "after"),
    [
        (CausalConv(3, 4), (1, 1), (1, 1)),
        (CausalConv(3, 4, stride=(2, 2, 2)), (1, 1), (1, 1)),
        (CausalConv(3, 4, (1, 3, 3), (1, 2, 2), one_sided=True), (0, 0), (1, 1)),
        (CausalConv(3, 4, (1, 1, 1)), (0, 0), (0, 0)),
    ],
    ids=["plain", "strided", "one_sided", "pointwise"],
)
def test_a_causal_convolution_is_its_sum(conv, before, after):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 6, 4, 3))
    p = spec_lib.map_specs(lambda s: rng.standard_normal(s.shape), conv.specs())
    wanted = causal_conv(x, p.weight_KKKIO, p.bias_O, conv.stride, before, after)
    p = jax.tree.map(jnp.float32, p)
    found = conv.apply(p, jnp.float32(x[None]), Carry())[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_convolution_in_pieces_is_the_whole():
    """Frames are carried, so a piece computes the same sums."""
    rng = np.random.default_rng(1)
    x = jnp.float32(rng.standard_normal((1, 9, 4, 4, 3)))
    for stride in ((1, 1, 1), (2, 2, 2)):
        conv = CausalConv(3, 4, stride=stride)
        p = spec_lib.map_specs(lambda s: jnp.float32(rng.standard_normal(s.shape)), conv.specs())
        whole, kept, parts = conv.apply(p, x, Carry()), None, []
        for piece in (x[:, :1], x[:, 1:5], x[:, 5:]):
            carry = Carry(kept)
            parts.append(conv.apply(p, piece, carry))
            kept = carry.kept
        np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-6, atol=1e-6)


def test_the_norm_is_of_single_frames():
    rng = np.random.default_rng(2)
    x, scale, bias = rng.standard_normal((2, 3, 4, 5, 6)), *rng.standard_normal((2, 6))
    grouped = x.reshape(2, 3, 4, 5, 2, 3)
    mean = grouped.mean((2, 3, 5), keepdims=True)
    wanted = ((grouped - mean) / np.sqrt(grouped.var((2, 3, 5), keepdims=True) + 1e-5)).reshape(
        x.shape
    ) * scale + bias
    p = NormParams(jnp.float32(scale), jnp.float32(bias))
    np.testing.assert_allclose(spatial_group_norm(p, jnp.float32(x), 2), wanted, **CLOSE)


def test_the_dual_path_is_convolution_plus_mean_and_repetition():
    """Each number of both shortcuts by its indices; with all weights zero they are what is left."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1, 3, 4, 4, 4))
    down, up = DownHead("dual_path", 4, 16, 8), UpHead("dual_path", 4, 16, 4)
    zero_down, zero_up = (
        spec_lib.map_specs(lambda s: jnp.zeros(s.shape), head.specs()) for head in (down, up)
    )
    padded = np.concatenate([np.zeros((1, 1, 4, 4, 4)), x], 1)
    deep = np.zeros((1, 2, 2, 2, 32))
    for t, i, j, c, a, b, d in np.ndindex(2, 2, 2, 4, 2, 2, 2):
        deep[0, t, i, j, c * 8 + a * 4 + b * 2 + d] = padded[0, 2 * t + a, 2 * i + b, 2 * j + d, c]
    wide = deep.reshape(1, 2, 2, 2, 16, 2).mean(-1)
    wanted = wide.reshape(1, 2, 2, 2, 8, 2).mean(-1)
    np.testing.assert_allclose(down.apply(zero_down, jnp.float32(x), Carry()), wanted, **CLOSE)
    z = wanted[..., :4]
    shown = np.zeros((1, 4, 4, 4, 4))
    for t, i, j, c, a, b, d in np.ndindex(2, 2, 2, 4, 2, 2, 2):
        number = (c * 8 + a * 4 + b * 2 + d) // 2 // 4  # of 32 from 16 from 4
        shown[0, 2 * t + a, 2 * i + b, 2 * j + d, c] = z[0, t, i, j, number]
    np.testing.assert_allclose(up.apply(zero_up, jnp.float32(z), Carry()), shown[:, 1:], **CLOSE)


def test_space_to_depth_can_be_undone_and_channels_average_to_what_was_repeated():
    x = jnp.float32(np.random.default_rng(4).standard_normal((1, 3, 2, 2, 3)))
    np.testing.assert_array_equal(depth_to_space(space_to_depth(x, 2, Carry()), 2, Carry()), x)
    np.testing.assert_allclose(mean_of_channels(repeated_channels(x, 12), 3), x, rtol=1e-6)


# --- clips of any length ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "latents"), [(1, 1), (2, 2), (9, 2), (10, 3), (17, 3), (18, 4), (34, 6), (204, 36)]
)
def test_seventeen_frames_become_three(frames, latents):
    model = VideoVAE()
    model.validate()
    assert model.reduction == (8, 16, 16)
    assert model.latent_frames(frames) == latents
    assert model.frames(latents) >= frames
    assert model.latent_frames(model.frames(latents)) == latents


@pytest.mark.thorough
def test_chunks_are_independent_and_what_is_beyond_the_end_is_the_last_frame(small):
    params, clip_THWC, mean, _ = small

    def parts(p, x):
        ends = (slice(5, 10), slice(0, 5), slice(0, 1), slice(0, 2))
        longer = jnp.concatenate([x[:, :2], x[:, 1:2]], 1)
        return [SMALL.encode(p, part)[0][0] for part in (*(x[:, e] for e in ends), longer)]

    second, first, picture, short, filled = jit(parts)(params, clip_THWC[None])
    np.testing.assert_allclose(mean[3:6], second, **CLOSE)
    np.testing.assert_allclose(mean[:3], first, **CLOSE)
    np.testing.assert_allclose(mean[:1], picture, **CLOSE)  # a clip of one frame
    np.testing.assert_allclose(short, filled, **CLOSE)


@pytest.mark.thorough
@pytest.mark.parametrize("pieces", [Pieces(), Pieces(latent_frames=1)], ids=["chunks", "frames"])
def test_a_stream_is_the_whole_clip(small, pieces):
    params, clip_THWC, mean, logvar = small
    coder = VideoCoder(SMALL, params, pieces)
    parts = list(coder.encode(np.split(clip_THWC, [1, 4, 9])))
    found = [np.concatenate(part) for part in zip(*parts, strict=True)]
    np.testing.assert_allclose(found[0], mean, **CLOSE)
    np.testing.assert_allclose(found[1], logvar, **CLOSE)
    whole = jit(lambda p, z: SMALL.decode(p, z, 9))(params, mean[None])[0]
    shown = np.concatenate(list(coder.decode(np.split(mean, [2, 3]), frames=9)))
    np.testing.assert_allclose(shown, whole, **CLOSE)


def test_tiles_cover_a_side_and_overlap():
    assert tile_spans(64, 0, 0) == tile_spans(64, 64, 16) == [(0, 64)]
    assert tile_spans(96, 48, 16) == [(0, 48), (32, 80), (48, 96)]


def test_tiles_are_blended_without_a_trace(small):
    """What every tile agrees on comes out unchanged; sizes are the untiled ones."""
    params, clip_THWC, *_ = small
    coder = VideoCoder(SMALL, params, Pieces(tile=16, overlap=8))
    x = np.random.default_rng(0).standard_normal((3, 40, 24, 2)).astype(np.float32)
    pieces = Pieces(tile=16, overlap=8)
    (same,) = coder._tiled(lambda tile: [tile], x, pieces, 1)
    np.testing.assert_allclose(same, x, rtol=1e-6, atol=1e-6)
    (smaller,) = coder._tiled(lambda tile: [tile[:, ::2, ::2]], x, pieces, 2)
    np.testing.assert_allclose(smaller, x[:, ::2, ::2], rtol=1e-6, atol=1e-6)
    wide = np.tile(clip_THWC[:5], (1, 3, 2, 1))
    ((mean, logvar),) = coder.encode([wide])
    assert mean.shape == logvar.shape == (3, 12, 8, 2)


# --- what does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 16}, "1 more than a multiple of 8"),
        ({"temporal": (True,)}, "must have 2 levels"),
        ({"groups": 48}, "no multiples of the 48 groups"),
        ({"head_width": 100}, "head_width 100 must be a multiple of 8"),
    ],
)
def test_a_model_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        VideoVAE(**options).validate()


@pytest.mark.parametrize("size", [(1, 20, 32), (1, 32, 8), (0, 32, 32)])
def test_a_clip_of_odd_size_is_refused_with_what_would_do(size):
    with pytest.raises(ConfigError, match="multiples of 16"):
        VideoVAE().check_size(*size)
