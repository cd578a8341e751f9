"""Supervised fine-tuning: a decoder learns to answer as the assistant of conversations does.

Conversations are rendered with the tokenizer's chat template and packed whole, apart from each
other; the loss is the mean over the tokens of the whole batch that the assistant said. The loop is
:func:`run`, read top to bottom; its parts are in ``trainers/text.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data import ConversationConfig
from step_jax.interop.artifacts import InitFrom
from step_jax.models.context import Execution
from step_jax.models.text.decoder import Decoder
from step_jax.models.text.facts import implementations, with_vocabulary
from step_jax.runs.device_memory import fitting
from step_jax.runs.expert_alarm import ExpertHealth
from step_jax.runs.session import RunConfig, Session
from step_jax.tokenizers.base import Tokenizer
from step_jax.tokenizers.chat import encode_request
from step_jax.trainers import text
from step_jax.trainers.text import LEARNER, Evaluation, Training, program
from step_jax.training.optimizers.config import AdamW, OptimizerConfig

__all__ = ["Config", "Sample", "program", "run"]


@dataclass(frozen=True)
class Sample(text.Sample):
    """Answers written at the end of the run, each to one of ``prompts``: what a user says.

    ``tokens: 0`` writes none. Temperature 0 takes the most probable token.
    """

    prompts: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0

    def validate(self):
        super().validate()
        if not all(prompt.strip() for prompt in self.prompts):
            raise ConfigError("sample.prompts has an empty one: a user says something")


@dataclass(frozen=True)
class Config:
    """Fine-tune a decoder on conversations: the one of ``init_from``, or a fresh ``model``."""

    run: RunConfig
    training: Training
    data: ConversationConfig
    model: Decoder | None = None
    init_from: InitFrom | None = None
    optimizer: OptimizerConfig = AdamW()
    execution: Execution = Execution()
    parallel: MeshConfig = MeshConfig(fsdp=-1)
    evaluation: Evaluation = Evaluation()
    expert_health: ExpertHealth = ExpertHealth()
    sample: Sample = Sample()
    loop: Literal["sft"] = "sft"

    def validate(self):
        """What can be known to fail before conversations are read and devices are touched."""
        text.check_length(self)

    @property
    def decoder(self) -> Decoder:
        """``model``, once it is known: a run fills in what it takes from ``init_from``."""
        assert self.model is not None
        return self.model


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
        chosen = implementations(
            begin.model, config.execution, config.data.sequence_length, sharding
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
        learned = dataset.tokens_learned / max(1, dataset.tokens_per_epoch)
        session.describe(
            config,
            text.describe(config, begin, dataset),
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
            write_samples(config, sharding, dataset.tokenizer, params),
            f"talk to it:   step-jax generate {session.directory.path} --chat --prompt 'Hello!'",
        )


def sample_prompts(config: Config, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of what the model is given for each prompt of ``config.sample``.

    Raises:
      ConfigError: one leaves no room in the context.
    """
    prompts = config.sample.prompts if config.sample.tokens else ()
    asked = ([{"role": "user", "content": prompt}] for prompt in prompts)
    return [
        text.with_room(encode_request(tokenizer, messages), prompt, config.data.sequence_length)
        for messages, prompt in zip(asked, prompts, strict=True)
    ]


def write_samples(config: Config, sharding: Sharding, tokenizer: Tokenizer, params) -> list[str]:
    """A question and its answer for every prompt of ``config.sample``."""
    prompts = sample_prompts(config, tokenizer)
    written = text.continued(config, config.sample, sharding, tokenizer, params, prompts)
    return [
        f"user: {prompt}\nassistant: {tokenizer.decode_continuation(ids, tokens).strip()}"
        for prompt, ids, tokens in zip(config.sample.prompts, prompts, written, strict=False)
    ]
