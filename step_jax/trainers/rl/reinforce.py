"""REINFORCE (Williams, 1992): a decoder learns to sort digits from rewards alone.

Answers that get more places right than the mean answer to their prompt become likelier.
Shape suffixes: B rows (prompts times samples), N tokens of an answer, T = 2 N of prompt and answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from step_jax.checkpoint.artifact import Description
from step_jax.core import rng
from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.files import write_whole
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data.schema import schema_like
from step_jax.inference.sampling import SamplingConfig
from step_jax.interop.artifacts import InitFrom, Start, starting_point
from step_jax.models.context import Execution
from step_jax.models.flops import train_flops_per_token
from step_jax.models.text.decoder import Decoder
from step_jax.runs import plots
from step_jax.runs.device_memory import fitting
from step_jax.runs.session import RunConfig, Session
from step_jax.tokenizers.huggingface import character_tokenizer
from step_jax.trainers.rl.policy import weighted_nll, write_answers
from step_jax.trainers.rl.tasks import SYMBOLS, Sorting
from step_jax.training.learner import learn
from step_jax.training.optimizers.config import AdamW, OptimizerConfig, check_optimizer
from step_jax.training.program import Program, Work, shardings_of
from step_jax.training.step import LossOutput, Part

LEARNER = "policy"


@dataclass(frozen=True)
class Training:
    """Every step has ``prompts`` of so many ``digits``, each answered ``samples`` times."""

    steps: int
    prompts: int = 32
    samples: int = 16
    digits: int = 3

    def validate(self):
        if bad := [name for name, value in vars(self).items() if value < 1]:
            raise ConfigError(f"training: {', '.join(bad)} must be at least 1")


@dataclass(frozen=True)
class Config:
    """Teach a decoder to sort: a fresh ``model``, or the one of ``init_from``."""

    run: RunConfig
    training: Training
    model: Decoder | None = None
    init_from: InitFrom | None = None
    optimizer: OptimizerConfig = AdamW()
    execution: Execution = Execution()
    parallel: MeshConfig = MeshConfig(fsdp=-1)
    loop: Literal["reinforce"] = "reinforce"

    def validate(self):
        if (self.model is None) == (self.init_from is None):
            raise ConfigError("give either a model, or init_from: what to start from")
        check_optimizer(self.optimizer, self.training.steps)
        self.run.profile.check(self.training.steps)


def policy_and_task(config: Config, begin: Start) -> tuple[Decoder, Any, Sorting]:
    """(model, tokenizer, the task in its tokens)."""
    if config.model is None:
        tokenizer, model = begin.tokenizer, begin.model
    else:
        tokenizer = character_tokenizer(SYMBOLS)
        model = replace(config.model, vocab=max(config.model.vocab, tokenizer.vocab_size))
    ids = tuple(int(tokenizer.encode(symbol)[-1]) for symbol in SYMBOLS)
    return model, tokenizer, Sorting(config.training.digits, ids)


def make_roll(config: Config, model: Decoder, task: Sorting, sharding, temperature=1.0):
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


def make_loss(config: Config, model: Decoder, sharding: Sharding):
    """Policy gradient per token of the answers. Sampled as trained, ``sampler_gap`` is 0."""

    def loss(params, batch, key) -> LossOutput:
        answer_BT, weights_BT = batch["answer"], batch["weights"]
        total, nll_BT = weighted_nll(
            params[LEARNER], model, batch, weights_BT, config.execution, sharding
        )
        count, gap_BT = jnp.sum(answer_BT), jnp.abs(nll_BT + batch["logprobs"])
        rows = jnp.float32(len(nll_BT))
        metrics = {name: (jnp.sum(batch[name]), rows) for name in ("reward", "solved")}
        metrics["entropy"] = (jnp.sum(nll_BT * answer_BT), count)
        metrics["sampler_gap"] = (jnp.sum(gap_BT * answer_BT), count)
        return LossOutput({"policy": Part(total, count)}, metrics)

    return loss


def program(config: Config, sharding: Sharding) -> Program:
    """What the loop compiles: the step that learns from rollouts (they are another program)."""
    begin = starting_point(config.model, config.init_from, sharding, Decoder, arrays=False)
    return make_program(config, begin, sharding)


def make_program(config: Config, begin: Start, sharding: Sharding) -> Program:
    c = config.training
    model, _, task = policy_and_task(config, begin)
    learning = learn(
        model,
        config.optimizer,
        total_steps=c.steps,
        sharding=sharding,
        freeze=begin.freeze,
        lora=begin.lora,
    )
    roll = make_roll(config, model, task, sharding)
    batch = jax.eval_shape(roll, spec_lib.abstract(learning.model_specs), 0)
    axes = {name: ("batch", "sequence")[: a.ndim] for name, a in batch.items()}
    tokens = c.prompts * c.samples * 2 * c.digits
    return Program.build(
        make_loss(config, model, sharding),
        {LEARNER: model},
        {LEARNER: learning},
        schema_like(batch, axes),
        sharding,
        total_steps=c.steps,
        work=Work(
            tokens,
            "tokens",
            tokens * train_flops_per_token(model, 2 * c.digits),
            config.execution.dtype,
        ),
        seed=config.run.seed,
        notes=("rollouts are a program of their own, which is not in these figures",),
    )


def run(config: Config, force: bool = False) -> dict[str, float]:
    """Trains; returns the reward of the most probable answers to fresh prompts.

    Args:
      force: try a step that needs more memory than a device has.
    """
    c = config.training
    with Session(config) as session:
        sharding = session.sharding
        begin = starting_point(
            config.model, config.init_from, sharding, Decoder, session.goes_on_from
        )
        model, tokenizer, task = policy_and_task(config, begin)
        built = make_program(config, begin, sharding)
        train_step = fitting(built.compile, jax.local_devices()[0], force)
        state, start = session.start(built, begin.given(LEARNER))
        description = Description(
            config.loop,
            {LEARNER: begin.part(model)},
            {"tokenizer": tokenizer.hash},
            context=2 * c.digits + 1,
            dtype=config.execution.dtype,
            origin=begin.origin,
        )
        learning = built.learnings[LEARNER]
        header = {"parameters": spec_lib.count(learning.model_specs), "steps": c.steps}
        units = {"loss": "policy gradient per token", "reward": "share of places right"}
        session.describe(config, description, {"tokenizer": tokenizer}, header, units=units)
        best = learning.best
        roll = jax.jit(
            make_roll(config, model, task, sharding), out_shardings=shardings_of(built.batch_like)
        )
        for step in range(start, c.steps):
            session.before(step)
            batch = roll(best(state.learners[LEARNER]), step)
            state, metrics = train_step(state, batch)
            session.finished(step + 1, state, metrics)
        session.flush()
        greedy = make_roll(config, model, task, sharding, temperature=0.0)
        greedy = jax.jit(greedy, out_shardings=sharding.replicated())
        return finish(session, task, c.samples, greedy(best(state.learners[LEARNER]), c.steps))


def finish(session: Session, task: Sorting, samples: int, batch) -> dict[str, float]:
    """Figures, the most probable answers, and the reward's curve."""
    steps, directory = session.total_steps, session.directory
    batch = jax.device_get(batch)
    result = {name: float(batch[name].mean()) for name in ("reward", "solved")}
    session.reporter.evaluation(steps, result, "greedy")
    if session.primary:
        text = zip(batch["tokens"], batch["targets"], strict=True)
        lines = [task.text([*start, end[-1]]) for start, end in text][::samples]
        write_whole(directory.samples / f"step_{steps}.txt", "\n".join([*lines, ""]))
        plots.plot_run(directory.path, directory.plots / "reward.png", metric="reward")
    session.reporter.summary({"status": "done", **result})
    return result
