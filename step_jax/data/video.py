"""Batches of clips, from files or of rendered scenes, as a pure function of (seed, step).

All clips of a batch are of one bucket: a size (frames, height, width). Which bucket a step has is
decided by how many batches each of them makes.

Shape suffixes: B clips, T frames, H height, W width, C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from step_jax.core.errors import CheckpointError, ConfigError, DataError
from step_jax.data.mixture import Mixture, MixtureStage, integer_weights
from step_jax.data.packing import derive_key, permutation
from step_jax.data.scenes import Scenes
from step_jax.data.schema import Field, Schema
from step_jax.data.video_files import ClipFiles, Size, VideoClips, prepare_clips


@dataclass(frozen=True)
class SceneClips:
    """Clips that are rendered when they are asked for.

    scenes: families of scenes, each a bucket of its own size; with ``frames: 1``, pictures.
    """

    kind: ClassVar[str] = "scenes"
    scenes: tuple[Scenes, ...]

    def validate(self):
        sizes = [size_of(scenes) for scenes in self.scenes]
        if not sizes or len(set(sizes)) < len(sizes):
            raise ConfigError(f"scenes must be of one size each, and there must be some: {sizes}")

    @property
    def buckets(self) -> tuple[Size, ...]:
        return tuple(size_of(scenes) for scenes in self.scenes)


ClipConfig = ClipFiles | SceneClips


def size_of(scenes: Scenes) -> Size:
    return scenes.frames, scenes.height, scenes.width


class Source(Protocol):
    """Where clips come from.

    Attributes:
      buckets: their sizes.
      fingerprint: JSON-able, what decides them.
    """

    @property
    def buckets(self) -> tuple[Size, ...]: ...
    @property
    def fingerprint(self) -> dict[str, Any]: ...

    def count(self, size: Size) -> int | None:
        """How many clips a bucket has; None for no end."""

    def clip(self, size: Size, number: int) -> np.ndarray:
        """Float32 (T, H, W, 3) in [-1, 1]."""


@dataclass(frozen=True)
class Rendered:
    """Scenes as a source; ``seed`` tells training's from those that are held out."""

    config: SceneClips
    seed: int

    @property
    def buckets(self) -> tuple[Size, ...]:
        return self.config.buckets

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"scenes": [str(scenes) for scenes in self.config.scenes]}

    def count(self, size: Size) -> int | None:
        return None

    def clip(self, size: Size, number: int) -> np.ndarray:
        scenes = self.config.scenes[self.buckets.index(size)]
        return scenes.render(scenes.draw(self.seed, number))


@dataclass(frozen=True)
class Filed:
    """A prepared set as a source."""

    clips: VideoClips

    @property
    def buckets(self) -> tuple[Size, ...]:
        return self.clips.buckets

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.clips.fingerprint

    @functools.cache  # noqa: B019 - as long as the set is open
    def _numbers(self, size: Size) -> np.ndarray:
        return self.clips.of_bucket(size)

    def count(self, size: Size) -> int | None:
        return len(self._numbers(size))

    def clip(self, size: Size, number: int) -> np.ndarray:
        return self.clips.pixels(int(self._numbers(size)[number]))

    def __hash__(self) -> int:
        return id(self)


def open_source(
    config: ClipConfig, seed: int, report: Callable[[str], None] = lambda message: None
) -> Source:
    """The clips of a configuration; see ``prepare_clips`` for what it raises."""
    if isinstance(config, SceneClips):
        return Rendered(config, seed)
    return Filed(prepare_clips(config, report))


def rows_of(buckets: tuple[Size, ...], rows: int, multiple: int) -> dict[Size, int]:
    """Rows of each bucket's batches: ``rows`` of the one with the most pixels, of the others as
    many as have no more pixels in all, in whole multiples of what the devices ask for."""
    pixels = {size: int(np.prod(size)) for size in buckets}
    budget = rows * max(pixels.values())
    return {size: max(multiple, budget // n // multiple * multiple) for size, n in pixels.items()}


def clip_schema(size: Size, rows: int) -> Schema:
    """What a batch of a bucket is."""
    return {"video": Field(("batch", None, None, None, None), (rows, *size, 3))}


class ClipBatches:
    """Batches of a source.

    Attributes:
      rows: of each bucket's batches.
      fingerprint: what a run that goes on must agree with.
    """

    def __init__(self, source: Source, rows: Mapping[Size, int], seed: int):
        """
        Raises:
          DataError: buckets that are configured and have no clip.
        """
        if empty := [size for size in rows if size not in source.buckets]:
            raise DataError(f"no clip is of the buckets {empty}: take them out of data.buckets")
        self.source, self.rows, self._seed = source, dict(rows), seed
        self.fingerprint = source.fingerprint | {
            "rows": [[list(size), n] for size, n in rows.items()]
        }
        counts = [source.count(size) for size in rows]
        shares = [
            1.0 if count is None else count / n
            for count, n in zip(counts, rows.values(), strict=True)
        ]
        self._mixture = Mixture([MixtureStage(0, integer_weights(shares))])

    def size_at(self, step: int) -> Size:
        """The bucket of a step."""
        return list(self.rows)[int(self._mixture.locate(np.array([step]))[0][0])]

    def batch(self, step: int, index: int = 0, count: int = 1) -> dict[str, np.ndarray]:
        """Part ``index`` of ``count`` of a step's batch: ``video`` float32 (B, T, H, W, 3)."""
        size = self.size_at(step)
        rows, bucket = self.rows[size], list(self.rows).index(size)
        first = int(self._mixture.counts(step)[bucket]) * rows + rows // count * index
        numbers = range(first, first + rows // count)
        return {"video": np.stack([self._clip(size, bucket, number) for number in numbers])}

    def _clip(self, size: Size, bucket: int, number: int) -> np.ndarray:
        count = self.source.count(size)
        if count is None:
            return self.source.clip(size, number)
        epoch, place = divmod(number, count)
        return self.source.clip(size, int(self._order(count, bucket, epoch)[place]))

    @functools.lru_cache(maxsize=8)  # noqa: B019 - a dataset lives as long as its run
    def _order(self, count: int, bucket: int, epoch: int) -> np.ndarray:
        return permutation(count, derive_key(self._seed, bucket, epoch))

    def check(self, saved: Mapping[str, Any], step: int) -> None:
        """Raises CheckpointError if a run of other data is to be gone on with."""
        here = self.fingerprint
        if changed := sorted(k for k in {**saved, **here} if saved.get(k) != here.get(k)):
            raise CheckpointError(
                f"step {step} was made with other clips: {', '.join(changed)} differ. Set them "
                "back, or start another run with init_from"
            )
