"""The files of a source: which there are, what they hold, and what is left out and why."""

from __future__ import annotations

import json
import os
import sysconfig
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from step_jax.core.errors import DataError
from step_jax.core.files import cache_folder, seal, sealed
from step_jax.core.storage import Objects, is_url
from step_jax.core.text import printable
from step_jax.data.config import PYTHON_STDLIB, Source
from step_jax.data.remote import copy_of, copy_source

CACHE_TAG = "CACHEDIR.TAG"
#: The standard tag of cache folders (bford.info/cachedir), which backup programs know too.
CACHE_TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# Tokenised corpora of step_jax.\n"

_EXTENSIONS = {
    ".jsonl": "jsonl",
    ".jsonl.zst": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
}
# Tests are mostly tables and doubtful bytes; encodings are generated character tables.
_STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
)
_RUN_MARKS = frozenset({"metrics.jsonl", "log.txt", "checkpoints", "tensorboard"})
_HASH_THREADS = 8
_HASH_CHUNK = 2**20
_LARGE_BYTES = 2**30
# Two changes within a tick of a file system's clock leave the same times.
_SETTLED_NS = 2 * 10**9


class Skip(NamedTuple):
    """Something that gave no document. ``bad`` ones count against the quarantine budget."""

    name: str
    reason: str
    detail: str = ""
    bad: bool = False


class Stamp(NamedTuple):
    """What the file system says of a file's state. No ordinary tool can set ``changed_ns``."""

    size: int
    modified_ns: int
    changed_ns: int
    inode: int

    def settled(self, now_ns: int) -> bool:
        """Whether another change would leave other times."""
        return max(self.modified_ns, self.changed_ns) < now_ns - _SETTLED_NS


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: its absolute path, its name relative to the source, its format.

    ``name`` is printable: bytes of a file name that are not UTF-8 stand as ``\\xff``.
    """

    path: Path
    name: str
    format: str
    stamp: Stamp


def stamp_of(path: Path) -> Stamp:
    """The state of a file now. Raises OSError."""
    stat = path.stat()
    return Stamp(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def root_of(source: Source) -> Path:
    """The file or folder that a source names; of one in an object store, where its copy lies."""
    if is_url(source.path):
        return copy_of(Objects.at(source.path), cache_folder())
    stdlib = source.path == PYTHON_STDLIB
    return Path(sysconfig.get_path("stdlib") if stdlib else source.path).expanduser()


def list_files(source: Source) -> tuple[list[SourceFile], list[Skip]]:
    """Files of a source in a fixed order (by relative name), and the files left out.

    Links to folders are followed, each folder is read once, and folders that step_jax wrote
    itself (runs, token caches) are left out below the source's own path.

    Raises:
      DataError: the path does not exist, is a run directory, or holds no file.
    """
    root = root_of(source)
    if is_url(source.path):
        copy_source(Objects.at(source.path), root)
    try:
        is_file, exists = root.is_file(), root.exists()
    except OSError as error:  # no permission on the way there
        raise DataError(f"data path {source.path!r} cannot be read: {error.strerror}") from error
    if not exists:
        raise DataError(
            f"data path {source.path!r} does not exist. Give a file or a folder of text "
            f"(data.path), or {PYTHON_STDLIB!r}, which every machine has"
        )
    skips: list[Skip] = []
    files: list[SourceFile] = []
    stdlib = source.path == PYTHON_STDLIB
    found = [(root, root.name)] if is_file else _Walk(source, skips).files(root, stdlib)
    for path, name in found:
        try:
            stamp = stamp_of(path)
        except OSError as error:
            skips.append(Skip(printable(name), "unreadable", error.strerror or str(error)))
            continue
        if stamp.size == 0:
            skips.append(Skip(printable(name), "empty"))
            continue
        kind = _format_of(path) if source.format == "auto" else source.format
        files.append(SourceFile(path, printable(name), kind, stamp))
    if not files:
        raise DataError(
            f"data path {source.path!r} holds no text: {list_skips(skips) or 'no file at all'}. "
            "Point data.path at a folder with text files"
        )
    return files, skips


def list_skips(skips: Sequence[Skip], most: int = 5) -> str:
    """The first of what was left out, for messages."""
    return "; ".join(f"{s.name}: {s.reason} {s.detail}".rstrip() for s in skips[:most])


def count_skips(skips: Iterable[Skip]) -> dict[str, int]:
    """How many there are of each reason, as ``skipped_<reason>``."""
    counts: dict[str, int] = {}
    for skip in skips:
        counts[f"skipped_{skip.reason}"] = counts.get(f"skipped_{skip.reason}", 0) + 1
    return counts


class _Walk:
    """Goes through a folder, following links to folders, and enters each folder once."""

    def __init__(self, source: Source, skips: list[Skip]):
        self.source, self.skips = source, skips
        self.entered: set[tuple[int, int]] = set()
        self.found: list[tuple[Path, str]] = []
        self.links: deque[tuple[str, str]] = deque()

    def files(self, root: Path, stdlib: bool) -> list[tuple[Path, str]]:
        """Every file below ``root`` with its relative name, in the order of the names."""
        self.links.append((str(root), ""))
        while self.links:  # links last: what lies in the tree itself keeps its own name
            waiting = [self.links.popleft()]
            while waiting:
                waiting += self._enter(*waiting.pop(), stdlib)
        return sorted(self.found, key=lambda item: item[1])

    def _enter(self, folder: str, name: str, stdlib: bool) -> list[tuple[str, str]]:
        """Takes the files of a folder; returns the real folders in it."""
        try:
            stat = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            self._skip(name or ".", "unreadable", error.strerror or str(error))
            return []
        if (stat.st_dev, stat.st_ino) in self.entered:
            self._skip(name, "linked_again", "the folder is read under another name")
            return []
        self.entered.add((stat.st_dev, stat.st_ino))
        if self._is_ours(folder, name, {entry.name for entry in entries}):
            return []
        folders = []
        left_out = _datasets_metadata(folder, [entry.name for entry in entries])
        for entry in entries:
            below = f"{name}/{entry.name}" if name else entry.name
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                if entry.name == "__pycache__" or (stdlib and entry.name in _STDLIB_LEFT_OUT):
                    continue
                if entry.is_symlink():
                    self.links.append((entry.path, below))
                else:
                    folders.append((entry.path, below))
            elif entry.name in left_out:
                self._skip(below, "metadata", left_out[entry.name])
            elif not stdlib or entry.name.endswith(".py"):
                self.found.append((Path(entry.path), below))
        return folders

    def _is_ours(self, folder: str, name: str, names: set[str]) -> bool:
        """Leaves out what step_jax wrote: it is no text of the corpus, and it grows."""
        if _is_run(names):
            if not name:
                raise DataError(
                    f"data path {self.source.path!r} is a run directory (it has "
                    f"{', '.join(sorted(names & (_RUN_MARKS | {'lock'})))}), not a corpus. Give "
                    "another data.path, or another run.directory"
                )
            self._skip(name, "run_directory", "written by a training run")
        elif name and _is_cache(folder, names):
            self._skip(name, "token_cache", "tokenised corpora of step_jax")
        else:
            return False
        return True

    def _skip(self, name: str, reason: str, detail: str) -> None:
        self.skips.append(Skip(printable(name), reason, detail))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: reported as an unreadable file
        return False


def _is_run(names: set[str]) -> bool:
    if {"metrics.jsonl", "config.yaml"} <= names:
        return True
    return "lock" in names and (bool(names & _RUN_MARKS) or names <= {"lock", "identity"})


def _is_cache(folder: str, names: set[str]) -> bool:
    if {"meta.json", "train.bin"} <= names:
        return True
    if CACHE_TAG not in names:
        return False
    try:
        return (Path(folder) / CACHE_TAG).read_text(errors="replace") == CACHE_TAG_TEXT
    except OSError:
        return False


def _datasets_metadata(folder: str, names: list[str]) -> dict[str, str]:
    """Files that Hugging Face ``datasets`` keeps beside a data set: name -> what it is.

    ``save_to_disk`` writes ``state.json``, which names the data files; other Arrow files there
    are caches of ``map`` and ``filter`` and would repeat documents.

    Raises:
      DataError: a data file that ``state.json`` names is missing.
    """
    left_out = {}
    arrow = [name for name in names if name.endswith(".arrow")]
    if arrow:
        about = "metadata of a Hugging Face data set"
        left_out = {n: about for n in names if n in ("dataset_info.json", "state.json")}
    elif "dataset_dict.json" in names:
        inside = (Path(folder) / name / "dataset_info.json" for name in names)
        if any(path.exists() for path in inside):
            left_out["dataset_dict.json"] = "names the splits of a Hugging Face data set"
    if "state.json" not in left_out:
        return left_out
    try:
        state = json.loads((Path(folder) / "state.json").read_bytes())
        listed = {str(item["filename"]) for item in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return left_out
    if missing := sorted(listed - set(names)):
        raise DataError(
            f"{printable(folder)}: state.json of this Hugging Face data set names {missing[0]}, "
            "which is not there. Copy the data set again, whole"
        )
    return left_out | {
        name: "an Arrow file that state.json does not name: a cache of `map` or `filter`"
        for name in arrow
        if name not in listed
    }


def _format_of(path: Path) -> str:
    for extension, kind in _EXTENSIONS.items():
        if path.name.lower().endswith(extension):
            return kind
    return "text"


def content_digests(
    files: Sequence[SourceFile], memo: Path, report: Callable[[str], None]
) -> list[str]:
    """A 128-bit hash of each file's bytes (XXH3, hex).

    ``memo`` remembers them with each file's stamp, so that a file is read again only if its
    size, times or inode changed. What changed in the last two seconds is not remembered: it
    could change once more and keep its times.
    """
    now = time.time_ns()
    known = _remembered(memo)
    current = {file.name: known.get(file.name, (None, ""))[1] for file in files}
    stale = [file for file in files if known.get(file.name, (None, ""))[0] != file.stamp]
    if not stale and len(known) == len(files):
        return list(current.values())
    if (size := sum(file.stamp.size for file in stale)) > _LARGE_BYTES:
        report(f"reading {len(stale):,} files ({size / 1e9:.3g} GB) to know what is in them")
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        for file, digest in zip(stale, pool.map(_digest, stale), strict=True):
            current[file.name] = digest
    rows = [
        [file.name, file.stamp, current[file.name]] for file in files if file.stamp.settled(now)
    ]
    seal(memo, rows)
    return list(current.values())


def _remembered(memo: Path) -> dict[str, tuple[Stamp, str]]:
    try:
        return {n: (Stamp(*stamp), digest) for n, stamp, digest in sealed(memo)}
    except (OSError, ValueError, TypeError):
        return {}


def _digest(file: SourceFile) -> str:
    state = xxhash.xxh3_128()
    try:
        with open(file.path, "rb") as stream:
            while data := stream.read(_HASH_CHUNK):
                state.update(data)
    except OSError:
        return "unreadable"  # the reader says so again, by name
    return state.hexdigest()
