"""Reinforcement learning on verifiable problems: ``step-jax rl``.

A decoder answers problems, verifiers score the answers, an algorithm says how much better than
expected each choice was, and the policy (and a critic) learns from it. The loop is :func:`run`,
read top to bottom: it is blind to the algorithm (``algorithms``), to what is asked
(``environments``) and to how answers are written (``inference.engine``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.checkpoint.artifact import Description, Part
from step_jax.core import rng
from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.files import write_whole
from step_jax.core.sharding import Sharding, bytes_on_device
from step_jax.data.batches import process_rows, to_mesh
from step_jax.data.schema import Field
from step_jax.interop.artifacts import Start, load_artifact, starting_point
from step_jax.models.flops import train_flops_per_token
from step_jax.models.text.decoder import Decoder
from step_jax.models.text.facts import with_vocabulary
from step_jax.models.text.reward import RewardModel
from step_jax.runs import plots
from step_jax.runs.device_memory import fitting
from step_jax.runs.kernel_check import trusted
from step_jax.runs.session import Session
from step_jax.tokenizers.base import Tokenizer
from step_jax.tokenizers.chat import encode_request
from step_jax.tokenizers.files import load_tokenizer
from step_jax.trainers.reference import frozen_reference, pinned
from step_jax.trainers.reward import as_reward_model
from step_jax.trainers.rl import learning
from step_jax.trainers.rl.config import Config
from step_jax.trainers.rl.heldout import HeldOut
from step_jax.trainers.rl.layouts import writer
from step_jax.trainers.rl.learning import CRITIC, POLICY
from step_jax.trainers.rl.phases import phases_of
from step_jax.trainers.rl.rollouts import Rollouts
from step_jax.trainers.rl.samples import Sample
from step_jax.trainers.rl.trajectory import schema
from step_jax.trainers.rl.turns import Turns
from step_jax.training.learner import learn
from step_jax.training.program import Phase, Program, Work
from step_jax.training.state import TrainState

__all__ = ["Config", "phases", "program", "run"]


# --- What is trained ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Begin:
    """Where the learners start."""

    policy: Start
    critic: Start | None

    @property
    def models(self) -> dict[str, Any]:
        critic = {} if self.critic is None else {CRITIC: self.critic.model}
        return {POLICY: self.policy.model} | critic

    @property
    def starts(self) -> dict[str, Start]:
        return {POLICY: self.policy} | ({} if self.critic is None else {CRITIC: self.critic})

    def given(self) -> dict[str, Any]:
        return {k: v for name, s in self.starts.items() for k, v in s.given(name).items()}


def begin_from(
    config: Config, sharding: Sharding, goes_on_from: str | None = None, *, arrays: bool = True
) -> Begin:
    """The policy's start, and the critic's if the algorithm has one.

    Raises:
      ConfigError: a critic of another vocabulary.
    """
    policy = starting_point(
        config.model, config.init_from, sharding, Decoder, goes_on_from, arrays=arrays
    )
    if config.init_from is None:
        policy = with_tokenizer(config, policy, sharding, goes_on_from)
    if config.how.critic is None:
        return Begin(policy, None)
    own = config.critic.init_from
    if goes_on_from is not None:
        held = load_artifact(goes_on_from, sharding, CRITIC, arrays=False)
        freeze = () if own is None else own.freeze
        return Begin(policy, Start(held.require(RewardModel, "the critic"), freeze=freeze))
    if own is not None:
        critic = starting_point(
            None, own, sharding, RewardModel, convert=as_reward_model, arrays=arrays
        )
        if critic.model.decoder.vocab != policy.model.vocab:
            raise ConfigError(
                f"critic.init_from {own.artifact} reads a vocabulary of "
                f"{critic.model.decoder.vocab} tokens, the policy writes one of "
                f"{policy.model.vocab}: take a critic of the same tokenizer"
            )
        return Begin(policy, critic)
    params = policy.params
    if params is not None:
        head = jnp.zeros(policy.model.width, jnp.float32)
        params = learning.critic_params(params, head)
    return Begin(policy, Start(RewardModel(policy.model), params))


def with_tokenizer(config: Config, policy: Start, sharding, goes_on_from: str | None) -> Start:
    """A fresh policy with the recipe's tokenizer, or the run's own if it has begun."""
    if goes_on_from is not None:
        tokenizer = load_artifact(goes_on_from, sharding, arrays=False).tokenizer
    else:
        assert config.tokenizer is not None  # see Config.validate
        tokenizer = load_tokenizer(config.tokenizer)
    model = with_vocabulary(policy.model, tokenizer.vocab_size)
    return replace(policy, model=model, processor={"tokenizer": tokenizer})


def program(config: Config, sharding: Sharding) -> Program:
    """The step that the loop compiles, for the longest texts; see ``phases`` for the rest."""
    return make_program(config, begin_from(config, sharding, arrays=False), sharding)


def phases(config: Config, sharding: Sharding) -> tuple[Phase, ...]:
    """What runs between steps, for the longest texts."""
    begin = begin_from(config, sharding, arrays=False)
    built = make_program(config, begin, sharding)
    return phases_of(config, begin.policy.model, built, make_judge(config, begin, built))


def make_program(config: Config, begin: Begin, sharding: Sharding) -> Program:
    c, how = config.training, config.how
    optimizers = {POLICY: config.optimizer, CRITIC: config.critic.optimizer or config.optimizer}
    learnings = {
        name: learn(
            start.model,
            optimizers[name],
            total_steps=c.steps,
            sharding=sharding,
            freeze=start.freeze,
            lora=start.lora,
        )
        for name, start in begin.starts.items()
    }
    rows, T = c.rows // c.updates, learning.places(
        config.rollout.context, config.rollout.context, sharding.ways("sequence")
    )  # fmt: skip
    policy = begin.policy.model
    specs = policy.specs()
    routing = learning.routing_shapes(policy) if config.rollout.replay_routing else ()
    return Program.build(
        learning.make_loss(
            how, begin.models, config.execution, sharding, config.rollout.temperature
        ),
        begin.models,
        learnings,
        schema(rows, T, learning.streams_of(how, old=keeps_old(config)), routing),
        sharding,
        total_steps=c.steps,
        accumulation=c.accumulation,
        work=Work(
            rows,
            "answers",
            rows * T * len(learnings) * train_flops_per_token(policy, T),
            config.execution.dtype,
        ),
        seed=config.run.seed,
        beside=None if how.kl is None else spec_lib.abstract(specs, sharding.params(specs)),
    )


def keeps_old(config: Config) -> bool:
    """Whether the log-probabilities before the first update must be kept for the others."""
    return config.training.updates > 1


# --- The loop -------------------------------------------------------------------------------------


def run(config: Config, force: bool = False) -> dict[str, float]:
    """Trains; returns what held-out problems come to in the end.

    Args:
      force: try a step that needs more memory than a device has.

    Raises:
      StepError: with the exit code of ``core.errors``; ``RestartRequested`` after a SIGTERM,
        ``DoesNotFit`` for a step that needs more memory than a device has.
    """
    c = config.training
    with Session(config) as session, ExitStack() as stack:
        sharding = session.sharding
        begin = begin_from(config, sharding, session.goes_on_from)
        tokenizer, policy = begin.policy.tokenizer, begin.policy.model
        length, report = config.rollout.context, session.reporter.event
        chosen = trusted(policy, config.execution, length, sharding, report)
        # each with its own: held-out problems may be answered while a batch is written
        turns, asides = (tools_of(config, tokenizer, stack) for _ in range(2))
        encode = encoder(config, tokenizer) if turns is None else turns.begin
        problems = config.problems.open()
        pool = stack.enter_context(config.problems.pool()) if session.primary else None
        evaluate = HeldOut(config, session, policy, tokenizer, problems, encode, pool, asides)
        write = writer(config, policy, tokenizer, sharding)
        making = Rollouts(
            config.rollout,
            prompts=c.prompts,
            samples=c.samples,
            batches=c.batches,
            keep_telling=config.how.dynamic_sampling,
            seed=config.run.seed,
            problems=problems,
            engine=write.engine,
            encode=encode,
            decode=tokenizer.decode_continuation,
            pool=pool,
            send=write.send,
            beside=write.beside,
            turns=turns,
        )  # both refuse problems that do not fit, before anything is compiled
        rollouts = stack.enter_context(making)
        built = make_program(config, begin, sharding)
        beside = bytes_on_device(built.beside)
        compiled = fitting(built.compile, jax.local_devices()[0], force, beside)
        steps = Steps(built, compiled)
        saved: dict[str, Any] = {}
        state, start = session.start(
            built, begin.given(), check=lambda meta, step: saved.update(meta)
        )
        reference, meta = reference_of(config, begin, sharding, saved)
        describe(session, config, begin, built, chosen, meta)
        judge = make_judge(config, begin, built)
        batch: dict[str, Any] = {}
        figures: dict[str, Any] = {}
        if session.carried:
            rollouts.restore(carried_part(session.carried, "rollouts"))
            batch = carried_part(session.carried, "batch")
            figures = carried_part(session.carried, "figures")
        for step in range(start, c.steps):
            session.before(step)
            number, update = divmod(step, c.updates)
            if update == 0:
                params = view(built, state, POLICY)
                evaluate(step, params)
                samples, written = rollouts.batch(params, number)
                prompts = [rollouts.prompt(s.index) for s in samples]
                batch, figures = judged(config, judge, built, state, reference, samples, prompts)
                figures = written | figures
                figures = {name: np.float32(value) for name, value in figures.items()}
                show_samples(session, config, tokenizer, samples, prompts, step)
            state, metrics = steps(state, part_of_batch(config, batch, number, update))
            session.finished(
                step + 1,
                state,
                metrics | figures,
                work=replace(built.work, flops=0.0),  # shorter texts are less: no MFU is claimed
                carried=lambda: carried(rollouts, batch, figures, update + 1 < c.updates),  # noqa: B023
            )
        return finish(session, config, evaluate, state, built)


def describe(session: Session, config: Config, begin: Begin, built: Program, chosen, meta) -> None:
    """Fixes what the run is, and shows the header."""
    tokenizer, c = begin.policy.tokenizer, config.training
    parts = {POLICY: begin.policy.part()}
    if begin.critic is not None:
        parts[CRITIC] = Part(begin.critic.model, freeze=begin.critic.freeze)
    description = Description(
        config.loop,
        parts,
        {"tokenizer": tokenizer.hash},
        context=config.rollout.context,
        dtype=config.execution.dtype,
        origin=begin.policy.origin,
    )
    header = {
        "algorithm": config.algorithm.name,
        "batch": f"{c.prompts} prompts x {c.samples} answers, {c.updates} updates",
        **chosen,
        **{
            f"parameters of the {name}": f"{spec_lib.count(how.model_specs):,}"
            for name, how in built.learnings.items()
        },
        "steps": c.steps,
    }
    session.describe(
        config,
        description,
        {"tokenizer": tokenizer},
        header,
        units={"loss": "of the policy's objective", "reward": "mean of a batch's answers"},
        meta=meta,
    )


def tools_of(config: Config, tokenizer: Tokenizer, stack: ExitStack) -> Turns | None:
    """The tools that replies may call, open until the run ends; None without."""
    return None if config.tools is None else stack.enter_context(Turns(config.tools, tokenizer))


def make_judge(config: Config, begin: Begin, built: Program):
    """The compiled function of ``learning.make_judge``: what a batch is compared with."""
    return jax.jit(
        learning.make_judge(
            config.how,
            begin.models,
            {name: how.view for name, how in built.learnings.items()},
            config.execution,
            built.sharding,
            config.rollout.temperature,
            old=keeps_old(config),
        ),
        out_shardings=built.sharding.replicated(),
    )


def encoder(config: Config, tokenizer: Tokenizer):
    """The prompt of a problem, in tokens. Raises ConfigError for a chat without a template."""
    chat = tokenizer.chat_template is not None
    if config.rollout.chat and not chat:
        raise ConfigError(f"rollout.chat is set, and {tokenizer.name} has no chat template")
    if chat and config.rollout.chat is not False:
        return lambda problem: encode_request(tokenizer, problem.messages, problem.name)
    return lambda problem: tokenizer.encode_prompt(problem.question)


def view(built: Program, state: TrainState, learner: str) -> Any:
    """The parameters of a learner's model."""
    return built.learnings[learner].view(state.learners[learner].params)


def judged(config: Config, judge, built: Program, state, reference, samples, prompts):
    """(the batch to learn from, on the host; figures)."""
    ways, most = built.sharding.ways("sequence"), config.rollout.context
    longest = max(len(p) + len(s.tokens) for p, s in zip(prompts, samples, strict=True))
    T = learning.places(longest, most, ways)
    t = learning.trajectory(samples, prompts, config.training.samples, T)
    config.how.check(replace(t, values_BT=t.rewards_BT, reference_BT=t.rewards_BT))
    kept = {name: learner.params for name, learner in state.learners.items()}
    batch, figures = jax.device_get(judge(kept, reference, t.batch()))
    return {name: np.asarray(a) for name, a in batch.items()}, figures


def part_of_batch(config: Config, batch, number: int, update: int) -> dict[str, np.ndarray]:
    """The rows of an update: all of them, or a part of a shuffle of them."""
    c = config.training
    if c.updates == 1:
        return batch
    order = np.random.default_rng([config.run.seed, number]).permutation(c.rows)
    rows = order.reshape(c.updates, -1)[update]
    return {name: a[rows] if a.ndim < 4 else a[:, rows] for name, a in batch.items()}


class Steps:
    """The train step for every length of batch: the one compiled ahead, others when they come."""

    def __init__(self, built: Program, longest: jax.stages.Compiled):
        self._built, self._longest = built, longest
        self._places = built.schema["tokens"].shape[1]

    def __call__(self, state: TrainState, batch: dict[str, np.ndarray]):
        built, T = self._built, batch["tokens"].shape[1]

        def field(name: str, like: Field) -> Field:
            assert batch[name].ndim == len(like.shape)
            return replace(like, shape=batch[name].shape)

        fields = {name: field(name, like) for name, like in built.schema.items()}
        own = {name: self._own(fields[name], batch[name]) for name in fields}
        step = self._longest if T == self._places else built.step
        return step(state, to_mesh(built.sharding, fields, own))

    def _own(self, field: Field, a: np.ndarray) -> np.ndarray:
        """The rows of this process."""
        axis = field.row_axis
        assert axis is not None  # every array of a trajectory has rows
        index, count = process_rows(self._built.sharding, field.shape[axis])
        return np.split(a, count, axis)[index]


# --- The reference --------------------------------------------------------------------------------


def reference_of(config: Config, begin: Begin, sharding: Sharding, saved: dict[str, Any]):
    """(the reference's parameters or None, what checkpoints say of it).

    Raises:
      ConfigError: it is another model than the policy.
      CheckpointError: it is not what the run's finished steps were compared with.
    """
    if config.how.kl is None:
        return None, {}
    was = saved.get("reference")
    if config.reference is None and config.init_from is None:
        key = rng.fold(config.run.seed, 0, "parameters")
        params = jax.jit(
            begin.policy.model.initialise, out_shardings=sharding.params(begin.policy.model.specs())
        )(key)
        return params, {"reference": pinned("the fresh model", params, was)}
    params, found = frozen_reference(
        config.reference, config.init_from, begin.policy, begin.policy.tokenizer, sharding, was
    )
    return params, {"reference": found}


# --- What is carried and shown --------------------------------------------------------------------


def carried(rollouts: Rollouts, batch, figures, unfinished: bool) -> dict[str, np.ndarray]:
    """What a checkpoint needs besides the learners; the batch if it has updates to come."""
    arrays = _named("rollouts", rollouts.carried())
    if unfinished:
        arrays |= _named("batch", batch) | _named("figures", figures)
    return arrays


def _named(part: str, arrays) -> dict[str, np.ndarray]:
    return {f"{part}.{name}": np.asarray(a) for name, a in arrays.items()}


def carried_part(arrays, part: str) -> dict[str, np.ndarray]:
    """What :func:`carried` has of a part."""
    found = {name.partition(".")[::2]: a for name, a in arrays.items()}
    return {name: a for (which, name), a in found.items() if which == part}


def show_samples(
    session: Session,
    config: Config,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    prompts: Sequence[Sequence[int]],
    step: int,
    shown: int = 8,
) -> None:
    """A few answers with their rewards, as they were written, before they are learned from."""
    every = config.evaluation.every_steps or config.training.steps
    if not session.primary or step % every:
        return
    apart = max(1, len(samples) // shown)
    lines = []
    for sample, prompt in list(zip(samples, prompts, strict=True))[::apart]:
        asked = tokenizer.decode(prompt)
        said = tokenizer.decode_continuation(prompt, sample.tokens)
        lines.append(
            f"--- problem {sample.index}, answer {sample.sample}: reward {sample.reward:g}, "
            f"{len(sample.tokens)} tokens, {sample.finish}\n{asked}\n>>> {said}"
        )
    write_whole(session.directory.samples / f"step_{step}.txt", "\n".join([*lines, ""]))


def finish(session: Session, config: Config, evaluate: HeldOut, state, built: Program):
    """Figures of the end, and the reward's curve."""
    session.flush()
    result = evaluate(config.training.steps, view(built, state, POLICY))
    directory = session.directory
    if session.primary:
        plots.plot_run(directory.path, directory.plots / "reward.png", metric="reward")
    session.reporter.summary({"status": "done", **result})
    return result
