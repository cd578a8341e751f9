"""Latents of clips on disk: written once by an autoencoder, read by every run.

A folder has ``manifest.json`` and, for every size, one array of all its latents.

Shape suffixes: N clips, F frames, H height, W width, C channels.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from step_jax.core.errors import DataError
from step_jax.core.files import write_whole

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
    """Writes clips as a folder of latents; the manifest comes last, so a cut-off write is none.

    Args:
      made_by: hash of the autoencoder, "" for pixels as they are.

    Raises:
      DataError: no clip, or clips of unlike channels or with unlike scalars.
    """
    folder = Path(folder)
    arrays: dict[tuple[int, ...], list[np.ndarray]] = {}
    entries: list[dict[str, Any]] = []
    for i, clip in enumerate(clips):
        size = clip.latents_FHWC.shape[:3]
        rows = arrays.setdefault(size, [])
        entries.append(
            {
                "size": size,
                "row": len(rows),
                "captions": clip.captions,
                "scalars": dict(clip.scalars),
                "noise": clip.noise,
            }
        )
        rows.append(np.asarray(clip.latents_FHWC, np.float32))
        first = next(iter(arrays.values()))[0]
        if (
            rows[-1].shape[3] != first.shape[3]
            or entries[-1]["scalars"].keys() != entries[0]["scalars"].keys()
        ):
            raise DataError(f"clip {i} has other channels or scalars than the first")
    if not entries:
        raise DataError(f"no clip to write to {folder}")
    files = {}
    for size, rows in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, np.stack(rows))
        name = "_".join(map(str, size)) + ".npy"
        write_whole(folder / name, buffer.getvalue())
        files[name] = hashlib.sha256(buffer.getvalue()).hexdigest()
    manifest = {"format": FORMAT, "made_by": made_by, "files": files, "clips": entries}
    write_whole(folder / MANIFEST, json.dumps(manifest, ensure_ascii=False))


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
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            files = manifest["files"]
            damaged = [n for n, digest in files.items() if _digest(path / n) != digest]
        except (OSError, ValueError, KeyError) as error:
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
