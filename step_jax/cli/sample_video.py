"""``step-jax sample-video ARTIFACT "a prompt" [...]``: a diffusion transformer draws."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from step_jax.cli.arguments import artifact_and_options
from step_jax.core import checks
from step_jax.core.command_line import load_config
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.inference.flow import Sampler
from step_jax.inference.text_states import Encoder

_DESCRIPTION = """Draw pictures and clips: step-jax sample-video ARTIFACT "a prompt" ...
ARTIFACT is RUN, RUN@STEP or hf:PATH, with which go --encoders, --vae and --size. Every prompt is a
row of the file, whose ending (.mp4, .gif, .png) says what is written; a PNG has the frames of a
clip side by side."""


@dataclass(frozen=True)
class SampleVideoConfig:
    """What to draw.

    prompts: what it shall show; words after the artifact's name are prompts too.
    negative: what it shall not show, in the place of no text.
    count: clips of each prompt.
    size: frames, height and width of the latents; those of the run's first bucket by default.
    first: a picture that the clips go on from, for a model that continues pictures.
    fps, motion: conditions that the model may read; ``fps`` is the file's too.
    vae: an artifact that decodes the latents; the run's own by default.
    encoders: what makes the states that the model reads of a text; the run's own by default.
    seed: of the noise.
    zoom: side of a pixel in the file.
    output: the file.
    """

    prompts: tuple[str, ...] = ()
    negative: str = ""
    count: int = 1
    size: tuple[int, int, int] | None = None
    first: Path | None = None
    fps: float = 8.0
    motion: float = 5.0
    vae: str | None = None
    encoders: tuple[Encoder, ...] = ()
    sampler: Sampler = field(default_factory=Sampler)
    seed: int = 0
    zoom: int = 1
    output: Path = Path("sample.gif")
    parallel: MeshConfig = MeshConfig(fsdp=-1)

    def validate(self):
        from step_jax.runs.media import FORMATS

        checks.at_least(self, count=1, zoom=1)
        checks.above(self, fps=0)
        checks.seed(self.seed)
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ConfigError("give a prompt: step-jax sample-video ARTIFACT 'a prompt'")
        if self.output.suffix not in FORMATS:
            raise ConfigError(f"output is {self.output}; it must end with {', '.join(FORMATS)}")


def parse(argv: list[str]) -> tuple[str, SampleVideoConfig]:
    """(the artifact's name, what to do with it)."""
    name, rest = artifact_and_options(argv, "step-jax sample-video")
    prompts = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
    options = [*rest[len(prompts) :], *(["--prompts", *prompts] if prompts else [])]
    loaded = load_config(
        SampleVideoConfig, options, prog="step-jax sample-video ARTIFACT",
        description=_DESCRIPTION,
    )  # fmt: skip
    return name, loaded.config


def run(asked: tuple[str, SampleVideoConfig]) -> None:
    name, config = asked

    import jax
    import numpy as np

    from step_jax.inference import text_states
    from step_jax.inference.flow import check_guidance, draw
    from step_jax.interop.artifacts import load_artifact
    from step_jax.models.video.dit import VideoDiT
    from step_jax.runs import media
    from step_jax.trainers.diffusion.sources import data_of, decoder_of

    sharding = Sharding.build(config.parallel)
    artifact = load_artifact(name, sharding)
    model = artifact.require(VideoDiT, "step-jax sample-video")
    check_guidance(artifact, config.sampler)
    data = data_of(artifact) if "config" in artifact.meta else None
    decoder = decoder_of(artifact, config.vae, sharding)
    size = config.size or (data.buckets[0] if data else None)
    if size is None:
        raise ConfigError(f"{name} says no size of latents: name one, --size")
    prompts = [config.negative, *config.prompts]
    texts = text_states.of_prompts(
        artifact, prompts, sharding, load_artifact, print, encoders=config.encoders
    )
    which = np.repeat(1 + np.arange(len(config.prompts)), config.count)
    clips_NFHWC = draw(
        artifact.params,
        model,
        {n: (e.values[which], e.lengths_K[which]) for n, e in texts.items()},
        {n: (e.values[0 * which], e.lengths_K[0 * which]) for n, e in texts.items()},
        size,
        config.sampler,
        seed=config.seed,
        execution=artifact.execution,
        sharding=sharding,
        count=len(which),
        scalars={"fps": config.fps, "motion": config.motion},
        first_NHWC=_first(config.first, len(which), decoder),
    )
    if decoder is not None:
        clips_NFHWC = np.asarray(jax.jit(decoder.model.decode)(decoder.params, clips_NFHWC))
    elif clips_NFHWC.shape[-1] not in (1, 3):
        raise ConfigError(f"{name} draws latents, which are no pictures: name what decodes, --vae")
    grid_FHWC = media.grid(clips_NFHWC, config.count)
    media.save_clip(grid_FHWC, config.output, config.fps, config.zoom)
    print(f"{name}, step {artifact.step}: {len(clips_NFHWC)} in {config.output}")


def _first(path: Path | None, count: int, vae):
    """The picture's latents for each clip, (count, H, W, C); None without one."""
    if path is None:
        return None
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        pixels_HWC = np.asarray(picture.convert("RGB"), np.float32) / 127.5 - 1
    latents_HWC = pixels_HWC
    if vae is not None:
        mean, _ = vae.model.encode(vae.params, pixels_HWC[None, None])
        latents_HWC = np.asarray(mean)[0, 0]
    return np.repeat(latents_HWC[None], count, axis=0)
