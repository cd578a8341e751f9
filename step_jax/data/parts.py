"""Parts of a source: runs of its records that are tokenised apart, by whoever comes first.

How a source is cut depends on names and sizes of its files alone, so every process and host cuts it
alike. The folder of a part, and that of the whole corpus, which is its parts one after the other,
file by file, have of both splits (train, heldout)

  <split>.bin          tokens of all documents, texts closed by eos; uint16 or uint32
  <split>.lengths.bin  int64, tokens of each document
  <split>.said.bin     uint8, of conversations: whether a token is learned

and ``heldout.raw`` (UTF-8 text of the held-out documents), ``heldout.bytes.bin`` (int64, bytes of
each), ``skipped.jsonl`` (what of the files was left out, with the reason). ``part.json`` has size
and checksum of each file. A folder appears by a rename, whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from step_jax.core.errors import DataError
from step_jax.core.files import seal, sealed
from step_jax.core.text import printable
from step_jax.data.config import DataConfig, Source
from step_jax.data.files import Skip, SourceFile, list_skips, stamp_of
from step_jax.data.left_out import too_many_bad
from step_jax.data.sources import Document, Encoded, Records, read_file
from step_jax.data.spans import Span, cut
from step_jax.data.split import Choice, split_documents
from step_jax.tokenizers.base import Tokenizer

SPLITS = ("train", "heldout")
FILES = (
    *(f"{split}.{kind}bin" for split in SPLITS for kind in ("", "lengths.", "said.")),
    "heldout.bytes.bin",
    "heldout.raw",
    "skipped.jsonl",
)
_ENCODE_BATCH_BYTES = 4 * 2**20
_CHUNK = 2**20

#: (size in bytes, xxh3-128 in hexadecimal)
Entry = tuple[int, str]


@dataclass(frozen=True)
class Part:
    """One part of a source: its place among them, its name, bytes of its files that it reads."""

    index: int
    name: str
    sections: tuple[tuple[SourceFile, Span], ...]
    size: int


def cut_parts(files: Sequence[SourceFile], part_bytes: int, most: int) -> list[Part]:
    """The parts of a source, each of about ``part_bytes``, or more where they would be over
    ``most``; a compressed file is never cut, and a small one never either."""
    part_bytes = max(part_bytes, sum(file.stamp.size for file in files) // most)
    found: list[list[tuple[SourceFile, Span]]] = [[]]
    sizes = [0.0]
    for file in files:
        spans = cut(file, part_bytes)
        for span in spans:
            size = file.stamp.size / len(spans)
            if found[-1] and sizes[-1] + size > part_bytes:
                found.append([])
                sizes.append(0.0)
            found[-1].append((file, span))
            sizes[-1] += size
    return [
        Part(i, f"{i:05d}-{_name(sections)}", tuple(sections), int(size))
        for i, (sections, size) in enumerate(zip(found, sizes, strict=True))
    ]


def _name(sections: Sequence[tuple[SourceFile, Span]]) -> str:
    named = [(file.name, *span) for file, span in sections]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:8]


class PartMeta(NamedTuple):
    """What ``part.json`` says: an entry for each of ``FILES``, and what was counted."""

    entries: tuple[Entry, ...]
    counters: dict[str, int]


def read_part(folder: Path) -> PartMeta | None:
    """What a finished part says of itself; None if there is none, or its files are not whole."""
    try:
        content = sealed(folder / "part.json")
        entries = tuple((int(size), str(digest)) for size, digest in content["entries"])
        sizes = [(folder / name).stat().st_size for name in FILES]
        if sizes != [size for size, _ in entries]:
            return None
        return PartMeta(entries, content["counters"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def first_skips(folders: Iterable[Path], *, bad: bool = False, most: int = 5) -> str:
    """The first of what was left out of parts, for messages; ``bad``: of bad records alone."""
    found: list[Skip] = []
    for folder in folders:
        try:
            lines = (folder / "skipped.jsonl").read_bytes().splitlines()
        except OSError:  # not made yet
            continue
        skips = (Skip(**json.loads(line)) for line in lines)
        found += [skip for skip in skips if skip.bad or not bad]
        if len(found) >= most:
            break
    return list_skips(found, most)


@dataclass(frozen=True)
class Work:
    """How the parts of a source become tokens. Can be sent to another process."""

    source: Source
    records: Records
    config: DataConfig
    tokenizer: Tokenizer
    choice: Choice

    @property
    def dtype(self) -> type:
        return np.uint16 if self.tokenizer.vocab_size <= 2**16 else np.uint32

    def make(self, part: Part, folder: Path) -> None:
        """Tokenises a part into a folder, in place of what is there.

        Raises:
          DataError: a damaged file, one that changes meanwhile, or too many bad records.
        """
        prefix = f".{folder.name}.{socket.gethostname()}."
        for stale in folder.parent.glob(f"{prefix}*"):  # of a killed process: the part is ours
            shutil.rmtree(stale, ignore_errors=True)
        temporary = folder.parent / f"{prefix}{os.getpid()}"
        temporary.mkdir(parents=True)
        try:
            writer = _Writer(temporary, self)
            documents = writer.documents(part)
            for document, held in split_documents(
                documents, self.config.heldout_fraction, self.choice
            ):
                writer.add(document, held)
            writer.finish()
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class _File:
    """A file that is written once, from its beginning."""

    def __init__(self, path: Path):
        self.stream = open(path, "wb")  # noqa: SIM115 (closed in finish)
        self.digest, self.size = xxhash.xxh3_128(), 0

    def write(self, data: bytes) -> None:
        self.stream.write(data)
        self.digest.update(data)
        self.size += len(data)

    def finish(self) -> Entry:
        self.stream.close()  # not synced: what a power cut takes, the checksum tells
        return self.size, self.digest.hexdigest()


class _Writer:
    """Tokenises documents in batches and keeps the books."""

    def __init__(self, directory: Path, work: Work):
        self.directory, self.work = directory, work
        self.files = {name: _File(directory / name) for name in FILES}
        self.lengths = {split: array("q") for split in SPLITS}
        self.heldout_bytes = array("q")
        self.counters: Counter[str] = Counter()
        self.first_skips: list[Skip] = []
        self.waiting: list[tuple[Document, bool]] = []
        self.waiting_bytes = 0

    def documents(self, part: Part) -> Iterator[Document]:
        """Documents of a part; what is left out goes to the report."""
        for file, span in part.sections:
            for item in read_file(
                file, self.work.records, self.work.config.max_document_bytes, span
            ):
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
        self.files["skipped.jsonl"].write((json.dumps(skip._asdict()) + "\n").encode())
        self.counters[f"skipped_{skip.reason}"] += 1
        self.counters["records_bad"] += skip.bad
        if skip.bad and len(self.first_skips) < 5:
            self.first_skips.append(skip)
        if self.counters["records_bad"] > self.work.config.max_bad_records:
            first = f"The first: {list_skips(self.first_skips)}"
            raise too_many_bad(self.work.source, self.work.config, first)

    def add(self, document: Document, held: bool) -> None:
        self.waiting.append((document, held))
        self.waiting_bytes += len(document.text)
        self.counters["documents_truncated"] += document.truncated_bytes > 0
        self.counters["bytes_truncated"] += document.truncated_bytes
        if self.waiting_bytes >= _ENCODE_BATCH_BYTES:
            self._encode()

    def _encode(self) -> None:
        documents = [document for document, _ in self.waiting]
        made = self.work.records.encode(documents, self.work.tokenizer)
        for (_, held), encoded in zip(self.waiting, made, strict=True):
            if isinstance(encoded, Skip):
                self.skip(encoded)
                continue
            for one in encoded:
                self._write(one, held)
        self.waiting, self.waiting_bytes = [], 0

    def _write(self, encoded: Encoded, held: bool) -> None:
        split, prefix = SPLITS[held], "heldout_" if held else ""
        self.files[f"{split}.bin"].write(encoded.ids.astype(self.work.dtype).tobytes())
        self.lengths[split].append(len(encoded.ids))
        counted = {"documents": 1, "bytes": len(encoded.text), "tokens": len(encoded.ids)}
        if encoded.said is not None:
            self.files[f"{split}.said.bin"].write(encoded.said.astype(np.uint8).tobytes())
            counted["tokens_learned"] = int(encoded.said.sum())
        for name, count in counted.items():
            self.counters[prefix + name] += count
        self.counters["tokens_truncated"] += encoded.cut
        if held:
            self.files["heldout.raw"].write(encoded.text)
            self.heldout_bytes.append(len(encoded.text))

    def finish(self) -> None:
        self._encode()
        for split in SPLITS:
            self.files[f"{split}.lengths.bin"].write(self.lengths[split].tobytes())
        self.files["heldout.bytes.bin"].write(self.heldout_bytes.tobytes())
        entries = [file.finish() for file in self.files.values()]
        seal(self.directory / "part.json", {"entries": entries, "counters": self.counters})


def _unchanged(file: SourceFile) -> bool:
    try:
        return stamp_of(file.path) == file.stamp
    except OSError:
        return False


def checksum_of(path: Path, first: int, size: int) -> str:
    """XXH3 (128 bits, hex) of ``size`` bytes of a file, fewer where it ends before."""
    state = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as stream:
        stream.seek(first)
        while size and (data := stream.read(min(size, _CHUNK))):
            state.update(data)
            size -= len(data)
    return state.hexdigest()
