"""The directory of one run, and the lock that keeps a second run out of it."""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

from step_jax.core.errors import RestartRequested, StepError, TakenOverError
from step_jax.core.files import write_whole
from step_jax.core.storage import Objects, is_url
from step_jax.runs.folder_lock import FolderLock
from step_jax.runs.lease import Lease, Lock, Renewal
from step_jax.runs.mirror import Mirror, fetch


class RunDirectory:
    """Where a run keeps everything, locked while the context is open.

    A directory may be in an object store (``gs://``, ``s3://``). It is then a folder of this
    process that is copied there as it grows (:mod:`step_jax.runs.mirror`), and all but ``name``,
    ``parent`` and ``checkpoints`` is in that folder.

    The lock is a :class:`~step_jax.runs.folder_lock.FolderLock`, in an object store a
    :class:`~step_jax.runs.lease.Lease`. A thread looks every ten seconds whether it is still held.

    Attributes:
      lost: another process has the directory by now, and nothing more may be written there.
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

    def __init__(
        self,
        path: Path | str,
        *,
        primary: bool = True,
        on_lost: Callable[[StepError], None] = lambda error: None,
    ):
        """
        Args:
          path: the directory, or its URL; it is made if it does not exist.
          primary: whether this process owns the directory (process 0 of a run). The others read
            paths from the object and neither lock nor write.
          on_lost: called, by a thread, with the error that says who has the directory now.
        """
        self.lost = False
        self._on_lost = on_lost
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
        self._lock: Lock = Lease(self._objects) if self._objects else FolderLock(self.path)
        self._renewal: Renewal | None = None

    def __enter__(self) -> RunDirectory:
        """Take the lock. Raises ConfigError naming the owner if another run has it."""
        try:
            if self.primary:
                self._lock.take()
                self._renewal = Renewal(self._lock, self._lose).__enter__()
            if self._objects:
                self._fetch(self._objects)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        if self.primary and not self.identity.exists():
            name = re.sub(r"[^A-Za-z0-9_.-]+", "_", self.path.resolve().name)[:40]
            write_whole(self.identity, f"{name}-{uuid.uuid4().hex[:8]}")
        return self

    def _lose(self, error: StepError) -> None:
        self.lost = True
        self._on_lost(error)

    def _fetch(self, objects: Objects) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        fetch(objects, self.path)
        if self.primary:
            self._mirror = Mirror(objects, self.path, self._lock)
            self._mirror.open()

    def keep(self) -> None:
        """Called before a checkpoint is committed: this process may still write, and what it wrote
        up to then outlives this machine. Raises StepError if one of them is not so."""
        try:
            if self._mirror:
                self._mirror.sync()
            elif self.primary:
                self._lock.renew()
        except TakenOverError:
            self.lost = True
            raise

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            self._close()
        except StepError:
            # What ended the run is not masked by what came of it.
            if error is None or isinstance(error, SystemExit | RestartRequested):
                raise

    def _close(self) -> None:
        try:
            if self._mirror:
                self._mirror.close()
        finally:
            try:
                if self._renewal:
                    self._renewal.__exit__()
                self._lock.release()
            finally:
                if self._objects:
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
