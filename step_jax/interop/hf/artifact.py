"""A folder in the Hugging Face layout as an artifact: ``hf:PATH``."""

from __future__ import annotations

from pathlib import Path

from step_jax.checkpoint.artifact import Artifact
from step_jax.core.errors import DataError
from step_jax.core.sharding import Sharding
from step_jax.interop.hf.families import config_from_hf, text_keys
from step_jax.interop.hf.files import read_config
from step_jax.interop.hf.load import load_hf
from step_jax.models.context import ComputeDtype
from step_jax.tokenizers.base import FILES
from step_jax.tokenizers.files import load_tokenizer

#: config.json's name of a dtype -> that a model of it is computed in
_COMPUTED: dict[str, ComputeDtype] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "bfloat16",
}


def load_hf_artifact(path: str, sharding: Sharding, *, arrays: bool = True) -> Artifact:
    """The model of a folder, with its tokenizer if it has one.

    Raises:
      ConfigError, CheckpointError: as ``load_hf``.
      DataError: the tokenizer's files are damaged.
    """
    folder = Path(path).expanduser()
    hf_config = read_config(folder)
    if arrays:
        model, params = load_hf(folder, sharding)
    else:
        model, params = config_from_hf(hf_config), None
    has_tokenizer = any((folder / name).is_file() for name in FILES[:2])
    text = text_keys(hf_config)
    context = text.get("max_position_embeddings")
    if not isinstance(context, int) or context < 1:
        raise DataError(
            f"{folder / 'config.json'}: max_position_embeddings is {context!r}; it must say how "
            "many tokens a text may have"
        )
    return Artifact(
        name=f"hf:{path}",
        directory=folder,
        model=model,
        params=params,
        processor={"tokenizer": load_tokenizer(folder)} if has_tokenizer else {},
        context=context,
        dtype=_COMPUTED.get(str(text.get("dtype") or text.get("torch_dtype")), "bfloat16"),
        step=0,
        meta={"artifact": {"loop": "", "origin": ""}},
    )
