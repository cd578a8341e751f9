"""Data in object stores: sources are copied to this machine, what is prepared is kept there too.

Texts are read through file systems and tokens are mapped into memory, so both lie on a local disk.
A copy of an object is taken again when the object has changed; a prepared folder is there when its
``whole.json`` is, which is written last and has size and checksum of every file.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from step_jax.core.errors import DataError
from step_jax.core.files import seal, sealed
from step_jax.core.storage import ABSENT, Objects, together

_WHOLE = "whole.json"
_PART_BYTES = 256 << 20  # of a file, to an object
_KNOWN = ".generations.json"


def copy_of(objects: Objects, home: Path) -> Path:
    """Where the copy of a source lies; see :func:`copy_source`."""
    return home / "objects" / objects.scheme / objects.bucket / objects.path


def copy_source(objects: Objects, folder: Path) -> None:
    """Brings the copy of an object, or of all objects under a URL, up to date.

    Raises:
      DataError: there is none.
    """
    names, remembered = objects.list(), _KNOWN
    if not names:
        if not objects.path or objects.parent.generation(objects.name) == ABSENT:
            raise DataError(f"data path {objects} does not exist: there is no object of that name")
        names, remembered = [objects.name], f".{objects.name}{_KNOWN}"
        objects, folder = objects.parent, folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        memo = folder / remembered
        try:
            known = sealed(memo)
        except (OSError, ValueError):
            known = {}
        found = [generation.hex() for generation in together(objects.generation, names)]
        now = dict(zip(names, found, strict=True))
        gone = known.keys() - now.keys()
        changed = [n for n in names if known.get(n) != now[n] or not (folder / n).exists()]
        for name in gone:
            (folder / name).unlink(missing_ok=True)
        if changed or gone:
            seal(memo, {n: g for n, g in now.items() if n not in set(changed)})
            objects.download(folder, changed)
            seal(memo, now)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def publish(folder: Path, objects: Objects) -> None:
    """Keeps a prepared folder; ``whole.json``, which makes it one, is written last."""
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != "."):
        digest, size, parts = xxhash.xxh3_128(), 0, 0
        with open(path, "rb") as stream:
            while (data := stream.read(_PART_BYTES)) or not parts:
                objects.write(f"{path.name}/{parts:05d}", data)
                digest.update(data)
                size, parts = size + len(data), parts + 1
        files[path.name] = [parts, size, digest.hexdigest()]
    objects.write(_WHOLE, json.dumps(files, indent=1).encode())


def exists(objects: Objects) -> set[str]:
    """Names of the folders below that were published."""
    return {n.removesuffix(f"/{_WHOLE}") for n in objects.list() if n.endswith(f"/{_WHOLE}")}


def obtain(objects: Objects, folder: Path) -> bool:
    """Makes a local folder of one that was published, whole or not at all.

    Returns:
      Whether there is one; a damaged one is none.
    """
    content = objects.get(_WHOLE)
    if content is None:
        return False
    temporary = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, (parts, size, checksum) in json.loads(content).items():
            if "/" in name or name.startswith("."):
                return False
            digest = xxhash.xxh3_128()
            with open(temporary / name, "wb") as stream:
                for part in range(parts):
                    data = objects.read(f"{name}/{part:05d}")
                    digest.update(data)
                    stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            if ((temporary / name).stat().st_size, digest.hexdigest()) != (size, checksum):
                return False
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        return True
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
