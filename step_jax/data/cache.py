"""Preparation: documents become memory-mapped token files, once, whole or not at all.

A tokenised corpus is a folder ``tokens-<key>`` with, for each split (train, heldout),

  <split>.bin          tokens of all documents, each closed by eos; uint16 or uint32
  <split>.offsets.npy  int64 (documents + 1,), borders of the documents in <split>.bin

and ``heldout.raw`` (UTF-8 text of the held-out documents), ``heldout.bytes.npy`` (int64, bytes
of each), ``skipped.jsonl`` (everything left out, with the reason) and ``meta.json``.
The key covers names, sizes and times of the source files, the tokenizer and the options;
``meta.json`` holds digests of the tokens themselves, which identify the data in checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from step_jax.core.errors import DataError, DiskFullError
from step_jax.core.files import write_whole
from step_jax.data.config import TRAIN_TOKENIZER, DataConfig, Source
from step_jax.data.sources import (
    Document,
    Skip,
    SourceFile,
    list_files,
    read_file,
    split_documents,
)
from step_jax.tokenizers.base import Tokenizer
from step_jax.tokenizers.files import load_tokenizer
from step_jax.tokenizers.sentencepiece import train_sentencepiece

_VERSION = 1
_TRAINING_SAMPLE_BYTES = 24 * 2**20  # more text changes a BPE vocabulary little
_ENCODE_BATCH_BYTES = 4 * 2**20
Report = Callable[[str], None]


class Documents(NamedTuple):
    """Tokens of many documents: ``tokens`` (n,), ``offsets`` int64 (documents + 1,)."""

    tokens: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class TokenCache:
    """One tokenised corpus on disk, memory-mapped.

    ``digest`` identifies the training tokens. ``counters`` counts what was read and left out.
    """

    directory: Path
    digest: str
    counters: dict[str, int]
    train: Documents
    heldout: Documents
    heldout_bytes: np.ndarray
    heldout_raw: np.ndarray


class Prepared(NamedTuple):
    """What training needs on disk: the tokenizer and one cache for each source."""

    tokenizer: Tokenizer
    caches: tuple[TokenCache, ...]


def prepare(
    config: DataConfig,
    report: Report = lambda message: None,
    tokenizer: Tokenizer | None = None,
) -> Prepared:
    """Trains or loads the tokenizer and tokenises every source; both are reused when current.

    Safe to call from many processes at once: one does the work, the others wait for it, and
    a killed one leaves nothing that is mistaken for a finished corpus.

    Args:
      tokenizer: to use instead of the configuration's.

    Raises:
      ConfigError: the configuration cannot work (see `DataConfig.validate`).
      DataError: no text, a damaged file, too many bad records.
      DiskFullError: the cache folder has no space left.
    """
    config.validate()
    try:
        tokenizer = tokenizer or _tokenizer(config, report)
        caches = tuple(
            _prepare_source(source, config, tokenizer, report) for source in config.resolved_sources
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            error.errno,
            f"no space left for the tokenised corpus in {config.cache_path}. Free some space or "
            "set data.cache_dir to another disk",
        ) from error
    return Prepared(tokenizer, caches)


def train_tokenizer(
    paths: Iterable[str], out: str | Path, vocab_size: int = 4096, *, text_field: str = "text"
) -> Tokenizer:
    """Trains a SentencePiece model on files or folders and writes it to the folder ``out``."""
    sources = [Source(path=str(path), text_field=text_field) for path in paths]
    tokenizer = _train(sources, vocab_size, DataConfig())
    tokenizer.save(out)
    return tokenizer


def _tokenizer(config: DataConfig, report: Report) -> Tokenizer:
    if config.tokenizer != TRAIN_TOKENIZER:
        return _usable(load_tokenizer(config.tokenizer), config)
    sources = config.resolved_sources
    listed = [_file_key(list_files(source)[0]) for source in sources]
    weights = [source.weight for source in sources]
    fields = [source.text_field for source in sources]
    options = [config.vocab_size, config.heldout_fraction, config.max_document_bytes]
    path = config.cache_path / f"tokenizer-{_key(listed, weights, fields, options)}"
    with _lock(path, report):
        if not (path / "tokenizer.model").exists():
            report(f"training a tokenizer of {config.vocab_size} pieces")
            _train(sources, config.vocab_size, config).save(path)
    return load_tokenizer(path)


def _usable(tokenizer: Tokenizer, config: DataConfig) -> Tokenizer:
    """The tokenizer, if documents can be made of its tokens."""
    tokenizer.document_borders()
    if tokenizer.lossy and not config.lossy_tokenizer:
        raise DataError(
            f"{config.tokenizer} loses part of the text: {tokenizer.lossy}. A model would be "
            "trained on what is left, and its bits per byte would divide the loss by bytes that it "
            "never saw. Take another tokenizer (data.tokenizer: train makes one that loses "
            "nothing), or set data.lossy_tokenizer: true to go on without bits per byte"
        )
    return tokenizer


def _train(sources: Iterable[Source], vocab_size: int, config: DataConfig) -> Tokenizer:
    sources = list(sources)
    total = sum(source.weight for source in sources)

    def texts() -> Iterator[str]:
        for source in sources:
            limit = int(_TRAINING_SAMPLE_BYTES * source.weight / total)
            documents = _sample(source, limit, config.max_document_bytes)
            for document, held in split_documents(documents, config.heldout_fraction):
                if not held:
                    yield document.text

    return train_sentencepiece(texts(), vocab_size)


def _sample(source: Source, limit: int, max_document_bytes: int) -> Iterator[Document]:
    """About ``limit`` bytes of a source, files in hashed order, no file more than 1/8 of it.

    A source within the limit is read whole.
    """
    files, skips = list_files(source)
    whole = sum(file.size for file in files) <= limit
    per_file = limit if whole else max(limit // 8, limit // len(files))
    found = taken = 0
    for file in sorted(files, key=lambda f: hashlib.sha256(f.name.encode()).digest()):
        from_file = 0
        for item in read_file(file, source.text_field, max_document_bytes):
            if isinstance(item, Skip):
                skips.append(item)
                continue
            yield item
            found += 1
            from_file += len(item.text)
            if not whole and from_file >= per_file:
                break
        taken += from_file
        if not whole and taken >= limit:
            break
    if not found:
        raise DataError(_no_text(source, skips))


def _prepare_source(
    source: Source, config: DataConfig, tokenizer: Tokenizer, report: Report
) -> TokenCache:
    files, skips = list_files(source)
    options = [source.text_field, config.heldout_fraction, config.max_document_bytes]
    key = _key(_file_key(files), tokenizer.hash, options)
    directory = config.cache_path / f"tokens-{key}"
    with _lock(directory, report):
        cache = _open(directory)
        if cache is None:
            report(f"tokenising {source.path} ({len(files)} files)")
            _write(directory, files, skips, source, config, tokenizer)
            cache = _open(directory)
    if cache is None:
        raise DataError(f"{directory} was written but cannot be read back; check the disk")
    return cache


def _write(
    directory: Path,
    files: list[SourceFile],
    skips: list[Skip],
    source: Source,
    config: DataConfig,
    tokenizer: Tokenizer,
) -> None:
    prefix = f".{directory.name}.{socket.gethostname()}."
    for stale in directory.parent.glob(f"{prefix}*"):  # of a killed process: the lock is ours
        shutil.rmtree(stale, ignore_errors=True)
    temporary = directory.parent / f"{prefix}{os.getpid()}"
    temporary.mkdir()
    try:
        writer = _Writer(temporary, source, config, tokenizer)
        for skip in skips:
            writer.skip(skip)
        documents = writer.documents(files)
        for document, held in split_documents(documents, config.heldout_fraction):
            writer.add(document, held)
        writer.finish(len(files))
        if _open(directory) is None:  # else another host has finished the same work
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _SplitFile:
    """Appends documents of one split to its token file."""

    def __init__(self, path: Path, dtype: type):
        self.path, self.dtype = path, dtype
        self.stream = open(path, "wb")  # noqa: SIM115 (closed in finish)
        self.digest = hashlib.sha256()
        self.lengths, self.byte_counts = array("q"), array("q")

    def add(self, ids: np.ndarray, eos_id: int, byte_count: int) -> None:
        data = np.append(ids, eos_id).astype(self.dtype).tobytes()
        self.stream.write(data)
        self.digest.update(data)
        self.lengths.append(len(ids) + 1)
        self.byte_counts.append(byte_count)

    def finish(self) -> str:
        lengths = np.frombuffer(self.lengths, np.int64)
        self.digest.update(lengths.tobytes())
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        np.save(self.path.with_suffix(".offsets.npy"), offsets)
        return self.digest.hexdigest()


class _Writer:
    """Tokenises documents in batches and keeps the books."""

    def __init__(self, directory: Path, source: Source, config: DataConfig, tokenizer: Tokenizer):
        self.directory, self.source = directory, source
        self.config, self.tokenizer = config, tokenizer
        self.dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        self.train = _SplitFile(directory / "train.bin", self.dtype)
        self.heldout = _SplitFile(directory / "heldout.bin", self.dtype)
        self.raw = open(directory / "heldout.raw", "wb")  # noqa: SIM115 (closed in finish)
        self.skipped = open(directory / "skipped.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        self.counters: Counter[str] = Counter()
        self.first_skips: list[Skip] = []
        self.waiting: list[tuple[bytes, str, bool]] = []
        self.waiting_bytes = 0

    def documents(self, files: list[SourceFile]) -> Iterator[Document]:
        """Documents of the files; what is left out goes to the report."""
        for file in files:
            for item in read_file(file, self.source.text_field, self.config.max_document_bytes):
                if isinstance(item, Document):
                    yield item
                else:
                    self.skip(item)

    def skip(self, skip: Skip) -> None:
        self.skipped.write(json.dumps(skip._asdict()) + "\n")
        self.counters[f"skipped_{skip.reason}"] += 1
        self.counters["records_bad"] += skip.bad
        if len(self.first_skips) < 5:
            self.first_skips.append(skip)
        if self.counters["records_bad"] > self.config.max_bad_records:
            raise DataError(
                f"{self.source.path}: more than {self.config.max_bad_records} bad records "
                f"(data.max_bad_records). The first: {_list_skips(self.first_skips)}. Repair the "
                "file, or raise the limit to go on without them"
            )

    def add(self, document: Document, held: bool) -> None:
        text = self.tokenizer.as_read(document.text)
        data = text.encode()
        self.waiting.append((data, text, held))
        self.waiting_bytes += len(data)
        self.counters["documents_truncated"] += document.truncated_bytes > 0
        self.counters["bytes_truncated"] += document.truncated_bytes
        if self.waiting_bytes >= _ENCODE_BATCH_BYTES:
            self._encode()

    def _encode(self) -> None:
        _, eos_id = self.tokenizer.document_borders()
        ids = self.tokenizer.encode_batch([text for _, text, _ in self.waiting])
        for (data, _, held), tokens in zip(self.waiting, ids, strict=True):
            split = self.heldout if held else self.train
            split.add(tokens, eos_id, len(data))
            if held:
                self.raw.write(data)
        self.waiting, self.waiting_bytes = [], 0

    def finish(self, files: int) -> None:
        self._encode()
        if not len(self.train.lengths) and not len(self.heldout.lengths):
            raise DataError(_no_text(self.source, self.first_skips))
        if not len(self.train.lengths):
            raise DataError(
                f"{self.source.path}: every document was held out; lower data.heldout_fraction "
                f"({self.config.heldout_fraction}) or give more documents"
            )
        digests = {"train": self.train.finish(), "heldout": self.heldout.finish()}
        byte_counts = np.frombuffer(self.heldout.byte_counts, np.int64)
        np.save(self.directory / "heldout.bytes.npy", byte_counts)
        self.raw.close()
        self.skipped.close()
        self.counters["files"] = files
        for name, split in (("", self.train), ("heldout_", self.heldout)):
            self.counters[f"{name}documents"] = len(split.lengths)
            self.counters[f"{name}bytes"] = sum(split.byte_counts)
            self.counters[f"{name}tokens"] = sum(split.lengths)
        meta = {
            "version": _VERSION,
            "source": self.source.path,
            "tokenizer": self.tokenizer.hash,
            "dtype": np.dtype(self.dtype).name,
            "digests": digests,
            "counters": dict(sorted(self.counters.items())),
        }
        write_whole(self.directory / "meta.json", json.dumps(meta, indent=1).encode())


def _open(directory: Path) -> TokenCache | None:
    """Opens a finished corpus; None when there is none or its files are not whole."""
    try:
        meta = json.loads((directory / "meta.json").read_bytes())
        splits = {}
        for split in ("train", "heldout"):
            offsets = np.load(directory / f"{split}.offsets.npy", mmap_mode="r")
            tokens = _map(directory / f"{split}.bin", meta["dtype"])
            if offsets[-1] != len(tokens):
                return None
            splits[split] = Documents(tokens, offsets)
        byte_counts = np.load(directory / "heldout.bytes.npy")
        raw = _map(directory / "heldout.raw", "uint8")
        if len(raw) != byte_counts.sum():
            return None
    except (OSError, ValueError, KeyError):
        return None
    return TokenCache(
        directory=directory,
        digest=meta["digests"]["train"],
        counters=meta["counters"],
        heldout_bytes=byte_counts,
        heldout_raw=raw,
        **splits,
    )


def _map(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:  # mmap refuses an empty file
        return np.zeros(0, dtype)
    # As a plain array: slicing a `memmap` object costs several times more.
    return np.asarray(np.memmap(path, dtype, mode="r"))


@contextlib.contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    """One builder at a time on a host. The kernel drops the lock of a killed process.

    Where locks do not reach (other hosts of a network disk) two may build the same corpus;
    the renames keep even that correct.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"another process prepares {path.name}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _file_key(files: list[SourceFile]) -> list[tuple[str, str, int, int]]:
    return [(file.name, file.format, file.size, file.mtime_ns) for file in files]


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([_VERSION, *parts]).encode()).hexdigest()[:16]


def _no_text(source: Source, skips: list[Skip]) -> str:
    reasons = _list_skips(skips[:5]) or "no documents in its files"
    return (
        f"data path {source.path!r} holds no text ({reasons}). Point data.path at text files, "
        "JSONL, Parquet, Arrow or ArrayRecord files with a text field"
    )


def _list_skips(skips: list[Skip]) -> str:
    return "; ".join(f"{s.name}: {s.reason} {s.detail}".rstrip() for s in skips)
