"""Flow matching (arXiv 2210.02747, 2209.03003): a small transformer learns digits by class.

x_t = (1 - t) x_0 + t x_1 with noise x_0 and image x_1; the model predicts x_1 - x_0, and sampling
integrates it from noise. Shape suffixes: B images, H height, W width, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.core import rng
from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data.batches import abstract_batch, process_rows, to_mesh
from step_jax.data.digits import Digits
from step_jax.evaluation.images import judge_digits
from step_jax.inference.flow import euler
from step_jax.models.context import Execution
from step_jax.models.vision.image_transformer import ImageTransformer
from step_jax.runs import plots
from step_jax.runs.session import RunConfig, Session, Work
from step_jax.training.compile import compile_initial_state, compile_train_step
from step_jax.training.optimizers.build import make_optimizer
from step_jax.training.optimizers.config import AdamW, OptimizerConfig, check_optimizer
from step_jax.training.state import abstract_state
from step_jax.training.step import LossOutput

ROWS = ("batch",)


@dataclass(frozen=True)
class Training:
    """``samples`` images of every class are drawn at the end, by the moving average."""

    steps: int
    batch_size: int = 64
    ema_decay: float = 0.99
    samples: int = 16
    euler_steps: int = 32


@dataclass(frozen=True)
class FlowMatchingConfig:
    """Train a class-conditional flow-matching model on scikit-learn's digits."""

    run: RunConfig
    model: ImageTransformer
    training: Training
    optimizer: OptimizerConfig = AdamW()
    execution: Execution = Execution()
    parallel: MeshConfig = MeshConfig(fsdp=-1)

    def validate(self):
        if bad := [name for name, value in vars(self.training).items() if value <= 0]:
            raise ConfigError(f"training: {', '.join(bad)} must be above 0")
        if (self.model.size, self.model.channels, self.model.classes) != (8, 1, 10):
            raise ConfigError("the digits are of size 8 with 1 channel and 10 classes")
        check_optimizer(self.optimizer, self.training.steps)


def make_loss(config: FlowMatchingConfig, sharding: Sharding):
    """Squared error of the velocity, summed over numbers; time and noise come from the key."""

    def loss(params, batch, key) -> LossOutput:
        x1_BHWC = batch["images"]
        time_key, noise_key = jax.random.split(key)
        time_B = jax.random.uniform(time_key, x1_BHWC.shape[:1])
        x0_BHWC = jax.random.normal(noise_key, x1_BHWC.shape)
        t_B111 = time_B[:, None, None, None]
        x_BHWC = (1 - t_B111) * x0_BHWC + t_B111 * x1_BHWC
        velocity_BHWC = config.model.apply(
            params, x_BHWC, time_B, batch["classes"], config.execution, sharding
        )
        squared = jnp.sum(jnp.square(velocity_BHWC - (x1_BHWC - x0_BHWC)))
        return LossOutput(squared, jnp.float32(x1_BHWC.size))

    return loss


def draw(params, config: FlowMatchingConfig, sharding: Sharding, classes_B) -> np.ndarray:
    """Images (B, H, W, C) of the given classes, whole on every process."""
    model, key = config.model, rng.fold(config.run.seed, 0, "noise")

    def images(params):
        shape = (len(classes_B), model.size, model.size, model.channels)

        def velocity(x_BHWC, time_B):
            x_BHWC = sharding.constrain(x_BHWC, "batch", None, None, None)
            return model.apply(params, x_BHWC, time_B, classes_B, config.execution, sharding)

        return euler(velocity, jax.random.normal(key, shape), config.training.euler_steps)

    return np.asarray(jax.jit(images, out_shardings=sharding.replicated())(params))


def run(config: FlowMatchingConfig) -> dict[str, float]:
    """Trains, draws and judges; returns the figures of :func:`judge_digits`."""
    digits = Digits.load()
    seed, rows, steps = config.run.seed, config.training.batch_size, config.training.steps
    with Session(config, config.run, config.parallel) as session:
        sharding, specs = session.sharding, config.model.specs()
        part = process_rows(sharding, rows)
        optimizer = make_optimizer(config.optimizer, specs, total_steps=steps, sharding=sharding)
        state_like = abstract_state(specs, optimizer, sharding, ema=True)
        key = rng.fold(seed, 0, "parameters")
        fresh = compile_initial_state(lambda: config.model.initialise(key), optimizer, state_like)
        state, start = session.start(fresh, state_like)
        train_step = compile_train_step(
            make_loss(config, sharding),
            optimizer,
            sharding,
            state_like,
            abstract_batch(sharding, digits.batch(seed, 0, rows, *part), rows, ROWS),
            clip_norm=config.optimizer.clip_norm,
            ema_decay=config.training.ema_decay,
            compute_dtype=config.execution.dtype,
            seed=seed,
        )
        header = {"parameters": spec_lib.count(specs), "steps": steps}
        session.describe(config, steps, Work(rows), {}, header)
        for step in range(start, steps):
            batch = to_mesh(sharding, digits.batch(seed, step, rows, *part), rows, ROWS)
            session.before(step)
            state, metrics = train_step(state, batch)
            session.finished(step + 1, state, metrics)
        session.flush()
        return finish(session, config, digits, state.best_params)


def finish(session: Session, config: FlowMatchingConfig, digits: Digits, params):
    """Figures, a picture with one row per class, and the loss curve."""
    per_class = config.training.samples
    classes_B = np.repeat(np.arange(10, dtype=np.int32), per_class)
    images_BHWC = draw(params, config, session.sharding, classes_B)
    result = judge_digits(digits, images_BHWC, classes_B)
    session.reporter.evaluation(session.total_steps, result, "samples")
    if session.primary:
        name = f"step_{session.total_steps}.png"
        plots.draw_images(images_BHWC, per_class, session.directory.samples / name)
        plots.plot_run(session.directory.path, session.directory.plots / "loss.png")
    session.reporter.summary({"status": "done", **result})
    return result
