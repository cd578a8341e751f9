"""Small checkpoints as folders, for the tests of reading and writing them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.golden import golden


def write_folder(path: Path, g: golden.Golden, shards: int = 1, state=None) -> Path:
    """``g`` as `transformers` would write it, in one file or in shards with an index."""
    state = g.state if state is None else state
    path.mkdir()
    (path / "config.json").write_text(json.dumps(g.config))
    if shards == 1:
        save_file(state, path / "model.safetensors")
        return path
    names = sorted(state)
    weight_map = {n: f"model-{i % shards + 1:05d}.safetensors" for i, n in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: state[n] for n in names if weight_map[n] == file}, path / file)
    write_index(path, weight_map)
    return path


def write_index(path: Path, weight_map) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def raw_file(header, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a .safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def small() -> golden.Golden:
    return golden.load("llama_gqa")


def zeros_like(state) -> dict[str, np.ndarray]:
    return {k: np.zeros_like(v) for k, v in state.items()}
