"""Detectors of rendered scenes: their ceiling, and that they can say no."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from step_jax.data.scenes import CAMERAS, Kind, Scene, Scenes
from step_jax.evaluation.video_scenes import agreement, flicker, judge_scenes, see

SIZES = {
    "square": (Scenes(17, 32, 32), 24),
    "few frames": (Scenes(5, 32, 24), 16),
    "small and plain": (Scenes(16, 16, 16, count=1, camera=False, background="plain"), 24),
    "two kinds": (Scenes(9, 64, 48, kinds=2), 8),
    "pictures": (Scenes(1, 32, 32, kinds=2), 16),
}


def rendered(scenes: Scenes, count: int, seed: int = 5):
    drawn = [scenes.draw(seed, i) for i in range(count)]
    return drawn, [scenes.render(scene) for scene in drawn]


@pytest.mark.parametrize(("scenes", "count"), SIZES.values(), ids=SIZES)
def test_on_rendered_clips_everything_is_seen(scenes, count):
    result = judge_scenes(*rendered(scenes, count))
    assert {k: v for k, v in result.items() if k != "flicker"} == dict.fromkeys(
        ["colour", "shape", "count", *(["motion", "camera"] if scenes.frames > 1 else []), "all"],
        1.0,
    )


def test_noise_of_a_fortieth_of_the_range_changes_nothing():
    drawn, clips = rendered(Scenes(9, 32, 32), 16)
    noise = np.random.default_rng(0)
    clips = [np.clip(clip + noise.normal(0, 0.05, clip.shape), -1, 1) for clip in clips]
    assert judge_scenes(drawn, clips)["all"] == 1.0


@pytest.mark.parametrize("camera", CAMERAS)
def test_every_camera_move_is_seen_and_objects_are_known_to_stand_still(camera):
    scenes = Scenes(9, 32, 32)
    waves = ((0.15, 8.0, 3.0, 1.0), (0.15, -3.0, 7.0, 0.0))
    scene = Scene((Kind("cyan", "square", "still", ((0.5, 0.5),), 0.14),), camera, 0.4, waves, True)
    seen = see(scenes.render(scene))
    assert seen.camera == camera
    assert [kind.motion for kind in seen.kinds] == ["still"]


@pytest.mark.parametrize(
    ("wrong", "lost"),
    [
        ({"colour": "green"}, {"colour"}),
        ({"shape": "cross"}, {"shape"}),
        ({"motion": "up"}, {"motion"}),
        ({"centres": ((0.3, 0.5), (0.7, 0.5))}, {"count"}),
    ],
)
def test_what_is_wrong_in_a_clip_is_the_only_thing_that_is_marked(wrong, lost):
    scenes = Scenes(9, 32, 32)
    asked = Scene((Kind("red", "circle", "down", ((0.5, 0.4),), 0.16),), "still", 0.4, (), True)
    shown = replace(asked, kinds=(replace(asked.kinds[0], **wrong),))
    result = agreement(asked, see(scenes.render(shown)))
    assert {name for name, value in result.items() if value == 0.0} == lost | {"all"}


def test_an_object_too_many_spoils_only_the_whole():
    scenes = Scenes(5, 32, 32)
    kind = Kind("red", "circle", "still", ((0.25, 0.5),), 0.16)
    more = Kind("blue", "circle", "still", ((0.75, 0.5),), 0.16)
    asked, shown = (Scene(kinds, "still", 0.4, (), True) for kinds in ((kind,), (kind, more)))
    result = agreement(asked, see(scenes.render(shown)))
    assert result.pop("all") == 0.0 and set(result.values()) == {1.0}


def test_nothing_is_seen_in_an_empty_clip_nor_in_noise():
    asked = Scenes(5, 32, 32).draw(0, 0)
    noise = np.random.default_rng(0).uniform(-1, 1, (5, 32, 32, 3))
    for clip in (np.zeros((5, 32, 32, 3)), noise):
        assert agreement(asked, see(clip))["all"] == 0.0
    assert see(np.zeros((5, 32, 32, 3))).kinds == ()


def test_flicker_is_of_second_differences():
    ramp = np.linspace(-1, 1, 5)[:, None, None, None] * np.ones((5, 4, 4, 3))
    assert flicker(ramp) == pytest.approx(0, abs=1e-6)
    beat = np.array([1.0, -1, 1, -1])[:, None, None, None] * np.ones((4, 4, 4, 3))
    assert flicker(beat) == 4.0
    assert flicker(ramp[:2]) == 0.0
