"""Flow matching (arXiv 2210.02747, 2209.03003): a small transformer learns digits by class.

x_t = (1 - t) x_0 + t x_1 with noise x_0 and image x_1; the model predicts x_1 - x_0, and sampling
integrates it from noise. Shape suffixes: B images, H height, W width, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.checkpoint.artifact import Description
from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data.batches import process_rows, to_mesh
from step_jax.data.digits import Digits, digits_schema
from step_jax.evaluation.images import judge_digits
from step_jax.inference.flow import draw
from step_jax.interop.artifacts import InitFrom, Start, starting_point
from step_jax.models.context import Execution
from step_jax.models.vision.image_transformer import ImageTransformer
from step_jax.runs import plots
from step_jax.runs.device_memory import fitting
from step_jax.runs.session import RunConfig, Session
from step_jax.training.learner import learn
from step_jax.training.optimizers.config import AdamW, OptimizerConfig, check_optimizer
from step_jax.training.program import Program, Work
from step_jax.training.step import LossOutput, Part

LEARNER = "model"


@dataclass(frozen=True)
class Training:
    """``samples`` images of every class are drawn at the end, by the moving average."""

    steps: int
    batch_size: int = 64
    ema_decay: float = 0.99
    samples: int = 16
    euler_steps: int = 32

    def validate(self):
        if bad := [name for name, value in vars(self).items() if value <= 0]:
            raise ConfigError(f"training: {', '.join(bad)} must be above 0")
        if self.ema_decay >= 1:
            raise ConfigError(f"training.ema_decay is {self.ema_decay}; it must be below 1")


@dataclass(frozen=True)
class Config:
    """Train a class-conditional flow-matching model on scikit-learn's digits."""

    run: RunConfig
    training: Training
    model: ImageTransformer | None = None
    init_from: InitFrom | None = None
    optimizer: OptimizerConfig = AdamW()
    execution: Execution = Execution()
    parallel: MeshConfig = MeshConfig(fsdp=-1)
    loop: Literal["flow-matching"] = "flow-matching"

    def validate(self):
        if self.model is None and self.init_from is None:
            raise ConfigError("give a model, or init_from: what to start from")
        if self.model is not None:
            fits_digits(self.model)
        check_optimizer(self.optimizer, self.training.steps)
        self.run.profile.check(self.training.steps)


def fits_digits(model: ImageTransformer) -> None:
    """Raises ConfigError for a model of other pictures."""
    if (model.size, model.channels, model.classes) != (8, 1, 10):
        raise ConfigError("the digits are of size 8 with 1 channel and 10 classes")


def make_loss(model: ImageTransformer, execution: Execution, sharding: Sharding):
    """Squared error of the velocity, summed over numbers; time and noise come from the key."""

    def loss(params, batch, key) -> LossOutput:
        x1_BHWC = batch["images"]
        time_key, noise_key = jax.random.split(key)
        time_B = jax.random.uniform(time_key, x1_BHWC.shape[:1])
        x0_BHWC = jax.random.normal(noise_key, x1_BHWC.shape)
        t_B111 = time_B[:, None, None, None]
        x_BHWC = (1 - t_B111) * x0_BHWC + t_B111 * x1_BHWC
        velocity_BHWC = model.apply(
            params[LEARNER], x_BHWC, time_B, batch["classes"], execution, sharding
        )
        squared = jnp.sum(jnp.square(velocity_BHWC - (x1_BHWC - x0_BHWC)))
        return LossOutput({"velocity": Part(squared, jnp.float32(x1_BHWC.size))})

    return loss


def program(config: Config, sharding: Sharding) -> Program:
    """What the loop compiles."""
    begin = starting_point(config.model, config.init_from, sharding, ImageTransformer, arrays=False)
    return make_program(config, begin, sharding)


def make_program(config: Config, begin: Start, sharding: Sharding) -> Program:
    c, model = config.training, begin.model
    learning = learn(
        model,
        config.optimizer,
        total_steps=c.steps,
        sharding=sharding,
        average=c.ema_decay,
        freeze=begin.freeze,
        lora=begin.lora,
    )
    return Program.build(
        make_loss(model, config.execution, sharding),
        {LEARNER: model},
        {LEARNER: learning},
        digits_schema(c.batch_size),
        sharding,
        total_steps=c.steps,
        work=Work(c.batch_size, "images", dtype=config.execution.dtype),
        seed=config.run.seed,
    )


def run(config: Config, force: bool = False) -> dict[str, float]:
    """Trains, draws and judges; returns the figures of :func:`judge_digits`.

    Args:
      force: try a step that needs more memory than a device has.
    """
    digits = Digits.load()
    seed, rows, steps = config.run.seed, config.training.batch_size, config.training.steps
    with Session(config) as session:
        sharding = session.sharding
        begin = starting_point(
            config.model, config.init_from, sharding, ImageTransformer, session.goes_on_from
        )
        fits_digits(begin.model)
        built = make_program(config, begin, sharding)
        train_step = fitting(built.compile, jax.local_devices()[0], force)
        state, start = session.start(built, begin.given(LEARNER))
        description = Description(
            config.loop,
            {LEARNER: begin.part(average=True)},
            dtype=config.execution.dtype,
            origin=begin.origin,
        )
        learning = built.learnings[LEARNER]
        header = {"parameters": spec_lib.count(learning.model_specs), "steps": steps}
        units = {"loss": "squared error of a number"}
        session.describe(config, description, {}, header, units=units)
        part = process_rows(sharding, rows)
        for step in range(start, steps):
            batch = to_mesh(sharding, built.schema, digits.batch(seed, step, rows, *part))
            session.before(step)
            state, metrics = train_step(state, batch)
            session.finished(step + 1, state, metrics)
        session.flush()
        return finish(session, config, begin.model, digits, learning.best(state.learners[LEARNER]))


def finish(session: Session, config: Config, model: ImageTransformer, digits: Digits, params):
    """Figures, a picture with one row per class, and the loss curve."""
    c = config.training
    classes_B = np.repeat(np.arange(10, dtype=np.int32), c.samples)
    images_BHWC = draw(
        params,
        model,
        classes_B,
        steps=c.euler_steps,
        seed=config.run.seed,
        execution=config.execution,
        sharding=session.sharding,
    )
    result = judge_digits(digits, images_BHWC, classes_B)
    session.reporter.evaluation(session.total_steps, result, "samples")
    if session.primary:
        name = f"step_{session.total_steps}.png"
        plots.draw_images(images_BHWC, c.samples, session.directory.samples / name)
        plots.plot_run(session.directory.path, session.directory.plots / "loss.png")
    session.reporter.summary({"status": "done", **result})
    return result
