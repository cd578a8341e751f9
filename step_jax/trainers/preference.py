"""Preference tuning: a decoder learns which answers are better, from pairs or from verdicts.

The losses are those of ``training.losses.preference``; what they compare with is a reference
policy, whose log-probabilities are computed once. The loop is :func:`run`, read top to bottom; its
parts are in ``trainers/judged.py`` and ``trainers/text.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.data.preferences import preference_schema
from step_jax.models import expert_health
from step_jax.models.text.decoder import Decoder
from step_jax.models.text.facts import with_vocabulary
from step_jax.runs.device_memory import fitting
from step_jax.runs.kernel_check import trusted
from step_jax.runs.session import Session
from step_jax.trainers import judged, text
from step_jax.trainers.reference import compared_with, reference_of
from step_jax.trainers.text import LEARNER, Questions
from step_jax.training.losses.judged import preference_loss
from step_jax.training.losses.preference import DPO, KTO, Preference
from step_jax.training.program import Program
from step_jax.training.step import LossFn


@dataclass(frozen=True, kw_only=True)
class Config(judged.JudgedLoop):
    """Tune a decoder on judged answers: the one of ``init_from``, or a fresh ``model``.

    loss: ``dpo`` (with ``label_smoothing``: cDPO), ``ipo``, ``kto``, ``orpo`` or ``simpo``; ``kto``
      reads verdicts, the others pairs.
    reference: the artifact that ``dpo``, ``ipo`` and ``kto`` compare with; null for the one that
      ``init_from`` names.
    """

    loss: Preference = DPO()
    reference: str | None = None
    sample: Questions = Questions()
    loop: Literal["preference"] = "preference"

    def validate(self):
        """What can be known to fail before answers are read and devices are touched."""
        super().validate()
        if self.loss.compares and self.reference is None and self.init_from is None:
            raise ConfigError(
                f"the loss {self.loss.kind} compares with a reference policy, and a fresh model is "
                "none: give init_from, or reference; or take a loss without one (orpo, simpo)"
            )
        if not self.loss.compares and self.reference is not None:
            raise ConfigError(
                f"the loss {self.loss.kind} compares with no reference policy: leave reference out"
            )

    @property
    def verdicts(self) -> bool:
        """Whether single answers are read instead of pairs."""
        return isinstance(self.loss, KTO)


def program(config: Config, sharding: Sharding) -> Program:
    """What the loop compiles, without opening the answers. Errors as ``text.program``."""
    begin = text.start_of(config, sharding, arrays=False)
    return make_program(config, text.planned(config, begin.model), sharding)


def make_program(config: Config, model: Decoder, sharding: Sharding) -> Program:
    """The program of a configuration and its model, which has its vocabulary."""
    rows = config.training.rows(config.data.sequence_length, sharding.ways("batch"))
    return text.program_of(
        config,
        model,
        sharding,
        make_loss(config, model, sharding),
        preference_schema(rows, config.data, config.verdicts, config.loss.compares),
        lambda params, sums: expert_health.report(
            replace(model, mtp=None), params[LEARNER], sums.experts
        ),
    )


def make_loss(config: Config, model: Decoder, sharding: Sharding) -> LossFn:
    rows = config.training.rows(config.data.sequence_length, sharding.ways("batch"))
    loss = preference_loss(
        config.loss,
        model,
        config.execution,
        sharding,
        examples=rows * config.data.examples_per_row,
        balance=config.training.balance,
    )
    return lambda params, batch, key: loss(params[LEARNER], batch)


def run(config: Config, force: bool = False) -> dict[str, float]:
    """Trains, evaluates and answers; returns the final held-out figures.

    Args:
      force: try a step that needs more memory than a device has.

    Raises:
      StepError: with the exit code of ``core.errors``; ``RestartRequested`` after a SIGTERM,
        ``DoesNotFit`` for a step that needs more memory than a device has.
    """
    with Session(config) as session:
        sharding, report = session.sharding, session.reporter
        begin = text.start_of(config, sharding, session.goes_on_from)
        T = config.data.sequence_length
        chosen = trusted(
            begin.model, config.execution, T, sharding, report.event
        )  # refuses before the data are prepared
        chosen.pop("loss")  # likelihoods are of no such kernel
        if text.trains_tokenizer(config):  # a mesh that does not divide is known already
            program(config, sharding)
        dataset = judged.prepare_data(config, begin, sharding, report.event)
        text.question_ids(config, config.sample, dataset.tokenizer)  # refuses a long one
        config = replace(config, model=with_vocabulary(begin.model, dataset.tokenizer.vocab_size))
        compared = None
        if config.loss.compares:
            compared = compared_with(
                config.reference,
                config.init_from,
                begin,
                goes_on=session.goes_on_from is not None,
            )
            compared.check(dataset.tokenizer, sharding)
        built = make_program(config, config.decoder, sharding)
        train_step = fitting(  # before the state is made, which may be too much already
            built.compile, jax.local_devices()[0], force
        )
        reference, folder = None, session.directory.path / "reference"
        if compared is not None:
            reference = reference_of(
                compared, dataset, config.execution, sharding, folder, report.event
            )
            dataset.reference = reference.logprobs

        def check(meta, step):
            dataset.check(meta["data"], step)
            if reference is not None:
                reference.check(meta["reference"], step)

        state, start = session.start(built, begin.given(LEARNER), check)
        session.describe(
            config,
            text.describe(config, begin, dataset, config.decoder),
            {"tokenizer": dataset.tokenizer},
            text.header(config, built, dataset, train_step, chosen)
            | {"examples": f"{dataset.sources[0].number:,}", "loss of": config.loss.kind},
            units={"loss": "preference loss"},
            meta={
                "data": dataset.fingerprint,
                "reference": None if reference is None else reference.facts,
            },
        )
        if reference is not None and session.primary:
            reference.save(folder)
        evaluate = judged.make_evaluator(
            make_loss(config, config.decoder, sharding), built, dataset
        )
        params = judged.train(session, config, dataset, train_step, state, start, evaluate)
        return judged.finish(
            session,
            dataset,
            evaluate(params, None),
            text.write_answers(config, config.sample, sharding, dataset.tokenizer, params),
            f"talk to it:   step-jax generate {session.directory.name} --chat --prompt 'Hello!'",
        )
