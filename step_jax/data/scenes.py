"""Rendered moving scenes with exact captions in English and Chinese.

A scene is a pure function of (seed, index): kinds of objects (count, colour, shape, motion) before
a grey background, seen by a camera. Either the objects move or the camera does, so that a caption
has one meaning. Lengths are in units of the picture's shorter side, x to the right, y downwards.

Shape suffixes: B clips, T frames, H height, W width, C channels (red, green, blue), 2 for (x, y).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from step_jax.core import checks
from step_jax.core.errors import ConfigError

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")

#: name -> (Chinese, RGB in [0, 1]); the hues are 60 degrees apart
COLOURS: dict[str, tuple[str, tuple[float, float, float]]] = {
    "red": ("红色", (0.90, 0.15, 0.15)),
    "yellow": ("黄色", (0.90, 0.85, 0.15)),
    "green": ("绿色", (0.15, 0.80, 0.20)),
    "cyan": ("青色", (0.15, 0.80, 0.85)),
    "blue": ("蓝色", (0.20, 0.25, 0.95)),
    "purple": ("紫色", (0.80, 0.20, 0.85)),
}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "cross": "十字"}
#: name -> (English verb phrase after "it", after "they", Chinese, direction)
MOTIONS: dict[str, tuple[str, str, str, tuple[int, int]]] = {
    "still": ("stands still", "stand still", "静止不动", (0, 0)),
    "left": ("moves to the left", "move to the left", "向左移动", (-1, 0)),
    "right": ("moves to the right", "move to the right", "向右移动", (1, 0)),
    "up": ("moves up", "move up", "向上移动", (0, -1)),
    "down": ("moves down", "move down", "向下移动", (0, 1)),
}
#: name -> (English, Chinese, direction of the camera, growth of what it sees)
CAMERAS: dict[str, tuple[str, str, tuple[int, int], int]] = {
    "still": ("", "", (0, 0), 0),
    "pan left": ("the camera pans to the left", "镜头向左平移", (-1, 0), 0),
    "pan right": ("the camera pans to the right", "镜头向右平移", (1, 0), 0),
    "tilt up": ("the camera tilts up", "镜头向上移动", (0, -1), 0),
    "tilt down": ("the camera tilts down", "镜头向下移动", (0, 1), 0),
    "zoom in": ("the camera zooms in", "镜头推近", (0, 0), 1),
    "zoom out": ("the camera zooms out", "镜头拉远", (0, 0), -1),
}
_NUMBERS = {1: ("a", "一个"), 2: ("two", "两个"), 3: ("three", "三个")}
PATH = 0.35  # of an object or the camera, over the whole clip
ZOOM = 1.6  # over the whole clip
_RADII = (0.14, 0.18)
_WAVES = 6  # of the background
_TRIES = 256  # to place a scene's objects, before they are made smaller
_GAP = 1.2  # between centres, in sums of radii
_SPARE = 8  # one combination in so many is kept unseen: those of a diagonal ...
_DIAGONAL = (1, 2, 3)  # ... so that every colour, shape and motion is in some of both sets


@dataclass(frozen=True)
class Kind:
    """Objects that are alike and move together.

    centres: where each stands in the first frame as the camera sees it: (x, y).
    radius: half of an object's height, in the first frame.
    """

    colour: str
    shape: str
    motion: str
    centres: tuple[tuple[float, float], ...]
    radius: float

    @property
    def count(self) -> int:
        return len(self.centres)

    @property
    def unseen(self) -> bool:
        """Whether the combination of colour, shape and motion is kept for ``unseen`` scenes."""
        places = [
            list(table).index(value)
            for table, value in (
                (COLOURS, self.colour),
                (SHAPES, self.shape),
                (MOTIONS, self.motion),
            )
        ]
        return int(np.dot(places, _DIAGONAL)) % _SPARE == 0


@dataclass(frozen=True)
class Scene:
    """What a clip shows.

    grey: the background's mean.
    waves: of its texture, each (amplitude, x and y frequency, phase).
    moving: False for a picture, in whose caption nothing moves.
    """

    kinds: tuple[Kind, ...]
    camera: str
    grey: float
    waves: tuple[tuple[float, float, float, float], ...]
    moving: bool

    def caption(self, language: Language) -> str:
        """Everything that a program can check, and nothing else."""
        return _english(self) if language == "en" else _chinese(self)


def _english(scene: Scene) -> str:
    parts = []
    for kind in scene.kinds:
        plural = "es" if kind.shape == "cross" else "s"
        name = kind.shape if kind.count == 1 else kind.shape + plural
        text = f"{_NUMBERS[kind.count][0]} {kind.colour} {name}"
        parts.append(f"{text} {MOTIONS[kind.motion][kind.count > 1]}" if scene.moving else text)
    text = " and ".join(parts)
    if scene.camera != "still":
        text = f"{text} while {CAMERAS[scene.camera][0]}"
    return f"{text[0].upper()}{text[1:]}."


def _chinese(scene: Scene) -> str:
    parts = []
    for kind in scene.kinds:
        text = f"{_NUMBERS[kind.count][1]}{COLOURS[kind.colour][0]}的{SHAPES[kind.shape]}"
        parts.append(f"{text}{MOTIONS[kind.motion][2]}" if scene.moving else text)
    text = "，".join(parts) if scene.moving else "和".join(parts)
    if scene.camera != "still":
        text = f"{text}，{CAMERAS[scene.camera][1]}"
    return f"{text}。"


@dataclass(frozen=True)
class Scenes:
    """A family of scenes of one size.

    frames: of a clip; 1 for pictures, whose captions name no motion.
    height, width: in pixels.
    kinds: the most kinds of objects of a scene, of unlike colours.
    count: the most objects of a kind.
    camera: whether it moves in half of the clips.
    background: ``textured`` by a few waves, or a ``plain`` grey.
    combinations: of colour, shape and motion: ``all``, or those that the other set never has.
    """

    frames: int = 17
    height: int = 32
    width: int = 32
    kinds: int = 1
    count: int = 3
    camera: bool = True
    background: Literal["textured", "plain"] = "textured"
    combinations: Literal["all", "seen", "unseen"] = "all"

    def validate(self):
        checks.at_least(self, frames=1, height=12, width=12)
        if not 1 <= self.count <= max(_NUMBERS) or not 1 <= self.kinds <= 2:
            raise ConfigError(
                f"scenes have 1 or 2 kinds of objects and 1 to {max(_NUMBERS)} of each, not "
                f"{self.kinds} and {self.count}"
            )
        if self.camera and self.frames > 1 and self.background == "plain":
            raise ConfigError(
                "before a plain background nobody sees the camera move: set camera to false, or "
                "background to textured"
            )

    def draw(self, seed: int, index: int) -> Scene:
        """The scene of a number; a pure function of its arguments."""
        rng = np.random.default_rng((seed, index))
        moving = self.frames > 1
        camera = "still"
        if moving and self.camera and rng.random() < 0.5:
            camera = _one_of(rng, [name for name in CAMERAS if name != "still"])
        objects_move = moving and camera == "still"
        drawn = [self._look(rng, objects_move)]
        if rng.integers(self.kinds):
            second = drawn[0]
            while second[0] == drawn[0][0]:
                second = self._look(rng, objects_move)
            drawn.append(second)
        counts = rng.integers(1, self.count + 1, len(drawn))
        kinds = self._placed(rng, drawn, counts, camera)
        waves: tuple[Any, ...] = ()
        if self.background == "textured":
            angles, sizes = rng.uniform(0, 2 * np.pi, (2, _WAVES)), rng.uniform(4, 12, _WAVES)
            columns = (0.08 * np.ones(_WAVES), np.cos(angles[0]) * sizes, np.sin(angles[0]) * sizes)
            waves = tuple(map(tuple, np.stack([*columns, angles[1]], 1).tolist()))
        return Scene(kinds, camera, float(rng.uniform(0.25, 0.5)), waves, moving)

    def render(self, scene: Scene) -> np.ndarray:
        """The clip: float32 (T, H, W, 3) in [-1, 1]."""
        time_T = np.arange(self.frames) / max(self.frames - 1, 1)
        _, _, direction_2, growth = CAMERAS[scene.camera]
        scale_T = ZOOM ** (growth * time_T)
        centre_2 = np.array(self._extent) / 2
        screen_HW2 = pixel_centres(self.height, self.width)
        # the point of the world behind each pixel, as of the first frame's coordinates
        shift_T2 = np.multiply.outer(time_T, direction_2) * PATH
        world_THW2 = (screen_HW2 - centre_2) / scale_T[:, None, None, None] + centre_2
        world_THW2 = (world_THW2 + shift_T2[:, None, None]).astype(np.float32)
        grey_THW = np.full(world_THW2.shape[:3], scene.grey, np.float32)
        for amplitude, fx, fy, phase in scene.waves:
            grey_THW += amplitude * np.sin(
                np.float32(fx) * world_THW2[..., 0] + np.float32(fy) * world_THW2[..., 1] + phase
            )
        video_THWC = np.repeat(grey_THW[..., None], 3, -1)
        pixels_T = np.float32(min(self.height, self.width)) * scale_T.astype(np.float32)
        for kind in scene.kinds:
            path_T2 = np.multiply.outer(time_T, MOTIONS[kind.motion][3]) * PATH
            colour_C = np.array(COLOURS[kind.colour][1], np.float32)
            for start in kind.centres:
                at_THW2 = world_THW2 - (path_T2 + start).astype(np.float32)[:, None, None]
                distance_THW = distance_to(kind.shape, at_THW2, kind.radius)
                cover_THW1 = np.clip(0.5 - distance_THW * pixels_T[:, None, None], 0, 1)[..., None]
                video_THWC += cover_THW1 * (colour_C - video_THWC)
        return np.clip(video_THWC * 2 - 1, -1, 1).astype(np.float32)

    @functools.cached_property
    def _extent(self) -> tuple[float, float]:
        """(width, height) of the picture."""
        short = min(self.height, self.width)
        return self.width / short, self.height / short

    def _look(self, rng, moves: bool) -> tuple[str, str, str]:
        """(colour, shape, motion) of a kind."""
        while True:
            motion = _one_of(rng, MOTIONS) if moves else "still"
            look = (_one_of(rng, COLOURS), _one_of(rng, SHAPES), motion)
            unseen = Kind(*look, centres=(), radius=0.1).unseen
            if self.combinations == "all" or unseen == (self.combinations == "unseen"):
                return look

    def _placed(self, rng, drawn, counts, camera: str) -> tuple[Kind, ...]:
        """Positions in which nothing touches anything, nor the border, from first to last frame."""
        _, _, pan_2, growth = CAMERAS[camera]
        zoom, extent_2 = ZOOM**growth, np.array(self._extent)
        way_M2 = np.repeat([MOTIONS[motion][3] for _, _, motion in drawn], counts, 0) - np.array(
            pan_2
        )
        radius_K = rng.uniform(*_RADII, len(drawn))
        while True:
            radius_M = np.repeat(radius_K, counts)
            # what comes nearer begins near the middle
            first_NM2 = (
                rng.uniform(-0.5, 0.5, (_TRIES, len(radius_M), 2)) / max(zoom, 1)
            ) * extent_2
            last_NM2 = first_NM2 * zoom + extent_2 / 2 + PATH * way_M2
            first_NM2 += extent_2 / 2
            good = np.flatnonzero(_apart(first_NM2, last_NM2, radius_M, zoom * radius_M, extent_2))
            if len(good):
                break
            radius_K = 0.95 * radius_K  # a crowd of large objects may not fit
        centres = np.split(first_NM2[good[0]], np.cumsum(counts)[:-1])
        return tuple(
            Kind(
                colour,
                shape,
                motion,
                centres=tuple((float(x), float(y)) for x, y in at),
                radius=float(radius),
            )
            for (colour, shape, motion), at, radius in zip(drawn, centres, radius_K, strict=True)
        )


def _one_of(rng, names: Iterable[str]) -> str:
    names = list(names)
    return names[rng.integers(len(names))]


def pixel_centres(height: int, width: int) -> np.ndarray:
    """The centres of the pixels: (H, W, 2)."""
    short = min(height, width)
    y_H, x_W = (np.arange(n) + 0.5 for n in (height, width))
    return np.stack(np.meshgrid(x_W / short, y_H / short), -1)


def _apart(first_NM2, last_NM2, first_M, last_M, extent_2) -> np.ndarray:
    """Which of N placings keep all M circles inside, and apart from each other, all the way."""
    good_N = np.ones(len(first_NM2), bool)
    other_MM = ~np.eye(len(first_M), dtype=bool)
    for time in np.linspace(0, 1, 7):
        at_NM2 = (1 - time) * first_NM2 + time * last_NM2
        radius_M = (1 - time) * first_M + time * last_M
        edge_M1 = radius_M[:, None]
        good_N &= ((at_NM2 >= edge_M1) & (at_NM2 <= extent_2 - edge_M1)).all((1, 2))
        gap_NMM = np.linalg.norm(at_NM2[:, :, None] - at_NM2[:, None], axis=-1)
        good_N &= (gap_NMM >= _GAP * (edge_M1 + radius_M))[:, other_MM].all(1)
    return good_N


def distance_to(shape: str, at_N2: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline of a shape about the origin, negative inside; (...) of (..., 2).

    Exact for a circle; for the others inside and near their edges, which is what pixels need.
    """
    x, y = at_N2[..., 0], at_N2[..., 1]
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
    if shape == "triangle":  # the tip is above
        slope = np.hypot(1.0, 0.5)
        return np.maximum((np.abs(x) - (y + radius) * 0.5) / slope, y - radius)
    if shape == "cross":
        arm = 0.3 * radius
        a = np.maximum(np.abs(x) - radius, np.abs(y) - arm)
        return np.minimum(a, np.maximum(np.abs(y) - radius, np.abs(x) - arm))
    raise ValueError(f"no shape {shape!r}")
