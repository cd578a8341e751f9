"""Frames from files: videos by PyAV, pictures and animations by Pillow, folders of pictures.

Shape suffixes: T frames, H height, W width, C channels (red, green, blue).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from step_jax.core.errors import ConfigError, DataError

VIDEOS = {".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg"}
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}


def is_frames(path: Path) -> bool:
    """Whether a folder is one clip: it holds pictures alone, named by their numbers."""
    names = [p for p in path.iterdir() if not p.name.startswith(".")]
    return len(names) > 1 and all(
        p.suffix.lower() in PICTURES and p.stem.isdecimal() and p.is_file() for p in names
    )


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a clip in order: uint8 (H, W, 3), all of one size.

    Raises:
      DataError: it cannot be read, has no frame, or frames of several sizes; says what is wrong.
      ConfigError: PyAV is not installed.
    """
    if path.is_dir():
        frames: Iterator[np.ndarray] = (f for p in _numbered(path) for f in _pictures(p))
    elif path.suffix.lower() in VIDEOS:
        frames = _video(path)
    elif path.suffix.lower() in PICTURES:
        frames = _pictures(path)
    else:
        known = ", ".join(sorted(VIDEOS | PICTURES))
        raise DataError(f"is no video or picture that is known here ({known})")
    first = None
    try:
        for frame_HWC in frames:
            first = frame_HWC.shape if first is None else first
            if frame_HWC.shape != first:
                raise DataError(f"has frames of {first[:2]} and of {frame_HWC.shape[:2]} pixels")
            yield frame_HWC
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot be decoded: {error}") from error
    if first is None:
        raise DataError("has no frame")


def frames_per_second(path: Path) -> float | None:
    """Of a video that can be opened, if it says so; else None."""
    if path.is_dir() or path.suffix.lower() not in VIDEOS:
        return None
    av = _av()
    try:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate
    except (av.error.FFmpegError, OSError, IndexError):
        return None
    return None if rate is None else float(rate)


def _numbered(folder: Path) -> list[Path]:
    return sorted(
        (p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: int(p.stem)
    )


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise ConfigError("videos are read by PyAV: pip install av") from None
    av.logging.set_level(av.logging.PANIC)  # what is wrong is said once, with the file's name
    return av


def _video(path: Path) -> Iterator[np.ndarray]:
    av = _av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError("has no pictures")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # more would read ahead in their own order
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise DataError(f"is damaged at {frame.time:.2f} s")
                yield frame.to_ndarray(format="rgb24")
    except av.error.FFmpegError as error:
        raise DataError(f"cannot be decoded: {error}") from error


def _pictures(path: Path) -> Iterator[np.ndarray]:
    """One frame of a picture, all of an animation; what is transparent is white."""
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            rgba = frame.convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            yield np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))


def fitted(frame_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """A frame scaled until it covers a size, and its middle cut out."""
    from PIL import Image

    H, W = frame_HWC.shape[:2]
    scale = max(height / H, width / W)
    size = (max(width, round(W * scale)), max(height, round(H * scale)))
    image = Image.fromarray(frame_HWC)
    if size != (W, H):
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return np.asarray(image)[top : top + height, left : left + width]
