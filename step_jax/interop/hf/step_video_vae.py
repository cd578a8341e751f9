"""The released layout of Step-Video's autoencoder, version 2 (arXiv 2502.10248), both directions.

A folder with ``vae_v2.safetensors``. There is no configuration: sizes are those of the tensors, and
the rest (17 frames a chunk, 32 groups, two paths) is fixed in the released class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from step_jax.core.config import validate
from step_jax.core.errors import CheckpointError, ConfigError
from step_jax.core.sharding import Sharding
from step_jax.core.spec import ParamSpec, by_name
from step_jax.interop.hf.export import differences
from step_jax.interop.hf.files import read_folder, single
from step_jax.interop.hf.load import read_params
from step_jax.interop.hf.save import Exported, write_folder
from step_jax.interop.hf.tensors import Form, Tensor
from step_jax.models.video.vae import VideoVAE, VideoVAEParams

STEM = "vae_v2"
OTHER = "vae.safetensors"  # of version 1

_PATHS = "encoder.conv_patchify.conv.conv.weight"  # what version 1 has not
_CLIPS: Form = ((4,), (3,), (0,), (1,), (2,))  # a convolution of clips
_FRAMES: Form = ((4,), (0, 3), (1,), (2,))  # of single frames, without an axis of time

_LEAVES = {"weight_KKKIO": "weight", "bias_O": "bias", "scale_C": "weight", "bias_C": "bias"}
_BLOCK = {
    "norm_in": "norm1",
    "conv_in": "conv1.conv",
    "norm_out": "norm2",
    "conv_out": "conv2.conv",
    "shortcut": "nin_shortcut.conv",
}
_ATTENTION = {
    "norm": "norm",
    "query": "q.conv",
    "key": "k.conv",
    "value": "v.conv",
    "out": "proj_out.conv",
}
_MIDDLE = {"before": "block_1", "after": "block_2"}
_ENDS = {
    "encoder/conv": "conv_in.conv",
    "encoder/norm": "norm_out",
    "encoder/head/resample": "conv_patchify.conv.conv",
    "encoder/head/conv": "conv_out.conv",
    "decoder/head/conv": "conv_in.conv",
    "decoder/head/resample": "conv_unpatchify.conv.conv",
    "decoder/norm": "norm_out",
    "decoder/conv": "conv_out",  # which the released class renames when it reads the file
}


def _their_name(path: str, model: VideoVAE) -> str:
    """The tensor of one of our parameters."""
    side, *inside, leaf = path.split("/")
    last = len(model.temporal)
    match inside:
        case ["levels", level, "blocks", block, part]:
            stack = f"down.{level}" if side == "encoder" else f"up.{last - int(level)}"
            name = f"{stack}.block.{block}.{_BLOCK[part]}"
        case ["levels", level, "resample"]:
            name = f"down.{level}.downsample.conv"
            name += ".conv" if model.temporal[int(level)] else ""
        case ["levels", level, "resample", part]:
            number = last - int(level)
            of_clips = model.temporal[number - 1]
            name = f"up.{number}.upsample." + (f"conv3d.{_BLOCK[part]}" if of_clips else "conv")
        case ["middle", "attention", part]:
            name = f"mid.attn_1.{_ATTENTION[part]}"
        case ["middle", where, part]:
            name = f"mid.{_MIDDLE[where]}.{_BLOCK[part]}"
        case _:
            name = _ENDS["/".join((side, *inside))]
    return f"{side}.{name}.{_LEAVES[leaf]}"


def layout(model: VideoVAE) -> tuple[list[Tensor], dict[str, ParamSpec]]:
    """All tensors of an autoencoder and all its leaves by path."""
    specs = by_name(model.specs())
    tensors = []
    for path, spec in specs.items():
        form = None
        if spec.role == "matrix":
            form = _FRAMES if spec.shape[:2] == (1, 3) else _CLIPS
        tensors.append(Tensor(_their_name(path, model), (path,), (spec,), form=form))
    return tensors, specs


def config_from_tensors(shapes: Mapping[str, tuple[int, ...]]) -> VideoVAE:
    """The autoencoder of tensors of these shapes, by name.

    Raises:
      CheckpointError: those that say its sizes are missing, or it is of version 1.
      ConfigError: there is no such autoencoder.
    """
    if _PATHS not in shapes and "encoder.conv_in.conv.weight" in shapes:
        raise CheckpointError(
            f"the autoencoder lacks {_PATHS}: it is of version 1, whose norms span time and which "
            "we do not compute, or damaged"
        )

    def size(name: str, axis: int = 0) -> int:
        if len(shapes.get(name, ())) <= axis:
            raise CheckpointError(
                f"{name} is missing, or misshapen ({shapes.get(name, 'none')}): it says what size "
                "the autoencoder has"
            )
        return shapes[name][axis]

    def how_many(name: str) -> int:
        return len([*takewhile(lambda i: name.format(i) in shapes, count())])

    block = "{}.block.0.conv1.conv.weight"
    levels = range(how_many(f"encoder.down.{block}"))
    downs = [f"encoder.down.{i}.downsample.conv.conv.weight" for i in levels]
    model = VideoVAE(
        latents=size("decoder.conv_in.conv.weight", 1),
        stem=size("encoder.conv_in.conv.weight"),
        encoder_widths=tuple(size(f"encoder.down.{block.format(i)}") for i in levels),
        decoder_widths=tuple(size(f"decoder.up.{block.format(i)}") for i in levels),
        encoder_blocks=how_many("encoder.down.0.block.{}.conv1.conv.weight"),
        decoder_blocks=how_many("decoder.up.0.block.{}.conv1.conv.weight"),
        temporal=tuple(down in shapes for down in downs[:-1]),
        channels=size("encoder.conv_in.conv.weight", 1),
    )
    validate(model)
    return model


def check_released(model: VideoVAE) -> None:
    """Raises ConfigError if the released class does not compute this autoencoder."""
    fixed = ("head", "head_width", "attention", "groups", "chunk")
    there = replace(model, **{name: getattr(VideoVAE(), name) for name in fixed})
    if model.head_width == 32 * model.latents:
        model = replace(model, head_width=0)
    if found := list(differences(model, there, "model")):
        raise ConfigError(
            f"the released autoencoder (version 2) cannot express this one: {'; '.join(found)}"
        )


def is_vae(folder: Path) -> bool:
    """Whether a folder has an autoencoder of this layout."""
    return any((folder / name).is_file() for name in (single(STEM), OTHER))


def load_vae(
    folder: Path, sharding: Sharding | None = None, *, arrays: bool = True
) -> tuple[VideoVAE, VideoVAEParams | None]:
    """Configuration and parameters of a folder; None without ``arrays``.

    Raises:
      CheckpointError: the file is missing or damaged, tensors are missing, unused, of another shape
        or no floats (each is named), values are not finite, or it is of version 1.
    """
    stored = read_folder(folder, STEM)
    model = config_from_tensors({name: tensor.shape for name, tensor in stored.items()})
    if not arrays:
        return model, None
    tensors, _ = layout(model)
    return model, read_params(stored, tensors, model.specs(), sharding)


def save_vae(
    path: str | Path, params: VideoVAEParams, model: VideoVAE, *, dtype: str = "bfloat16"
) -> Exported:
    """Writes an autoencoder as a new folder in the released layout; see ``save_hf``."""
    check_released(model)
    tensors, specs = layout(model)
    documents: dict[str, dict[str, Any]] = {}
    return write_folder(
        path,
        params,
        (tensors, specs),
        dtype=dtype,
        documents=documents,
        stem=STEM,
        max_shard_size=2 * sum(4 * spec.size for spec in specs.values()),  # a single file
        architecture="AutoencoderKL (version 2)",
        note="the class is of the released code, not of `diffusers`",
    )
