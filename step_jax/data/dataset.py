"""The training stream: any batch from its step number, read ahead by Grain."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from step_jax.core.errors import DataError
from step_jax.data.cache import Prepared, prepare
from step_jax.data.config import DataConfig
from step_jax.data.corpus import TokenCache
from step_jax.data.heldout import Heldout, row_slice
from step_jax.data.mixture import Mixture, MixtureStage, integer_weights
from step_jax.data.packing import Batch, Pieces, Plan, derive_key, empty_batch, fill, make_plan
from step_jax.tokenizers.base import Tokenizer

_ORDER_VERSION = 1  # raise when the same configuration would give another order
_EPOCHS_WORTH = 4  # up to here, repeated text is nearly as good as new text
_COUNT_ROWS = 2**18  # rows looked at together, to bound the memory


@dataclass(frozen=True)
class _Corpus:
    """Epoch plans of one source; the last two used are kept (a batch may span the border)."""

    documents: Any  # ``Documents``, or what else the rows of a data set are made of
    plan_of: Callable[[int], Plan]
    rows: int

    @classmethod
    def build(cls, documents: Any, config: DataConfig, key: int) -> _Corpus:
        plans: dict[int, Plan] = {}
        lock = threading.Lock()  # Grain reads from several threads

        def plan_of(epoch: int) -> Plan:
            with lock:
                plan = plans.pop(epoch, None) or make_plan(
                    config.packing,
                    documents.offsets,
                    config.sequence_length,
                    derive_key(key, epoch),
                    documents.given,
                )
                plans[epoch] = plan  # last used comes last
                while len(plans) > 2:
                    del plans[next(iter(plans))]
                return plan

        return cls(documents, plan_of, plan_of(0).rows)


class Samples(NamedTuple):
    """What rows are made of: runs of consecutive targets of one document, all int64 (P,)."""

    row: np.ndarray  # in the global batch
    offset: np.ndarray  # place in the row
    source: np.ndarray  # in the order of `DataConfig.resolved_sources`
    epoch: np.ndarray  # of that source
    document: np.ndarray  # of that source's training documents; of judged answers: example
    start: np.ndarray  # first target's place in the document
    length: np.ndarray


class TextDataset:
    """Batches of packed text, a pure function of (configuration, seed, step).

    A global batch is the same for every number of processes; a process holds its contiguous
    slice of the rows. Nothing but the step is needed to go on where a run stopped.

    Attributes:
      tokenizer: the tokenizer the corpora were made with.
      heldout: the documents kept for evaluation.
      fingerprint: JSON-able description of everything that fixes the order of the data.
        Store it in checkpoints and hand it to `check` when resuming.
    """

    def __init__(
        self,
        config: DataConfig,
        prepared: Prepared,
        *,
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """See `build`, which also prepares the corpora."""
        self.config, self.batch_size, self.seed = config, batch_size, seed
        self.tokenizer: Tokenizer = prepared.tokenizer
        self._caches = prepared.caches
        self._low, self._high = row_slice(batch_size, process_index, process_count)
        self._corpora = [
            # By content and not by place in the list, so that adding a source changes no order.
            _Corpus.build(self._units(cache), config, derive_key(seed, cache.digest))
            for cache in prepared.caches
        ]
        self.mixture = Mixture(_mixture_stages(config, batch_size))
        self._check_size()
        self.heldout = Heldout.of(prepared.caches, prepared.tokenizer)
        self.fingerprint: dict[str, Any] = {
            "order_version": _ORDER_VERSION,
            "tokenizer": self.tokenizer.hash,
            "sequence_length": config.sequence_length,
            "packing": config.packing,
            "isolate": config.isolate,
            "batch_size": batch_size,
            "seed": seed,
            "stages": self._stages(),
        }

    def _units(self, cache: TokenCache) -> Any:
        """What rows are made of: see ``_Corpus``."""
        return cache.train

    @classmethod
    def build(
        cls,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        tokenizer: Tokenizer | None = None,
        report: Callable[[str], None] = lambda message: None,
    ) -> TextDataset:
        """Prepares the corpora (see `cache.prepare`) and opens them for training.

        Args:
          batch_size: rows of the global batch; a multiple of ``process_count``.
          seed: fixes the order of documents and rows.
          tokenizer: to use instead of the configuration's.
          report: called with one line of text when something takes a while.

        Raises:
          DataError: no text, damaged or too many bad records, or less than one batch.
          ConfigError: the batch does not divide among the processes.
        """
        row_slice(batch_size, process_index, process_count)
        return cls(
            config,
            prepare(config, report, tokenizer),
            batch_size=batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
        )

    def _check_size(self) -> None:
        for source, cache, corpus in zip(
            self.config.resolved_sources, self._caches, self._corpora, strict=True
        ):
            if corpus.rows < self.batch_size and len(self._corpora) == 1:
                needed = self.batch_size * self.config.sequence_length
                raise DataError(
                    f"data path {source.path!r} is too small: {len(cache.train.tokens)} training "
                    f"tokens make {corpus.rows} rows of {self.config.sequence_length}, and one "
                    f"batch has {self.batch_size} rows ({needed} tokens). Give more text, or "
                    "lower the batch size or data.sequence_length"
                )

    def _stages(self) -> list[list[Any]]:
        firsts = [stage.first // self.batch_size for stage in self.mixture.stages]
        return [
            [
                first,
                until,
                [[c.digest, w] for c, w in zip(self._caches, stage.weights, strict=True) if w],
            ]
            for first, until, stage in zip(
                firsts, [*firsts[1:], None], self.mixture.stages, strict=True
            )
        ]

    @property
    def tokens_per_epoch(self) -> int:
        """Targets in one epoch of every source, those of a conversation's questions included."""
        return sum(corpus.documents.pairs for corpus in self._corpora)

    @property
    def tokens_learned(self) -> int:
        """Targets in one epoch of every source that carry loss."""
        return sum(corpus.documents.learned for corpus in self._corpora)

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one epoch of every source; the last may be part padding."""
        return sum(corpus.rows for corpus in self._corpora)

    @property
    def skipped_paths(self) -> list[Path]:
        """For each source the JSON lines that name what was left out, and why."""
        return [cache.skipped for cache in self._caches]

    def epochs(self, step: int) -> list[float]:
        """How often each source has been read before ``step``, in config order."""
        rows = self.mixture.counts(step * self.batch_size)
        return [float(n / c.rows) for n, c in zip(rows, self._corpora, strict=True)]

    def notes(self, total_steps: int) -> list[str]:
        """What to know before training for ``total_steps``: sources that are read many times."""
        return [
            f"{source.path} is read {epochs:.3g} times over ({corpus.documents.pairs:,} tokens); "
            f"more than {_EPOCHS_WORTH} epochs teach little (arXiv 2305.16264)"
            for source, corpus, epochs in zip(
                self.config.resolved_sources, self._corpora, self.epochs(total_steps), strict=True
            )
            if epochs > _EPOCHS_WORTH
        ]

    def counters(self) -> dict[str, int]:
        """What was read, left out, cut and padded, summed over the sources.

        ``tokens_dropped`` compares the plan of an epoch with the corpus; it is 0.
        """
        total: dict[str, int] = {}
        for cache in self._caches:
            for name, value in cache.counters.items():
                total[name] = total.get(name, 0) + value
        placed = cut = 0
        for corpus in self._corpora:
            cut -= len(corpus.documents.offsets) - 1
            for first in range(0, corpus.rows, _COUNT_ROWS):
                rows = np.arange(first, min(first + _COUNT_ROWS, corpus.rows))
                lengths = corpus.plan_of(0).pieces(rows).length
                placed += int(lengths.sum())
                cut += len(lengths)
        total["rows_per_epoch"] = self.rows_per_epoch
        total["cuts_per_epoch"] = cut
        total["padding_per_epoch"] = self.rows_per_epoch * self.config.sequence_length - placed
        total["tokens_dropped"] = self.tokens_per_epoch - placed
        return total

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of ``step``.

        Returns:
          tokens, targets, segments, positions int32 (b, T) and weights float32 (b, T), where
          b = batch_size / process_count. ``weights`` is 1 on every target (of conversations: that
          the assistant said) and 0 elsewhere. ``segments`` is 0 on padding.
        """
        batch = empty_batch(
            self._high - self._low, self.config.sequence_length, self.tokenizer.pad_id
        )
        for k, _, slots, pieces in self._pieces(step):
            fill(
                batch,
                slots,
                pieces,
                self._corpora[k].documents.tokens,
                said=self._corpora[k].documents.said,
                bos_id=self.tokenizer.document_borders()[0],
                pad_id=self.tokenizer.pad_id,
                isolate=self.config.isolate,
            )
        return batch

    def samples(self, step: int) -> Samples:
        """What this process's rows of the batch of ``step`` are made of.

        Over all processes and steps of an epoch of a source, whatever their number at each step,
        every target of every document is there once.
        """
        found = []
        for k, epoch, slots, pieces in self._pieces(step):
            offsets = self._corpora[k].documents.offsets
            document = np.searchsorted(offsets, pieces.start, side="right") - 1
            row, begin = self._low + slots[pieces.slot], pieces.start - offsets[document]
            source, epochs = np.full_like(row, k), np.full_like(row, epoch)
            found.append((row, pieces.offset, source, epochs, document, begin, pieces.length))
        columns = [np.concatenate(column) for column in zip(*found, strict=True)]
        order = np.lexsort([columns[1], columns[0]])
        return Samples(*(column[order] for column in columns))

    def _pieces(self, step: int) -> Iterator[tuple[int, int, np.ndarray, Pieces]]:
        """(source, its epoch, the rows of this process's batch that it fills, their pieces)."""
        rows_b = step * self.batch_size + np.arange(self._low, self._high, dtype=np.int64)
        source_b, local_b = self.mixture.locate(rows_b)
        for k in np.unique(source_b):
            corpus = self._corpora[k]
            epoch_b, row_b = np.divmod(local_b, corpus.rows)
            for epoch in np.unique(epoch_b[source_b == k]):
                slots = np.flatnonzero((source_b == k) & (epoch_b == epoch))
                pieces = corpus.plan_of(int(epoch)).pieces(row_b[slots])
                yield int(k), int(epoch), slots, pieces

    def iterate(self, start_step: int = 0, *, prefetch: int = 4) -> BatchIterator:
        """Batches from ``start_step`` on, without end, read ahead in the background."""
        return BatchIterator(self, start_step, prefetch)

    def check(self, fingerprint: dict[str, Any], step: int) -> None:
        """Raises `DataError` unless this dataset goes on where a stored one was at ``step``.

        Sources may be added and weights may change from ``step`` on (write the past as a
        stage with its own weights); what was trained on before must be the same.
        """
        saved_tokenizer = fingerprint.get("tokenizer", "")
        self.tokenizer.require(saved_tokenizer, "the checkpoint")
        for name, now in self.fingerprint.items():
            saved = fingerprint.get(name)
            if name == "stages":
                saved, now = _until(saved, step), _until(now, step)
                hint = (
                    "the texts or their weights before this step are not the same. Restore the "
                    "texts, or keep the old weights in data.stages up to this step"
                )
            elif name == "batch_size":
                hint = f"set training.batch_size: {saved}, or start a new run"
            else:
                hint = "set it back, or start a new run"
            if saved != now:
                raise DataError(
                    f"the data do not go on where the checkpoint of step {step} stopped: "
                    f"{name} was {saved} and is {now}; {hint}"
                )


def _mixture_stages(config: DataConfig, batch_size: int) -> list[MixtureStage]:
    stages = config.resolved_stages
    firsts = [0, *(stage.until_step or 0 for stage in stages[:-1])]
    return [
        MixtureStage(first * batch_size, integer_weights(stage.weights))
        for first, stage in zip(firsts, stages, strict=True)
    ]


def _until(stages: list[list[Any]] | None, step: int) -> list[list[Any]]:
    return [
        [first, step if until is None else min(until, step), weights]
        for first, until, weights in stages or []
        if first < step
    ]


class _Batches:
    """The dataset as a random-access source of Grain: index = step."""

    def __init__(self, dataset: TextDataset):
        self._dataset = dataset

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> Batch:
        return self._dataset.batch(int(step))


class BatchIterator:
    """Batches in order, read ahead by a thread.

    Attributes:
      step: the step whose batch comes next; all the state there is.
      wait_seconds: time the last `next` waited for data.
    """

    def __init__(self, dataset: TextDataset, start_step: int, prefetch: int):
        import grain

        self.wait_seconds = 0.0
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        batches = grain.MapDataset.source(_Batches(dataset))
        self._iterator = iter(batches.to_iter_dataset(options))
        self._iterator.set_state({"next_index": start_step})
        self._iterator.start_prefetch()

    @property
    def step(self) -> int:
        return self._iterator.get_state()["next_index"]

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = next(self._iterator)
        self.wait_seconds = time.perf_counter() - start
        return batch

    def close(self) -> None:
        """Stops the reading thread."""
        self._iterator.close()
