"""The directory of one run, and the lock that keeps a second run out of it."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import uuid
from pathlib import Path

from step_jax.core.errors import ConfigError, RestartRequested, StepError
from step_jax.core.files import write_whole
from step_jax.core.storage import Objects, is_url
from step_jax.runs.lease import beats, owner_in
from step_jax.runs.mirror import Mirror, fetch

_held: set[Path] = set()  # record locks do not exclude the process that holds them


class RunDirectory:
    """Where a run keeps everything, locked while the context is open.

    A directory may be in an object store (``gs://``, ``s3://``). It is then a folder of this
    process that is copied there as it grows (:mod:`step_jax.runs.mirror`), and all but ``name``,
    ``parent`` and ``checkpoints`` is in that folder.

    On a file system the lock is a POSIX record lock on ``lock``: the kernel drops it when the owner
    dies, however it dies, and child processes do not inherit it. So the directory of a killed run
    can be taken over at once, and one in use cannot be. In an object store it is a
    :class:`~step_jax.runs.lease.Lease`.

    Attributes:
      name: the directory as people and commands name it.
      parent: where directories of other runs may lie, named so too.
      path: the directory.
      config: the resolved configuration (``config.yaml``).
      metrics: ``metrics.jsonl``, see :mod:`step_jax.runs.metrics_log`.
      log: ``log.txt``, what was printed, with times.
      heldout: the documents that the run held out (see :class:`step_jax.data.Heldout`).
      identity: holds the name that services know the run by: the same for every start, wherever the
        directory is moved, and another one for a new run in the same place.
      checkpoints, tensorboard, plots, samples, profile: subdirectories, made by who writes.
    """

    def __init__(self, path: Path | str, *, primary: bool = True):
        """
        Args:
          path: the directory, or its URL; it is made if it does not exist.
          primary: whether this process owns the directory (process 0 of a run). The others read
            paths from the object and neither lock nor write.
        """
        self._objects = Objects.at(str(path)) if is_url(path) else None
        self._mirror: Mirror | None = None
        if self._objects:
            self.path = Path(tempfile.mkdtemp(prefix="step_jax_")) / self._objects.name
            self.name, self.parent = str(self._objects), str(self._objects.parent)
        else:
            self.path = Path(path).expanduser()
            self.name, self.parent = str(self.path), str(self.path.parent)
        self.primary = primary
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.log = self.path / "log.txt"
        self.heldout = self.path / "heldout"
        self.identity = self.path / "identity"
        self.checkpoints = (self._objects or self.path) / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.plots = self.path / "plots"
        self.samples = self.path / "samples"
        self.profile = self.path / "profile"
        self._lock_file = self.path / "lock"
        self._descriptor: int | None = None

    def __enter__(self) -> RunDirectory:
        """Take the lock. Raises ConfigError naming the owner if another run has it."""
        if self._objects:
            self._fetch(self._objects)
        elif self.primary:
            self._lock()
        if self.primary and not self.identity.exists():
            name = re.sub(r"[^A-Za-z0-9_.-]+", "_", self.path.resolve().name)[:40]
            write_whole(self.identity, f"{name}-{uuid.uuid4().hex[:8]}")
        return self

    def _fetch(self, objects: Objects) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.primary:
                self._mirror = Mirror(objects, self.path)
                self._mirror.open()
            else:
                fetch(objects, self.path)
        except BaseException:
            shutil.rmtree(self.path.parent, ignore_errors=True)
            raise

    def keep(self) -> None:
        """Called before a checkpoint is committed: what was written up to then outlives this
        machine. Raises StepError if it does not."""
        if self._mirror:
            self._mirror.sync()

    def _lock(self) -> None:
        identity = self._lock_file.resolve()
        if identity in _held:  # ask before opening: closing any descriptor drops the lock
            raise ConfigError(self._refusal(descriptor=None))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            reason = os.strerror(error.errno or 0)
            raise ConfigError(f"cannot write to the run directory {self.path}: {reason}") from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                message = self._refusal(descriptor)
            else:
                reason = os.strerror(error.errno or 0)
                message = (
                    f"the file system of {self.path} has no file locks ({reason}); "
                    "keep the run directory on another one"
                )
            os.close(descriptor)
            raise ConfigError(message) from None
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": " ".join(sys.argv),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        self._descriptor = descriptor
        _held.add(identity)

    def _refusal(self, descriptor: int | None) -> str:
        try:
            owner = json.loads(os.pread(descriptor, 65536, 0)) if descriptor is not None else {}
        except ValueError:  # the owner is just writing it
            owner = {}
        pid, host = owner.get("pid", os.getpid()), owner.get("host", socket.gethostname())
        since = f" since {owner['started']}" if "started" in owner else ""
        return (
            f"the run directory {self.path} is in use by process {pid} on {host}{since}; "
            "stop that run or choose another directory"
        )

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self._objects:
            self._leave(error)
        if self._descriptor is None:
            return
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)  # drops the lock
        self._descriptor = None
        _held.discard(self._lock_file.resolve())

    def _leave(self, error: BaseException | None) -> None:
        try:
            if self._mirror:
                self._mirror.close()
        except StepError:
            # What ended the run is not masked by what came of it.
            if error is None or isinstance(error, SystemExit | RestartRequested):
                raise
        finally:
            shutil.rmtree(self.path.parent, ignore_errors=True)

    def write_config(self, yaml_text: str) -> Path | None:
        """Store the resolved configuration.

        Returns:
          The name under which one that differs is kept now (``config.1.yaml``).
        """
        if not self.primary:
            return None
        kept = None
        if self.config.exists():
            if (before := self.config.read_text(encoding="utf-8")) == yaml_text:
                return None
            names = (self.path / f"config.{number}.yaml" for number in itertools.count(1))
            kept = next(path for path in names if not path.exists())
            write_whole(kept, before)
        write_whole(self.config, yaml_text)  # a kill in between leaves a configuration
        return kept


def is_locked(path: Path | str) -> bool:
    """Whether a run has the directory at the moment."""
    if (Path(path) / "lock").resolve() in _held:
        return True
    try:
        owner = owner_in((Path(path) / "lock").read_bytes())
    except OSError:
        return False
    if "beat" in owner:  # a copy of that of an object store
        return beats(owner)
    try:
        descriptor = os.open(Path(path) / "lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
