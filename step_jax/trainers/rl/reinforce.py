"""REINFORCE (Williams, 1992): a decoder learns to sort digits from rewards alone.

Answers that get more places right than the mean answer to their prompt become likelier.
Shape suffixes: B rows (prompts times samples), N tokens of an answer, T = 2 N of prompt and answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from step_jax.checkpoint.load import load_model
from step_jax.core import rng
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data.batches import abstract_batch
from step_jax.inference.sampling import SamplingConfig
from step_jax.models.context import Execution
from step_jax.models.text.decoder import Decoder
from step_jax.runs import plots
from step_jax.runs.session import RunConfig, Session, Work
from step_jax.trainers.rl.policy import weighted_nll, write_answers
from step_jax.trainers.rl.tasks import SYMBOLS, Sorting
from step_jax.training.compile import compile_initial_state, compile_train_step, layout
from step_jax.training.optimizers.build import make_optimizer
from step_jax.training.optimizers.config import AdamW, OptimizerConfig, check_optimizer
from step_jax.training.state import abstract_state
from step_jax.training.step import LossOutput


@dataclass(frozen=True)
class Training:
    """Every step has ``prompts`` of so many ``digits``, each answered ``samples`` times."""

    steps: int
    prompts: int = 32
    samples: int = 16
    digits: int = 3


@dataclass(frozen=True)
class ReinforceConfig:
    """Teach a decoder to sort: a fresh ``model``, or the one of the run in ``init_from``."""

    run: RunConfig
    training: Training
    model: Decoder | None = None
    init_from: str | None = None
    optimizer: OptimizerConfig = AdamW()
    execution: Execution = Execution()
    parallel: MeshConfig = MeshConfig(fsdp=-1)

    def validate(self):
        if (self.model is None) == (self.init_from is None):
            raise ConfigError("give either a model or init_from, a pretraining run's directory")
        if bad := [name for name, value in vars(self.training).items() if value < 1]:
            raise ConfigError(f"training: {', '.join(bad)} must be at least 1")
        check_optimizer(self.optimizer, self.training.steps)


def starting_point(config: ReinforceConfig, sharding: Sharding):
    """(model, task in its tokens, trained parameters or None)."""
    if config.model is not None:
        model = replace(config.model, vocab=max(config.model.vocab, len(SYMBOLS)))
        return model, Sorting(config.training.digits, tuple(range(len(SYMBOLS)))), None
    trained = load_model(config.init_from, sharding)
    ids = tuple(int(trained.tokenizer.encode(symbol)[-1]) for symbol in SYMBOLS)
    return trained.decoder, Sorting(config.training.digits, ids), trained.params


def make_roll(config: ReinforceConfig, model: Decoder, task: Sorting, sharding, temperature=1.0):
    """A pure function (params, step) -> batch: answers to the step's prompts, with advantages."""
    c, seed = config.training, config.run.seed
    sampling = SamplingConfig(max_new_tokens=c.digits, temperature=temperature)

    def roll(params, step):
        drawn = task.draw(rng.fold(seed, step, "prompts"), c.prompts)
        prompts, answers_BN = (a.repeat(c.samples, 0) for a in drawn)
        key = rng.fold(seed, step, "rollout")
        batch = write_answers(params, model, prompts, key, sampling, config.execution, sharding)
        right_BN = batch.pop("written_BN") == answers_BN
        reward_B = jnp.mean(right_BN, 1, dtype=jnp.float32)
        advantage_B = reward_B - reward_B.reshape(-1, c.samples).mean(1).repeat(c.samples)
        weights_BT = batch["answer"] * advantage_B[:, None]
        return batch | {"weights": weights_BT, "reward": reward_B, "solved": jnp.all(right_BN, 1)}

    return roll


def make_loss(config: ReinforceConfig, model: Decoder, sharding: Sharding):
    """Policy gradient per token of the answers. Sampled as trained, ``sampler_gap`` is 0."""

    def loss(params, batch, key) -> LossOutput:
        answer_BT, weights_BT = batch["answer"], batch["weights"]
        total, nll_BT = weighted_nll(params, model, batch, weights_BT, config.execution, sharding)
        count, gap_BT = jnp.sum(answer_BT), jnp.abs(nll_BT + batch["logprobs"])
        rows = jnp.float32(len(nll_BT))
        metrics = {name: (jnp.sum(batch[name]), rows) for name in ("reward", "solved")}
        metrics["entropy"] = (jnp.sum(nll_BT * answer_BT), count)
        metrics["sampler_gap"] = (jnp.sum(gap_BT * answer_BT), count)
        return LossOutput(total, count, metrics)

    return loss


def run(config: ReinforceConfig) -> dict[str, float]:
    """Trains; returns the reward of the most probable answers to fresh prompts."""
    c, seed = config.training, config.run.seed
    with Session(config, config.run, config.parallel) as session:
        sharding, rows = session.sharding, c.prompts * c.samples
        model, task, trained = starting_point(config, sharding)
        specs, key = model.specs(), rng.fold(seed, 0, "parameters")
        optimizer = make_optimizer(config.optimizer, specs, total_steps=c.steps, sharding=sharding)
        state_like = abstract_state(specs, optimizer, sharding)
        fresh = compile_initial_state(lambda p: p or model.initialise(key), optimizer, state_like)
        state, start = session.start(lambda: fresh(trained), state_like)
        roll = make_roll(config, model, task, sharding)
        batch_like = abstract_batch(sharding, jax.eval_shape(roll, state.params, 0), rows)
        roll = jax.jit(roll, out_shardings=layout(batch_like))
        train_step = compile_train_step(
            make_loss(config, model, sharding),
            optimizer,
            sharding,
            state_like,
            batch_like,
            clip_norm=config.optimizer.clip_norm,
            compute_dtype=config.execution.dtype,
            seed=seed,
        )
        session.describe(config, c.steps, Work(rows * 2 * c.digits), {}, {"steps": c.steps})
        for step in range(start, c.steps):
            session.before(step)
            state, metrics = train_step(state, roll(state.params, step))
            session.finished(step + 1, state, metrics)
        session.flush()
        greedy = make_roll(config, model, task, sharding, temperature=0.0)
        greedy = jax.jit(greedy, out_shardings=sharding.replicated())
        batch = jax.device_get(greedy(state.params, c.steps))
        result = {name: float(batch[name].mean()) for name in ("reward", "solved")}
        session.reporter.evaluation(c.steps, result, "greedy")
        if session.primary:
            directory, text = session.directory, zip(batch["tokens"], batch["targets"], strict=True)
            lines = [task.text([*start, end[-1]]) for start, end in text][:: c.samples]
            directory.samples.mkdir(exist_ok=True)
            (directory.samples / f"step_{c.steps}.txt").write_text("\n".join([*lines, ""]), "utf-8")
            plots.plot_run(directory.path, directory.plots / "reward.png", metric="reward")
        session.reporter.summary({"status": "done", **result})
        return result
