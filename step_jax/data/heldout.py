"""Held-out documents: each token scored once, and what gzip and xz need for the same bytes.

A run keeps its own in a folder: ``<i>.tokens.npy``, ``<i>.offsets.npy``, ``<i>.raw.npy`` (uint8,
UTF-8 text), ``<i>.bytes.npy`` (int64, bytes of each document) and of conversations ``<i>.said.npy``
(uint8, what is learned) for source ``i``, and
``meta.json`` with the tokenizer's hash, the control ids, size and checksum of every file, and a
checksum of itself.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from step_jax.core.errors import ConfigError, DataError
from step_jax.core.files import sync_directory, write_synced
from step_jax.data.corpus import Documents, TokenCache
from step_jax.data.packing import Batch, FitPlan, empty_batch, fill, permutation
from step_jax.tokenizers.base import Tokenizer

_COMPRESS_BYTES = 64 * 2**20
_VERSION = 1
_META = "meta.json"
_CHUNK = 2**20


@dataclass(frozen=True)
class Heldout:
    """Documents that training never sees.

    Attributes:
      corpora: tokens of each source's held-out documents.
      bytes: UTF-8 bytes of the documents, of conversations those of the answers. Bits per byte
        is the summed loss over all batches in nats / ln 2 / bytes.
      tokens: targets in all batches together, the closing token of each document or answer
        included.
      lossy: what the tokenizer loses of the text; bits per byte then mean nothing.
      tokenizer: hash of the tokenizer that the tokens are of.
    """

    corpora: tuple[Documents, ...]
    raws: tuple[np.ndarray, ...]
    bytes_of: tuple[np.ndarray, ...]
    bos_id: int
    pad_id: int
    tokenizer: str
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
            tokenizer=tokenizer.hash,
        )

    def save(self, folder: Path) -> None:
        """Writes the documents to a folder, which appears whole or not at all.

        One that is there is replaced. Raises OSError as the file system says.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process of the same number
        temporary.mkdir()
        try:
            files = {}
            for name, values in self._arrays().items():
                with open(temporary / name, "wb") as stream:
                    np.save(stream, values)
                    stream.flush()
                    os.fsync(stream.fileno())
                files[name] = _size_and_checksum(temporary / name)
            meta = {
                "version": _VERSION,
                "tokenizer": self.tokenizer,
                "bos_id": self.bos_id,
                "pad_id": self.pad_id,
                "sources": len(self.corpora),
                "files": files,
            }
            whole = {"held_out": meta, "checksum": _checksum_of(meta)}
            write_synced(temporary / _META, json.dumps(whole, indent=1).encode())
            sync_directory(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
            sync_directory(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> Heldout:
        """The documents that `save` wrote, memory-mapped, every byte checked.

        Raises:
          DataError: there are none, they are damaged, or of another tokenizer.
        """
        try:
            whole = json.loads((folder / _META).read_bytes())
            meta = whole["held_out"]
            if _checksum_of(meta) != whole["checksum"]:
                raise ValueError(f"{_META} is not what was written")
            if meta["version"] != _VERSION:
                raise DataError(
                    f"{folder} is of version {meta['version']}; this step_jax reads {_VERSION}"
                )
            for name, expected in meta["files"].items():
                if _size_and_checksum(folder / name) != expected:
                    raise ValueError(f"{name} is not what was written")
            tokenizer.require(meta["tokenizer"], f"the held-out documents in {folder}")
            heldout = cls._opened(folder, meta, tokenizer)
        except DataError:
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            if not folder.exists():
                raise DataError(f"there are no held-out documents in {folder}") from error
            raise _damaged(folder, error) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(folder, error) from error
        return heldout

    @classmethod
    def _opened(cls, folder: Path, meta: dict, tokenizer: Tokenizer) -> Heldout:
        corpora, raws, bytes_of = [], [], []
        for i in range(meta["sources"]):
            tokens, offsets, raw, counts = (
                np.load(folder / f"{i}.{kind}.npy", mmap_mode="r")
                for kind in ("tokens", "offsets", "raw", "bytes")
            )
            said = None
            if f"{i}.said.npy" in meta["files"]:
                said = np.asarray(np.load(folder / f"{i}.said.npy", mmap_mode="r"))
            corpora.append(Documents(np.asarray(tokens), np.asarray(offsets), said))
            raws.append(np.asarray(raw))
            bytes_of.append(np.asarray(counts))
        ids = (int(meta["bos_id"]), int(meta["pad_id"]))
        arrays = (tuple(corpora), tuple(raws), tuple(bytes_of))
        return cls(*arrays, *ids, tokenizer.hash, tokenizer.lossy)

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {}
        parts = zip(self.corpora, self.raws, self.bytes_of, strict=True)
        for i, (corpus, raw, counts) in enumerate(parts):
            arrays[f"{i}.tokens.npy"] = corpus.tokens
            arrays[f"{i}.offsets.npy"] = corpus.offsets
            arrays[f"{i}.raw.npy"] = raw
            arrays[f"{i}.bytes.npy"] = counts
            if corpus.said is not None:
                arrays[f"{i}.said.npy"] = corpus.said
        return arrays

    def kept(self, folder: Path, tokenizer: Tokenizer, *, write: bool) -> Heldout:
        """The documents that a run held out when it began: those in ``folder``, else these.

        What a run is scored on stays the same however its texts change later. ``write`` is for
        the one process that saves these at the first start; the others hold the same ones.

        Raises:
          DataError: those in the folder are damaged or of another tokenizer.
        """
        if folder.exists():
            return Heldout.load(folder, tokenizer)
        if write:
            self.save(folder)
        return self

    @property
    def documents(self) -> int:
        return sum(len(counts) for counts in self.bytes_of)

    @property
    def bytes(self) -> int:
        return int(sum(counts.sum() for counts in self.bytes_of))

    @property
    def tokens(self) -> int:
        return sum(corpus.learned for corpus in self.corpora)

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
            said = None
            if corpus.said is not None:
                said, _ = _select(corpus.said, corpus.offsets, sorted(chosen))
            tokens_of = _select(corpus.tokens, corpus.offsets, sorted(chosen))
            corpora.append(Documents(*tokens_of, said))
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
        plans = [FitPlan(c.offsets, sequence_length, 0, c.given) for c in self.corpora]
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
                    said=self.corpora[k].said,
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


def _size_and_checksum(path: Path) -> list:
    state, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as stream:
        while data := stream.read(_CHUNK):
            state.update(data)
            size += len(data)
    return [size, state.hexdigest()]


def _checksum_of(meta: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(meta, sort_keys=True).encode())


def _damaged(folder: Path, error: Exception) -> DataError:
    return DataError(
        f"the held-out documents in {folder} are damaged ({error}). Restore the folder from a "
        "copy; they cannot be made again, since the texts may have changed"
    )


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
