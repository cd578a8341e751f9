"""``step-jax sample-images ARTIFACT [--classes 3 7] ...``: a flow-matching model draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from step_jax.cli.arguments import artifact_and_options
from step_jax.core.command_line import load_config
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding

_DESCRIPTION = """Draw with a flow-matching model: step-jax sample-images ARTIFACT ...
ARTIFACT is RUN or RUN@STEP. The picture has one row for each class."""


@dataclass(frozen=True)
class SampleImagesConfig:
    """What to draw.

    classes: of the pictures; all of the model by default.
    count: pictures of each class.
    steps: of Euler's method.
    seed: of the noise.
    output: the PNG file.
    """

    classes: tuple[int, ...] = ()
    count: int = 8
    steps: int = 32
    seed: int = 0
    output: Path = Path("samples.png")
    parallel: MeshConfig = MeshConfig(fsdp=-1)

    def validate(self):
        if self.count < 1 or self.steps < 1:
            raise ConfigError(f"count is {self.count} and steps {self.steps}: at least 1 each")


def parse(argv: list[str]) -> tuple[str, SampleImagesConfig]:
    """(the artifact's name, what to do with it)."""
    name, options = artifact_and_options(argv, "step-jax sample-images")
    loaded = load_config(
        SampleImagesConfig, options, prog="step-jax sample-images ARTIFACT",
        description=_DESCRIPTION,
    )  # fmt: skip
    return name, loaded.config


def run(asked: tuple[str, SampleImagesConfig]) -> None:
    name, config = asked

    import numpy as np

    from step_jax.inference.flow import draw
    from step_jax.interop.artifacts import load_artifact
    from step_jax.models.vision.image_transformer import ImageTransformer
    from step_jax.runs.plots import draw_images

    sharding = Sharding.build(config.parallel)
    artifact = load_artifact(name, sharding)
    model = artifact.require(ImageTransformer, "step-jax sample-images")
    classes = config.classes or tuple(range(model.classes))
    if bad := [c for c in classes if not 0 <= c < model.classes]:
        raise ConfigError(f"classes {bad} are none of the model's {model.classes}")
    images_BHWC = draw(
        artifact.params,
        model,
        np.repeat(np.asarray(classes, np.int32), config.count),
        steps=config.steps,
        seed=config.seed,
        execution=artifact.execution,
        sharding=sharding,
    )
    draw_images(images_BHWC, config.count, config.output)
    print(f"{name}, step {artifact.step}: {len(images_BHWC)} pictures in {config.output}")
