"""Reward models: a decoder's trunk learns to score answers so that the better ones score higher.

A loop of its own and not a loss of ``preference``: what it trains and leaves is a model of another
kind, which writes nothing, needs no reference, and may start from a decoder or from a reward model.
The loop is :func:`run`, read top to bottom; its parts are in ``trainers/judged.py`` and
``trainers/text.py``. ``evaluation.rewards`` scores texts with the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from step_jax.checkpoint.artifact import Artifact
from step_jax.core.sharding import Sharding
from step_jax.data.preferences import preference_schema
from step_jax.interop.artifacts import Start, starting_point
from step_jax.models import expert_health
from step_jax.models.text.decoder import Decoder
from step_jax.models.text.facts import with_vocabulary
from step_jax.models.text.reward import RewardModel, RewardParams, headless
from step_jax.runs.device_memory import fitting
from step_jax.runs.kernel_check import trusted
from step_jax.runs.session import Session
from step_jax.trainers import judged, text
from step_jax.trainers.text import LEARNER
from step_jax.training.losses.judged import bradley_terry_loss
from step_jax.training.losses.preference import BradleyTerry
from step_jax.training.program import Program
from step_jax.training.step import LossFn


@dataclass(frozen=True, kw_only=True)
class Config(judged.JudgedLoop):
    """Train a reward model on pairs of answers: on the trunk of a decoder, of ``init_from`` or a
    fresh ``model``; or go on with a reward model.
    """

    loss: BradleyTerry = BradleyTerry()
    loop: Literal["reward"] = "reward"


def start_of(
    config: Config, sharding: Sharding, goes_on_from: str | None = None, *, arrays: bool = True
) -> Start:
    """See ``starting_point``: a decoder's trunk with a fresh score, or a whole reward model."""
    return starting_point(
        None if config.model is None else RewardModel(config.model),
        config.init_from,
        sharding,
        RewardModel,
        goes_on_from,
        complete=_with_vocabulary_of,
        convert=as_reward_model,
        arrays=arrays,
    )


def _with_vocabulary_of(model: RewardModel, found: RewardModel) -> RewardModel:
    decoder = model.decoder
    return RewardModel(replace(decoder, vocab=decoder.vocab or found.decoder.vocab))


def as_reward_model(artifact: Artifact) -> Artifact:
    """A decoder's artifact as that of a reward model that scores everything 0; others as is."""
    if not isinstance(artifact.model, Decoder):
        return artifact
    params: Any = artifact.params
    if params is not None:
        params = RewardParams(headless(params), jnp.zeros(artifact.model.width, jnp.float32))
    return replace(artifact, model=RewardModel(artifact.model), params=params)


def program(config: Config, sharding: Sharding) -> Program:
    """What the loop compiles, without opening the answers. Errors as ``text.program``."""
    begin = start_of(config, sharding, arrays=False)
    return make_program(config, RewardModel(text.planned(config, begin.model.decoder)), sharding)


def make_program(config: Config, model: RewardModel, sharding: Sharding) -> Program:
    """The program of a configuration and its model, which has its vocabulary."""
    rows = config.training.rows(config.data.sequence_length, sharding.ways("batch"))
    return text.program_of(
        config,
        model,
        sharding,
        make_loss(config, model, sharding),
        preference_schema(rows, config.data, verdicts=False, reference=False),
        lambda params, sums: expert_health.report(
            replace(model.decoder, mtp=None), params[LEARNER].decoder, sums.experts
        ),
    )


def make_loss(config: Config, model: RewardModel, sharding: Sharding) -> LossFn:
    loss = bradley_terry_loss(
        config.loss, model, config.execution, sharding, config.training.balance
    )
    return lambda params, batch, key: loss(params[LEARNER], batch)


def run(config: Config, force: bool = False) -> dict[str, float]:
    """Trains and evaluates; returns the final held-out figures.

    Args:
      force: try a step that needs more memory than a device has.

    Raises:
      StepError: with the exit code of ``core.errors``; ``RestartRequested`` after a SIGTERM,
        ``DoesNotFit`` for a step that needs more memory than a device has.
    """
    with Session(config) as session:
        sharding, report = session.sharding, session.reporter
        begin = start_of(config, sharding, session.goes_on_from)
        T, decoder = config.data.sequence_length, begin.model.decoder
        chosen = trusted(
            decoder, config.execution, T, sharding, report.event, writes=False
        )  # refuses before the data are prepared
        chosen.pop("loss")  # there is no vocabulary
        if text.trains_tokenizer(config):  # a mesh that does not divide is known already
            program(config, sharding)
        dataset = judged.prepare_data(config, begin, sharding, report.event)
        decoder = with_vocabulary(begin.model.decoder, dataset.tokenizer.vocab_size)
        config, model = replace(config, model=decoder), RewardModel(decoder)
        built = make_program(config, model, sharding)
        train_step = fitting(  # before the state is made, which may be too much already
            built.compile, jax.local_devices()[0], force
        )
        state, start = session.start(
            built,
            begin.given(LEARNER),
            check=lambda meta, step: dataset.check(meta["data"], step),
        )
        session.describe(
            config,
            text.describe(config, begin, dataset, model),
            {"tokenizer": dataset.tokenizer},
            text.header(config, built, dataset, train_step, chosen)
            | {"examples": f"{dataset.sources[0].number:,}"},
            units={"loss": "nats per pair"},
            meta={"data": dataset.fingerprint},
        )
        evaluate = judged.make_evaluator(make_loss(config, model, sharding), built, dataset)
        params = judged.train(session, config, dataset, train_step, state, start, evaluate)
        return judged.finish(
            session,
            dataset,
            evaluate(params, None),
            [],
            "score texts:  step_jax.evaluation.rewards.score(artifact, conversations)",
        )
