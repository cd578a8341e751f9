"""The checksum manifest that makes a saved step *verified*. Needs neither JAX nor Orbax.

A committed step is a directory ``00000100`` that holds the arrays as Orbax wrote them,
``step.json`` (the caller's metadata and the shape and dtype of every leaf) and
``manifest.json``: size and xxh3-128 of every other file. The manifest's first line is the
xxh3-128 of the rest of the manifest, so a flipped bit anywhere, the manifest included, is found.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import xxhash

from step_jax.checkpoint.errors import CorruptCheckpoint
from step_jax.core.files import sync_directory, write_synced

MANIFEST = "manifest.json"
_CHUNK_BYTES = 8 << 20
_DIGEST_CHARS = 32

# (size in bytes, xxh3-128 in hexadecimal)
Entry = tuple[int, str]


def step_name(step: int) -> str:
    return f"{step:08d}"


def committed_steps(directory: Path) -> list[int]:
    """Steps that were committed, ascending; says nothing about damage since."""
    if not directory.is_dir():
        return []
    names = (p.name for p in directory.iterdir() if p.name.isdigit() and p.is_dir())
    return sorted(int(n) for n in names if n == step_name(int(n)))


def list_files(step_dir: Path) -> list[str]:
    """Relative POSIX paths of all files but the manifest, sorted."""
    found = []
    for root, _, names in os.walk(step_dir):
        for name in names:
            found.append((Path(root) / name).relative_to(step_dir).as_posix())
    return sorted(set(found) - {MANIFEST})


def hash_files(step_dir: Path, files: list[str], *, sync: bool = False) -> dict[str, Entry]:
    """Size and xxh3-128 of each file, read from the file system.

    ``sync`` also flushes each file to the device, so that a committed step survives a power cut.
    Raises OSError for a file that cannot be read.
    """
    entries: dict[str, Entry] = {}
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    for name in files:
        digest, size = xxhash.xxh3_128(), 0
        with open(step_dir / name, "rb", buffering=0) as f:
            if sync:
                os.fsync(f.fileno())
            while n := f.readinto(buffer):
                digest.update(view[:n])
                size += n
        entries[name] = (size, digest.hexdigest())
    return entries


def write_manifest(step_dir: Path, step: int, entries: dict[str, Entry]) -> None:
    """Write and flush the manifest, then flush every directory of the step."""
    body = json.dumps({"step": step, "files": entries}, sort_keys=True, indent=0).encode()
    write_synced(step_dir / MANIFEST, xxhash.xxh3_128(body).hexdigest().encode() + b"\n" + body)
    for root, _, _ in os.walk(step_dir):
        sync_directory(Path(root))


def read_manifest(step_dir: Path) -> dict[str, Entry]:
    """The manifest's entries. Raises CorruptCheckpoint."""
    try:
        raw = (step_dir / MANIFEST).read_bytes()
    except OSError as e:
        raise CorruptCheckpoint(f"{MANIFEST}: {e.strerror or e}") from e
    head, body = raw[: _DIGEST_CHARS + 1], raw[_DIGEST_CHARS + 1 :]
    if head != xxhash.xxh3_128(body).hexdigest().encode() + b"\n":
        raise CorruptCheckpoint(f"{MANIFEST}: its own checksum does not match")
    content = json.loads(body)
    if step_name(content["step"]) != step_dir.name:
        raise CorruptCheckpoint(
            f"{MANIFEST}: belongs to step {content['step']}, not to {step_dir.name}"
        )
    return {name: (size, digest) for name, (size, digest) in content["files"].items()}


def problems_of(step_dir: Path, entries: dict[str, Entry], share: slice = slice(None)) -> list[str]:
    """Compare the files with the manifest; ``share`` picks part of them (one process's part)."""
    problems = []
    for name in sorted(entries)[share]:
        size, digest = entries[name]
        try:
            found_size, found = hash_files(step_dir, [name])[name]
        except FileNotFoundError:
            problems.append(f"{name}: missing")
        except OSError as e:
            problems.append(f"{name}: unreadable ({e.strerror or e})")
        else:
            if found_size != size:
                problems.append(f"{name}: {found_size} bytes, {size} expected")
            elif found != digest:
                problems.append(f"{name}: checksum does not match")
    return problems


def verify_step(step_dir: Path) -> list[str]:
    """All that is wrong with a committed step; empty if it is good."""
    try:
        entries = read_manifest(step_dir)
    except CorruptCheckpoint as e:
        return [str(e)]
    return unexpected(step_dir, entries) + problems_of(step_dir, entries)


def unexpected(step_dir: Path, entries: dict[str, Entry]) -> list[str]:
    """Files that the manifest does not know."""
    extra = sorted(set(list_files(step_dir)) - set(entries))
    return [f"{name}: not part of this step" for name in extra]


def verify(directory: str | os.PathLike) -> dict[int, list[str]]:
    """Check every committed step of a checkpoint directory without loading any array.

    Returns {step: problems}, ascending; an empty list of problems means a verified step.
    """
    root = Path(directory)
    return {s: verify_step(root / step_name(s)) for s in committed_steps(root)}


def signature(step_dir: Path) -> tuple:
    """Changes whenever a file of the step is written to, replaced, added or removed."""
    rows: list[tuple] = []
    for name in [MANIFEST, *list_files(step_dir)]:
        try:
            s = os.stat(step_dir / name)
            rows.append((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
        except OSError:
            rows.append((name, None))
    return tuple(rows)
