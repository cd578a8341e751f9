"""Supervised fine-tuning: a decoder learns to answer as the assistant of conversations does.

Conversations are rendered with the tokenizer's chat template and packed whole, apart from each
other; the loss is the mean over the tokens of the whole batch that the assistant said. The loop is
:func:`run`, read top to bottom; its parts are in ``trainers/text.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax

from step_jax.data import ConversationConfig
from step_jax.models.text.facts import with_vocabulary
from step_jax.runs.device_memory import fitting
from step_jax.runs.kernel_check import trusted
from step_jax.runs.session import Session
from step_jax.trainers import text
from step_jax.trainers.text import LEARNER, Questions, program

__all__ = ["Config", "program", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(text.TextLoop):
    """Fine-tune a decoder on conversations: the one of ``init_from``, or a fresh ``model``."""

    data: ConversationConfig
    sample: Questions = Questions()
    loop: Literal["sft"] = "sft"


def run(config: Config, force: bool = False) -> dict[str, float]:
    """Trains, evaluates and answers; returns the final held-out figures, of the answers' tokens.

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
        dataset = text.prepare_data(config, begin, sharding, report.event)
        text.question_ids(config, config.sample, dataset.tokenizer)  # refuses one that is too long
        config = replace(config, model=with_vocabulary(begin.model, dataset.tokenizer.vocab_size))
        built = text.make_program(config, config.decoder, sharding)
        train_step = fitting(  # before the state is made, which may be too much already
            built.compile, jax.local_devices()[0], force
        )
        state, start = session.start(
            built,
            begin.given(LEARNER),
            check=lambda meta, step: dataset.check(meta["data"], step),
        )
        learned = dataset.tokens_learned / max(1, dataset.tokens_per_epoch)
        session.describe(
            config,
            text.describe(config, begin, dataset, config.decoder),
            {"tokenizer": dataset.tokenizer},
            text.header(config, built, dataset, train_step, chosen)
            | {"tokens of answers": f"{dataset.tokens_learned:,} an epoch ({learned:.0%})"},
            units={"loss": "nats per answer token", "nll": "nats per answer token"},
            meta={"data": dataset.fingerprint},
        )
        params, evaluate = text.train(session, config, dataset, train_step, state, start)
        return text.finish(
            session,
            dataset,
            evaluate,
            params,
            text.write_answers(config, config.sample, sharding, dataset.tokenizer, params),
            f"talk to it:   step-jax generate {session.directory.name} --chat --prompt 'Hello!'",
        )
