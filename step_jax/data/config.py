"""Configuration of the data pipeline: what to read, how to pack it, what to hold out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from step_jax.core.errors import ConfigError
from step_jax.core.files import cache_folder
from step_jax.core.storage import Objects, is_url
from step_jax.core.text import is_utf8, printable

PYTHON_STDLIB = "python:stdlib"
TRAIN_TOKENIZER = "train"

Format = Literal["auto", "text", "jsonl", "parquet", "arrow", "arrayrecord"]


@dataclass(frozen=True)
class Source:
    """One corpus: a file or a folder.

    ``path`` is a file, a folder (read recursively, hidden names left out), or
    ``python:stdlib`` (the standard library of the running Python, a text every machine
    has). ``weight`` is the share of this source in a mixture, counted in rows, and in the text
    that a tokenizer is trained on; a source that no weight ever draws from is not read.
    ``format`` ``auto`` goes by file extension: ``.jsonl``, ``.jsonl.zst``, ``.jsonl.gz``,
    ``.parquet``, ``.arrow``, ``.arrayrecord``; every other file is text, one document each.
    ``text_field`` names the field or column that holds the text of a record.
    """

    path: str
    weight: float = 1.0
    format: Format = "auto"
    text_field: str = "text"


@dataclass(frozen=True)
class Stage:
    """Weights that hold until a step. The last stage has ``until_step: null`` (open end).

    ``weights`` follow the order of ``DataConfig.sources``.
    """

    weights: tuple[float, ...]
    until_step: int | None = None


@dataclass(frozen=True)
class DataConfig:
    """Where the training text comes from and how it becomes rows of tokens.

    Attributes:
      path: one corpus (see `Source.path`); ``sources`` instead gives several. Without either it
        is ``python:stdlib``. Of two files that give one each, the upper one wins.
      sources: the corpora of a mixture, with weights.
      stages: weights that change at given steps; empty means the sources' own weights.
      format: format of ``path`` (see `Source`).
      text_field: field or column with the text, for ``path``.
      tokenizer: ``train`` (SentencePiece BPE on the training documents), or the path of a
        tokenizer: a SentencePiece ``.model``, or a folder as Hugging Face writes it.
      lossy_tokenizer: accept a tokenizer that loses part of the text (spaces, case, unknown
        characters); held-out figures then have no bits per byte.
      vocab_size: size of a tokenizer that is trained; one that is loaded brings its own.
      sequence_length: tokens in a row.
      packing: ``split`` cuts the stream of documents at row borders (no padding but at the
        end of an epoch); ``fit`` keeps every document that fits in one row (best fit
        decreasing, some padding).
      isolate: True keeps the documents of a row apart (segment ids, positions restart);
        False joins them into one stream.
      heldout_fraction: share of the documents kept for evaluation, chosen by a hash of
        their content, so copies of one document never stand on both sides.
      max_bad_records: records that cannot be read before preparation stops with an error.
      max_document_bytes: a longer document is cut there; the cut bytes are counted.
      cache_dir: where tokenised corpora are kept; default ``$XDG_CACHE_HOME/step_jax`` or
        ``~/.cache/step_jax``. With ``gs://`` or ``s3://`` they are kept there too, and machines
        that have none yet copy them.
    """

    #: what stands instead of each other, each with the keys that belong to it
    alternatives: ClassVar[dict[str, tuple[str, ...]]] = {
        "path": ("format", "text_field"),
        "sources": ("stages",),
    }

    path: str | None = None
    sources: tuple[Source, ...] = ()
    stages: tuple[Stage, ...] = ()
    format: Format = "auto"
    text_field: str = "text"
    tokenizer: str = TRAIN_TOKENIZER
    lossy_tokenizer: bool = False
    vocab_size: int = 4096
    sequence_length: int = 512
    packing: Literal["split", "fit"] = "split"
    isolate: bool = True
    heldout_fraction: float = 0.02
    max_bad_records: int = 100
    max_document_bytes: int = 256 * 2**20
    cache_dir: str | None = None

    def validate(self) -> None:
        """Raises `ConfigError` for values that cannot work together."""
        if self.sources and self.path is not None:
            raise ConfigError("path and sources are both set: keep one of them")
        if self.sources and (self.format, self.text_field) != ("auto", "text"):
            raise ConfigError("format and text_field belong to path: give them in each source")
        for path in (source.path for source in self._all_sources):
            if not is_utf8(path):
                raise ConfigError(f"{printable(path)!r} is not UTF-8: rename the file or folder")
        for name in (*(source.path for source in self._all_sources), self.cache_dir):
            if name is not None and is_url(name):
                Objects.at(name)
        if self.sequence_length < 2:
            raise ConfigError(f"sequence_length is {self.sequence_length}; it must be >= 2")
        if not 0 <= self.heldout_fraction < 1:
            raise ConfigError(f"heldout_fraction is {self.heldout_fraction}; it must be in [0, 1)")
        if self.max_document_bytes < 1 or self.max_bad_records < 0:
            raise ConfigError("max_document_bytes must be >= 1, max_bad_records >= 0")
        # 256 byte pieces and 4 control pieces are always there; text needs some more.
        if self.tokenizer == TRAIN_TOKENIZER and self.vocab_size < 300:
            raise ConfigError(f"vocab_size is {self.vocab_size}; a trained tokenizer needs >= 300")
        self._check_stages()

    def _check_stages(self) -> None:
        for name, weights in [
            ("sources weights", tuple(s.weight for s in self._all_sources)),
            *((f"stages[{i}].weights", s.weights) for i, s in enumerate(self.stages)),
        ]:
            if len(weights) != len(self._all_sources):
                raise ConfigError(
                    f"{name} has {len(weights)} entries for {len(self._all_sources)} sources"
                )
            if any(not math.isfinite(w) or w < 0 for w in weights) or sum(weights) <= 0:
                raise ConfigError(f"{name} is {weights}: weights must be >= 0 and not all 0")
        previous = 0
        for i, stage in enumerate(self.stages):
            last = i == len(self.stages) - 1
            if last != (stage.until_step is None):
                raise ConfigError(
                    "stages: every stage but the last needs until_step, and the last "
                    "has none, so that the run never leaves the stages"
                )
            if stage.until_step is not None:
                if stage.until_step <= previous:
                    raise ConfigError(
                        f"stages[{i}].until_step is {stage.until_step}; it must be above {previous}"
                    )
                previous = stage.until_step

    @property
    def _all_sources(self) -> tuple[Source, ...]:
        if self.sources:
            return self.sources
        path = PYTHON_STDLIB if self.path is None else self.path
        return (Source(path=path, format=self.format, text_field=self.text_field),)

    @property
    def _all_stages(self) -> tuple[Stage, ...]:
        return self.stages or (Stage(weights=tuple(s.weight for s in self._all_sources)),)

    @property
    def _in_use(self) -> list[int]:
        """Indices of the sources that some stage draws from."""
        shares = zip(*(stage.weights for stage in self._all_stages), strict=True)
        return [i for i, weights in enumerate(shares) if any(weights)]

    @property
    def resolved_sources(self) -> tuple[Source, ...]:
        """``sources``, or the one source that ``path`` stands for; those that are drawn from."""
        return tuple(self._all_sources[i] for i in self._in_use)

    @property
    def resolved_stages(self) -> tuple[Stage, ...]:
        """``stages``, or the one open-ended stage of the sources' own weights.

        Their weights follow ``resolved_sources``.
        """
        return tuple(
            replace(stage, weights=tuple(stage.weights[i] for i in self._in_use))
            for stage in self._all_stages
        )

    @property
    def cache_path(self) -> Path:
        """Folder of the tokenised corpora and trained tokenizers on this machine."""
        if self.cache_dir is not None and not is_url(self.cache_dir):
            return Path(self.cache_dir).expanduser()
        return cache_folder()

    def kept(self, name: str) -> Objects | None:
        """Where a folder of the cache is kept for other machines, None if nowhere."""
        if self.cache_dir is None or not is_url(self.cache_dir):
            return None
        return Objects.at(self.cache_dir) / name


@dataclass(frozen=True)
class ConversationConfig(DataConfig):
    """Where conversations come from, and how they become rows of tokens.

    As of texts, but for what follows. A conversation stands in a row as a whole, apart from the
    others, and what the assistant says is learned.

    Attributes:
      chat_template: ``auto`` (the tokenizer's own, ``plain`` if it has none), ``chatml``,
        ``plain``, or the path of a Jinja file. The run keeps it with its tokenizer.
      too_long: what becomes of a conversation that does not fit in a row: ``refuse`` stops and
        names it, ``skip`` leaves it out, ``truncate`` cuts its end off; both are counted and said.
    """

    packing: Literal["split", "fit"] = "fit"
    chat_template: str = "auto"
    too_long: Literal["refuse", "skip", "truncate"] = "refuse"

    def validate(self) -> None:
        super().validate()
        if self.packing != "fit" or not self.isolate:
            raise ConfigError(
                "conversations are packed whole and apart from each other: leave packing and "
                "isolate out"
            )
        if any(s.format == "text" or s.text_field != "text" for s in self._all_sources):
            raise ConfigError(
                "conversations are records with fields of their own (messages; or prompt and "
                "completion): leave text_field out, and format: text"
            )


@dataclass(frozen=True)
class PreferenceConfig(ConversationConfig):
    """Where judged answers come from, and how they become rows of tokens.

    As of conversations, but that only the last answer of each is looked at. A row holds examples:
    two texts each, which lie side by side at the same place of the row's two halves of
    ``sequence_length`` tokens.

    Attributes:
      examples_per_row: at most so many share a row. 1: a step has exactly ``batch_size`` of them.
    """

    examples_per_row: int = 1

    def validate(self) -> None:
        super().validate()
        if not 1 <= self.examples_per_row <= self.sequence_length:
            raise ConfigError(
                f"examples_per_row is {self.examples_per_row}; it must be at least 1, and no more "
                f"than the {self.sequence_length} tokens of a row"
            )
