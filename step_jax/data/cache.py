"""Preparation: documents become memory-mapped token files, once, whole or not at all.

A tokenised corpus is a folder ``tokens-<key>`` (``data.corpus``), made of parts (``data.parts``)
which lie in ``parts-<key>`` until all are there and which any number of processes and hosts make
together (``data.making``). The key covers names and contents of the source files, the tokenizer and
the options. Beside them lie, for each source, what its files held (``files-<key>.json``), what it
holds out beyond the rule (``split-<key>.json``) and everything left out of it
(``skipped-<key>.jsonl``).
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from socket import gethostname
from typing import NamedTuple

import numpy as np

from step_jax.core.digest import digest
from step_jax.core.errors import DataError, DiskFullError
from step_jax.core.files import seal, sealed, write_whole
from step_jax.data.config import TRAIN_TOKENIZER, ConversationConfig, DataConfig, Source
from step_jax.data.conversations import Conversations
from step_jax.data.corpus import (
    VERSION,
    DamagedPart,
    TokenCache,
    damaged,
    join,
    mend,
    open_corpus,
)
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
)
from step_jax.data.left_out import in_words, no_text, too_many_bad
from step_jax.data.making import Place, make_parts
from step_jax.data.parts import Part, Work, cut_parts, first_skips
from step_jax.data.remote import obtain, publish
from step_jax.data.sources import Document, Records, read_file
from step_jax.data.split import Choice, choose, split_documents
from step_jax.data.texts import Texts
from step_jax.tokenizers.base import Tokenizer
from step_jax.tokenizers.files import chat_tokenizer, load_tokenizer
from step_jax.tokenizers.sentencepiece import train_sentencepiece

_WHOLE = ".whole.json"  # beside a tokenizer that was trained here: the digest of its file
_TRAINING_SAMPLE_BYTES = 24 * 2**20  # more text changes a BPE vocabulary little
#: of a source's files, to a part: some ten seconds of one core; and the most parts of a source,
#: which are larger where they would be more
PART_BYTES, MOST_PARTS = 16 * 2**20, 4096
_ATTEMPTS = 3
Report = Callable[[str], None]


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
    *,
    workers: int | None = None,
    verify: bool = False,
) -> Prepared:
    """Trains or loads the tokenizer and tokenises every source; both are reused when current.

    Safe to call from many processes at once. Those of a host wait for the one that does its work,
    hosts with a common cache share it, and one that is killed leaves the parts that it finished and
    nothing that is mistaken for more.

    Args:
      tokenizer: to use instead of the configuration's.
      records: what the records are, where the configuration's kind does not say.
      workers: processes that tokenise a large source; one for each core by default.
      verify: read every byte of what is there already, also where it seems untouched.

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
            _prepare_source(listing, config, tokenizer, own, choice, workers, verify, report)
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
            held, cut = sealed(path)
            return Choice(frozenset(held), frozenset(cut))
        except (OSError, ValueError, TypeError):
            choice = _choose(listing, config)
            seal(path, choice.to_json())
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
        if not _is_whole(model):
            if model.exists():
                report(f"{model} is not known to be what was written: the tokenizer is made again")
            if not (kept and obtain(kept, path)):
                report(f"training a tokenizer of {config.vocab_size} pieces")
                _train(listings, config.vocab_size, config, choice).save(path)
                if kept:
                    publish(path, kept)
            seal(path / _WHOLE, digest(model.read_bytes()))
    return load_tokenizer(path)


def _is_whole(model: Path) -> bool:
    """Whether a tokenizer is, in every byte, what was trained here."""
    try:
        return sealed(model.parent / _WHOLE) == digest(model.read_bytes())
    except (OSError, ValueError):
        return False


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
        raise DataError(no_text(listing.source, list_skips(skips)))


def _prepare_source(
    listing: _Listing,
    config: DataConfig,
    tokenizer: Tokenizer,
    own: Choice,
    choice: Choice,
    workers: int | None,
    verify: bool,
    report: Report,
) -> TokenCache:
    """The cache of one source; ``choice`` is that of all sources and ``own`` its part of it,
    which its contents determine."""
    source = listing.source
    options = [*listing.records.key, config.heldout_fraction, config.max_document_bytes]
    more = listing.records.tokens_key(tokenizer)
    key = _key(listing.key, tokenizer.hash, options, (choice - own).to_json(), *more)
    root = os.path.abspath(root_of(source))
    skipped = config.cache_path / f"skipped-{_key(root, source.format, options)}.jsonl"
    work = Work(source, listing.records, config, tokenizer, choice)
    builder = _Builder(work, listing.files, key, workers, report)
    with _lock(builder.directory.with_name(f"{builder.directory.name}.{gethostname()}"), report):
        cache = builder.corpus(verify)
        write_whole(skipped, _json_lines(listing.skips) + cache.skipped.read_bytes())
    if cache.counters["records_bad"] > config.max_bad_records:  # written under a larger budget
        raise too_many_bad(source, config, f"They are named in {skipped}")
    counters = dict(cache.counters)
    for name, count in count_skips(listing.skips).items():
        counters[name] = counters.get(name, 0) + count
    cache = replace(cache, counters=counters, skipped=skipped)
    if not counters["documents"]:
        if not counters["heldout_documents"]:
            raise DataError(no_text(source, first_skips([cache.directory])))
        raise DataError(
            f"{source.path}: every document was held out; lower data.heldout_fraction "
            f"({config.heldout_fraction}) or give more documents"
        )
    if left_out := in_words(cache.counters, cache.skipped):
        report(f"{source.path}: {left_out}")
    return cache


class _Builder:
    """Makes the corpus of a source, and mends it."""

    def __init__(
        self,
        work: Work,
        files: Sequence[SourceFile],
        key: str,
        workers: int | None,
        report: Report,
    ):
        self.work, self.files, self.workers, self.report = work, files, workers, report
        home = work.config.cache_path
        self.directory = home / f"tokens-{key}"
        self.place = Place(home / f"parts-{key}", work.config.kept(f"parts-{key}"))

    def corpus(self, verify: bool) -> TokenCache:
        """The corpus, whole; ``verify``: every byte of it is read, whatever is known of it."""
        found = damaged(self.directory, anew=verify)
        if found is None or found:
            parts = cut_parts(self.files, PART_BYTES, MOST_PARTS)
            if not found or not self._mended(parts, found):
                self._build(parts)
            found = damaged(self.directory, anew=True)
        shutil.rmtree(self.place.folder, ignore_errors=True)
        cache = open_corpus(self.directory)
        if found or cache is None:
            raise DataError(f"{self.directory} was written but cannot be read back; check the disk")
        return cache

    def _make(self, parts: Sequence[Part]) -> None:
        make_parts(
            self.work,
            parts,
            self.place,
            workers=self.workers,
            report=self.report,
            elsewhere=(self.directory / "meta.json").exists,
        )

    def _mended(self, parts: Sequence[Part], found: set[int]) -> bool:
        """Whether the damaged parts alone could be made again."""
        if max(found) >= len(parts):  # it was cut otherwise
            return False
        self.report(
            f"{self.directory} is damaged in {len(found)} of {len(parts)} parts, which are made "
            "again"
        )
        again = [parts[i] for i in sorted(found)]
        make_parts(self.work, again, self.place, workers=self.workers, report=self.report)
        with _lock(self.directory, self.report):
            return mend(self.directory, {part.index: self.place.of(part) for part in again})

    def _build(self, parts: Sequence[Part]) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        about = {
            "source": self.work.source.path,
            "tokenizer": self.work.tokenizer.hash,
            "dtype": np.dtype(self.work.dtype).name,
            "files": len(self.files),
        }
        for _ in range(_ATTEMPTS):
            self._make(parts)
            with _lock(self.directory, self.report):
                if (self.directory / "meta.json").exists():  # another host has made it
                    return
                try:
                    return join([self.place.of(part) for part in parts], self.directory, about)
                except DamagedPart as damage:
                    self.report(f"{self.place.of(parts[damage.index])} is damaged: made again")
                    shutil.rmtree(self.place.of(parts[damage.index]), ignore_errors=True)
        raise DataError(f"parts in {self.place.folder} are damaged again and again; check the disk")


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


def _json_lines(skips: Iterable[Skip]) -> bytes:
    return "".join(json.dumps(skip._asdict()) + "\n" for skip in skips).encode()


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()[:16]
