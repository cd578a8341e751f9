"""Writing files so that a crash, or a reader meanwhile, finds the old content or the new."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import xxhash

from step_jax.core.storage import local


def write_whole(path: Path | str, content: str | bytes) -> None:
    """Puts a file in place at once: written beside, flushed to the device, renamed.

    Raises:
      OSError: as the file system says; nothing is left beside.
    """
    path = local(path, "a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        write_synced(temporary, content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def seal(path: Path, content: object) -> None:
    """Writes JSON with its own checksum, as :func:`write_whole`."""
    write_whole(path, json.dumps({"checksum": _checksum(content), "content": content}))


def sealed(path: Path) -> Any:
    """What `seal` wrote.

    Raises:
      ValueError: anything else is there.
      OSError: nothing is there, or it cannot be read.
    """
    try:
        whole = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not what was written: {error}") from None
    if not isinstance(whole, dict) or whole.keys() != {"checksum", "content"}:
        raise ValueError(f"{path} has no checksum")
    if whole["checksum"] != _checksum(whole["content"]):
        raise ValueError(f"{path} is not what was written")
    return whole["content"]


def _checksum(content: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def cache_folder(name: str = "") -> Path:
    """Where what can be made again is kept: ``$XDG_CACHE_HOME/step_jax/NAME`` (``~/.cache``)."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "step_jax" / name


def write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
