"""A tokenised corpus: the parts of a source one after the other, memory-mapped, every byte checked.

Its folder has the files of a part (``data.parts``), each those of all parts joined in order, and
``meta.json``: size and checksum of every part's share of every file, a digest of the training
tokens, which identifies the data in checkpoints, and a checksum of itself. So damage is found, and
known to be of certain parts, which alone are made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from step_jax.core.files import seal, sealed, sync_directory, write_whole
from step_jax.data.files import Stamp, stamp_of
from step_jax.data.parts import (
    FILES,
    SPLITS,
    Entry,
    PartMeta,
    checksum_of,
    read_part,
)

VERSION = 4
_CHUNK = 8 * 2**20
_THREADS = 8
_CHECKED = ".checked.json"


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


class DamagedPart(Exception):
    """A part that is not there, or not what was written."""

    def __init__(self, index: int):
        super().__init__(f"part {index}")
        self.index = index


def join(folders: Sequence[Path], directory: Path, about: dict[str, Any]) -> None:
    """Makes a corpus of its finished parts; it appears whole or not at all.

    Args:
      about: of ``meta.json`` what the parts do not say: source, tokenizer, dtype, files.

    Raises:
      DamagedPart: the files of one are gone, or not what was written.
    """
    prefix = f".{directory.name}.{socket.gethostname()}."
    for stale in directory.parent.glob(f"{prefix}[0-9]*"):  # of a killed process: the lock is ours
        shutil.rmtree(stale, ignore_errors=True)
    temporary = directory.with_name(f"{prefix}{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        parts, digest = [], _Digest(about["dtype"])
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(open(temporary / name, "wb")) for name in FILES]
            for i, folder in enumerate(folders):
                if (part := read_part(folder)) is None or not _append(folder, part, streams):
                    raise DamagedPart(i)
                digest.add(folder)
                parts.append(part)
            for stream in streams:
                stream.flush()
                os.fsync(stream.fileno())
        content = {
            "version": VERSION,
            "digest": digest.hexdigest(),
            "counters": _counters(parts, about["files"]),
            "parts": [part.entries for part in parts],
        }
        seal(temporary / "meta.json", about | content)
        sync_directory(temporary)
        if not (directory / "meta.json").exists():  # else another host has joined the same parts
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(temporary, directory)
            sync_directory(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _append(folder: Path, part: PartMeta, streams: Sequence[Any]) -> bool:
    """Copies the files of a part into streams; whether they are what was written."""
    for name, stream, (_, expected) in zip(FILES, streams, part.entries, strict=True):
        state = xxhash.xxh3_128()
        try:
            with open(folder / name, "rb", buffering=0) as file:
                while data := file.read(_CHUNK):
                    stream.write(data)
                    state.update(data)
        except FileNotFoundError:  # another host was faster, and has removed it
            return False
        if state.hexdigest() != expected:
            return False
    return True


class _Digest:
    """SHA-256 of the training tokens, document by document, and then of the documents' lengths."""

    def __init__(self, dtype: str):
        self.width, self.state = np.dtype(dtype).itemsize, hashlib.sha256()
        self.lengths: list[np.ndarray] = []

    def add(self, folder: Path) -> None:
        tokens, said = (_map(folder / f"train.{kind}bin", "uint8") for kind in ("", "said."))
        self.lengths.append(np.fromfile(folder / "train.lengths.bin", np.int64))
        if not len(said):
            self.state.update(tokens)
            return
        end = 0
        for length in self.lengths[-1].tolist():  # a document's tokens, then what of them is said
            first, end = end, end + length
            self.state.update(tokens[first * self.width : end * self.width])
            self.state.update(said[first:end])

    def hexdigest(self) -> str:
        for lengths in self.lengths:
            self.state.update(lengths)
        return self.state.hexdigest()


def _counters(parts: Sequence[PartMeta], files: int) -> dict[str, int]:
    names = [f"{split}{n}" for split in ("", "heldout_") for n in ("documents", "bytes", "tokens")]
    total = dict.fromkeys(("records_bad", *names), 0) | {"files": files}
    for part in parts:
        for name, count in part.counters.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items()))


def open_corpus(directory: Path) -> TokenCache | None:
    """A finished corpus; None when there is none. Its bytes are not looked at: see `damaged`."""
    try:
        meta = sealed(directory / "meta.json")
        if meta["version"] != VERSION:
            return None
        conversations = any("tokens_learned" in name for name in meta["counters"])
        splits = {}
        for split in SPLITS:
            lengths = np.fromfile(directory / f"{split}.lengths.bin", np.int64)
            tokens = _map(directory / f"{split}.bin", meta["dtype"])
            said = _map(directory / f"{split}.said.bin", "uint8") if conversations else None
            offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
            splits[split] = Documents(tokens, offsets, said)
        return TokenCache(
            directory=directory,
            digest=meta["digest"],
            counters=meta["counters"],
            skipped=directory / "skipped.jsonl",
            heldout_bytes=np.fromfile(directory / "heldout.bytes.bin", np.int64),
            heldout_raw=_map(directory / "heldout.raw", "uint8"),
            **splits,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:  # mmap refuses an empty file
        return np.zeros(0, dtype)
    # As a plain array: slicing a `memmap` object costs several times more.
    return np.asarray(np.memmap(path, dtype, mode="r"))


def damaged(directory: Path, *, anew: bool = False) -> set[int] | None:
    """The parts of a corpus whose bytes are not what was written; None if there is no corpus.

    Files are read again when size, times or inode of one have changed since they were found good,
    or always (``anew``).
    """
    if (parts := _parts(directory)) is None:
        return None
    stamps, now = [_stamp(directory / name) for name in (*FILES, "meta.json")], time.time_ns()
    if not anew and stamps == _found_good(directory):
        return set()
    shares, bad = [], set[int]()
    for name, stamp, entries in zip(FILES, stamps, zip(*parts, strict=True), strict=False):
        end = 0
        for i, (size, digest) in enumerate(entries):
            shares.append((i, directory / name, end, size, digest))
            end += size
        if stamp is None or stamp.size > end:  # it is not there, or goes on behind its end
            bad.add(len(parts) - 1)
    with ThreadPoolExecutor(_THREADS) as pool:
        good = pool.map(lambda share: _is_good(*share[1:]), shares)
        bad |= {share[0] for share, fine in zip(shares, good, strict=True) if not fine}
    if not bad and all(stamp and stamp.settled(now) for stamp in stamps):
        write_whole(directory / _CHECKED, json.dumps(stamps))
    return bad


def _parts(directory: Path) -> list[list[Entry]] | None:
    try:
        meta = sealed(directory / "meta.json")
        return meta["parts"] if meta["version"] == VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_good(path: Path, first: int, size: int, digest: str) -> bool:
    try:
        return checksum_of(path, first, size) == digest
    except OSError:
        return False


def _stamp(path: Path) -> Stamp | None:
    try:
        return stamp_of(path)
    except OSError:
        return None


def _found_good(directory: Path) -> list[Stamp] | None:
    try:
        return [Stamp(*stamp) for stamp in json.loads((directory / _CHECKED).read_bytes())]
    except (OSError, ValueError, TypeError):
        return None


def mend(directory: Path, made: Mapping[int, Path]) -> bool:
    """Puts parts that were made again in the place of damaged ones.

    Returns:
      Whether they are what they were; else the corpus is damaged still.
    """
    parts = _parts(directory)
    assert parts is not None  # see `damaged`
    again = {i: read_part(folder) for i, folder in made.items()}
    if any(part is None or [*map(list, part.entries)] != parts[i] for i, part in again.items()):
        return False
    sizes = np.array([[size for size, _ in part] for part in parts])
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(open(_kept(directory / n), "r+b")) for n in FILES]
        for i, part in again.items():
            for stream, end in zip(streams, sizes[:i].sum(0).tolist(), strict=True):
                stream.seek(end)
            if part is None or not _append(made[i], part, streams):
                return False
        for stream, end in zip(streams, sizes.sum(0).tolist(), strict=True):
            stream.truncate(end)
            stream.flush()
            os.fsync(stream.fileno())
    return True


def _kept(path: Path) -> int:
    """A descriptor of a file with what it holds, which is nothing if it is not there."""
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
