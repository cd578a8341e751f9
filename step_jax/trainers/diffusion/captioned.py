"""What the loops share that train a diffusion transformer on captioned clips.

Their settings, and how captions reach the model. Each loop (``diffusion``, ``video-preference``,
``video-rl``) is a function of its own that reads top to bottom and calls these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from step_jax.checkpoint.artifact import Description
from step_jax.core import checks
from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding, laid_out
from step_jax.data.batches import microbatches
from step_jax.data.captions import TextBank, distinct, token_rows
from step_jax.data.clips import ClipSource, Reads
from step_jax.data.config import TRAIN_TOKENIZER
from step_jax.data.schema import Field, Schema
from step_jax.inference import text_states
from step_jax.inference.text_states import Encoder
from step_jax.interop.artifacts import InitFrom, Start, load_artifact, present
from step_jax.models.context import Execution
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.flow import Flow
from step_jax.models.video.text_inputs import States, Tower
from step_jax.runs.session import RunConfig, Session
from step_jax.tokenizers.base import Tokenizer
from step_jax.tokenizers.files import load_tokenizer
from step_jax.tokenizers.sentencepiece import train_sentencepiece
from step_jax.trainers.diffusion.preview import Sample
from step_jax.training.optimizers.config import AdamW, OptimizerConfig

LEARNER = "model"


@dataclass(frozen=True)
class Text:
    """How captions reach the model.

    dropout: share of the samples whose caption is left out, so that the model can be guided.
    tokenizer: of a text tower that learns with the model: a file, or ``train`` to make one of the
      captions. With ``init_from`` it comes with the artifact.
    encoders: of the model's inputs that are states.
    cache: folder in which the encoders' states are kept.
    """

    dropout: float = 0.1
    tokenizer: str = TRAIN_TOKENIZER
    encoders: tuple[Encoder, ...] = ()
    cache: Path = Path("text_states")

    def validate(self):
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"text.dropout is {self.dropout}; use a share in [0, 1)")


@dataclass(frozen=True)
class Training:
    """How long a model is tuned by clips of its own, and on how many at once.

    batch_size: pairs, or chosen steps of clips, of a step over all devices.
    accumulation: microbatches that a step is computed in; changes memory, not results.
    """

    steps: int
    batch_size: int = 32
    accumulation: int = 1

    def validate(self):
        checks.at_least(self, steps=1, batch_size=1, accumulation=1)


@dataclass(frozen=True, kw_only=True)
class CaptionedLoop:
    """The settings that these loops share; each has ``data``, ``training`` and its name besides."""

    run: RunConfig
    model: VideoDiT | None = None
    init_from: InitFrom | None = None
    text: Text = Text()
    flow: Flow = Flow()
    optimizer: OptimizerConfig = AdamW()
    execution: Execution = Execution()
    parallel: MeshConfig = MeshConfig(fsdp=-1)
    sample: Sample = Sample()

    def validate(self):
        if self.model is None and self.init_from is None:
            raise ConfigError("give a model, or init_from: what to start from")
        if self.model is not None:
            check_inputs(self.model, self)
        if self.sample.sampler.guidance != 1 and not self.text.dropout and self.init_from is None:
            raise ConfigError(
                "sample.sampler.guidance needs a model that also learns without text: set "
                "text.dropout above 0"
            )


def check_inputs(model: VideoDiT, config: CaptionedLoop) -> None:
    """Raises ConfigError unless each of the model's states has its encoder, and each encoder its
    states."""
    wanted = {t.name for t in model.text if isinstance(t, States)}
    given = {e.name for e in config.text.encoders}
    if wanted != given:
        raise ConfigError(
            f"the model reads states of {sorted(wanted) or 'no encoder'}, and text.encoders has "
            f"{sorted(given) or 'none'}"
        )


def reads_of(model: VideoDiT) -> Reads:
    """What the model reads of a clip."""
    return Reads(model.patch, model.scalars, model.first_frame, model.deviation)


def text_shapes(model: VideoDiT) -> dict[str, tuple[int, ...]]:
    """What one text is to each of the model's inputs: tokens (S,), or states (S, E)."""
    return {
        t.name: (t.tokens,) if isinstance(t, Tower) else (t.tokens, t.width) for t in model.text
    }


def read_texts(
    config: CaptionedLoop,
    begin: Start,
    source: ClipSource,
    sharding: Sharding,
    report: Callable[[str], None],
) -> tuple[Tokenizer | None, TextBank]:
    """(the tokenizer of the model's own text towers, every text that training and samples use)."""
    captions = distinct(source.captions)
    tokenizer = tokenizer_of(config, begin, captions)
    sampled = (*config.sample.prompts_of(source), *config.sample.unwanted)
    texts = distinct([*source.captions, *((prompt,) for prompt in sampled)])
    return tokenizer, bank_of(config, begin.model, texts, tokenizer, sharding, report)


def tokenizer_of(config: CaptionedLoop, begin: Start, texts: list[str]) -> Tokenizer | None:
    """That of the model's own text towers; None for a model that has none.

    Raises:
      ConfigError: it has more tokens than a tower knows.
    """
    towers = [t for t in begin.model.text if isinstance(t, Tower)]
    if not towers:
        return None
    if "tokenizer" in begin.processor:
        tokenizer = begin.tokenizer
    elif config.text.tokenizer == TRAIN_TOKENIZER:
        tokenizer = train_sentencepiece(texts[1:], towers[0].vocab)
    else:
        tokenizer = load_tokenizer(config.text.tokenizer)
    for tower in towers:
        if tower.vocab < tokenizer.vocab_size:
            raise ConfigError(
                f"the text tower {tower.name} has a vocab of {tower.vocab}, and its tokenizer "
                f"{tokenizer.vocab_size} tokens"
            )
    return tokenizer


def bank_of(
    config: CaptionedLoop,
    model: VideoDiT,
    texts: list[str],
    tokenizer: Tokenizer | None,
    sharding: Sharding,
    report: Callable[[str], None],
) -> TextBank:
    """All texts as each of the model's inputs is given them."""
    encoders = {e.name: e for e in config.text.encoders}
    encoded = {}
    before = None
    if config.init_from is not None and present(config.init_from.artifact):  # a run outlives it
        before = load_artifact(config.init_from.artifact, sharding, arrays=False)
    for t in model.text:
        if isinstance(t, Tower):
            assert tokenizer is not None
            encoded[t.name] = token_rows(tokenizer, texts, t.tokens, report)
            continue
        e = encoders[t.name]
        artifact = load_artifact(e.artifact, sharding, e.part)
        folder = config.text.cache / t.name
        encoded[t.name] = text_states.cached(folder, artifact, texts, t.tokens, sharding, report)
        text_states.check_width(e.artifact, encoded[t.name], t)
        if before is not None:
            unlike = text_states.another_encoder(before, t.name, e.artifact, encoded[t.name])
            if unlike:
                report(f"{unlike}: the model has to learn its states anew")
    return TextBank(texts, encoded)


def guidable(config: CaptionedLoop, session: Session) -> bool:
    """Whether the model learns without text as well, or did before."""
    source = session.goes_on_from
    if source is None and config.init_from is not None:
        source = config.init_from.artifact
    before = source is not None and load_artifact(source, session.sharding, arrays=False).meta.get(
        "guidable", False
    )
    return before or config.text.dropout > 0


def description(
    loop: str, config: CaptionedLoop, begin: Start, tokenizer: Tokenizer | None, *, average: bool
) -> Description:
    """What a checkpoint of the loop is."""
    return Description(
        loop,
        {LEARNER: begin.part(average=average)},
        {} if tokenizer is None else {"tokenizer": tokenizer.hash},
        dtype=config.execution.dtype,
        origin=begin.origin,
    )


def processor_of(tokenizer: Tokenizer | None) -> dict[str, Tokenizer]:
    """What is kept with a run for whoever loads it."""
    return {} if tokenizer is None else {"tokenizer": tokenizer}


def frozen_like(config: CaptionedLoop, model: VideoDiT, sharding: Sharding) -> Any:
    """The parameters of a frozen model in the compute dtype, abstract."""
    specs = model.specs()
    cast = jax.eval_shape(
        lambda p: spec_lib.cast(p, config.execution.dtype, specs), spec_lib.abstract(specs)
    )
    return jax.tree.map(laid_out, cast, sharding.params(specs))


def frozen(
    config: CaptionedLoop,
    model: VideoDiT,
    params: Any,
    of: Callable[[Any, Any], jax.Array],
    schema: Schema,
    result: Field,
    sharding: Sharding,
    accumulation: int,
) -> Callable[[Any], jax.Array]:
    """A function of a batch to what a model that never changes makes of it, in as many microbatches
    as the step. The model has neither gradient nor optimizer memory.

    Args:
      of: (parameters, microbatch) -> an array with a row for each of the microbatch's.
      result: that of the whole batch.
    """
    dtype, specs = config.execution.dtype, model.specs()
    kept = jax.jit(
        lambda p: spec_lib.cast(p, dtype, specs), out_shardings=sharding.params(specs)
    )(params)  # fmt: skip

    def made(params, batch):
        part = microbatches(schema, batch, accumulation)
        parts = jax.lax.map(lambda i: of(params, part(i)), jnp.arange(accumulation))
        # row r was in microbatch r % accumulation
        return parts.swapaxes(0, 1).reshape(result.shape)

    compiled = jax.jit(made, out_shardings=sharding.named(result.axes, result.shape))
    return lambda batch: compiled(kept, batch)
