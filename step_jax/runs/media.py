"""Clips and pictures as files: PNG, GIF and MP4.

Shape suffixes: N clips, F frames, H height, W width, C channels.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from step_jax.core.errors import ConfigError
from step_jax.core.files import write_whole

FORMATS = (".png", ".gif", ".mp4")


def pixels(clips: Any, zoom: int = 1) -> np.ndarray:
    """uint8 (..., H, W, 3) from values in [-1, 1] of 1 channel (grey) or 3; ``zoom`` is the side of
    a pixel."""
    clips = np.asarray(clips, np.float32)
    values = np.round((clips.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    return values.repeat(3 // values.shape[-1], -1).repeat(zoom, -3).repeat(zoom, -2)


def grid(clips_NFHWC: Any, columns: int) -> np.ndarray:
    """Clips side by side with a grey frame, ``columns`` in a row: float32 (F, H', W', C)."""
    x = np.pad(clips_NFHWC, ((0, -len(clips_NFHWC) % columns), (0, 0), (1, 1), (1, 1), (0, 0)))
    N, F, H, W, C = x.shape
    x = x.reshape(N // columns, columns, F, H, W, C).transpose(2, 0, 3, 1, 4, 5)
    return x.reshape(F, N // columns * H, columns * W, C)


def save_clip(clip_FHWC: Any, path: Path | str, fps: float = 8.0, zoom: int = 1) -> Path:
    """Writes a clip as its name says: ``.mp4``, ``.gif``, or ``.png`` with the frames side by side.

    Raises:
      ConfigError: another ending, or MP4 without PyAV.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path} is no {', '.join(FORMATS)}: the ending says what to write")
    frames = pixels(clip_FHWC, zoom)
    if path.suffix == ".mp4":
        write_whole(path, _mp4(frames, fps))
        return path
    from PIL import Image

    buffer = io.BytesIO()
    if path.suffix == ".png":
        Image.fromarray(np.concatenate(list(frames), axis=1)).save(buffer, "png")
    else:
        first, *rest = (Image.fromarray(frame) for frame in frames)
        milliseconds = max(20, round(1000 / fps))
        first.save(buffer, "gif", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    write_whole(path, buffer.getvalue())
    return path


def save_grid(clips_NFHWC: Any, columns: int, path: Path, fps: float) -> list[Path]:
    """Writes clips in a grid, ``columns`` in a row: a GIF of them, or a PNG of pictures.

    Args:
      path: without its ending.

    Returns:
      What was written; latents, which are no pictures, as ``.npy``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clips_NFHWC = np.asarray(clips_NFHWC)
    if clips_NFHWC.shape[-1] not in (1, 3):
        buffer = io.BytesIO()
        np.save(buffer, clips_NFHWC)
        write_whole(path.with_suffix(".npy"), buffer.getvalue())
        return [path.with_suffix(".npy")]
    ending = ".gif" if clips_NFHWC.shape[1] > 1 else ".png"
    zoom = max(1, 32 // clips_NFHWC.shape[2])
    return [save_clip(grid(clips_NFHWC, columns), path.with_suffix(ending), fps, zoom)]


def _mp4(frames_FHWC: np.ndarray, fps: float) -> bytes:
    """H.264; odd sides lose a pixel, which the codec asks for."""
    try:
        import av
    except ImportError:
        raise ConfigError(
            "MP4 is written by PyAV, which is not installed: pip install av (or write .gif)"
        ) from None
    from fractions import Fraction

    F, H, W, _ = frames_FHWC.shape
    frames_FHWC = frames_FHWC[:, : H - H % 2, : W - W % 2]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height = frames_FHWC.shape[2], frames_FHWC.shape[1]
        stream.pix_fmt = "yuv420p"
        for frame in frames_FHWC:
            made = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(made))
        container.mux(stream.encode(None))
    return buffer.getvalue()
