"""Held-out documents: each token scored once, and what gzip and xz need for the same bytes."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from step_jax.core.errors import ConfigError
from step_jax.data.cache import Documents, TokenCache
from step_jax.data.packing import Batch, FitPlan, empty_batch, fill, permutation
from step_jax.tokenizers.base import Tokenizer

_COMPRESS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Heldout:
    """Documents that training never sees.

    Attributes:
      corpora: tokens of each source's held-out documents.
      bytes: UTF-8 bytes of the documents. Bits per byte is the summed loss over all batches
        in nats / ln 2 / bytes.
      tokens: targets in all batches together, the closing eos of each document included.
      lossy: what the tokenizer loses of the text; bits per byte then mean nothing.
    """

    corpora: tuple[Documents, ...]
    raws: tuple[np.ndarray, ...]
    bytes_of: tuple[np.ndarray, ...]
    bos_id: int
    pad_id: int
    lossy: str | None = None

    @classmethod
    def of(cls, caches: tuple[TokenCache, ...], tokenizer: Tokenizer) -> Heldout:
        """The held-out documents of prepared corpora."""
        return cls(
            corpora=tuple(cache.heldout for cache in caches),
            raws=tuple(cache.heldout_raw for cache in caches),
            bytes_of=tuple(cache.heldout_bytes for cache in caches),
            bos_id=tokenizer.document_borders()[0],
            pad_id=tokenizer.pad_id,
            lossy=tokenizer.lossy,
        )

    @property
    def documents(self) -> int:
        return sum(len(counts) for counts in self.bytes_of)

    @property
    def bytes(self) -> int:
        return int(sum(counts.sum() for counts in self.bytes_of))

    @property
    def tokens(self) -> int:
        return sum(len(corpus.tokens) for corpus in self.corpora)

    def subset(self, tokens: int) -> Heldout:
        """Whole documents of at least ``tokens`` tokens together, for quick evaluations.

        Documents are taken in an order that depends on nothing but their count.
        """
        picked: list[list[int]] = [[] for _ in self.corpora]
        owner = np.repeat(np.arange(len(self.corpora)), [len(b) for b in self.bytes_of])
        number = np.concatenate([np.arange(len(b)) for b in self.bytes_of])
        taken = 0
        for i in permutation(len(owner), key=0):
            if taken >= tokens:
                break
            offsets = self.corpora[owner[i]].offsets
            picked[owner[i]].append(int(number[i]))
            taken += int(offsets[number[i] + 1] - offsets[number[i]])
        corpora, raws = [], []
        for corpus, raw, counts, chosen in zip(
            self.corpora, self.raws, self.bytes_of, picked, strict=True
        ):
            corpora.append(Documents(*_select(corpus.tokens, corpus.offsets, sorted(chosen))))
            ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
            raws.append(_select(raw, ends, sorted(chosen))[0])
        bytes_of = [b[sorted(chosen)] for b, chosen in zip(self.bytes_of, picked, strict=True)]
        return replace(self, corpora=tuple(corpora), raws=tuple(raws), bytes_of=tuple(bytes_of))

    def batches(
        self,
        batch_size: int,
        sequence_length: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[Batch]:
        """Batches in which every held-out token is a target exactly once.

        Documents are isolated and packed without cuts unless longer than a row. Every
        process gets the same number of batches, each of ``batch_size / process_count`` rows
        (the same keys, shapes and dtypes as in training); missing rows are padding.
        """
        low, high = row_slice(batch_size, process_index, process_count)
        plans = [FitPlan(c.offsets, sequence_length, key=0) for c in self.corpora]
        owner = np.repeat(np.arange(len(plans)), [plan.rows for plan in plans])
        row = np.concatenate([np.arange(plan.rows) for plan in plans])
        for start in range(0, len(owner), batch_size):
            mine = slice(start + low, min(start + high, len(owner)))
            batch = empty_batch(high - low, sequence_length, self.pad_id)
            for k in np.unique(owner[mine]):
                slots = np.flatnonzero(owner[mine] == k)
                fill(
                    batch,
                    slots,
                    plans[k].pieces(row[mine][slots]),
                    self.corpora[k].tokens,
                    bos_id=self.bos_id,
                    pad_id=self.pad_id,
                    isolate=True,
                )
            yield batch

    def compressed_bits_per_byte(self) -> dict[str, float]:
        """Bits per byte of ``gzip -9`` and ``xz -6`` over the documents, joined.

        Of more than 64 MiB only the first 64 MiB are compressed.
        """
        data = b"".join(bytes(raw[:_COMPRESS_BYTES]) for raw in self.raws)[:_COMPRESS_BYTES]
        if not data:
            return {}
        return {
            "gzip": len(gzip.compress(data, 9, mtime=0)) * 8 / len(data),
            "xz": len(lzma.compress(data, preset=6)) * 8 / len(data),
        }


def row_slice(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    """The rows [low, high) of a global batch that belong to a process."""
    if batch_size < 1 or batch_size % process_count:
        raise ConfigError(
            f"batch size {batch_size} does not divide among {process_count} processes; make it a "
            f"positive multiple of {process_count}"
        )
    rows = batch_size // process_count
    return process_index * rows, (process_index + 1) * rows


def _select(
    values: np.ndarray, offsets: np.ndarray, chosen: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    parts = [np.asarray(values[offsets[i] : offsets[i + 1]]) for i in chosen]
    lengths = np.array([len(part) for part in parts], np.int64)
    joined = np.concatenate([values[:0], *parts])
    return joined, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
