"""Pretraining: from a folder of text to a decoder that writes.

The loop is :func:`run`, read top to bottom; its parts are in ``trainers/text.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.data import DataConfig
from step_jax.models.text.decoder import Decoder
from step_jax.models.text.facts import with_vocabulary
from step_jax.runs.device_memory import fitting
from step_jax.runs.kernel_check import trusted
from step_jax.runs.session import Session
from step_jax.tokenizers.base import Tokenizer
from step_jax.trainers import text
from step_jax.trainers.text import LEARNER, Sample, program

__all__ = ["Config", "program", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(text.TextLoop):
    """Train a decoder on text: a fresh ``model``, or what ``init_from`` names."""

    data: DataConfig = DataConfig()
    sample: Sample = Sample()
    loop: Literal["pretrain"] = "pretrain"

    def validate(self):
        """What can be known to fail before text is read and devices are touched."""
        super().validate()
        if self.model is not None:
            check_documents(self.model, self.data)


def check_documents(model: Decoder, data: DataConfig) -> None:
    """Raises ConfigError for a model that must know documents, of data that do not tell them."""
    if model.mtp is not None and not data.isolate:
        raise ConfigError(
            "model.mtp would predict across documents that data.isolate: false joins in a row, "
            "where a batch does not tell them apart; set data.isolate: true"
        )


def run(config: Config, force: bool = False) -> dict[str, float]:
    """Trains, evaluates and samples; returns the final held-out figures.

    Args:
      force: try a step that needs more memory than a device has.

    Raises:
      StepError: with the exit code of ``core.errors``; ``RestartRequested`` after a SIGTERM,
        ``DoesNotFit`` for a step that needs more memory than a device has.
    """
    with Session(config) as session:
        sharding, report = session.sharding, session.reporter
        begin = text.start_of(config, sharding, session.goes_on_from)
        check_documents(begin.model, config.data)
        T = config.data.sequence_length
        chosen = trusted(
            begin.model, config.execution, T, sharding, report.event
        )  # refuses before the data are prepared
        dataset = text.prepare_data(config, begin, sharding, report.event)
        sample_prompts(config, dataset.tokenizer)  # refuses one that is too long
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
        session.describe(
            config,
            text.describe(config, begin, dataset, config.decoder),
            {"tokenizer": dataset.tokenizer},
            text.header(config, built, dataset, train_step, chosen),
            units={"loss": "nats per token", "nll": "nats per token"},
            meta={"data": dataset.fingerprint},
        )
        params, evaluate = text.train(session, config, dataset, train_step, state, start)
        return text.finish(
            session,
            dataset,
            evaluate,
            params,
            write_samples(config, sharding, dataset.tokenizer, params),
            f"write more:   step-jax generate {session.directory.name} --prompt 'import os'",
        )


def sample_prompts(config: Config, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of the prompts of ``config.sample``.

    Raises:
      ConfigError: one leaves no room in the context.
    """
    prompts = config.sample.prompts if config.sample.tokens else ()
    return [
        text.with_room(tokenizer.encode_prompt(prompt), prompt, config.data.sequence_length)
        for prompt in prompts
    ]


def write_samples(config: Config, sharding: Sharding, tokenizer: Tokenizer, params) -> list[str]:
    """One text per prompt of ``config.sample``, prompt included."""
    prompts = sample_prompts(config, tokenizer)
    written = text.continued(config, config.sample, sharding, tokenizer, params, prompts)
    return [
        prompt + tokenizer.decode_continuation(ids, tokens)
        for prompt, ids, tokens in zip(config.sample.prompts, prompts, written, strict=False)
    ]
