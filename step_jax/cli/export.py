"""``step-jax export ARTIFACT FOLDER ...``: a model in the layout of a public release."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from step_jax.cli.arguments import artifact_and_options
from step_jax.core.command_line import load_config
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding

if TYPE_CHECKING:
    from step_jax.checkpoint.artifact import Artifact
    from step_jax.interop.hf import Exported

_DESCRIPTION = """Write a decoder as `transformers` reads it, a diffusion transformer or a video
autoencoder as the code of Step-Video does: step-jax export ARTIFACT FOLDER ...
ARTIFACT is RUN, RUN@STEP or hf:PATH; FOLDER is a new folder. What is written is the moving average
if the run kept one, with adapters added; with a decoder its tokenizer and the tokens that end a
text."""


@dataclass(frozen=True)
class ExportConfig:
    """How to write.

    dtype: of the weights; routers and selection biases stay float32.
    max_shard_gb: a file is no larger.
    part: which of the artifact's models; its first by default.
    """

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_shard_gb: float = 5.0
    part: str | None = None
    parallel: MeshConfig = MeshConfig(fsdp=-1)

    def validate(self):
        if self.max_shard_gb <= 0:
            raise ConfigError(f"max_shard_gb is {self.max_shard_gb}; it must be above 0")


def parse(argv: list[str]) -> tuple[str, str, ExportConfig]:
    """(the artifact's name, the folder to write, how)."""
    name, rest = artifact_and_options(argv, "step-jax export")
    folder, options = "", rest
    if name:
        if not rest or rest[0].startswith("-"):
            raise ConfigError(f"name the folder to write: step-jax export {name} FOLDER")
        folder, options = rest[0], rest[1:]
    loaded = load_config(
        ExportConfig, options, prog="step-jax export ARTIFACT FOLDER", description=_DESCRIPTION
    )
    return name, folder, loaded.config


def run(asked: tuple[str, str, ExportConfig]) -> None:
    name, folder, config = asked

    from step_jax.interop.artifacts import load_artifact

    artifact = load_artifact(name, Sharding.build(config.parallel), config.part)
    exported = _write(artifact, folder, config)
    print(
        f"{name}, step {artifact.step} -> {exported.folder}: {exported.bytes / 1e6:,.1f} MB in "
        f"{len(exported.files)} files, {exported.architecture} "
        f"({exported.auto_class or 'no Auto class'})"
    )
    if exported.note:
        print(exported.note)


def _write(artifact: Artifact, folder: str, config: ExportConfig) -> Exported:
    from step_jax.interop.hf import save_hf, save_transformer, save_vae
    from step_jax.models.text.decoder import Decoder
    from step_jax.models.video.dit import VideoDiT
    from step_jax.models.video.vae import VideoVAE

    model, limit = artifact.model, round(config.max_shard_gb * 1e9)
    if isinstance(model, VideoDiT):
        return save_transformer(
            folder, artifact.params, model, dtype=config.dtype, max_shard_size=limit
        )
    if isinstance(model, VideoVAE):
        return save_vae(folder, artifact.params, model, dtype=config.dtype)
    model = artifact.require(Decoder, "step-jax export")
    tokenizer, kept = artifact.processor.get("tokenizer"), artifact.directory / "tokenizer"
    folder_of = kept if kept.is_dir() else artifact.directory
    return save_hf(
        folder,
        artifact.params,
        model,
        dtype=config.dtype,
        tokenizer_folder=None if tokenizer is None else folder_of,
        context_length=artifact.context_of_text,
        bos_id=None if tokenizer is None else tokenizer.start_id,
        eos_ids=() if tokenizer is None else tokenizer.stop_ids,
        max_shard_size=limit,
    )
