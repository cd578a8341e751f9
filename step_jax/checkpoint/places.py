"""Where the steps of a run lie, and what makes one exist: the only file that commits one.

On a file system a step is written beside its place and renamed. An object store renames nothing:
there a step is written in its place, and exists once its manifest does, which is written last and
deleted first.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from step_jax.checkpoint import manifest
from step_jax.checkpoint.manifest import MANIFEST, Entry, Place
from step_jax.core.errors import DiskFullError
from step_jax.core.files import sync_directory, write_synced
from step_jax.core.storage import Objects, is_url

_UNFINISHED = ".tmp-"
_DELETED = ".old-"


class Steps(Protocol):
    """The saved steps of a run. One process calls what writes."""

    @property
    def root(self) -> Place:
        """Where all of them lie."""

    def clean(self, event: Callable[[str], None]) -> None:
        """Removes what killed processes left."""

    def prepare(self, step: int, need: int) -> str | None:
        """Makes room for a save of ``need`` bytes.

        Returns:
          The name that a step in its way has from now on.

        Raises:
          DiskFullError: there is no room.
        """

    def unfinished(self, step: int) -> Place:
        """Where a step is written."""

    def write(self, step: int, name: str, data: bytes) -> None:
        """Adds a file to an unfinished step."""

    def commit(self, step: int, entries: dict[str, Entry]) -> None:
        """Makes an unfinished step exist; it must not exist yet."""

    def discard(self, step: int) -> None:
        """Removes an unfinished step, as far as that is possible."""

    def set_aside(self, step: int) -> str:
        """Renames a step to what is no step; returns the name."""

    def delete(self, step: int) -> None:
        """Deletes a step. One that is half deleted is no step."""


def steps_at(directory: str | os.PathLike | Objects) -> Steps:
    """Raises ConfigError for a URL that is none of a known object store."""
    if isinstance(directory, Objects):
        return InBucket(directory)
    if is_url(directory):
        return InBucket(Objects.at(str(directory)))
    return InFolder(Path(directory).absolute())


class InFolder:
    """Steps on a file system that all processes share."""

    def __init__(self, root: Path):
        self.root = root

    def clean(self, event: Callable[[str], None]) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for path in self.root.iterdir():
            if path.name.startswith((_UNFINISHED, _DELETED)):
                if path.name.startswith(_UNFINISHED):
                    event(f"checkpoint: removing unfinished save {path.name}")
                shutil.rmtree(path)

    def prepare(self, step: int, need: int) -> None:
        free = shutil.disk_usage(self.root).free
        if free < need:
            raise DiskFullError(
                f"{self.root} has {free / 1e6:.1f} MB free and the state needs "
                f"{need / 1e6:.1f} MB: free some space, or lower checkpoint.keep"
            )

    def unfinished(self, step: int) -> Path:
        return self.root / f"{_UNFINISHED}{manifest.step_name(step)}"

    def write(self, step: int, name: str, data: bytes) -> None:
        write_synced(self.unfinished(step) / name, data)

    def commit(self, step: int, entries: dict[str, Entry]) -> None:
        """The rename is the commit: before it the step does not exist, after it it is whole."""
        unfinished = self.unfinished(step)
        write_synced(unfinished / MANIFEST, manifest.manifest_of(step, entries))
        for folder, _, _ in os.walk(unfinished):
            sync_directory(Path(folder))
        os.rename(unfinished, self.root / manifest.step_name(step))
        sync_directory(self.root)

    def discard(self, step: int) -> None:
        for path in self.root.glob(f"{self.unfinished(step).name}*"):
            shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, step: int) -> str:
        source = self.root / manifest.step_name(step)
        names = (source.with_name(f"{source.name}.aside-{k}") for k in itertools.count())
        target = next(path for path in names if not path.exists())
        os.rename(source, target)
        return target.name

    def delete(self, step: int) -> None:
        name = manifest.step_name(step)
        # Renamed first: a half-deleted step must not look like a damaged one.
        os.rename(self.root / name, self.root / f"{_DELETED}{name}")
        shutil.rmtree(self.root / f"{_DELETED}{name}")


class InBucket:
    """Steps in an object store."""

    def __init__(self, root: Objects):
        self.root = root

    def clean(self, event: Callable[[str], None]) -> None:
        names = self.root.list()
        whole = {name.partition("/")[0] for name in names if name.endswith(f"/{MANIFEST}")}
        doomed = [name for name in names if (name.partition("/")[0]) not in whole]
        for step in sorted({name.partition("/")[0] for name in doomed}):
            event(f"checkpoint: removing unfinished save {step}")
        self.root.delete(doomed)

    def prepare(self, step: int, need: int) -> str | None:
        place = self.unfinished(step)
        names = place.list()
        if MANIFEST in names:
            return self.set_aside(step)
        place.delete(names)
        return None

    def unfinished(self, step: int) -> Objects:
        return self.root / manifest.step_name(step)

    def write(self, step: int, name: str, data: bytes) -> None:
        self.unfinished(step).write(name, data)

    def commit(self, step: int, entries: dict[str, Entry]) -> None:
        self.unfinished(step).write(MANIFEST, manifest.manifest_of(step, entries))

    def discard(self, step: int) -> None:
        place = self.unfinished(step)
        place.delete(place.list())

    def set_aside(self, step: int) -> str:
        source, taken = self.unfinished(step), {name.partition("/")[0] for name in self.root.list()}
        names = (f"{source.name}.aside-{k}" for k in itertools.count())
        target = next(name for name in names if name not in taken)
        files = [name for name in source.list() if name != MANIFEST]
        for name in [*files, MANIFEST]:  # a copy, since stores rename nothing
            (self.root / target).write(name, source.read(name))
        self.delete(step)
        return target

    def delete(self, step: int) -> None:
        place = self.unfinished(step)
        place.delete([MANIFEST])
        place.delete(place.list())
