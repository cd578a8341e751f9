"""Rendered scenes: pure functions of their number, captions that say what is drawn."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from step_jax.core.errors import ConfigError
from step_jax.data.scenes import COLOURS, MOTIONS, SHAPES, Kind, Scene, Scenes

SCENES = Scenes(frames=5, height=16, width=24, kinds=2)


def scene(*kinds: Kind, camera: str = "still", moving: bool = True) -> Scene:
    return Scene(kinds, camera, 0.4, (), moving)


ONE = Kind("red", "circle", "left", ((0.5, 0.5),), 0.2)
TWO = Kind("blue", "cross", "still", ((0.3, 0.3), (0.7, 0.7)), 0.1)


def test_a_scene_is_a_pure_function_of_seed_and_index():
    a, b = (SCENES.draw(3, 7) for _ in range(2))
    assert a == b != SCENES.draw(3, 8) != SCENES.draw(4, 8)
    np.testing.assert_array_equal(SCENES.render(a), SCENES.render(b))
    clip = SCENES.render(a)
    assert clip.shape == (5, 16, 24, 3) and clip.dtype == np.float32
    assert -1 <= clip.min() < clip.max() <= 1


@pytest.mark.parametrize(
    ("shown", "english", "chinese"),
    [
        (scene(ONE), "A red circle moves to the left.", "一个红色的圆形向左移动。"),
        (scene(ONE, moving=False), "A red circle.", "一个红色的圆形。"),
        (
            scene(ONE, TWO),
            "A red circle moves to the left and two blue crosses stand still.",
            "一个红色的圆形向左移动，两个蓝色的十字静止不动。",
        ),
        (
            scene(TWO, camera="zoom in"),
            "Two blue crosses stand still while the camera zooms in.",
            "两个蓝色的十字静止不动，镜头推近。",
        ),
    ],
)
def test_captions_say_the_same_in_both_languages(shown, english, chinese):
    assert shown.caption("en") == english
    assert shown.caption("zh") == chinese


def test_captions_of_unlike_scenes_are_unlike():
    looks = list(itertools.product(COLOURS, SHAPES, MOTIONS))
    for language in ("en", "zh"):
        texts = {scene(Kind(*look, ((0.5, 0.5),), 0.2)).caption(language) for look in looks}
        assert len(texts) == len(looks)


def test_unseen_combinations_are_in_no_seen_scene_and_leave_no_word_out():
    looks = set(itertools.product(COLOURS, SHAPES, MOTIONS))
    held = {look for look in looks if Kind(*look, centres=(), radius=0.1).unseen}
    assert len(held) == 15
    for words in (held, looks - held):
        assert [len(set(column)) for column in zip(*words, strict=True)] == [6, 4, 5]
    for which, wanted in (("seen", looks - held), ("unseen", held)):
        scenes = Scenes(camera=False, combinations=which)
        kinds = [kind for i in range(60) for kind in scenes.draw(0, i).kinds]
        assert {(kind.colour, kind.shape, kind.motion) for kind in kinds} <= wanted


def test_objects_are_drawn_where_the_scene_says_and_move_as_it_says():
    one = replace(ONE, radius=0.15)
    clip = Scenes(frames=3, height=32, width=32).render(scene(one))
    red = (clip[..., 0] - clip[..., 1]) > 0.5
    column = [np.flatnonzero(frame.any(0)).mean() for frame in red]
    np.testing.assert_allclose(column, [15.5, 15.5 - 0.175 * 32, 15.5 - 0.35 * 32], atol=0.6)
    covered = (clip[..., 0] - clip[..., 1]) / (2 * (0.90 - 0.15))
    np.testing.assert_allclose(covered.sum((1, 2)), np.pi * (0.15 * 32) ** 2, rtol=0.02)


def test_nothing_leaves_the_picture_or_touches_anything_else():
    """Every object's pixels, and a free border of one colour's pixels, are there in every frame."""
    from scipy import ndimage

    crowd = Scenes(frames=5, height=48, width=48, kinds=2, count=3)
    for i in range(8):
        drawn = crowd.draw(1, i)
        covered = np.ptp(crowd.render(drawn), axis=-1) > 0.6
        objects = sum(kind.count for kind in drawn.kinds)
        assert [ndimage.label(frame)[1] for frame in covered] == [objects] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 4}, "1 to 3 of each"),
        ({"kinds": 3}, "1 or 2 kinds"),
        ({"background": "plain"}, "nobody sees the camera move"),
        ({"height": 8}, "height is 8; it must be at least 12"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Scenes(**options).validate()
