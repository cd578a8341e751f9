"""Preparation: documents become memory-mapped token files, once, whole or not at all.

A tokenised corpus is a folder ``tokens-<key>`` with, for each split (train, heldout),

  <split>.bin          tokens of all documents, texts closed by eos; uint16 or uint32
  <split>.offsets.npy  int64 (documents + 1,), borders of the documents in <split>.bin

  <split>.said.bin     uint8, of conversations: whether a token is learned

and ``heldout.raw`` (UTF-8 text of the held-out documents), ``heldout.bytes.npy`` (int64, bytes
of each), ``skipped.jsonl`` (what of the files was left out, with the reason) and ``meta.json``.
The key covers names and contents of the source files, the tokenizer and the options;
``meta.json`` holds digests of the tokens themselves, which identify the data in checkpoints.
Beside them lie, for each source, what its files held (``files-<key>.json``), what it holds out
beyond the rule (``split-<key>.json``) and everything left out of it (``skipped-<key>.jsonl``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from step_jax.core.errors import DataError, DiskFullError
from step_jax.core.files import write_whole
from step_jax.core.text import printable
from step_jax.data.config import TRAIN_TOKENIZER, ConversationConfig, DataConfig, Source
from step_jax.data.conversations import Conversations
from step_jax.data.files import (
    CACHE_TAG,
    CACHE_TAG_TEXT,
    Skip,
    SourceFile,
    content_digests,
    count_skips,
    list_files,
    list_skips,
    root_of,
    stamp_of,
)
from step_jax.data.left_out import in_words, no_text, too_many_bad
from step_jax.data.remote import obtain, publish
from step_jax.data.sources import Document, Encoded, Records, read_file
from step_jax.data.split import Choice, choose, split_documents
from step_jax.data.texts import Texts
from step_jax.tokenizers.base import Tokenizer
from step_jax.tokenizers.files import chat_tokenizer, load_tokenizer
from step_jax.tokenizers.sentencepiece import train_sentencepiece

_VERSION = 3
_TRAINING_SAMPLE_BYTES = 24 * 2**20  # more text changes a BPE vocabulary little
_ENCODE_BATCH_BYTES = 4 * 2**20
Report = Callable[[str], None]


class Documents(NamedTuple):
    """Tokens of many documents: ``tokens`` (n,), ``offsets`` int64 (documents + 1,).

    ``said`` uint8 (n,): which tokens are learned. None: all of them, after a token that stands
    before each document; else a document's first token is what the others stand after.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    said: np.ndarray | None = None

    @property
    def given(self) -> int:
        """Tokens at the beginning of each document that are inputs only."""
        return 0 if self.said is None else 1

    @property
    def pairs(self) -> int:
        """Pairs of input and target that all documents give."""
        return len(self.tokens) - self.given * (len(self.offsets) - 1)

    @property
    def learned(self) -> int:
        """Targets that carry loss."""
        return len(self.tokens) if self.said is None else int(self.said.sum(dtype=np.int64))


@dataclass(frozen=True)
class TokenCache:
    """One tokenised corpus on disk, memory-mapped.

    ``digest`` identifies the training tokens. ``counters`` counts what was read and left out,
    ``skipped`` is the file that names everything left out.
    """

    directory: Path
    digest: str
    counters: dict[str, int]
    skipped: Path
    train: Documents
    heldout: Documents
    heldout_bytes: np.ndarray
    heldout_raw: np.ndarray


class Prepared(NamedTuple):
    """What training needs on disk: the tokenizer and one cache for each source in use."""

    tokenizer: Tokenizer
    caches: tuple[TokenCache, ...]


@dataclass(frozen=True)
class _Listing:
    """A source as it lies on disk now; ``key`` stands for names and contents of its files."""

    source: Source
    records: Records
    files: list[SourceFile]
    skips: list[Skip]
    key: str = ""

    def documents(self, max_document_bytes: int) -> Iterator[Document]:
        for file in self.files:
            for item in read_file(file, self.records, max_document_bytes):
                if isinstance(item, Document):
                    yield item


def prepare(
    config: DataConfig,
    report: Report = lambda message: None,
    tokenizer: Tokenizer | None = None,
    records: Records | None = None,
) -> Prepared:
    """Trains or loads the tokenizer and tokenises every source; both are reused when current.

    Safe to call from many processes at once: one does the work, the others wait for it, and
    a killed one leaves nothing that is mistaken for a finished corpus.

    Args:
      tokenizer: to use instead of the configuration's.
      records: what the records are, where the configuration's kind does not say.

    Raises:
      ConfigError: the configuration cannot work (see `DataConfig.validate`).
      DataError: no text, a damaged file, too many bad records.
      DiskFullError: the cache folder has no space left.
    """
    config.validate()
    try:
        _mark_cache(config.cache_path)
        listings = [
            _list(source, config, report, records or _records(config, source))
            for source in config.resolved_sources
        ]
        choices = [_choice(listing, config, report) for listing in listings]
        choice = functools.reduce(Choice.__or__, choices)
        if tokenizer is None:
            tokenizer = _tokenizer(config, listings, choice, report)
        else:
            _usable(tokenizer, config)
        if isinstance(config, ConversationConfig):
            tokenizer = chat_tokenizer(tokenizer, config.chat_template)
        caches = tuple(
            _prepare_source(listing, config, tokenizer, own, choice, report)
            for listing, own in zip(listings, choices, strict=True)
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
    config, texts = DataConfig(), Texts(text_field)
    sources = [Source(path=str(path)) for path in paths]
    listings = [_Listing(source, texts, *list_files(source)) for source in sources]
    choices = [_choose(listing, config) for listing in listings]
    choice = functools.reduce(Choice.__or__, choices, Choice())
    tokenizer = _train(listings, vocab_size, config, choice)
    tokenizer.save(out)
    return tokenizer


def _mark_cache(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CACHE_TAG).exists():
        (folder / CACHE_TAG).write_text(CACHE_TAG_TEXT)


def _records(config: DataConfig, source: Source) -> Records:
    if isinstance(config, ConversationConfig):
        return Conversations(config.sequence_length, config.too_long)
    return Texts(source.text_field)


def _list(source: Source, config: DataConfig, report: Report, records: Records) -> _Listing:
    files, skips = list_files(source)
    root = os.path.abspath(root_of(source))
    memo = config.cache_path / f"files-{_key(root)}.json"
    with _lock(memo, report):
        digests = content_digests(files, memo, report)
    named = [(f.name, f.format, digest) for f, digest in zip(files, digests, strict=True)]
    return _Listing(source, records, files, skips, _key(named))


def _choice(listing: _Listing, config: DataConfig, report: Report) -> Choice:
    """See `choose`; kept, so that a prepared corpus is not read to know it."""
    options = [*listing.records.key, config.heldout_fraction, config.max_document_bytes]
    path = config.cache_path / f"split-{_key(listing.key, options)}.json"
    with _lock(path, report):
        try:
            held, cut = json.loads(path.read_bytes())
            return Choice(frozenset(held), frozenset(cut))
        except (OSError, ValueError, TypeError):
            choice = _choose(listing, config)
            write_whole(path, json.dumps(choice.to_json()))
            return choice


def _choose(listing: _Listing, config: DataConfig) -> Choice:
    documents = listing.documents(config.max_document_bytes)
    return choose(documents, config.heldout_fraction, listing.records.may_be_cut)


def _tokenizer(
    config: DataConfig, listings: list[_Listing], choice: Choice, report: Report
) -> Tokenizer:
    if config.tokenizer != TRAIN_TOKENIZER:
        return _usable(load_tokenizer(config.tokenizer), config)
    keys = [listing.key for listing in listings]
    weights = [listing.source.weight for listing in listings]
    fields = [field for listing in listings for field in listing.records.key]
    options = [config.vocab_size, config.heldout_fraction, config.max_document_bytes]
    path = config.cache_path / f"tokenizer-{_key(keys, weights, fields, options)}"
    with _lock(path, report):
        kept, model = config.kept(path.name), path / "tokenizer.model"
        if not model.exists() and not (kept and obtain(kept, path)):
            report(f"training a tokenizer of {config.vocab_size} pieces")
            _train(listings, config.vocab_size, config, choice).save(path)
            if kept:
                publish(path, kept)
    return load_tokenizer(path)


def _usable(tokenizer: Tokenizer, config: DataConfig) -> Tokenizer:
    """The tokenizer, if documents can be made of its tokens."""
    tokenizer.document_borders()
    if tokenizer.lossy and not config.lossy_tokenizer:
        raise DataError(
            f"{tokenizer.name} loses part of the text: {tokenizer.lossy}. A model would be "
            "trained on what is left, and its bits per byte would divide the loss by bytes that it "
            "never saw. Take another tokenizer (data.tokenizer: train makes one that loses "
            "nothing), or set data.lossy_tokenizer: true to go on without bits per byte"
        )
    return tokenizer


def _train(
    listings: list[_Listing], vocab_size: int, config: DataConfig, choice: Choice
) -> Tokenizer:
    """Trains on what is not held out. Sources share the sample by their weights; where all of
    them get theirs from stages only, evenly."""
    weights = [listing.source.weight for listing in listings]
    if not sum(weights):
        weights = [1.0] * len(listings)

    def texts() -> Iterator[str]:
        for listing, weight in zip(listings, weights, strict=True):
            if not weight:
                continue
            limit = int(_TRAINING_SAMPLE_BYTES * weight / sum(weights))
            documents = _sample(listing, limit, config.max_document_bytes)
            for document, held in split_documents(documents, config.heldout_fraction, choice):
                if not held:
                    yield listing.records.words(document)

    return train_sentencepiece(texts(), vocab_size)


def _sample(listing: _Listing, limit: int, max_document_bytes: int) -> Iterator[Document]:
    """About ``limit`` bytes of a source, files in hashed order, no file more than 1/8 of it.

    A source within the limit is read whole.
    """
    files, skips = listing.files, list(listing.skips)
    whole = sum(file.stamp.size for file in files) <= limit
    per_file = limit if whole else max(limit // 8, limit // len(files))
    found = taken = 0
    for file in sorted(files, key=lambda f: hashlib.sha256(f.name.encode()).digest()):
        from_file = 0
        for item in read_file(file, listing.records, max_document_bytes):
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
        raise DataError(no_text(listing.source, skips))


def _prepare_source(
    listing: _Listing,
    config: DataConfig,
    tokenizer: Tokenizer,
    own: Choice,
    choice: Choice,
    report: Report,
) -> TokenCache:
    """The cache of one source; ``choice`` is that of all sources and ``own`` its part of it,
    which its contents determine."""
    source = listing.source
    options = [*listing.records.key, config.heldout_fraction, config.max_document_bytes]
    more = listing.records.tokens_key(tokenizer)
    key = _key(listing.key, tokenizer.hash, options, (choice - own).to_json(), *more)
    directory = config.cache_path / f"tokens-{key}"
    root = os.path.abspath(root_of(source))
    skipped = config.cache_path / f"skipped-{_key(root, source.format, options)}.jsonl"
    with _lock(directory, report):
        kept, cache = config.kept(directory.name), _open(directory)
        if cache is None and kept and obtain(kept, directory):
            cache = _open(directory)
        if cache is None:
            report(f"tokenising {source.path} ({len(listing.files)} files)")
            _write(directory, listing, config, tokenizer, choice)
            if kept:
                publish(directory, kept)
            cache = _open(directory)
        if cache is None:
            raise DataError(f"{directory} was written but cannot be read back; check the disk")
        write_whole(skipped, _json_lines(listing.skips) + cache.skipped.read_bytes())
    if cache.counters["records_bad"] > config.max_bad_records:  # written under a larger budget
        raise too_many_bad(source, config, f"They are named in {skipped}")
    counters = dict(cache.counters)
    for name, count in count_skips(listing.skips).items():
        counters[name] = counters.get(name, 0) + count
    cache = replace(cache, counters=counters, skipped=skipped)
    if left_out := in_words(cache.counters, cache.skipped):
        report(f"{source.path}: {left_out}")
    return cache


def _write(
    directory: Path,
    listing: _Listing,
    config: DataConfig,
    tokenizer: Tokenizer,
    choice: Choice,
) -> None:
    prefix = f".{directory.name}.{socket.gethostname()}."
    for stale in directory.parent.glob(f"{prefix}*"):  # of a killed process: the lock is ours
        shutil.rmtree(stale, ignore_errors=True)
    temporary = directory.parent / f"{prefix}{os.getpid()}"
    temporary.mkdir()
    try:
        writer = _Writer(temporary, listing, config, tokenizer)
        documents = writer.documents()
        for document, held in split_documents(documents, config.heldout_fraction, choice):
            writer.add(document, held)
        writer.finish()
        if _open(directory) is None:  # else another host has finished the same work
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _SplitFile:
    """Appends documents of one split to its token file, and to that of what is said."""

    def __init__(self, path: Path, dtype: type):
        self.path, self.dtype = path, dtype
        self.stream = open(path, "wb")  # noqa: SIM115 (closed in finish)
        self.said = open(path.with_suffix(".said.bin"), "wb")  # noqa: SIM115
        self.digest = hashlib.sha256()
        self.lengths, self.byte_counts = array("q"), array("q")
        self.learned = 0

    def add(self, encoded: Encoded) -> None:
        data = encoded.ids.astype(self.dtype).tobytes()
        self.stream.write(data)
        self.digest.update(data)
        self.lengths.append(len(encoded.ids))
        self.byte_counts.append(len(encoded.text))
        if encoded.said is not None:
            said = encoded.said.astype(np.uint8).tobytes()
            self.said.write(said)
            self.digest.update(said)
            self.learned += sum(said)

    def finish(self) -> str:
        lengths = np.frombuffer(self.lengths, np.int64)
        self.digest.update(lengths.tobytes())
        for stream in (self.stream, self.said):
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        np.save(self.path.with_suffix(".offsets.npy"), offsets)
        return self.digest.hexdigest()


class _Writer:
    """Tokenises documents in batches and keeps the books."""

    def __init__(
        self, directory: Path, listing: _Listing, config: DataConfig, tokenizer: Tokenizer
    ):
        self.directory, self.source = directory, listing.source
        self.records, self.files = listing.records, listing.files
        self.config, self.tokenizer = config, tokenizer
        self.dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        self.train = _SplitFile(directory / "train.bin", self.dtype)
        self.heldout = _SplitFile(directory / "heldout.bin", self.dtype)
        self.raw = open(directory / "heldout.raw", "wb")  # noqa: SIM115 (closed in finish)
        self.skipped = open(directory / "skipped.jsonl", "wb")  # noqa: SIM115
        self.counters: Counter[str] = Counter()
        self.first_skips: list[Skip] = []
        self.waiting: list[tuple[Document, bool]] = []
        self.waiting_bytes = 0

    def documents(self) -> Iterator[Document]:
        """Documents of the files; what is left out goes to the report."""
        for file in self.files:
            for item in read_file(file, self.records, self.config.max_document_bytes):
                if isinstance(item, Document):
                    yield item
                else:
                    self.skip(item)
            if not _unchanged(file):
                raise DataError(
                    f"{printable(str(file.path))} was changed while it was read; start again "
                    "when nothing writes there"
                )

    def skip(self, skip: Skip) -> None:
        self.skipped.write(_json_lines([skip]))
        self.counters[f"skipped_{skip.reason}"] += 1
        self.counters["records_bad"] += skip.bad
        if len(self.first_skips) < 5:
            self.first_skips.append(skip)
        if self.counters["records_bad"] > self.config.max_bad_records:
            first = f"The first: {list_skips(self.first_skips)}"
            raise too_many_bad(self.source, self.config, first)

    def add(self, document: Document, held: bool) -> None:
        self.waiting.append((document, held))
        self.waiting_bytes += len(document.text)
        self.counters["documents_truncated"] += document.truncated_bytes > 0
        self.counters["bytes_truncated"] += document.truncated_bytes
        if self.waiting_bytes >= _ENCODE_BATCH_BYTES:
            self._encode()

    def _encode(self) -> None:
        made = self.records.encode([document for document, _ in self.waiting], self.tokenizer)
        for (_, held), parts in zip(self.waiting, made, strict=True):
            if isinstance(parts, Skip):
                self.skip(parts)
                continue
            for part in parts:
                (self.heldout if held else self.train).add(part)
                self.counters["tokens_truncated"] += part.cut
                if held:
                    self.raw.write(part.text)
        self.waiting, self.waiting_bytes = [], 0

    def finish(self) -> None:
        self._encode()
        if not len(self.train.lengths) and not len(self.heldout.lengths):
            raise DataError(no_text(self.source, self.first_skips))
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
        self.counters["files"] = len(self.files)
        self.counters["records_bad"] += 0  # named also where there are none
        for name, split in (("", self.train), ("heldout_", self.heldout)):
            self.counters[f"{name}documents"] = len(split.lengths)
            self.counters[f"{name}bytes"] = sum(split.byte_counts)
            self.counters[f"{name}tokens"] = sum(split.lengths)
            if split.learned:
                self.counters[f"{name}tokens_learned"] = split.learned
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
            said = _map(directory / f"{split}.said.bin", "uint8")
            if offsets[-1] != len(tokens) or len(said) not in (0, len(tokens)):
                return None
            conversations = any("tokens_learned" in name for name in meta["counters"])
            splits[split] = Documents(tokens, offsets, said if conversations else None)
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
        skipped=directory / "skipped.jsonl",
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


def _unchanged(file: SourceFile) -> bool:
    try:
        return stamp_of(file.path) == file.stamp
    except OSError:
        return False


def _json_lines(skips: Iterable[Skip]) -> bytes:
    return "".join(json.dumps(skip._asdict()) + "\n" for skip in skips).encode()


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([_VERSION, *parts]).encode()).hexdigest()[:16]
