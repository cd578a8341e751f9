"""Latents of clips on disk: written once by an autoencoder, read by every run.

A folder has ``manifest.json`` and, for every size, one array of all its latents.

Shape suffixes: N clips, F frames, H height, W width, C channels.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from step_jax.core.errors import DataError
from step_jax.core.files import seal, sealed

MANIFEST = "manifest.json"
FORMAT = 1


class Clip(NamedTuple):
    """One clip.

    Attributes:
      latents_FHWC: float32.
      captions: the same in several words or languages.
      scalars: numbers that are known of it (``fps``, ``motion``).
      noise: number of the noise that a model made it of, None for a clip of the world.
    """

    latents_FHWC: np.ndarray
    captions: tuple[str, ...]
    scalars: Mapping[str, float] = {}
    noise: int | None = None


def write_latents(folder: Path | str, clips: Iterable[Clip], made_by: str) -> None:
    """Writes clips as a folder of latents, one clip in memory at a time.

    The manifest comes last, so a cut-off write is none.

    Args:
      made_by: hash of the autoencoder, "" for pixels as they are.

    Raises:
      DataError: no clip, or clips of unlike channels or with unlike scalars.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        rows: dict[tuple[int, ...], _Rows] = {}
        channels = None
        for i, clip in enumerate(clips):
            *size, width = clip.latents_FHWC.shape
            channels = channels or width
            if width != channels or (
                entries and clip.scalars.keys() != entries[0]["scalars"].keys()
            ):
                raise DataError(f"clip {i} has other channels or scalars than the first")
            key = tuple(size)
            if key not in rows:
                path = folder / ("_".join(map(str, key)) + ".npy")
                rows[key] = stack.enter_context(_Rows(path, (*key, width)))
            entries.append(
                {
                    "size": key,
                    "row": rows[key].append(clip.latents_FHWC),
                    "captions": clip.captions,
                    "scalars": dict(clip.scalars),
                    "noise": clip.noise,
                }
            )
        if not entries:
            raise DataError(f"no clip to write to {folder}")
        for file in rows.values():
            file.finish()
    files = {file.path.name: _digest(file.path) for file in rows.values()}
    manifest = {"format": FORMAT, "made_by": made_by, "files": files, "clips": entries}
    seal(folder / MANIFEST, manifest)


class _Rows:
    """A .npy file of float32 that grows row by row; in its place once it is finished."""

    def __init__(self, path: Path, row: tuple[int, ...]):
        self.path, self._row, self._count = path, row, 0

    def __enter__(self) -> _Rows:
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._file = open(self._temporary, "wb")
        self._write_header()
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def append(self, a: np.ndarray) -> int:
        """Writes a row; returns its number."""
        self._file.write(np.ascontiguousarray(a, np.float32).tobytes())
        self._count += 1
        return self._count - 1

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._temporary, self.path)

    def _write_header(self) -> None:
        """NumPy leaves room in it for a first axis that grows."""
        shape = (self._count, *self._row)
        facts = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, facts | {"fortran_order": False})


@dataclass(frozen=True)
class LatentFolder:
    """Clips of a folder; a source of clips (``data.clips``)."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str, made_by: str | None = None) -> LatentFolder:
        """The folder, every file checked against its checksum.

        Args:
          made_by: hash of the autoencoder that must have made them; None takes any.

        Raises:
          DataError: no such folder, a damaged one, or latents of another autoencoder.
        """
        path = Path(path)
        try:
            manifest = sealed(path / MANIFEST)
            files = manifest["files"]
            damaged = [n for n, digest in files.items() if _digest(path / n) != digest]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no folder of latents: {error}") from None
        if manifest["format"] != FORMAT or damaged:
            raise DataError(f"{path}: damaged files {damaged}, or another format: make it again")
        if made_by is not None and manifest["made_by"] != made_by:
            raise DataError(
                f"the latents in {path} are of another autoencoder ({manifest['made_by'][:12]}) "
                f"than the one given ({made_by[:12]}): encode the clips again"
            )
        return cls(path, manifest)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {
            "kind": "latents",
            "made_by": self.manifest["made_by"],
            "files": self.manifest["files"],
        }

    @functools.cached_property
    def sizes_N3(self) -> np.ndarray:
        return np.array([clip["size"] for clip in self.manifest["clips"]])

    @functools.cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: np.load(self.path / name, mmap_mode="r") for name in self.manifest["files"]}

    @property
    def channels(self) -> int:
        return next(iter(self._arrays.values())).shape[-1]

    @functools.cached_property
    def captions(self) -> list[tuple[str, ...]]:
        return [tuple(clip["captions"]) for clip in self.manifest["clips"]]

    @functools.cached_property
    def noises_N(self) -> np.ndarray | None:
        noises = [clip["noise"] for clip in self.manifest["clips"]]
        return None if None in noises else np.array(noises, np.uint32)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The captions of the first clips."""
        return tuple(dict.fromkeys(text for texts in self.captions[:4] for text in texts))

    @functools.cached_property
    def scalars(self) -> dict[str, np.ndarray]:
        clips = self.manifest["clips"]
        names = clips[0]["scalars"]
        return {n: np.array([c["scalars"][n] for c in clips], np.float32) for n in names}

    def latents(self, i: int) -> np.ndarray:
        clip = self.manifest["clips"][i]
        return np.asarray(self._arrays["_".join(map(str, clip["size"])) + ".npy"][clip["row"]])


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
