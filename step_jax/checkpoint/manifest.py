"""The checksum manifest that makes a saved step *verified*. Needs neither JAX nor Orbax.

A committed step is a directory ``00000100``, or objects whose names begin so, with the arrays,
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
from step_jax.core.storage import Objects, is_url, together

MANIFEST = "manifest.json"
_CHUNK_BYTES = 8 << 20
_DIGEST_CHARS = 32

# (size in bytes, xxh3-128 in hexadecimal)
Entry = tuple[int, str]
Place = Path | Objects


def step_name(step: int) -> str:
    return f"{step:08d}"


def committed_steps(directory: Place) -> list[int]:
    """Steps that were committed, ascending; says nothing about damage since."""
    if isinstance(directory, Objects):
        ends = (name.partition("/") for name in directory.list())
        names = [step for step, _, file in ends if file == MANIFEST and step.isdigit()]
    elif directory.is_dir():
        names = [p.name for p in directory.iterdir() if p.name.isdigit() and p.is_dir()]
    else:
        return []
    return sorted(int(n) for n in names if n == step_name(int(n)))


def list_files(step_dir: Place) -> list[str]:
    """Relative POSIX paths of all files but the manifest, sorted."""
    if isinstance(step_dir, Objects):
        return [name for name in step_dir.list() if name != MANIFEST]
    found = []
    for root, _, names in os.walk(step_dir):
        for name in names:
            found.append((Path(root) / name).relative_to(step_dir).as_posix())
    return sorted(set(found) - {MANIFEST})


def hash_files(step_dir: Place, files: list[str], *, sync: bool = False) -> dict[str, Entry]:
    """Size and xxh3-128 of each file, read from where it lies.

    ``sync`` also flushes each file to the device, so that a committed step survives a power cut.
    Raises OSError for a file that cannot be read.
    """
    if isinstance(step_dir, Objects):
        found = together(lambda name: _hash(step_dir.read(name)), files)
        return dict(zip(files, found, strict=True))
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


def _hash(data: bytes) -> Entry:
    return len(data), xxhash.xxh3_128(data).hexdigest()


def manifest_of(step: int, entries: dict[str, Entry]) -> bytes:
    """The manifest of a step with these files."""
    body = json.dumps({"step": step, "files": entries}, sort_keys=True, indent=0).encode()
    return xxhash.xxh3_128(body).hexdigest().encode() + b"\n" + body


def read_file(step_dir: Place, name: str) -> bytes:
    """Raises OSError."""
    if isinstance(step_dir, Objects):
        return step_dir.read(name)
    return (step_dir / name).read_bytes()


def read_manifest(step_dir: Place) -> dict[str, Entry]:
    """The manifest's entries. Raises CorruptCheckpoint."""
    try:
        raw = read_file(step_dir, MANIFEST)
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


def problems_of(
    step_dir: Place, entries: dict[str, Entry], share: slice = slice(None)
) -> list[str]:
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


def verify_step(step_dir: Place) -> list[str]:
    """All that is wrong with a committed step; empty if it is good."""
    try:
        entries = read_manifest(step_dir)
    except CorruptCheckpoint as e:
        return [str(e)]
    return unexpected(step_dir, entries) + problems_of(step_dir, entries)


def unexpected(step_dir: Place, entries: dict[str, Entry]) -> list[str]:
    """Files that the manifest does not know."""
    extra = sorted(set(list_files(step_dir)) - set(entries))
    return [f"{name}: not part of this step" for name in extra]


def verify(directory: str | os.PathLike) -> dict[int, list[str]]:
    """Check every committed step of a checkpoint directory without loading any array.

    Returns {step: problems}, ascending; an empty list of problems means a verified step.
    """
    root = Objects.at(str(directory)) if is_url(directory) else Path(directory)
    return {s: verify_step(root / step_name(s)) for s in committed_steps(root)}


def signature(step_dir: Place) -> tuple:
    """Changes whenever a file of the step is written to, replaced, added or removed."""
    if isinstance(step_dir, Objects):
        names = [MANIFEST, *list_files(step_dir)]
        return tuple(zip(names, together(step_dir.generation, names), strict=True))
    rows: list[tuple] = []
    for name in [MANIFEST, *list_files(step_dir)]:
        try:
            s = os.stat(step_dir / name)
            rows.append((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
        except OSError:
            rows.append((name, None))
    return tuple(rows)
