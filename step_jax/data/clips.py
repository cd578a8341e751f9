"""Latents of clips and pictures with captions: sources, and buckets and packs in batches.

A batch is rows of patches. With *buckets*, all rows of a batch are samples of one size, and smaller
sizes have more rows, so that every step has about the same work. With *packs*, a row holds several
samples of any size, one after the other.

Shape suffixes: N samples of a source, B rows, T tokens, P numbers in a patch, G samples of a row,
K extra conditions, S tokens of a text.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from step_jax.core import checks
from step_jax.core.errors import CheckpointError, ConfigError, DataError
from step_jax.data.captions import TextBank
from step_jax.data.mixture import Mixture, MixtureStage, integer_weights
from step_jax.data.packing import derive_key, permutation
from step_jax.data.schema import Field, Schema
from step_jax.models.video.patches import Sizes, patches_of, places_of

_MEASURED = 64  # clips, to know how far numbers deviate


class ClipSource(Protocol):
    """Clips in latents (or in pixels) with what is known of them.

    Attributes:
      fingerprint: JSON-able, what decides them.
      sizes_N3: int (N, 3), frames, height and width.
      channels: of a latent.
      captions: of each clip, the same in several words or languages.
      scalars: name (``fps``, ``motion``) -> float32 (N,), where known.
      prompts: to draw by while a model trains.
      noises_N: numbers of the noise that clips began as, uint32 (N,); None for clips of the world.
    """

    @property
    def fingerprint(self) -> dict[str, Any]: ...
    @property
    def sizes_N3(self) -> np.ndarray: ...
    @property
    def channels(self) -> int: ...
    @property
    def captions(self) -> Sequence[tuple[str, ...]]: ...
    @property
    def scalars(self) -> Mapping[str, np.ndarray]: ...
    @property
    def prompts(self) -> tuple[str, ...]: ...
    @property
    def noises_N(self) -> np.ndarray | None: ...

    def latents(self, i: int) -> np.ndarray:
        """Float32 (F, H, W, C) of clip ``i``."""


@dataclass(frozen=True)
class Packs:
    """Rows of samples of any size.

    tokens: of a row.
    samples: most of a row.
    """

    tokens: int
    samples: int

    def validate(self):
        checks.at_least(self, tokens=1, samples=1)


class Shape(NamedTuple):
    """What a batch is compiled for: rows, tokens and samples of a row.

    size: of a bucket's latents, None for packs.
    """

    rows: int
    tokens: int
    samples: int
    size: Sizes | None


class Reads(NamedTuple):
    """What of a clip a model reads: its patches' sides, and the names of its extra conditions.

    first_frame: it is given the first frame beside the noise.
    deviation: what it reads is latents divided by this.
    """

    patch: Sizes
    scalars: tuple[str, ...] = ()
    first_frame: bool = False
    deviation: float = 1.0


def clip_schema(
    shape: Shape,
    numbers: int,
    reads: Reads,
    bank: Mapping[str, Field],
    own_noise: bool = False,
) -> Schema:
    """The arrays of a batch.

    Args:
      numbers: in a patch.
      bank: of each text input, one text's array (``TextBank.fields``).
      own_noise: clips began as a noise of their own.
    """
    B, T, G, _ = shape
    of_tokens = ("batch", "sequence", None)
    fields = {
        "patches": Field(of_tokens, (B, T, numbers)),
        "places": Field(of_tokens, (B, T, 3), "int32"),
        "samples": Field(("batch", None), (B, G), "uint32"),
    }
    if shape.size is None:
        fields["segments"] = Field(of_tokens[:2], (B, T), "int32")
    for name, one in bank.items():
        fields[f"text/{name}"] = Field(("batch", None, *one.axes), (B, G, *one.shape), one.dtype)
        fields[f"lengths/{name}"] = Field(("batch", None), (B, G), "int32")
    if reads.scalars:
        fields["scalars"] = Field(("batch", None, None), (B, G, len(reads.scalars)))
    if own_noise:
        fields["noises"] = fields["samples"]
    if reads.first_frame:
        fields["first"] = Field(of_tokens, (B, T, numbers))
    return fields


def bucket_rows(flops: Mapping[Sizes, float], rows: int, multiple: int) -> dict[Sizes, int]:
    """Rows of each bucket's batches: of the costliest size ``rows``, of others as many as cost no
    more, in whole multiples.

    Args:
      flops: operations of one sample of each size.
      multiple: that devices and microbatches ask for.
    """
    budget = rows * max(flops.values())
    return {
        size: max(multiple, int(budget / cost * (1 + 1e-9)) // multiple * multiple)
        for size, cost in flops.items()
    }


def uniforms(seed: int, purpose: str, numbers_N: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each sample's number, float64 (N,): of seed, purpose and number alone.

    splitmix64 (Steele et al. 2014), as ``packing.permutation``.
    """
    key = np.uint64(derive_key(seed, purpose))
    z = (numbers_N.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def check_same(fingerprint: Mapping[str, Any], saved: Mapping[str, Any], step: int) -> None:
    """Raises CheckpointError unless the finished steps were made with the same data."""
    changed = [k for k in {**saved, **fingerprint} if saved.get(k) != fingerprint.get(k)]
    if changed:
        raise CheckpointError(
            f"step {step} was made with other data: {', '.join(sorted(changed))} differ. Set "
            "them back, or start another run with init_from"
        )


class Drawn(NamedTuple):
    """Samples of a batch: of which clip, in which row, with which number; int64 arrays."""

    clip: np.ndarray
    row: np.ndarray
    number: np.ndarray


class ClipDataset:
    """Batches of a source as a pure function of (seed, step).

    Attributes:
      shapes: of all batches that there are.
      fingerprint: what a run that goes on must agree with.
    """

    def __init__(
        self,
        source: ClipSource,
        bank: TextBank,
        reads: Reads,
        *,
        rows: int | Mapping[Sizes, int],
        packs: Packs | None,
        seed: int,
        dropout: float,
    ):
        """
        Args:
          rows: of a pack's batch, or of each bucket's.
          dropout: share of the samples whose caption is left out.

        Raises:
          ConfigError: clips of sizes that are no bucket's, or larger than a pack.
          DataError: the model reads a condition that the source does not know.
        """
        self.source, self.bank, self.reads, self._packs = source, bank, reads, packs
        self._seed, self._dropout = seed, dropout
        self._captions = list(source.captions)
        self.fingerprint = source.fingerprint | {"texts": bank.fingerprint}
        known = {"frames", "height", "width", *source.scalars}
        if missing := [name for name in reads.scalars if name not in known]:
            raise DataError(
                f"the model reads {', '.join(missing)} of a clip, which the data do not tell "
                f"(they tell {', '.join(sorted(known))})"
            )
        self._tokens_N = np.prod(source.sizes_N3 // np.array(reads.patch), axis=1)
        if packs is not None:
            assert isinstance(rows, int)
            self.shapes = [Shape(rows, packs.tokens, packs.samples, None)]
            if (largest := int(self._tokens_N.max())) > packs.tokens:
                raise ConfigError(
                    f"data.packs.tokens is {packs.tokens}; the largest clip has {largest}"
                )
            return
        assert not isinstance(rows, int)
        self._clips = self._by_bucket(list(rows))
        self.shapes = [
            Shape(n, int(np.prod(np.array(size) // reads.patch)), 1, size)
            for size, n in rows.items()
        ]
        shares = [len(c) / n for c, n in zip(self._clips, rows.values(), strict=True)]
        self._mixture = Mixture([MixtureStage(0, integer_weights(shares))])

    def _by_bucket(self, sizes: list[Sizes]) -> list[np.ndarray]:
        """The clips of each size."""
        found = {size: np.flatnonzero((self.source.sizes_N3 == size).all(1)) for size in sizes}
        if empty := [size for size, clips in found.items() if not len(clips)]:
            raise ConfigError(f"the buckets {empty} have no clip")
        return list(found.values())

    def shape_at(self, step: int) -> Shape:
        """The shape of a step's batch."""
        if self._packs is not None:
            return self.shapes[0]
        return self.shapes[int(self._mixture.locate(np.array([step]))[0][0])]

    def samples_before(self, step: int) -> int:
        """How many samples all steps before this one have; of packs the rows."""
        if self._packs is not None:
            return step * self.shapes[0].rows
        return int(self._mixture.counts(step) @ np.array([s.rows for s in self.shapes]))

    def schema(self, shape: Shape) -> Schema:
        """The arrays of a batch of this shape."""
        numbers = self.source.channels * int(np.prod(self.reads.patch))
        own_noise = self.source.noises_N is not None
        return clip_schema(shape, numbers, self.reads, self.bank.fields, own_noise)

    def batch(self, step: int, index: int = 0, count: int = 1) -> dict[str, np.ndarray]:
        """Part ``index`` of ``count`` of the rows of a step's batch."""
        shape = self.shape_at(step)
        drawn = self._packed(step, shape) if shape.size is None else self._of_bucket(step, shape)
        low, high = (shape.rows // count * i for i in (index, index + 1))
        mine = (drawn.row >= low) & (drawn.row < high)
        return self._filled(shape, Drawn(*(a[mine] for a in drawn)), low, high - low)

    def check(self, saved: Mapping[str, Any], step: int) -> None:
        """Raises CheckpointError if a run of other data is to be gone on with."""
        check_same(self.fingerprint, saved, step)

    @property
    def deviation(self) -> float:
        """From their mean, of the numbers of some clips as the model reads them."""
        count = len(self._captions)
        some = np.unique(np.linspace(0, count - 1, min(count, _MEASURED)).astype(int))
        numbers = np.concatenate([self.source.latents(int(i)).ravel() for i in some])
        return float(np.std(numbers)) / self.reads.deviation

    def text_of(self, drawn: Drawn) -> np.ndarray:
        """Which text of the bank each sample is shown: 0, no text, where its caption is dropped."""
        choice = uniforms(self._seed, "caption", drawn.number)
        dropped = uniforms(self._seed, "dropout", drawn.number) < self._dropout
        texts = [self._captions[i] for i in drawn.clip]
        chosen = [t[int(u * len(t))] for t, u in zip(texts, choice, strict=True)]
        return np.where(dropped, 0, [self.bank.index[text] for text in chosen])

    def _of_bucket(self, step: int, shape: Shape) -> Drawn:
        bucket = self.shapes.index(shape)
        before = self._mixture.counts(step)
        clips, first = self._clips[bucket], int(before[bucket]) * shape.rows
        at = np.arange(first, first + shape.rows)
        epoch, place = np.divmod(at, len(clips))
        order = {e: permutation(len(clips), derive_key(self._seed, bucket, e)) for e in set(epoch)}
        chosen = [clips[order[e][p]] for e, p in zip(epoch, place, strict=True)]
        row = np.arange(shape.rows)
        return Drawn(np.array(chosen), row, self.samples_before(step) + row)

    def _packed(self, step: int, shape: Shape) -> Drawn:
        """The packs of the rows of a step: those of one epoch after those of the one before."""
        first, parts = step * shape.rows, []
        epoch = before = 0
        while before < first + shape.rows:
            clips, pack = self._packs_of(epoch)
            packs = int(pack[-1]) + 1
            row = before + pack - first
            here = (row >= 0) & (row < shape.rows)
            number = epoch * len(clips) + np.flatnonzero(here)
            parts.append(Drawn(clips[here], row[here], number))
            epoch, before = epoch + 1, before + packs
        return Drawn(*(np.concatenate(a) for a in zip(*parts, strict=True)))

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a dataset lives as long as its run
    def _packs_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(clips of an epoch in order, the pack of each): one begins where the last is full."""
        assert self._packs is not None
        clips = permutation(len(self._tokens_N), derive_key(self._seed, "packs", epoch))
        pack, used, samples, number = np.empty_like(clips), 0, 0, 0
        for i, tokens in enumerate(self._tokens_N[clips]):
            if used + tokens > self._packs.tokens or samples == self._packs.samples:
                number, used, samples = number + 1, 0, 0
            pack[i], used, samples = number, used + tokens, samples + 1
        return clips, pack

    def _filled(self, shape: Shape, drawn: Drawn, low: int, rows: int) -> dict[str, np.ndarray]:
        """The arrays of ``rows`` rows from ``low`` on."""
        schema = self.schema(shape._replace(rows=rows))
        out = {name: np.zeros(f.shape, f.dtype) for name, f in schema.items()}
        used, samples = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        for clip, row, number, text in zip(*drawn, self.text_of(drawn), strict=True):
            r = row - low
            g, start, stop = samples[r], used[r], used[r] + self._tokens_N[clip]
            used[r], samples[r] = stop, g + 1
            self._place(out, int(clip), (r, slice(start, stop)))
            if "segments" in out:
                out["segments"][r, start:stop] = g + 1
            out["samples"][r, g] = number
            if self.source.noises_N is not None:
                out["noises"][r, g] = self.source.noises_N[clip]
            for name, (values, length) in self.bank.texts(int(text)).items():
                out[f"text/{name}"][r, g], out[f"lengths/{name}"][r, g] = values, length
            if self.reads.scalars:
                out["scalars"][r, g] = self._scalars(int(clip))
        return out

    def _place(self, out: dict[str, np.ndarray], clip: int, where: tuple) -> None:
        latents_FHWC, patch = self.source.latents(clip) / self.reads.deviation, self.reads.patch
        size = latents_FHWC.shape[:3]
        out["patches"][where] = patches_of(latents_FHWC[None], patch)[0]
        out["places"][where] = places_of((size[0], size[1], size[2]), patch)
        if "first" in out:
            first_FHWC = np.zeros_like(latents_FHWC)
            first_FHWC[0] = latents_FHWC[0]
            out["first"][where] = patches_of(first_FHWC[None], patch)[0]

    def _scalars(self, clip: int) -> list[float]:
        frames, height, width = self.source.sizes_N3[clip]
        own = {"frames": frames, "height": height, "width": width}
        own |= {name: values[clip] for name, values in self.source.scalars.items()}
        return [float(own[name]) for name in self.reads.scalars]
