"""A folder in the layout of a public release as an artifact: ``hf:PATH``.

That is a decoder in the Hugging Face layout, or Step-Video's transformer or autoencoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from step_jax.checkpoint.artifact import Artifact
from step_jax.core.errors import ConfigError, DataError
from step_jax.core.sharding import Sharding
from step_jax.interop.hf import step_video, step_video_vae
from step_jax.interop.hf.families import config_from_hf, text_keys
from step_jax.interop.hf.files import read_config
from step_jax.interop.hf.load import load_hf
from step_jax.models.context import ComputeDtype
from step_jax.tokenizers.base import FILES
from step_jax.tokenizers.files import load_tokenizer

PIPELINE = "model_index.json"  # of a folder of folders of `diffusers`

#: config.json's name of a dtype -> that a model of it is computed in
_COMPUTED: dict[str, ComputeDtype] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "bfloat16",
}


def load_hf_artifact(path: str, sharding: Sharding, *, arrays: bool = True) -> Artifact:
    """The model of a folder, with its tokenizer if it has one.

    Raises:
      ConfigError, CheckpointError: as ``load_hf``, ``load_transformer`` and ``load_vae``.
      DataError: the tokenizer's files are damaged.
    """
    folder = Path(path).expanduser()
    if (folder / PIPELINE).is_file():
        raise ConfigError(
            f"{folder} holds several models ({PIPELINE}): name the folder of one, such as "
            f"hf:{folder / 'transformer'} or hf:{folder / 'vae'}"
        )
    model: Any
    params: Any
    if step_video_vae.is_vae(folder):
        model, params = step_video_vae.load_vae(folder, sharding, arrays=arrays)
        return _of_video(path, folder, model, params)
    hf_config = read_config(folder)
    if hf_config.get("_class_name") == step_video.CLASS:
        model, params = step_video.load_transformer(folder, hf_config, sharding, arrays=arrays)
        return _of_video(path, folder, model, params)
    return _of_text(path, folder, hf_config, sharding, arrays)


def _of_video(path: str, folder: Path, model: Any, params: Any) -> Artifact:
    """The released transformer is guided by 9 (5 of the distilled), so it knows no text too."""
    return Artifact(
        name=f"hf:{path}",
        directory=folder,
        model=model,
        params=params,
        processor={},
        context=None,
        dtype="bfloat16",  # as the released code computes it
        step=0,
        meta={"artifact": {"loop": "", "origin": ""}, "guidable": True},
    )


def _of_text(path: str, folder: Path, hf_config, sharding: Sharding, arrays: bool) -> Artifact:
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
