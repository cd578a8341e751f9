"""A run directory in an object store: a folder of this machine, copied there as it grows.

Everything that a run writes but its checkpoints are small files that it appends to or writes again,
which objects do not allow. They are written here and copied there: before a checkpoint is
committed, from time to time, and at the end. So what a killed process has not copied yet is of
steps after its last checkpoint, which are done again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

from step_jax.core.errors import StepError
from step_jax.core.storage import Objects
from step_jax.runs.lease import LOCK, Lock

#: what no run reads back, and checkpoints, which are not in the folder
_NOT_FETCHED = ("checkpoints", "tensorboard", "plots", "samples", "profile")
#: folders that are left out without the file that is written last, and the file
_WHOLE_OR_NOT, _COMMITS = ("heldout", "reference"), "meta.json"
_EVERY_S = 30.0
_SHARE = 20  # copying takes at most so small a part of the time
_CLOSE_S = 60.0


class Mirror:
    """Copies a folder to an object store while it is open and its lock is held."""

    def __init__(self, objects: Objects, folder: Path, lock: Lock):
        self._objects, self._folder, self._lock = objects, folder, lock
        self._known: dict[str, tuple[int, int]] = {}  # name -> size and time of what was copied
        self._copying = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def open(self) -> None:
        """Goes on from what the folder holds, which was fetched."""
        self._known = self._files()
        self._thread.start()

    def sync(self) -> None:
        """Copies what has changed.

        Raises:
          TakenOverError: another process has taken the lock over.
          StepError: the store does not take it.
        """
        with self._copying:
            self._lock.renew()
            now = self._files()
            changed = [name for name, state in now.items() if self._known.get(name) != state]
            last = [name for name in changed if name.endswith(f"/{_COMMITS}")]
            self._objects.upload(self._folder, sorted(set(changed) - set(last)))
            self._objects.upload(self._folder, last)
            self._objects.delete(self._known.keys() - now.keys())
            self._known = now

    def close(self) -> None:
        """Copies the rest. Raises as `sync`."""
        self._closing.set()
        self._thread.join(_CLOSE_S)
        self.sync()

    def _work(self) -> None:
        pause = _EVERY_S
        while not self._closing.wait(pause):
            started = time.monotonic()
            try:
                self.sync()
            except (StepError, OSError) as error:
                # No end of the run yet: that is for the next checkpoint to say, if it lasts.
                logging.getLogger("step_jax.runs").warning("%s", error)
            pause = max(_EVERY_S, _SHARE * (time.monotonic() - started))

    def _files(self) -> dict[str, tuple[int, int]]:
        found = {}
        for folder, folders, names in os.walk(self._folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                if name.startswith("."):  # being written
                    continue
                path = Path(folder) / name
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                found[path.relative_to(self._folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
        return found


def fetch(objects: Objects, folder: Path) -> None:
    """Copies to a folder what a run reads back of its directory."""
    names = [name for name in objects.list() if name.partition("/")[0] not in _NOT_FETCHED]
    names = [name for name in names if name != LOCK]
    whole = {name.rpartition("/")[0] for name in names if name.endswith(f"/{_COMMITS}")}
    torn = set(_WHOLE_OR_NOT) - whole
    objects.download(folder, [name for name in names if name.partition("/")[0] not in torn])
