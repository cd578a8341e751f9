"""What the loops share that train a decoder on rows of tokens: their settings, and parts of a run.

Each loop (pretrain, sft, preference, reward) is a function of its own that reads top to bottom and
calls these.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax

from step_jax.checkpoint.artifact import Description
from step_jax.core import checks
from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data import DataConfig, TextDataset
from step_jax.data.batches import process_rows, to_mesh
from step_jax.data.config import TRAIN_TOKENIZER
from step_jax.data.packing import text_schema
from step_jax.data.preferences import PreferenceDataset
from step_jax.data.schema import Schema
from step_jax.evaluation.attention_probe import beside, make_probe
from step_jax.evaluation.heldout import make_evaluator
from step_jax.inference.generate import generate
from step_jax.inference.sampling import SamplingConfig
from step_jax.interop.artifacts import InitFrom, Start, starting_point
from step_jax.models import expert_health
from step_jax.models.context import Execution
from step_jax.models.flops import train_flops_per_token
from step_jax.models.text.decoder import Decoder
from step_jax.models.text.facts import cache_bytes_per_token, with_vocabulary
from step_jax.models.text.reward import RewardModel
from step_jax.runs import plots
from step_jax.runs.console import Shown
from step_jax.runs.device_memory import available, needed
from step_jax.runs.expert_alarm import ExpertAlarm, ExpertHealth
from step_jax.runs.session import RunConfig, Session
from step_jax.tokenizers.base import Tokenizer
from step_jax.tokenizers.chat import encode_request
from step_jax.training.learner import learn
from step_jax.training.losses.text import packed_text_loss
from step_jax.training.optimizers.config import AdamW, OptimizerConfig, check_optimizer
from step_jax.training.program import Program, Work
from step_jax.training.scaling_laws import step_law_batch_rows
from step_jax.training.step import LossFn

LEARNER = "model"


@dataclass(frozen=True)
class Training:
    """How long, and on how much at once. Give ``steps`` or ``tokens``.

    steps: optimizer steps of the whole run.
    tokens: tokens of the whole run instead.
    batch_size: rows of a step over all devices, or ``step_law`` (arXiv 2503.04715; needs tokens).
    accumulation: microbatches that a step is computed in; changes memory, not results.
    balance: of which tokens the routers' losses take the loads of experts: all of a step, so that
      accumulation changes nothing (with several microbatches their layers are run once more to know
      the loads), or those of each microbatch.
    z_loss: coefficient of the squared log-partition function.
    ema_decay: of a moving average of the parameters, which evaluation and sampling then use.
    """

    steps: int | None = None
    tokens: float | None = None
    batch_size: int | Literal["step_law"] = "step_law"
    accumulation: int = 1
    balance: Literal["batch", "microbatch"] = "batch"
    z_loss: float = 0.0
    ema_decay: float | None = None

    def validate(self):
        if (self.steps is None) == (self.tokens is None):
            raise ConfigError("give either training.steps or training.tokens")
        if self.batch_size == "step_law" and self.tokens is None:
            raise ConfigError("training.batch_size: step_law needs training.tokens")
        for name in ("steps", "tokens", "batch_size", "accumulation"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 1 <= value < float("inf"):
                raise ConfigError(f"training.{name} is {value}; it must be at least 1, and finite")
        if isinstance(self.batch_size, int) and self.batch_size % self.accumulation:
            raise ConfigError(
                f"training.accumulation {self.accumulation} does not divide batch_size "
                f"{self.batch_size}"
            )
        if self.z_loss < 0:
            raise ConfigError(f"training.z_loss is {self.z_loss}; it must be 0 or more")
        checks.decay(self, "ema_decay")

    def rows(self, sequence_length: int, multiple: int) -> int:
        """Rows of a batch; Step Law's are rounded to a multiple of ``multiple``."""
        if self.batch_size == "step_law":
            assert self.tokens is not None  # see validate
            return step_law_batch_rows(self.tokens, sequence_length, multiple * self.accumulation)
        return self.batch_size

    def total_steps(self, tokens_per_step: int) -> int:
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None  # see validate
        return max(1, round(self.tokens / tokens_per_step))


@dataclass(frozen=True)
class Evaluation:
    """Held-out evaluation during the run; the end of the run always scores every held-out token.

    every_steps: 0 for the end only.
    tokens: of the quick evaluations, whole documents.
    attention: also say where every layer's attention looks (``evaluation.attention_probe``).
    """

    every_steps: int = 200
    tokens: int = 50_000
    attention: bool = False

    def validate(self):
        if self.every_steps < 0 or self.tokens < 1:
            raise ConfigError(
                f"evaluation needs every_steps of 0 or more and tokens of at least 1: {self}"
            )

    def due(self, step: int, total_steps: int) -> bool:
        return bool(self.every_steps) and step % self.every_steps == 0 and 0 < step < total_steps


@dataclass(frozen=True)
class Sample:
    """Text written at the end of the run. ``tokens: 0`` writes none."""

    prompts: tuple[str, ...] = ("",)
    tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95

    def validate(self):
        if self.tokens < 0:
            raise ConfigError(f"sample.tokens is {self.tokens}; it must be 0 or more")
        self.sampling(0)

    def sampling(self, seed: int) -> SamplingConfig:
        return SamplingConfig(
            max_new_tokens=max(1, self.tokens),
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )


@dataclass(frozen=True)
class Questions(Sample):
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


@dataclass(frozen=True, kw_only=True)
class TextLoop:
    """The configuration that the loops share which train a decoder on rows of tokens.

    The decoder is a fresh ``model``, or the one of ``init_from``.
    """

    run: RunConfig
    training: Training
    data: DataConfig
    model: Decoder | None = None
    init_from: InitFrom | None = None
    optimizer: OptimizerConfig = AdamW()
    execution: Execution = Execution()
    parallel: MeshConfig = MeshConfig(fsdp=-1)
    evaluation: Evaluation = Evaluation()
    expert_health: ExpertHealth = ExpertHealth()
    loop: str

    def validate(self):
        """What can be known to fail before data are read and devices are touched."""
        T, training = self.data.sequence_length, self.training
        tokens = training.rows(T, 1) * T
        steps = training.total_steps(tokens)
        check_optimizer(self.optimizer, steps, steps * tokens)
        self.run.profile.check(steps)
        if self.model is None and self.init_from is None:
            raise ConfigError("give a model, or init_from: what to start from")
        if self.model is not None and trains_tokenizer(self):
            with_vocabulary(self.model, self.data.vocab_size)

    @property
    def decoder(self) -> Decoder:
        """``model``, once it is known: a run fills in what it takes from ``init_from``."""
        assert self.model is not None
        return self.model


def trains_tokenizer(config: TextLoop) -> bool:
    """Whether the tokenizer is made of the text: none is named, nor comes with a model."""
    return config.data.tokenizer == TRAIN_TOKENIZER and config.init_from is None


def start_of(
    config: TextLoop, sharding: Sharding, goes_on_from: str | None = None, *, arrays: bool = True
) -> Start:
    """See ``starting_point``; a model without a vocabulary has the artifact's."""
    return starting_point(
        config.model,
        config.init_from,
        sharding,
        Decoder,
        goes_on_from,
        complete=lambda model, found: model if model.vocab else replace(model, vocab=found.vocab),
        arrays=arrays,
    )


def prepare_data(config: TextLoop, begin: Start, sharding: Sharding, report) -> TextDataset:
    """The dataset of this process's rows; processes that share rows read the same ones."""
    if trains_tokenizer(config):  # a mesh that does not divide is known already
        make_program(config, with_vocabulary(begin.model, config.data.vocab_size), sharding)
    rows = rows_read(config, begin, sharding)
    dataset = TextDataset.build(config.data, report=report, **rows)
    tell_another_tokenizer(begin, dataset.tokenizer, report)
    return dataset


def tell_another_tokenizer(begin: Start, tokenizer: Tokenizer, report) -> None:
    """Reports a tokenizer that is not the one with which the parameters of the start were made."""
    own = begin.processor.get("tokenizer")
    if begin.params is not None and own is not None and own.hash != tokenizer.hash:
        report(
            f"texts are read by the tokenizer {tokenizer.name} ({tokenizer.vocab_size} tokens), "
            f"and {begin.origin} was made with {own.name} ({own.vocab_size}): rows of the "
            "embedding stand for other tokens than before, unless init_from.fresh names it"
        )


def rows_read(config: TextLoop, begin: Start, sharding: Sharding) -> dict[str, Any]:
    """Which rows this process reads, and by what tokenizer: arguments of ``TextDataset.build``."""
    rows = config.training.rows(config.data.sequence_length, sharding.ways("batch"))
    index, count = process_rows(sharding, rows)
    named = config.data.tokenizer != TRAIN_TOKENIZER or trains_tokenizer(config)
    return {
        "batch_size": rows,
        "seed": config.run.seed,
        "process_index": index,
        "process_count": count,
        "tokenizer": None if named else begin.tokenizer,
    }


def program(config: TextLoop, sharding: Sharding) -> Program:
    """What the loop compiles, without opening the text.

    Raises:
      ConfigError: no vocabulary without the tokenizer, or sizes that the mesh does not divide.
    """
    begin = start_of(config, sharding, arrays=False)
    return make_program(config, planned(config, begin.model), sharding)


def planned(config: TextLoop, model: Decoder) -> Decoder:
    """The model with its vocabulary, without opening the text; errors as :func:`program`."""
    if model.vocab:
        return model
    if not trains_tokenizer(config):
        raise ConfigError(
            "a plan does not open the tokenizer: set model.vocab to the size of its vocabulary"
        )
    return with_vocabulary(model, config.data.vocab_size)


def make_program(config: TextLoop, model: Decoder, sharding: Sharding) -> Program:
    """The program of a configuration and its model, which has its vocabulary."""
    training, T = config.training, config.data.sequence_length
    rows = training.rows(T, sharding.ways("batch"))
    text_loss = packed_text_loss(
        model, config.execution, sharding, training.z_loss, training.balance
    )
    return program_of(
        config,
        model,
        sharding,
        lambda params, batch, key: text_loss(params[LEARNER], batch),
        text_schema(rows, T),
        lambda params, stats: expert_health.report(model, params[LEARNER], stats),
    )


def program_of(
    config: TextLoop,
    model: Decoder | RewardModel,
    sharding: Sharding,
    loss: LossFn,
    schema: Schema,
    report: Callable[[dict[str, Any], Any], dict[str, jax.Array]],
) -> Program:
    """The program of a loss of one model; ``loss``, ``schema`` and ``report`` as ``Program.build``
    takes them. Its work is the tokens of the schema."""
    training, T = config.training, config.data.sequence_length
    tokens = math.prod(schema["tokens"].shape)
    decoder = model if isinstance(model, Decoder) else model.decoder
    total_steps = training.total_steps(tokens)
    init = config.init_from
    learning = learn(
        model,
        config.optimizer,
        total_steps=total_steps,
        sharding=sharding,
        tokens=float(total_steps * tokens),
        average=training.ema_decay,
        freeze=init.freeze if init else (),
        lora=init.lora if init else None,
    )
    return Program.build(
        loss,
        {LEARNER: model},
        {LEARNER: learning},
        schema,
        sharding,
        total_steps=total_steps,
        work=Work(
            tokens,
            "tokens",
            tokens * train_flops_per_token(decoder, T),
            config.execution.dtype,
        ),
        seed=config.run.seed,
        accumulation=training.accumulation,
        report=report,
    )


def describe(
    config: TextLoop, begin: Start, dataset: TextDataset, model: Decoder | RewardModel
) -> Description:
    """What every checkpoint of the run is; ``model`` with its vocabulary."""
    part = begin.part(model, average=config.training.ema_decay is not None)
    return Description(
        loop=config.loop,
        parts={LEARNER: part},
        processor={"tokenizer": dataset.tokenizer.hash},
        context=config.data.sequence_length,
        dtype=config.execution.dtype,
        origin=begin.origin,
    )


def header(
    config: TextLoop, built: Program, dataset: TextDataset, train_step, chosen: dict[str, str]
) -> dict[str, Any]:
    """What the run shows before its first step; ``chosen`` as of ``facts.implementations``."""
    T, steps = config.data.sequence_length, built.total_steps
    learning, tokens = built.learnings[LEARNER], built.work.count
    assert config.model is not None
    need, limit = needed(train_step), available(jax.local_devices()[0])
    trained = spec_lib.count(spec_lib.trained(learning.specs))
    whole = spec_lib.count(learning.specs)
    values: dict[str, Any] = {
        "parameters": spec_lib.count(learning.model_specs),
        "active for a token": spec_lib.count(learning.model_specs, active=True),
        "of which in matrices": spec_lib.count(learning.model_specs, roles=("matrix",)),
        **({"trained": trained} if trained < whole else {}),
        **chosen,
        "tokens per step": Shown(tokens, f"{tokens:,} ({dataset.batch_size} rows of {T})"),
        "steps": Shown(
            steps,
            f"{steps:,} ({steps * tokens:,} tokens, "
            f"{steps * tokens / max(1, dataset.tokens_per_epoch):.2f} epochs)",
        ),
        "peak learning rate": learning.optimizer.peak,
        "cache bytes per token": cache_bytes_per_token(config.model),
    }
    if need is not None and limit is not None:
        state = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(built.state_like))
        values["memory per device"] = (
            f"{need / 1e9:.3g} GB predicted of {limit / 1e9:.3g} GB "
            f"(whole state {state / 1e9:.3g} GB)"
        )
    for i, note in enumerate([*learning.optimizer.notes, *dataset.notes(steps)], 1):
        values[f"note {i}"] = note
    return values


def train(session: Session, config: TextLoop, dataset: TextDataset, train_step, state, start: int):
    """The steps that are left, scored on held-out text when that is due.

    Args:
      train_step: the compiled step of the session's program.
      state, start: as ``session.start`` gives them.

    Returns:
      (the model's parameters to use, what scores them).
    """
    model = session.program.models[LEARNER]
    T = config.data.sequence_length
    dataset.heldout = dataset.heldout.kept(
        session.directory.heldout, dataset.tokenizer, write=session.primary
    )
    evaluate = make_evaluator(model, config.execution, session.sharding, dataset.batch_size, T)
    if config.evaluation.attention:
        evaluate = beside(evaluate, make_probe(model, config.execution, session.sharding, T))
    quick = dataset.heldout.subset(config.evaluation.tokens)

    def score(params) -> dict[str, float]:
        figures = evaluate(params, quick) if quick.documents else {}
        return figures | {"loss": figures["nll"]} if figures else {}

    return take_steps(session, config, dataset, train_step, state, start, score), evaluate


def take_steps(
    session: Session,
    config: TextLoop,
    dataset: TextDataset | PreferenceDataset,
    train_step,
    state,
    start: int,
    score: Callable[[Any], dict[str, float]],
):
    """The steps that are left, scored when that is due.

    Args:
      score: parameters to held-out figures; none where nothing was held out.

    Returns:
      The model's parameters to use.
    """
    built = session.program
    session.watch = ExpertAlarm(config.expert_health).check
    best = built.learnings[LEARNER].best

    def hold_out(step: int):
        if config.evaluation.due(step, built.total_steps):
            with session.aside():
                if figures := score(best(state.learners[LEARNER])):
                    session.reporter.evaluation(step, figures, "heldout")

    if not session.recorded(start, "heldout"):  # the run was killed while it was made
        hold_out(start)
    batches = dataset.iterate(start)
    for step in range(start, built.total_steps):
        batch = to_mesh(session.sharding, built.schema, next(batches))
        session.before(step)
        state, metrics = train_step(state, batch)
        session.finished(step + 1, state, metrics, batches.wait_seconds)
        hold_out(step + 1)
    batches.close()
    session.flush()
    return best(state.learners[LEARNER])


def finish(
    session: Session, dataset: TextDataset, evaluate, params, texts: list[str], go_on: str
) -> dict[str, float]:
    """Scores every held-out token, keeps the samples, draws the plot, and says where everything is.

    Args:
      texts: that the model wrote.
      go_on: a line that says how to have more of them.
    """
    result = evaluate(params, dataset.heldout) if dataset.heldout.documents else {}
    if result:
        final = result | {"loss": result["nll"]}
        session.reporter.evaluation(session.total_steps, final, "final")
    baselines: dict[str, Any] = {}
    if dataset.heldout.lossy:
        baselines["held-out"] = f"not available: the tokenizer loses text ({dataset.heldout.lossy})"
    elif session.primary:
        baselines = dataset.heldout.compressed_bits_per_byte()
    baselines = {f"{name} bits per byte": value for name, value in baselines.items()}
    more = f"{go_on}\nscore it:     step-jax eval {session.directory.name}"
    conclude(session, dataset, result, texts, more, baselines)
    return result


def conclude(
    session: Session,
    dataset: TextDataset | PreferenceDataset,
    figures: dict[str, float],
    texts: list[str],
    go_on: str,
    beside: dict[str, Any] | None = None,
) -> None:
    """Keeps the texts, draws the plot, sums up, and says where everything is.

    Args:
      figures: of what was held out.
      texts: that the model wrote.
      go_on: lines that say what can be done with the result.
      beside: what the figures are compared with.
    """
    report, directory = session.reporter, session.directory
    if session.primary:
        if texts:
            directory.samples.mkdir(exist_ok=True)
            path = directory.samples / f"step_{session.total_steps}.txt"
            path.write_text("\n\n".join(texts), encoding="utf-8")
            report.event(f"sample:\n{texts[0]}")
        plots.plot_run(directory.path, directory.plots / "loss.png")
    counters = {f"data {name}": value for name, value in dataset.counters().items() if value}
    report.summary(
        {
            "status": "done",
            **{f"held-out {name}": value for name, value in figures.items()},
            **(beside or {}),
            **counters,
            "seconds": time.perf_counter() - session.opened,
        }
    )
    report.event(
        f"everything is in {directory.name}: the loss in plots/loss.png"
        f"{', texts in samples/' if texts else ''}\n"
        f"{go_on}\n"
        f"compare runs: step-jax runs {directory.parent}"
    )


def with_room(ids: list[int], prompt: str, context: int) -> list[int]:
    """The ids of a prompt. Raises ConfigError where they leave no room in the context."""
    if len(ids) >= context:
        raise ConfigError(
            f"the sample prompt {prompt[:40]!r} leaves no room in a context of {context} tokens: "
            "shorten it, or raise data.sequence_length"
        )
    return ids


def continued(
    config: TextLoop, sample: Sample, sharding: Sharding, tokenizer: Tokenizer, params, prompts
) -> list[list[int]]:
    """The tokens that the model writes after each prompt (token ids)."""
    if not prompts:
        return []
    assert config.model is not None
    written = generate(
        params,
        config.model,
        prompts,
        sample.sampling(config.run.seed),
        max_length=config.data.sequence_length,
        stop_ids=tokenizer.stop_ids,
        execution=config.execution,
        sharding=sharding,
    )
    return [list(tokens) for tokens in written.tokens]


def question_ids(config: TextLoop, sample: Questions, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of what the model is given for each prompt.

    Raises:
      ConfigError: one leaves no room in the context.
    """
    prompts = sample.prompts if sample.tokens else ()
    asked = ([{"role": "user", "content": prompt}] for prompt in prompts)
    return [
        with_room(encode_request(tokenizer, messages), prompt, config.data.sequence_length)
        for messages, prompt in zip(asked, prompts, strict=True)
    ]


def write_answers(
    config: TextLoop, sample: Questions, sharding: Sharding, tokenizer: Tokenizer, params
) -> list[str]:
    """A question and its answer for every prompt."""
    prompts = question_ids(config, sample, tokenizer)
    written = continued(config, sample, sharding, tokenizer, params, prompts)
    return [
        f"user: {prompt}\nassistant: {tokenizer.decode_continuation(ids, tokens).strip()}"
        for prompt, ids, tokens in zip(sample.prompts, prompts, written, strict=False)
    ]
