"""From parameters to a folder that `transformers` loads, a tensor at a time."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from step_jax.core.errors import CheckpointError, ConfigError
from step_jax.core.files import sync_directory, write_synced
from step_jax.core.spec import FLOAT32_ROLES, ParamSpec, path_name
from step_jax.core.storage import local
from step_jax.interop.hf.export import config_to_hf, family_of
from step_jax.interop.hf.families import FAMILIES
from step_jax.interop.hf.files import DTYPES, STEM, index_of, single
from step_jax.interop.hf.tensors import Tensor, layout
from step_jax.models.text.decoder import Decoder, DecoderParams

#: What weights can be written as; the names are those of config.json.
EXPORT_DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: What a tokenizer of `transformers` consists of.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "chat_template.jinja", "chat_template.json", "*.tiktoken",
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
      folder: where it is.
      files: names of all files, config.json among them.
      bytes: of all tensors.
      architecture: the model's class, as config.json names it.
      auto_class: of `transformers`, loads the folder by its path alone; None if the library knows
        this architecture only as part of another model.
      note: what a reader has to know, a sentence; empty if nothing.
    """

    folder: Path
    files: tuple[str, ...]
    bytes: int
    architecture: str
    auto_class: str | None
    note: str


def params_to_hf(
    params: DecoderParams, config: Decoder, *, rope_interleave: bool = True, dtype=None
) -> dict[str, np.ndarray]:
    """The inverse of ``params_from_hf``: tensor name -> array, of ``dtype`` or the parameters' own.

    Routers and selection biases stay float32, in which they decide.

    Raises:
      CheckpointError: parameters that do not fit ``config``, are no floats, or hold what ``dtype``
        cannot; each by its name.
      ConfigError: ``config`` has parameters without a tensor.
    """
    dtype = None if dtype is None else np.dtype(dtype)
    tensors, specs = layout(config, rope_interleave)
    return {e.name: e.read() for e in entries_of(params, tensors, specs, dtype)}


def save_hf(
    path: str | Path,
    params: DecoderParams,
    config: Decoder,
    *,
    dtype: str = "bfloat16",
    context_length: int,
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
    tokenizer_folder: str | Path | None = None,
    max_shard_size: int = 5_000_000_000,
) -> Exported:
    """Writes a model as a new folder that `transformers` loads.

    The folder appears whole, under its name only at the end. One tensor at a time is on the host.

    Args:
      dtype: ``bfloat16``, ``float16`` or ``float32``.
      context_length: tokens of the longest row it was trained on.
      bos_id, eos_ids: the token that starts a document, and those at which generation stops.
      tokenizer_folder: whose tokenizer files are copied beside the weights.
      max_shard_size: bytes of a file; more is cut into shards with an index.

    Raises:
      ConfigError: no Hugging Face family computes this model; an argument that does not fit; or
        ``path`` exists and is not empty.
      CheckpointError: as ``params_to_hf``.
    """
    _check_arguments(config, context_length, bos_id, eos_ids)
    tokenizer = _tokenizer_files(tokenizer_folder)
    hf_config = config_to_hf(config) | _ids(bos_id, eos_ids)
    hf_config |= {"max_position_embeddings": context_length, "dtype": dtype, "torch_dtype": dtype}
    generation = {"_from_model_config": False, "do_sample": False, **_ids(bos_id, eos_ids)}
    family = FAMILIES[family_of(config)]
    return write_folder(
        path,
        params,
        layout(config),
        dtype=dtype,
        documents={"generation_config.json": generation, "config.json": hf_config},
        copied=tokenizer,
        max_shard_size=max_shard_size,
        architecture=family.architecture,
        auto_class=family.auto_class,
        note=family.note,
    )


def write_folder(
    path: str | Path,
    params: Any,
    layout: tuple[list[Tensor], dict[str, ParamSpec]],
    *,
    dtype: str,
    documents: Mapping[str, dict[str, Any]],
    copied: Sequence[Path] = (),
    stem: str = STEM,
    max_shard_size: int,
    architecture: str,
    auto_class: str | None = None,
    note: str = "",
) -> Exported:
    """Writes parameters as a new folder; see :func:`save_hf`.

    Args:
      layout: the tensors, and the specs of all leaves by path.
      documents: JSON by the name of its file.
      copied: files that go beside the weights as they are.
      stem: of the weights' files.
      architecture, auto_class, note: see ``Exported``.

    Raises:
      ConfigError, CheckpointError: as ``save_hf``.
    """
    path = local(path, "where to export to")
    if dtype not in EXPORT_DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; export as one of {', '.join(EXPORT_DTYPES)}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is not empty: choose a new folder to export into")
    if max_shard_size < 1:
        raise ConfigError(f"max_shard_size is {max_shard_size}; it must be at least 1")
    entries = list(entries_of(params, *layout, EXPORT_DTYPES[dtype]))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        _write_weights(temporary, entries, stem, max_shard_size)
        for file in copied:
            shutil.copyfile(file, temporary / file.name)
        for name, content in documents.items():
            write_synced(temporary / name, _json(content))
        sync_directory(temporary)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Exported(
        folder=path,
        files=tuple(sorted(p.name for p in path.iterdir())),
        bytes=sum(e.bytes for e in entries),
        architecture=architecture,
        auto_class=auto_class,
        note=note,
    )


def _check_arguments(config, context_length, bos_id, eos_ids) -> None:
    if context_length < 1:
        raise ConfigError(f"context_length is {context_length}; it must be at least 1")
    for name, value in (("bos_id", bos_id), *(("eos_ids", i) for i in eos_ids)):
        if value is not None and not 0 <= value < config.vocab:
            raise ConfigError(f"{name} has {value}; the vocabulary has {config.vocab} tokens")


def _ids(bos_id: int | None, eos_ids: Sequence[int]) -> dict[str, Any]:
    """Said in any case: where a file is silent, some families stop at their own tokens 0, 1 or 2.

    Batches are padded with the first stop token.
    """
    eos = list(eos_ids)
    return {
        "bos_token_id": bos_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
        "pad_token_id": eos[0] if eos else None,
    }


def _tokenizer_files(folder: str | Path | None) -> list[Path]:
    if folder is None:
        return []
    folder = Path(folder).expanduser()
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    files = [folder / n for n in names if any(fnmatch(n, known) for known in _TOKENIZER_FILES)]
    if not files:
        raise ConfigError(
            f"{folder} has no file of a tokenizer: none of {', '.join(_TOKENIZER_FILES)}"
        )
    return files


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


# --- tensors -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A tensor to be written; ``read`` fetches it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def entries_of(
    params: Any, tensors: list[Tensor], specs: dict[str, ParamSpec], dtype: np.dtype | None
) -> Iterator[Entry]:
    """The tensors that parameters are to be written as. Raises as ``params_to_hf``."""
    leaves = {path_name(path): a for path, a in jax.tree_util.tree_leaves_with_path(params)}
    _check_leaves(leaves, specs)
    for t in tensors:
        to = dtype
        if to is None or t.specs[0].role in FLOAT32_ROLES:
            to = np.dtype(leaves[t.leaves[0]].dtype)
        read = functools.partial(_fetch, t, tuple(leaves[leaf] for leaf in t.leaves), to)
        yield Entry(t.name, t.their_shape, to, read)


def _check_leaves(leaves: dict[str, Any], specs) -> None:
    problems = [f"missing {path} {specs[path].shape}" for path in specs if path not in leaves]
    problems += [f"unused {path} {np.shape(leaves[path])}" for path in leaves if path not in specs]
    for path in specs.keys() & leaves.keys():
        shape, dtype = np.shape(leaves[path]), leaves[path].dtype
        if shape != specs[path].shape:
            problems.append(f"{path} has shape {shape}, expected {specs[path].shape}")
        elif not jnp.issubdtype(dtype, jnp.floating):
            problems.append(f"{path} is {dtype}, expected a floating-point type")
        elif not getattr(leaves[path], "is_fully_addressable", True):
            raise CheckpointError(
                f"{path} lies on devices of other processes: load the checkpoint in one process "
                "and export there"
            )
    if problems:
        raise CheckpointError("the parameters do not fit the model: " + "; ".join(sorted(problems)))


def _fetch(tensor: Tensor, leaves: tuple[Any, ...], dtype: np.dtype) -> np.ndarray:
    """The tensor as it is written, turned and narrowed where its leaves lie."""
    order = tuple(np.argsort(tensor.order).tolist()) if tensor.reorder else None
    if all(map(_on_host, leaves)):
        parts = [np.asarray(leaf)[tensor.place] for leaf in leaves]
        with np.errstate(over="ignore"):
            theirs, *finite = _turn(np, parts, tensor.axes, order, dtype)
    else:
        place = np.asarray(tensor.place, np.int32)
        theirs, *finite = _turn_there(leaves, place, axes=tensor.axes, order=order, dtype=dtype)
    what = f"{tensor.name} ({', '.join(tensor.leaves)}) holds"
    if not finite[0]:
        raise CheckpointError(f"{what} NaN or infinite values")
    if not finite[1]:
        raise CheckpointError(f"{what} values too large for {dtype}: export as float32")
    return np.asarray(theirs).reshape(tensor.their_shape)


def _on_host(leaf: Any) -> bool:
    """Whether NumPy sees the array as it is, without a copy."""
    if not isinstance(leaf, jax.Array):
        return True
    return len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu"


def _turn(xp, parts, axes, order, dtype):
    """(the tensor of ``dtype`` with their order of axes, whether it was finite, and still is)."""
    ours = parts[0] if len(parts) == 1 else xp.concatenate(parts, -1)
    if order is not None:
        ours = ours[..., np.asarray(order)]
    theirs = xp.transpose(ours, axes).astype(dtype)
    return theirs, xp.isfinite(ours).all(), xp.isfinite(theirs).all()


@functools.partial(jax.jit, static_argnames=("axes", "order", "dtype"))
def _turn_there(leaves, place, *, axes, order, dtype):
    for i in range(place.shape[0]):
        leaves = [jax.lax.dynamic_index_in_dim(a, place[i], keepdims=False) for a in leaves]
    return _turn(jnp, leaves, axes, order, dtype)


# --- files ---------------------------------------------------------------------------------------


def _write_weights(folder: Path, entries: list[Entry], stem: str, max_shard_size: int) -> None:
    shards = list(_shards(entries, max_shard_size))
    count = len(shards)
    names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = [single(stem)] if count == 1 else names
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(folder / name, shard)
    if len(shards) > 1:
        total = {"total_size": sum(e.bytes for e in entries)}
        where = {e.name: n for n, shard in zip(names, shards, strict=True) for e in shard}
        index = {"metadata": total, "weight_map": dict(sorted(where.items()))}
        write_synced(folder / index_of(stem), _json(index))


def _shards(entries: list[Entry], limit: int) -> Iterator[list[Entry]]:
    """The tensors in turn, as many as fit into a file; a larger one has its own."""
    shard: list[Entry] = []
    for entry in entries:
        if shard and sum(e.bytes for e in shard) + entry.bytes > limit:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def _write_safetensors(path: Path, entries: list[Entry]) -> None:
    """One file, a tensor at a time; wide types first, so that each lies on a multiple of itself."""
    entries = sorted(entries, key=lambda e: -e.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for e in entries:
        start, end = end, end + e.bytes
        header[e.name] = {
            "dtype": _NAMES[e.dtype], "shape": list(e.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for e in entries:
            f.write(np.ascontiguousarray(e.read()).reshape(-1).view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())
