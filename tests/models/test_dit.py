"""The diffusion transformer: against a float64 oracle, alone and in packs; its arithmetic.

Shape suffixes: B rows, T tokens, P numbers in a patch, A axes of a place, G samples of a row, S
tokens of a text, E width of an encoder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from step_jax.core.config import load_file, parse_config
from step_jax.core.errors import ConfigError
from step_jax.core.spec import count
from step_jax.models.context import Execution
from step_jax.models.layers.attention import MHA
from step_jax.models.layers.mlp import GELU
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Rope
from step_jax.models.video.dit import Rows, VideoDiT
from step_jax.models.video.flops import forward_flops, tokens_of, train_flops
from step_jax.models.video.patches import clip_of, patches_of, places_of
from step_jax.models.video.text_inputs import States, Tower
from step_jax.trainers.diffusion import flow_matching
from tests.models import dit_oracle, small

RECIPE = Path(__file__).parents[2] / "configs" / "video" / "step_video_30b.yaml"
ATTENTION = MHA(2, 16, qk_norm=RMSNorm(1e-6), position=Rope(axes=(8, 4, 4)))
TEXT = (States("clip", 6, 3, padding=True), States("llm", 8, 4, "mlp"))
MODEL = VideoDiT(
    16, 2, ATTENTION, GELU(32), channels=3, patch=(1, 2, 1), text=TEXT,
    scalars=("fps", "motion"), first_frame=True,
)  # fmt: skip
EXECUTION = Execution(dtype="float32")
SIZES = [(2, 2, 3), (1, 4, 1), (3, 2, 1)]  # 6, 2 and 3 tokens


@pytest.fixture(scope="module")
def params():
    return small.params(MODEL)


@pytest.fixture(scope="module")
def apply():
    def f(p, x, t, rows):
        return MODEL.apply(p, x, t, rows, EXECUTION)

    return lambda *args: small.run(f, *args)


def samples():
    """Of each size: patches, time, places, states of two texts, length of the second, conditions,
    patches of a first frame."""
    rng = np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        clip, first = rng.standard_normal((2, 1, *size, 3)).astype(np.float32)
        texts = [rng.standard_normal((t.tokens, t.width)).astype(np.float32) for t in TEXT]
        yield {
            "patches": patches_of(clip, MODEL.patch)[0],
            "time": np.float32(0.2 + 0.3 * i),
            "places": places_of(size, MODEL.patch),
            "texts": texts,
            "length": 2 + i % 3,
            "scalars": np.array([8.0 + i, 5.0 * i], np.float32),
            "first": patches_of(first, MODEL.patch)[0],
        }


def pack(chosen, tokens: int, segments: bool) -> tuple:
    """One row of these samples one after the other, with padding behind."""
    P, G = chosen[0]["patches"].shape[1], len(chosen)
    x, first, place = np.zeros((1, tokens, P)), np.zeros((1, tokens, P)), np.zeros((1, tokens, 3))
    segment_BT, at = np.zeros((1, tokens), np.int32), 0
    for g, s in enumerate(chosen):
        here = slice(at, at + len(s["patches"]))
        x[0, here], first[0, here], place[0, here] = s["patches"], s["first"], s["places"]
        segment_BT[0, here], at = g + 1, here.stop
    rows = Rows(
        place.astype(np.int32),
        segment_BT if segments else None,
        tuple(np.stack([s["texts"][i] for s in chosen])[None] for i in range(len(TEXT))),
        (np.ones((1, G), np.int32), np.array([[s["length"] for s in chosen]], np.int32)),
        np.stack([s["scalars"] for s in chosen])[None],
        first.astype(np.float32),
    )
    return x.astype(np.float32), np.array([[s["time"] for s in chosen]], np.float32), rows


@pytest.fixture(scope="module")
def packed(apply, params):
    return apply(params, *pack(list(samples()), 14, segments=True))[0]


def oracle(params, sample):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    layers = [jax.tree.map(lambda a, i=i: a[i], p.blocks) for i in range(MODEL.depth)]
    clip, llm = sample["texts"]
    return dit_oracle.model(
        p, layers, sample["patches"], sample["time"], sample["places"], (8, 4, 4),
        (clip, llm[: sample["length"]]), sample["scalars"], sample["first"],
    )  # fmt: skip


def test_a_sample_alone_is_what_the_equations_say(apply, params):
    sample = next(samples())
    got = apply(params, *pack([sample], 6, segments=False))[0]
    expected = oracle(params, sample)
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


def test_every_sample_of_a_pack_is_what_the_equations_say_of_it_alone(packed, params):
    """Other samples, their times, texts and conditions, and padding change nothing."""
    start = 0
    for sample in samples():
        expected = oracle(params, sample)
        stop = start + len(expected)
        assert np.abs(packed[start:stop] - expected).max() < 1e-5 * np.abs(expected).max()
        start = stop


def test_patches_are_put_back_where_they_came_from():
    x = np.arange(2 * 4 * 6 * 2 * 3, dtype=np.float32).reshape(2, 4, 6, 2, 3)
    patches = patches_of(x, (2, 3, 1))
    assert patches.shape == (2, 8, 18)
    np.testing.assert_array_equal(clip_of(patches, (4, 6, 2), (2, 3, 1)), x)
    np.testing.assert_array_equal(patches[1, 3, :6], x[1, 0, 3:5, 1].ravel())  # row 1, column 1
    np.testing.assert_array_equal(places_of((4, 6, 2), (2, 3, 1))[3], [0, 1, 1])
    with pytest.raises(ConfigError, match="4 x 6 x 2 .* do not divide into patches of 1 x 4 x 1"):
        patches_of(x, (1, 4, 1))


def test_a_tower_sees_both_ways_and_no_padding():
    tower = Tower("clip", 5, 20, 8, 1, MHA(2, 4), GELU(16))
    p = small.params(VideoDiT(8, 1, MHA(1, 8), GELU(8), 1, text=(tower,))).text[0]

    def states(tokens, lengths):
        from step_jax.models.context import Context
        from step_jax.models.tokens import Tokens

        ctx = Context(Tokens.in_order(2, 5), execution=EXECUTION)
        return small.run(lambda p, t, n: tower.states(p, t, n, ctx), p, tokens, lengths)

    tokens = np.array([[3, 4, 5, 6, 7], [3, 4, 9, 6, 7]])
    both = states(tokens, np.array([5, 5]))
    assert np.abs(both[0, 0] - both[1, 0]).max() > 1e-3  # a later token changes the first state
    alike = states(tokens, np.array([2, 2]))
    np.testing.assert_array_equal(alike[0, :2], alike[1, :2])  # not if it is padding


# --- Step-Video-T2V ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step_video():
    return load_file(flow_matching.Config, RECIPE).model


def test_the_recipe_has_the_parameters_of_step_video(step_video):
    """Term by term of the released model's layers; nothing of it is taken from our table."""
    D, clip, latent, waves = 6144, 1024, 64, 256
    linear = lambda rows, columns: rows * columns + columns  # noqa: E731
    attention = 4 * D * D + 2 * 128  # no biases; norms of queries and keys
    layer = 2 * attention + 2 * (4 * D * D) + 2 * (2 * D) + 6 * D
    time = linear(waves, D) + linear(D, D) + linear(D, 6 * D)
    text = linear(clip, D) + linear(D, D) + linear(D, D)
    ends = linear(latent, D) + linear(D, latent) + 2 * D
    assert count(step_video.specs()) == 48 * layer + time + text + ends == 29_342_478_400


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ((36, 16, 16), 1717),  # 204 frames of 256 x 256 pixels
        ((36, 12, 20), 1593),  # 204 of 192 x 320
        ((24, 16, 16), 1080),  # 136 of 256 x 256
        ((12, 16, 16), 509),  # 68
        ((1, 16, 16), 45),  # a picture
    ],
)
def test_operations_are_those_of_the_reports_table(step_video, size, published):
    """TFLOP of a training sample (arXiv 2502.10248, the table of the load balance).

    How many tokens its texts had is not published: 256 in all fit every row to 0.2 %.
    """
    clip, llm = step_video.text
    c = replace(step_video, text=(clip, replace(llm, tokens=256 - clip.tokens)))
    assert train_flops(c, tokens_of(c, size)) / 1e12 == pytest.approx(published, rel=0.002)


def test_the_largest_clip_is_75_888_tokens(step_video):
    """204 frames of 544 x 992 pixels: 36 x 34 x 62 latents."""
    tokens = tokens_of(step_video, (36, 34, 62))
    assert tokens == 75_888
    assert forward_flops(step_video, tokens) / 1e15 == pytest.approx(10.68, rel=0.002)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("deviation: 0", "deviation is 0"),
        ("patch: [1, 0, 1]", "each side must be at least 1"),
        ("scalars: [fps, fps]", "scalars has a name twice: fps, fps"),
        ("attention: {kind: mha, heads: 1, head_dim: 8, window: 4}", "has no window"),
        ("attention: {kind: mha, heads: 1, head_dim: 8}", "rotates by .time, row, column"),
        ("text: [{kind: states, name: a, width: 0, tokens: 1}]", "width is 0"),
    ],
)
def test_models_that_cannot_be_are_refused(change, message):
    fields = {
        "attention": "attention: {kind: mha, heads: 1, head_dim: 8, position: null}",
        "rest": "width: 8\ndepth: 1\nchannels: 1\nmlp: {kind: gelu, hidden: 8}",
    }
    fields[change.partition(":")[0]] = change
    with pytest.raises(ConfigError, match=message):
        parse_config(VideoDiT, "\n".join(fields.values()))
