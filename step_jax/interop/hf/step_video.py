"""The released layout of Step-Video's transformer (arXiv 2502.10248), in both directions.

A folder of `diffusers`: config.json of the class ``StepVideoModel`` and
``diffusion_pytorch_model.safetensors`` or its shards. The class has a second form, Step-Video-TI2V
(arXiv 2503.11251), with ``use_additional_conditions``: it goes on from a picture, whose latents
stand beside the noisy ones, and is told a score of its motion.

Queries, keys and values are one matrix there, head by head; so are keys and values of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from step_jax.core.config import validate
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.core.spec import ParamSpec, by_name
from step_jax.interop.hf.export import differences
from step_jax.interop.hf.files import read_folder
from step_jax.interop.hf.keys import Keys
from step_jax.interop.hf.load import read_params
from step_jax.interop.hf.save import Exported, write_folder
from step_jax.interop.hf.tensors import Form, Tensor, check_complete
from step_jax.models.layers.attention import MHA
from step_jax.models.layers.mlp import GELU
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Rope
from step_jax.models.video.dit import VideoDiT, VideoDiTParams
from step_jax.models.video.text_inputs import States

CLASS = "StepVideoModel"
STEM = "diffusion_pytorch_model"

HEAD_DIM, AXES = 128, (64, 32, 32)  # fixed in the released class, with what each axis rotates
HIDDEN = 4  # of the MLP, in widths
#: Tokens of a text that the released encoders give; the file does not say.
CLIP_TOKENS, LLM_TOKENS = 77, 320

#: Keys of no effect on the function: names, and how it is run.
_WITHOUT_EFFECT = frozenset(
    {"_class_name", "_diffusers_version", "_name_or_path", "attention_type", "dropout"}
)

# A tensor's name -> paths of our parameters, and how its axes are ours if not by their role.
_Table = Mapping[str, tuple[tuple[str, ...], Form | None]]

_PIXELS: Form = ((1,), (0,), (), ())  # a convolution of single pixels
_ROWS: Form = ((0,), (1,))


def _linear(name: str, weight: str, bias: str) -> _Table:
    return {f"{name}.weight": ((weight,), None), f"{name}.bias": ((bias,), None)}


def _embedder(name: str, path: str) -> _Table:
    return {
        **_linear(f"{name}.linear_1", f"{path}/in_WD", f"{path}/in_bias_D"),
        **_linear(f"{name}.linear_2", f"{path}/out_DD", f"{path}/out_bias_D"),
    }


_TOP: _Table = {
    "pos_embed.proj.weight": (("patch_PD",), _PIXELS),
    "pos_embed.proj.bias": (("patch_bias_D",), None),
    **_embedder("adaln_single.emb.timestep_embedder", "time"),
    **_embedder("adaln_single.emb.motion_score_embedder", "scalars/0"),
    **_linear("adaln_single.linear", "modulation_DMD", "modulation_bias_MD"),
    **_linear("clip_projection", "text/0/weight_ED", "text/0/bias_D"),
    **_linear("caption_projection.linear_1", "text/1/in_ED", "text/1/in_bias_D"),
    **_linear("caption_projection.linear_2", "text/1/out_DD", "text/1/out_bias_D"),
    "scale_shift_table": (("final_MD",), _ROWS),
    **_linear("proj_out", "head_DP", "head_bias_P"),
}
_LAYER: _Table = {
    "scale_shift_table": (("modulation_MD",), _ROWS),
    **_linear("norm1", "attention_norm_D/scale_D", "attention_norm_D/bias_D"),
    "attn1.wqkv.weight": (
        ("attention/query_DNH", "attention/key_DKH", "attention/value_DKH"),
        None,
    ),
    "attn1.wo.weight": (("attention/output_NHD",), None),
    "attn1.q_norm.weight": (("attention/query_norm_H",), None),
    "attn1.k_norm.weight": (("attention/key_norm_H",), None),
    "attn2.wq.weight": (("cross/query_DNH",), None),
    "attn2.wkv.weight": (("cross/key_DNH", "cross/value_DNH"), None),
    "attn2.wo.weight": (("cross/output_NHD",), None),
    "attn2.q_norm.weight": (("cross/query_norm_H",), None),
    "attn2.k_norm.weight": (("cross/key_norm_H",), None),
    **_linear("norm2", "mlp_norm_D/scale_D", "mlp_norm_D/bias_D"),
    "ff.net.0.proj.weight": (("mlp/up_DF",), None),
    "ff.net.2.weight": (("mlp/down_FD",), None),
}


def config_from_diffusers(config: Mapping[str, Any]) -> VideoDiT:
    """The transformer that a config.json of a ``StepVideoModel`` describes.

    A key that is missing has the class's default.

    Raises:
      ConfigError: a value of the wrong type, one that we do not compute, or a key of no known
        meaning, each by its name.
    """
    c = Keys(config, f"config.json of this {CLASS}")
    heads = c.integer("num_attention_heads", 48)
    channels = c.integer("in_channels", 64)
    c.only(
        attention_head_dim=HEAD_DIM, out_channels=channels, patch_size=1,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    captions = c.integers("caption_channels") or [6144, 1024]
    if len(captions) != 2 or not all(captions):
        raise ConfigError(
            f"{c.where} has caption_channels {captions}; they must be two widths, of the language "
            "model and of the CLIP"
        )
    pictures = c.flag("use_additional_conditions", False)
    depth = c.integer("num_layers", 48)
    c.note_unread(_WITHOUT_EFFECT)
    if c.problems:
        raise ConfigError(f"this {CLASS} needs what we lack: {'; '.join(c.problems)}")
    llm, clip = captions
    width = heads * HEAD_DIM
    model = VideoDiT(
        width=width,
        depth=depth,
        attention=MHA(heads, HEAD_DIM, qk_norm=RMSNorm(1e-6), position=Rope(axes=AXES)),
        mlp=GELU(HIDDEN * width),
        channels=channels,
        text=(
            States("clip", clip, CLIP_TOKENS, padding=True),
            States("llm", llm, LLM_TOKENS, "mlp"),
        ),
        scalars=("motion",) if pictures else (),
        first_frame=pictures,
        unit_gates=False,
    )
    validate(model)
    return model


def config_to_diffusers(model: VideoDiT) -> dict[str, Any]:
    """The config.json of a transformer: the inverse of ``config_from_diffusers``.

    Raises:
      ConfigError: the released class does not compute exactly this model; names what differs.
    """
    states = [t.width for t in model.text if isinstance(t, States)]
    if len(states) != 2 or len(model.text) != 2:
        raise ConfigError(
            f"a {CLASS} reads states of a CLIP and of a language model, this model "
            f"{', '.join(f'{t.kind} {t.name}' for t in model.text) or 'no text'}: cannot export"
        )
    config = {
        "_class_name": CLASS,
        "num_attention_heads": model.attention.heads,
        "attention_head_dim": HEAD_DIM,
        "in_channels": model.channels,
        "out_channels": model.channels,
        "num_layers": model.depth,
        "dropout": 0.0,
        "patch_size": 1,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "use_additional_conditions": model.first_frame,
        "caption_channels": [states[1], states[0]],
        "attention_type": "parallel",
    }
    there = config_from_diffusers(config)
    ours = model.attention
    attention = replace(ours, output_rate=1.0, kv_heads=None if ours.kv == ours.heads else ours.kv)
    ours_too = replace(model, attention=attention, init=there.init)
    if found := list(differences(ours_too, there, "model")):
        raise ConfigError(f"a {CLASS} cannot express this one: {'; '.join(found)}")
    return config


def layout(model: VideoDiT) -> tuple[list[Tensor], dict[str, ParamSpec]]:
    """All tensors of a transformer and all its leaves by path.

    Raises:
      ConfigError: parameters that the layout has no tensor for.
    """
    specs = by_name(model.specs())
    tensors = [*_tensors(_TOP, specs)]
    for layer in range(model.depth):
        place = f"transformer_blocks.{layer}."
        tensors += _tensors(_LAYER, specs, place, "blocks/", (layer,))
    check_complete(tensors, specs)
    return tensors, specs


def _tensors(
    table: _Table, specs: Mapping[str, ParamSpec], prefix="", path="", place=()
) -> Iterator[Tensor]:
    for name, (parts, form) in table.items():
        leaves = tuple(f"{path}{part}" for part in parts)
        if leaves[0] in specs:  # only the one that continues pictures has an embedder of motion
            yield Tensor(f"{prefix}{name}", leaves, tuple(specs[n] for n in leaves), place, 0, form)


def load_transformer(
    folder: Path,
    config: Mapping[str, Any],
    sharding: Sharding | None = None,
    *,
    arrays: bool = True,
) -> tuple[VideoDiT, VideoDiTParams | None]:
    """Configuration and parameters of a folder whose config.json is ``config``; None without
    ``arrays``.

    Raises:
      CheckpointError: a file is missing or damaged, tensors are missing, unused, of another shape
        or no floats (each is named), or values are not finite.
      ConfigError: as ``config_from_diffusers``.
    """
    model = config_from_diffusers(config)
    if not arrays:
        return model, None
    tensors, _ = layout(model)
    return model, read_params(read_folder(folder, STEM), tensors, model.specs(), sharding)


def save_transformer(
    path: str | Path,
    params: VideoDiTParams,
    model: VideoDiT,
    *,
    dtype: str = "bfloat16",
    max_shard_size: int = 5_000_000_000,
) -> Exported:
    """Writes a transformer as a new folder in the released layout; see ``save_hf``."""
    config = config_to_diffusers(model)
    return write_folder(
        path,
        params,
        layout(model),
        dtype=dtype,
        documents={"config.json": config},
        stem=STEM,
        max_shard_size=max_shard_size,
        architecture=CLASS,
        note="the class is of the released code, not of `diffusers`",
    )
