"""What a program sees in a clip of ``data.scenes``: objects, colours, counts, motions, the camera.

Written for rendered scenes and no others: objects are coloured, the background is grey, everything
moves at a constant rate. What the detectors reach on rendered clips is their ceiling; a model's
figures mean something beside it.

Shape suffixes: B clips, T frames, H height, W width, C channels, K colours, 2 for (x, y).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from step_jax.data.scenes import (
    CAMERAS,
    COLOURS,
    MOTIONS,
    PATH,
    SHAPES,
    ZOOM,
    Scene,
    distance_to,
    pixel_centres,
)

_COVERED = 0.4  # of a pixel, to be of an object
_MOVED = 0.4  # of the way of a moving object or camera, to be no longer still
_SMALLEST = 0.004  # area of an object, in squares of the shorter side
_BLUR = 1.5  # pixels
_NEAR = 0.15  # of a pixel's surroundings, covered by objects
_TEXTURE = 0.3  # slope of a background whose motion can be seen, per shorter side
_EXPLAINED = 0.1  # of the changes, by a camera that moves
_FRAMES = 5  # in which objects are counted and their shapes compared
#: area and height of the centroid, for a radius of one
_FORMS = {
    "circle": (np.pi, 0.0),
    "square": (1.7**2, 0.0),
    "triangle": (2.0, 1 / 3),
    "cross": (2.04, 0.0),
}


@dataclass(frozen=True)
class SeenKind:
    """Objects of one colour; see ``scenes.Kind``."""

    colour: str
    shape: str
    count: int
    motion: str


@dataclass(frozen=True)
class Seen:
    """What was found in a clip; ``kinds`` from the largest to the smallest."""

    kinds: tuple[SeenKind, ...]
    camera: str


def see(video_THWC: np.ndarray) -> Seen:
    """What a clip of values in [-1, 1] shows; of a single frame, nothing moves."""
    video_THWC = np.asarray(video_THWC, np.float32) / 2 + 0.5
    cover_THWK = _coverage(video_THWC)
    pan_2, growth = _camera(video_THWC, cover_THWK.max(-1))
    looked_at = np.linspace(0, len(video_THWC) - 1, min(_FRAMES, len(video_THWC))).astype(int)
    found = []
    for k, colour in enumerate(COLOURS):
        frames = [_objects(cover_HW) for cover_HW in cover_THWK[looked_at, ..., k]]
        counts = [len(labels) for labels in frames]
        count = int(np.median(counts))
        if count:
            motion = _motion(cover_THWK[..., k], pan_2, growth)
            shape = _shape(frames)
            size = float(np.mean([part.sum() for labels in frames for part in labels]))
            found.append((size * count, SeenKind(colour, shape, count, motion)))
    found.sort(key=lambda pair: -pair[0])
    return Seen(tuple(kind for _, kind in found), _named_camera(pan_2, growth))


def _coverage(video_THWC) -> np.ndarray:
    """How much of each pixel is of an object of each colour: (T, H, W, K); one colour a pixel.

    The background has no chroma, so a pixel's chroma is its colour's times the share covered.
    """
    palette_KC = np.array([rgb for _, rgb in COLOURS.values()], np.float32)
    palette_KC -= palette_KC.mean(-1, keepdims=True)
    chroma_THWC = video_THWC - video_THWC.mean(-1, keepdims=True)
    lengths_K = np.linalg.norm(palette_KC, axis=-1)
    along_THWK = chroma_THWC @ (palette_KC / lengths_K[:, None]).T
    best_THW = along_THWK.argmax(-1)
    share_THW = (
        np.take_along_axis(along_THWK, best_THW[..., None], -1)[..., 0] / lengths_K[best_THW]
    )
    share_THW = np.clip(share_THW, 0, 1)
    return share_THW[..., None] * (best_THW[..., None] == np.arange(len(COLOURS)))


def _objects(cover_HW) -> list[np.ndarray]:
    """The coverage of each object of a frame, alone: arrays (H, W)."""
    from scipy import ndimage

    labels_HW, count = ndimage.label(cover_HW > _COVERED)
    least = max(2.0, _SMALLEST * min(cover_HW.shape) ** 2)
    parts = []
    for i in range(1, count + 1):
        near_HW = ndimage.binary_dilation(labels_HW == i, np.ones((3, 3)))
        part_HW = np.where(near_HW & ((labels_HW == i) | (labels_HW == 0)), cover_HW, 0)
        if part_HW.sum() >= least:
            parts.append(part_HW)
    return parts


def _shape(frames: Sequence[Sequence[np.ndarray]]) -> str:
    """The shape whose picture, of an object's area and place, covers the objects best."""
    scores = {shape: [0.0] for shape in SHAPES}
    for parts in frames:
        for part_HW in parts:
            height, width = part_HW.shape
            short, at_HW2 = min(height, width), pixel_centres(height, width)
            area = part_HW.sum()
            centre_2 = (part_HW[..., None] * at_HW2).sum((0, 1)) / area
            for shape, (unit_area, low) in _FORMS.items():
                radius = np.sqrt(area / unit_area) / short
                offset_HW2 = at_HW2 - centre_2 + np.array([0.0, low * radius])
                drawn_HW = np.clip(0.5 - short * distance_to(shape, offset_HW2, radius), 0, 1)
                both, either = np.minimum(drawn_HW, part_HW), np.maximum(drawn_HW, part_HW)
                scores[shape].append(float(both.sum() / either.sum()))
    return max(scores, key=lambda shape: np.mean(scores[shape]))


def _motion(cover_THW, pan_2, growth: float) -> str:
    """How the objects of a colour move in the world, the camera's own motion taken out."""
    T, H, W = cover_THW.shape
    at_HW2 = pixel_centres(H, W)
    weight_T = cover_THW.sum((1, 2))
    there = np.flatnonzero(weight_T > 0)
    if len(there) < 2:
        return "still"
    centre_T2 = np.einsum("THW,HWc->Tc", cover_THW[there], at_HW2) / weight_T[there, None]
    middle_2 = np.array([W, H]) / min(H, W) / 2
    time_T = there / (T - 1)
    centre_T2 = middle_2 + (centre_T2 - middle_2) * np.exp(-growth * time_T)[:, None]
    centre_T2 += np.multiply.outer(time_T, pan_2)
    way_2 = np.polyfit(time_T, centre_T2, 1)[0]
    axis = int(np.abs(way_2).argmax())
    if abs(way_2[axis]) < _MOVED * PATH:
        return "still"
    direction = tuple(int(np.sign(way_2[axis])) if i == axis else 0 for i in range(2))
    return next(name for name, row in MOTIONS.items() if row[3] == direction)


def _camera(video_THWC, cover_THW) -> tuple[np.ndarray, float]:
    """(way of the camera, logarithm of its zoom) over the whole clip.

    Least squares of the brightness constancy, all pairs of frames at once: what is seen flows at
    the same rate in all of them. Objects, and what is about them, are left out.
    """
    from scipy import ndimage

    T, H, W = cover_THW.shape
    if T == 1:
        return np.zeros(2), 0.0
    # noise in the slopes would make every flow look smaller, and so would a way much below a pixel
    grey_THW = ndimage.gaussian_filter(video_THWC.mean(-1), (0, _BLUR, _BLUR))
    gap = max(1, (T - 1) // _FRAMES)
    slope_y, slope_x = np.gradient((grey_THW[gap:] + grey_THW[:-gap]) / 2, axis=(1, 2))
    near_THW = ndimage.gaussian_filter(cover_THW, (0, _BLUR, _BLUR)) > _NEAR
    covered = ndimage.binary_dilation(near_THW, np.ones((1, 5, 5)))
    free = ~(covered[gap:] | covered[:-gap])
    free[:, [0, -1]] = free[:, :, [0, -1]] = False
    at_HW2 = pixel_centres(H, W) * min(H, W) - np.array([W, H]) / 2
    radial = slope_x * at_HW2[..., 0] + slope_y * at_HW2[..., 1]
    columns = np.stack([slope_x[free], slope_y[free], radial[free]], -1).astype(np.float64)
    change = (grey_THW[gap:] - grey_THW[:-gap])[free]
    texture = np.square(columns[:, :2]).sum(-1).mean() if len(columns) > 2 else 0.0
    if np.sqrt(texture) * min(H, W) < _TEXTURE:
        return np.zeros(2), 0.0
    flow_3 = np.linalg.lstsq(columns, -change, rcond=1e-6)[0]
    unexplained = np.square(change + columns @ flow_3).sum()
    if unexplained > (1 - _EXPLAINED) * np.square(change).sum():
        return np.zeros(2), 0.0
    flow_3 *= (T - 1) / gap
    return -flow_3[:2] / min(H, W), float(flow_3[2])


def _named_camera(pan_2, growth: float) -> str:
    shares = np.array([*(pan_2 / PATH), growth / np.log(ZOOM)])
    most = int(np.abs(shares).argmax())
    if abs(shares[most]) < _MOVED:
        return "still"
    sign = int(np.sign(shares[most]))
    wanted = ((0, 0), sign) if most == 2 else (((sign, 0), (0, sign))[most], 0)
    return next(name for name, row in CAMERAS.items() if row[2:] == wanted)


def agreement(scene: Scene, seen: Seen) -> dict[str, float]:
    """Which of the caption's statements a clip bears out: each the share of its kinds of objects.

    ``all`` is 1 if everything is right and nothing else is there.
    """
    left = list(seen.kinds)
    matched: list[SeenKind | None] = []
    wanted = sorted(scene.kinds, key=lambda kind: kind.colour not in {k.colour for k in left})
    for kind in wanted:
        same = [k for k in left if k.colour == kind.colour] or left[:1]
        matched.append(same[0] if same else None)
        left = [k for k in left if k not in same[:1]]
    names = ["colour", "shape", "count", *(["motion"] if scene.moving else [])]
    result = {
        name: float(np.mean([
            found is not None and getattr(found, name) == getattr(kind, name)
            for kind, found in zip(wanted, matched, strict=True)
        ]))
        for name in names
    }  # fmt: skip
    if scene.moving:
        result["camera"] = float(seen.camera == scene.camera)
    result["all"] = float(all(value == 1.0 for value in result.values()) and not left)
    return result


def judge_scenes(scenes: Sequence[Scene], clips: Sequence[np.ndarray]) -> dict[str, float]:
    """The mean of :func:`agreement` over clips (T, H, W, 3), and of :func:`flicker`."""
    rows = [agreement(scene, see(clip)) for scene, clip in zip(scenes, clips, strict=True)]
    result = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return result | {"flicker": float(np.mean([flicker(clip) for clip in clips]))}


def flicker(video_THWC: np.ndarray) -> float:
    """Mean size of the second difference in time, of values in [-1, 1]; 0 for less than 3 frames.

    What moves evenly has little of it, what jumps back and forth from frame to frame much.
    """
    if len(video_THWC) < 3:
        return 0.0
    return float(np.abs(np.diff(np.asarray(video_THWC, np.float32), 2, axis=0)).mean())
