"""Clips of any length and size through a video autoencoder, in bounded memory.

In time nothing is approximate: chunks are independent, and within a chunk pieces hand on what the
causal layers look back at, so that the result is that of ``VideoVAE.encode`` and ``decode``. Tiles
of a picture are approximate: norms and attention see a tile at a time, so neighbours overlap and
are blended into each other.

Shape suffixes: T frames, t frames of latents, H height, W width, h and w those of latents,
C channels, Z channels of a latent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.models.layers.convolution import Carry
from step_jax.models.video.vae import SEAM, VideoVAE, VideoVAEParams


@dataclass(frozen=True)
class Pieces:
    """What is computed at a time.

    latent_frames: of a chunk; 0 for the whole chunk.
    tile: height and width in pixels, a multiple of the reduction; 0 for whole pictures.
    overlap: of neighbouring tiles, in pixels, likewise.
    """

    latent_frames: int = 0
    tile: int = 0
    overlap: int = 0

    def validate(self):
        checks.at_least(self, latent_frames=0, tile=0, overlap=0)
        if self.tile and not self.overlap < self.tile:
            raise ConfigError(
                f"an overlap of {self.overlap} leaves nothing of a tile of {self.tile}"
            )


class VideoCoder:
    """A video autoencoder with its parameters, on one clip at a time."""

    def __init__(self, model: VideoVAE, params: VideoVAEParams, pieces: Pieces = Pieces()):
        """
        Raises:
          ConfigError: tiles that the reduction does not divide.
        """
        pieces.validate()
        side = model.reduction[1]
        if pieces.tile % side or pieces.overlap % side:
            raise ConfigError(
                f"tiles of {pieces.tile} with an overlap of {pieces.overlap} pixels: both must be "
                f"multiples of {side}"
            )
        self.model, self.params, self.pieces = model, params, pieces
        self._dtype = params.encoder.conv.weight_KKKIO.dtype

        def encode(p, x, kept):
            carry = Carry(kept)
            return model.encode_piece(p, x, carry), tuple(carry.kept)

        def decode(p, z, kept):
            carry = Carry(kept)
            return model.decode_piece(p, z, carry), tuple(carry.kept)

        self._encode, self._decode = jax.jit(encode), jax.jit(decode)

    def encode(self, frames: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(mean, logarithm of the variance) of each chunk, float32 (t, h, w, Z).

        Args:
          frames: parts (T, H, W, C) of one clip in [-1, 1], of any lengths.
        """
        reduction, side, _ = self.model.reduction
        n = self.pieces.latent_frames
        for chunk_THWC in _regrouped(frames, self.model.chunk):
            self.model.check_size(*chunk_THWC.shape[:3])
            missing = -(len(chunk_THWC) - 1) % reduction
            filled = np.concatenate([chunk_THWC, np.repeat(chunk_THWC[-1:], missing, 0)])
            cuts: Any = np.arange(1 + (n - 1) * reduction, len(filled), n * reduction) if n else []

            def through(tile_THWC, cuts=cuts):
                return self._run(self._encode, self.params.encoder, np.split(tile_THWC, cuts))

            yield tuple(self._tiled(through, filled, self.pieces, side, outputs=2))

    def decode(self, latents: Iterable[np.ndarray], frames: int | None = None):
        """The clip's frames as they are known: an iterator of float32 (T, H, W, C).

        Args:
          latents: parts (t, h, w, Z) of one clip, of any lengths.
          frames: of the clip, if it is shorter than its latents allow.
        """
        _, side, _ = self.model.reduction
        n, left = self.pieces.latent_frames, frames
        for part_THWC in self._blended(latents, n, side):
            part_THWC = part_THWC[:left]
            left = None if left is None else left - len(part_THWC)
            if len(part_THWC):
                yield part_THWC

    def _blended(self, latents: Iterable[np.ndarray], n: int, side: int) -> Iterator[np.ndarray]:
        """Decoded chunks. A chunk's last frame waits for the next one's first."""
        tiles = Pieces(0, self.pieces.tile // side, self.pieces.overlap // side)
        last_1HWC = None
        for chunk_thwZ in _regrouped(latents, self.model.chunk_latents):
            cuts: Any = np.arange(n, len(chunk_thwZ), n) if n else []

            def through(tile_thwZ, cuts=cuts):
                return [self._run(self._decode, self.params.decoder, np.split(tile_thwZ, cuts))]

            (chunk_THWC,) = self._tiled(through, chunk_thwZ, tiles, 1, scale=side)
            if last_1HWC is not None:
                chunk_THWC[:1] = SEAM * chunk_THWC[:1] + (1 - SEAM) * last_1HWC
                yield SEAM * last_1HWC + (1 - SEAM) * chunk_THWC[:1]
            last_1HWC = chunk_THWC[-1:]
            yield chunk_THWC[:-1]
        if last_1HWC is not None:
            yield last_1HWC

    def _run(self, f: Callable, params: Any, parts: Sequence[np.ndarray]):
        """One chunk of one tile, piece by piece."""
        kept, done = None, []
        for part in parts:
            out, kept = f(params, part[None].astype(self._dtype), kept)
            done.append(jax.tree.map(lambda a: np.asarray(a)[0], out))
        return jax.tree.map(lambda *pieces: np.concatenate(pieces), *done)

    @staticmethod
    def _tiled(f: Callable, x, pieces: Pieces, shrink: int, *, scale: int = 1, outputs: int = 1):
        """``f`` of a clip tile by tile: a list of arrays, ``shrink`` times smaller or ``scale``
        times larger than the clip."""
        H, W = x.shape[1:3]
        rows, columns = (tile_spans(n, pieces.tile, pieces.overlap) for n in (H, W))
        if len(rows) == len(columns) == 1:
            return list(f(x))
        total: list[Any] = [None] * outputs
        for (top, bottom), (left, right) in itertools.product(rows, columns):
            ramp_hw = np.multiply.outer(
                *(
                    _ramp(low * scale // shrink, high * scale // shrink,
                          n * scale // shrink, pieces.overlap * scale // shrink)
                    for low, high, n in ((top, bottom, H), (left, right, W))
                )
            )[..., None]  # fmt: skip
            where = tuple(
                slice(low * scale // shrink, high * scale // shrink)
                for low, high in ((top, bottom), (left, right))
            )
            for i, out in enumerate(f(x[:, top:bottom, left:right])):
                if total[i] is None:
                    size = (len(out), H * scale // shrink, W * scale // shrink, out.shape[-1])
                    total[i] = np.zeros(size, np.float32), np.zeros((*size[1:3], 1), np.float32)
                total[i][0][:, *where] += out * ramp_hw
                total[i][1][where] += ramp_hw
        return [value / weight for value, weight in total]


def tile_spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Where tiles lie on a side: of equal size, the last one moved back to the border."""
    if not tile or tile >= length:
        return [(0, length)]
    starts = list(range(0, length - tile, tile - overlap)) + [length - tile]
    return [(start, start + tile) for start in starts]


def _ramp(low: int, high: int, length: int, overlap: int) -> np.ndarray:
    """A tile's weight along a side: rising over the overlap, but not at the picture's border."""
    at = np.arange(high - low, dtype=np.float32)
    rise = np.minimum(1, (at + 1) / (overlap + 1))
    ramp = np.ones_like(at) if low == 0 else rise
    return ramp if high == length else ramp * rise[::-1]


def _regrouped(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same frames, ``size`` at a time, and the rest."""
    waiting: list[np.ndarray] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += len(part)
        while count >= size:
            joined = np.concatenate(waiting)
            yield joined[:size]
            waiting, count = [joined[size:]], count - size
    if count:
        yield np.concatenate(waiting)
