"""Reading a checkpoint's folder: which files count, and what is wrong with one that is not whole.

Which files: as `transformers` has it, ``model.safetensors``, or else the shards that
``model.safetensors.index.json`` names; `diffusers` has another stem than ``model``. Nothing else in
the folder is read.

The format of a .safetensors file: eight bytes with the header's length, little endian; the header,
JSON from a tensor's name to its ``dtype``, ``shape`` and ``data_offsets``; the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from step_jax.core.errors import CheckpointError

STEM = "model"

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "BOOL": np.dtype(np.bool_),
    **{f"{sign}{n}": np.dtype(f"{sign.lower()}{n // 8}") for sign in "IU" for n in (8, 16, 32, 64)},
}
_HEADER_LIMIT = 100_000_000  # bytes, of the format itself


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; as an array, a view of the file's own pages."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        count = math.prod(self.shape)
        return np.memmap(self.path, self.dtype, "r", self.start, (count,)).reshape(self.shape)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
      CheckpointError: there is none, or it is no JSON object.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}: give a folder with config.json and weights")
    return _read_json(folder / "config.json")


def single(stem: str) -> str:
    """The file of all weights."""
    return f"{stem}.safetensors"


def index_of(stem: str) -> str:
    """The file that says which shard has which weights."""
    return f"{stem}.safetensors.index.json"


def read_folder(folder: Path, stem: str = STEM) -> dict[str, Stored]:
    """The tensors of a folder by name; only headers are read.

    Args:
      stem: of the weights' files.

    Raises:
      CheckpointError: no weights, a damaged or missing file, or an index that does not fit.
    """
    whole, index = single(stem), index_of(stem)
    if (folder / whole).exists():
        return _read_header(folder / whole)
    if (folder / index).exists():
        return _read_shards(folder, folder / index)
    others = sorted(p.name for p in folder.iterdir() if p.suffix in _WEIGHTS)
    instead = f"; it has {', '.join(others[:5])}, which are not read" if others else ""
    raise CheckpointError(f"{folder} has neither {whole} nor {index}{instead}")


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def _read_shards(folder: Path, index: Path) -> dict[str, Stored]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} puts {name} into {file!r}, which is no .safetensors file"
            )
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file:
            raise CheckpointError(f"{index} puts {name} into {file!r}, outside of its folder")
    files = sorted(set(weight_map.values()))
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise CheckpointError(f"{folder} lacks {_few(absent)}, which its index names")
    out: dict[str, Stored] = {}
    for file in files:
        tensors = _read_header(folder / file)
        if twice := sorted(tensors.keys() & out.keys()):
            other = out[twice[0]].path.name
            raise CheckpointError(f"{folder} has {_few(twice)} twice: in {other} and in {file}")
        if stale := sorted(name for name in tensors if weight_map.get(name) != file):
            raise CheckpointError(
                f"{folder / file} has {_few(stale)}, which {index.name} does not look for there: "
                "is the file of another checkpoint?"
            )
        out |= tensors
    if lost := sorted(weight_map.keys() - out.keys()):
        raise CheckpointError(
            f"{folder / weight_map[lost[0]]} lacks {_few(lost)}, which its index names"
        )
    return out


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# --- JSON ----------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"no {path.name} in {path.parent}")
    if not path.is_file():
        raise CheckpointError(f"{path} is no file")
    return _parse_json(path.read_bytes(), str(path))


def _parse_json(data: bytes, what: str) -> dict[str, Any]:
    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise CheckpointError(f"{what} has the key {_few(twice)} twice")
        return found

    if kind := _other_kind(data[:64]):
        raise CheckpointError(f"{what} is {kind}, not JSON")
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise CheckpointError(f"{what} is not JSON: {e}") from e
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{what} is no JSON object but {type(parsed).__name__}")
    return parsed


def _other_kind(head: bytes) -> str | None:
    """What a file that begins like this is, if it is a usual mistake."""
    if not head.strip(b"\0 \r\n\t"):
        return "empty" if not head else "blank"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs (fetch the file itself: `git lfs pull`)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page (a failed download?)"
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "a PyTorch or zip file"
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    return None


# --- .safetensors --------------------------------------------------------------------------------


def _read_header(path: Path) -> dict[str, Stored]:
    if not path.is_file():
        raise CheckpointError(f"{path} is no file")
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(64)
        if kind := _other_kind(head):
            raise CheckpointError(f"{path} is {kind}, not a .safetensors file")
        length = int.from_bytes(head[:8], "little")
        if size < 8 or not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise CheckpointError(
                f"{path} is truncated or no .safetensors file: it has {size} bytes and names a "
                f"header of {length}"
            )
        f.seek(8)
        header = _parse_json(f.read(length), f"the header of {path}")
    header.pop("__metadata__", None)
    out = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_extents(path, out, 8 + length, size)
    return out


def _entry(path: Path, name: str, entry: Any, data: int) -> Stored:
    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path} is damaged: {name} has {what}")

    if not isinstance(entry, dict):
        raise bad(f"the entry {entry!r}")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"the type {dtype!r}, which is none of {', '.join(DTYPES)}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _indices(shape):
        raise bad(f"the shape {shape!r}")
    if not _indices(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"the offsets {offsets!r}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise bad(f"{offsets[1] - offsets[0]} bytes, but {dtype} {tuple(shape)} are {expected}")
    return Stored(path, DTYPES[dtype], tuple(shape), data + offsets[0])


def _indices(x: Any) -> TypeGuard[list[int]]:
    return isinstance(x, list) and all(type(i) is int and i >= 0 for i in x)


def _check_extents(path: Path, tensors: dict[str, Stored], data: int, size: int) -> None:
    """The tensors lie one after another and fill the file."""
    end = data
    for name, t in sorted(
        tensors.items(), key=lambda item: (item[1].start, math.prod(item[1].shape))
    ):
        if t.start != end:
            what = "overlaps another tensor" if t.start < end else "follows bytes of no tensor"
            raise CheckpointError(f"{path} is damaged: {name} {what}")
        end += math.prod(t.shape) * t.dtype.itemsize
    if end != size:
        what = "truncated" if end > size else "damaged"
        raise CheckpointError(f"{path} is {what}: it has {size} bytes, its header names {end}")
