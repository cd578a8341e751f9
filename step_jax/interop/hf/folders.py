"""Checkpoints: folders with config.json and .safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from step_jax.core.errors import CheckpointError
from step_jax.interop.hf.export import config_to_hf
from step_jax.interop.hf.families import config_from_hf
from step_jax.interop.hf.tensors import left_out, params_from_hf, params_to_hf
from step_jax.models.text.decoder import Decoder, DecoderParams


class _Folder(Mapping):
    """The tensors of a folder's .safetensors files, each read when it is asked for."""

    def __init__(self, path: Path):
        from safetensors import safe_open

        index = path / "model.safetensors.index.json"
        if index.is_file():  # a folder may hold other formats' files beside these
            names = set(json.loads(index.read_text())["weight_map"].values())
        else:
            names = {p.name for p in path.glob("*.safetensors")}
        if not names:
            raise CheckpointError(f"no .safetensors file in {path}")
        if absent := sorted(n for n in names if not (path / n).is_file()):
            raise CheckpointError(f"{path} lacks {', '.join(absent)}, which its index names")
        files = [safe_open(path / n, framework="np") for n in sorted(names)]
        self._file = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file[name].get_tensor(name)

    def __iter__(self):
        return iter(self._file)

    def __len__(self):
        return len(self._file)


def load_hf(path: str | Path) -> tuple[Decoder, DecoderParams]:
    """Configuration and parameters (NumPy) of a folder with config.json and .safetensors files.

    Needs the package `safetensors` (the extra `hf`).

    Raises:
      CheckpointError: a file is missing, or the tensors do not fit config.json (each is named).
      ConfigError: as ``config_from_hf``.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"no config.json in {path}")
    hf_config = json.loads((path / "config.json").read_text())
    config = config_from_hf(hf_config)
    params = params_from_hf(
        _Folder(path),
        config,
        rope_interleave=hf_config.get("rope_interleave", True),
        ignored=left_out(hf_config),
    )
    return config, params


def save_hf(
    path: str | Path, params: DecoderParams, config: Decoder, dtype: str = "bfloat16"
) -> None:
    """Writes config.json and model.safetensors, which `transformers` loads, into a new folder.

    Needs the package `safetensors` (the extra `hf`).

    Raises:
      ConfigError: no Hugging Face family computes this model.
      FileExistsError: ``path`` exists and is not empty.
    """
    from safetensors.numpy import save_file

    hf_config = config_to_hf(config) | {"dtype": dtype}
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty: choose a new folder to export into")
    path.mkdir(parents=True, exist_ok=True)
    state = params_to_hf(params, config, dtype=dtype)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    # Last, so that a folder with a config.json is whole.
    (path / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
