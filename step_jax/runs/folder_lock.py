"""Who may write a run in a folder: a POSIX record lock, and a sign of life beside it.

The kernel drops the record lock when its owner dies, however it dies, and child processes do not
inherit it: on one machine the folder of a killed run can be taken over at once, and one in use
cannot be. Some file systems keep such locks to each machine (Lustre and NFS, by how they are
mounted). So the owner also writes its file again every ten seconds: a lock that was never given
back by a process of another machine is looked at for a minute before it is taken over, and an owner
that finds another's name in its file, or its file gone, knows that it is not the owner any more.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from step_jax.core.errors import ConfigError, TakenOverError
from step_jax.runs import lease

_SIZE = 65536
_held: set[Path] = set()  # record locks do not exclude the process that holds them


class FolderLock:
    """The lock of a folder: its file ``lock``."""

    def __init__(self, folder: Path):
        self._path = folder / lease.LOCK
        self._owner = lease.this_process()
        self._descriptor: int | None = None

    def take(self) -> None:
        """Waits up to ``lease.PATIENCE_S`` if the last owner was of another machine.

        Raises:
          ConfigError: another process has it, or who asks may not write there.
        """
        identity = self._path.resolve()
        if identity in _held:  # ask before opening: closing any descriptor drops the lock
            raise ConfigError(self._refusal(self._owner))
        descriptor = self._opened()
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = lease.owner_in(os.pread(descriptor, _SIZE, 0))
            if lease.lives(owner) or self._beats(descriptor, owner):
                raise BlockingIOError(errno.EAGAIN, "")
            self._write(descriptor, fresh=True)
        except OSError as error:
            refusal = self._refusal(lease.owner_in(os.pread(descriptor, _SIZE, 0)))
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(refusal) from None
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(
                f"the file system of {self._path.parent} has no file locks "
                f"({os.strerror(error.errno or 0)}); keep the run directory on another one"
            ) from None
        self._descriptor = descriptor
        _held.add(identity)

    def _opened(self) -> int:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            reason = os.strerror(error.errno or 0)
            raise ConfigError(
                f"cannot write to the run directory {self._path.parent}: {reason}"
            ) from None

    def _beats(self, descriptor: int, owner: Mapping[str, Any]) -> bool:
        """Whether an owner on another machine writes its file again."""
        if "beat" not in owner or lease.lives(owner) is False:
            return False
        logging.getLogger("step_jax.runs").warning(
            "%s was not given back by process %s on %s: looking for up to %g s whether it lives",
            self._path, owner.get("pid"), owner.get("host"), lease.PATIENCE_S,
        )  # fmt: skip
        before, deadline = os.pread(descriptor, _SIZE, 0), time.monotonic() + lease.PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(lease.BEAT_S / 4)
            if os.pread(descriptor, _SIZE, 0) != before:
                return True
        return False

    def renew(self) -> None:
        """Raises TakenOverError if another process has the lock, or the file is not there."""
        descriptor = self._descriptor
        if descriptor is None:
            raise TakenOverError(f"{self._path} is not held any more")
        try:
            there = os.path.samestat(os.stat(self._path), os.fstat(descriptor))
        except FileNotFoundError:
            raise TakenOverError(
                f"{self._path} is gone: the run directory was moved or removed. Nothing more is "
                "written"
            ) from None
        if there:
            owner = lease.owner_in(os.pread(descriptor, _SIZE, 0))
        else:
            owner = lease.owner_in(self._path.read_bytes())
        if owner.get("token") != self._owner["token"]:
            raise TakenOverError(f"{self._refusal(owner)}. This process writes nothing more")
        self._write(descriptor)

    def _write(self, descriptor: int, fresh: bool = False) -> None:
        # Of one length: whoever reads meanwhile finds it whole.
        content = json.dumps(self._owner | {"beat": int(time.time())}).encode()
        if fresh:
            os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)

    def release(self) -> None:
        """Gives the lock back; one that was lost is left alone."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        if lease.owner_in(os.pread(descriptor, _SIZE, 0)).get("token") == self._owner["token"]:
            os.ftruncate(descriptor, 0)
        os.close(descriptor)  # drops the lock
        _held.discard(self._path.resolve())

    def _refusal(self, owner: Mapping[str, Any]) -> str:
        return lease.refusal(self._path.parent, owner)


def is_locked(folder: Path | str) -> bool:
    """Whether a run has the folder, or what it is a copy of, at the moment."""
    path = Path(folder) / lease.LOCK
    if path.resolve() in _held:
        return True
    try:
        owner = lease.owner_in(path.read_bytes())
    except OSError:
        return False
    lives = lease.lives(owner)
    if lives is not None:
        return lives
    return lease.beats(owner) or _is_record_locked(path)


def _is_record_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
