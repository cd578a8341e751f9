"""Pretraining: from a folder of text to a decoder that writes.

The loop is :func:`run`, read top to bottom.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax

from step_jax.core import hardware, rng
from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data import DataConfig, TextDataset
from step_jax.data.batches import abstract_batch, process_rows, to_mesh
from step_jax.data.config import TRAIN_TOKENIZER
from step_jax.data.packing import empty_batch
from step_jax.evaluation.heldout import make_evaluator
from step_jax.inference.generate import generate
from step_jax.inference.sampling import SamplingConfig
from step_jax.models import expert_health
from step_jax.models.context import Context, Execution
from step_jax.models.flops import train_flops_per_token
from step_jax.models.layers.moe import MoE
from step_jax.models.layers.positions import alibi
from step_jax.models.text.decoder import Decoder
from step_jax.models.text.loss import language_model_loss
from step_jax.ops import attention, cross_entropy, grouped_matmul
from step_jax.runs import plots
from step_jax.runs.device_memory import available, fitting, needed
from step_jax.runs.expert_alarm import ExpertAlarm, ExpertHealth
from step_jax.runs.session import RunConfig, Session, Work
from step_jax.training.compile import compile_initial_state, compile_train_step
from step_jax.training.optimizers.build import make_optimizer
from step_jax.training.optimizers.config import AdamW, OptimizerConfig, check_optimizer
from step_jax.training.scaling_laws import step_law_batch_rows
from step_jax.training.state import abstract_state
from step_jax.training.step import LossOutput


@dataclass(frozen=True)
class Training:
    """How long, and on how much at once. Give ``steps`` or ``tokens``.

    steps: optimizer steps of the whole run.
    tokens: tokens of the whole run instead.
    batch_size: rows of a step over all devices, or ``step_law`` (arXiv 2503.04715; needs tokens).
    accumulation: microbatches that a step is computed in; changes memory, not results.
    z_loss: coefficient of the squared log-partition function.
    ema_decay: of a moving average of the parameters, which evaluation and sampling then use.
    """

    steps: int | None = None
    tokens: float | None = None
    batch_size: int | Literal["step_law"] = "step_law"
    accumulation: int = 1
    z_loss: float = 0.0
    ema_decay: float | None = None

    def validate(self):
        if (self.steps is None) == (self.tokens is None):
            raise ConfigError("give either training.steps or training.tokens")
        if self.batch_size == "step_law" and self.tokens is None:
            raise ConfigError("training.batch_size: step_law needs training.tokens")
        for name in ("steps", "tokens", "batch_size", "accumulation"):
            value = getattr(self, name)
            if isinstance(value, int | float) and value < 1:
                raise ConfigError(f"training.{name} is {value}; it must be at least 1")
        if isinstance(self.batch_size, int) and self.batch_size % self.accumulation:
            raise ConfigError(
                f"training.accumulation {self.accumulation} does not divide batch_size "
                f"{self.batch_size}"
            )

    def rows(self, sequence_length: int, multiple: int) -> int:
        """Rows of a batch; Step Law's are rounded to a multiple of ``multiple``."""
        if self.batch_size == "step_law":
            return step_law_batch_rows(self.tokens, sequence_length, multiple * self.accumulation)
        return self.batch_size

    def total_steps(self, tokens_per_step: int) -> int:
        return self.steps or max(1, round(self.tokens / tokens_per_step))


@dataclass(frozen=True)
class Evaluation:
    """Held-out evaluation during the run; the end of the run always scores every held-out token.

    every_steps: 0 for the end only.
    tokens: of the quick evaluations, whole documents.
    """

    every_steps: int = 200
    tokens: int = 50_000

    def due(self, step: int, total_steps: int) -> bool:
        return bool(self.every_steps) and step % self.every_steps == 0 and step < total_steps


@dataclass(frozen=True)
class Sample:
    """Text written at the end of the run. ``tokens: 0`` writes none."""

    prompts: tuple[str, ...] = ("",)
    tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95


@dataclass(frozen=True)
class PretrainConfig:
    """Train a decoder on text."""

    run: RunConfig
    model: Decoder
    training: Training
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = AdamW()
    execution: Execution = Execution()
    parallel: MeshConfig = MeshConfig(fsdp=-1)
    evaluation: Evaluation = Evaluation()
    expert_health: ExpertHealth = ExpertHealth()
    sample: Sample = Sample()

    def validate(self):
        """What can be known to fail before text is read and devices are touched."""
        T, training = self.data.sequence_length, self.training
        tokens = training.rows(T, 1) * T
        steps = training.total_steps(tokens)
        check_optimizer(self.optimizer, steps, steps * tokens)
        if self.data.tokenizer == TRAIN_TOKENIZER:
            with_vocabulary(self.model, self.data.vocab_size)


def context(batch: dict[str, Any], execution: Execution, sharding: Sharding) -> Context:
    """The context of a packed batch."""
    return Context(
        positions_BT=batch["positions"],
        segments_BT=batch["segments"],
        execution=execution,
        sharding=sharding,
    )


def make_loss(model: Decoder, execution: Execution, sharding: Sharding, z_loss: float = 0.0):
    """The loss function of ``make_train_step`` for packed text."""

    def loss(params, batch, key) -> LossOutput:
        ctx = context(batch, execution, sharding)
        return LossOutput(*language_model_loss(params, model, batch, ctx, z_loss))

    return loss


def with_vocabulary(model: Decoder, vocab_size: int) -> Decoder:
    """The model with the tokenizer's vocabulary, if it has none of its own.

    Raises:
      ConfigError: its own is too small for the tokenizer.
    """
    if not model.vocab:
        return replace(model, vocab=vocab_size)
    if model.vocab < vocab_size:
        raise ConfigError(f"model.vocab is {model.vocab}; the tokenizer has {vocab_size} pieces")
    return model


def prepare_data(config: PretrainConfig, sharding: Sharding, report) -> TextDataset:
    """The dataset of this process's rows; processes that share rows read the same ones."""
    T = config.data.sequence_length
    rows = config.training.rows(T, sharding.ways("batch"))
    if config.data.tokenizer == TRAIN_TOKENIZER:  # a mesh that does not divide is known already
        sharding.params(with_vocabulary(config.model, config.data.vocab_size).specs())
    if T % sharding.size("context"):
        raise ConfigError(
            f"parallel.context {sharding.size('context')} does not divide data.sequence_length {T}"
        )
    index, count = process_rows(sharding, rows)
    return TextDataset.build(
        config.data,
        batch_size=rows,
        seed=config.run.seed,
        process_index=index,
        process_count=count,
        report=report,
    )


def run(config: PretrainConfig, force: bool = False) -> dict[str, float]:
    """Trains, evaluates and samples; returns the final held-out figures.

    Args:
      force: try a step that needs more memory than a device has.

    Raises:
      StepError: with the exit code of ``core.errors``; ``RestartRequested`` after a SIGTERM,
        ``DoesNotFit`` for a step that needs more memory than a device has.
    """
    with Session(config, config.run, config.parallel) as session:
        sharding, report = session.sharding, session.reporter
        chosen = implementations(config, sharding)  # refuses before the data are prepared
        dataset = prepare_data(config, sharding, report.event)
        model = with_vocabulary(config.model, dataset.tokenizer.vocab_size)
        config = replace(config, model=model)
        rows, tokens = dataset.batch_size, dataset.batch_size * config.data.sequence_length
        total_steps = config.training.total_steps(tokens)

        optimizer, state_like = optimizer_and_state(config, sharding, rows)
        train_step = fitting(  # before the state is made, which may be too much already
            lambda: compile_step(config, optimizer, sharding, state_like, rows),
            jax.local_devices()[0],
            force,
        )
        state, start = session.start(
            compile_initial_state(
                lambda: model.initialise(rng.fold(config.run.seed, 0, "parameters")),
                optimizer,
                state_like,
            ),
            state_like,
            check=lambda meta, step: dataset.check(meta["data"], step),
        )
        session.describe(
            config,
            total_steps,
            work(config, tokens, sharding),
            meta={"data": dataset.fingerprint, "tokenizer": dataset.tokenizer.hash},
            header=header(config, optimizer, dataset, total_steps, state_like, train_step, chosen),
        )
        session.watch = ExpertAlarm(config.expert_health).check
        if session.primary:  # not before the run is known to go on where its checkpoint stopped
            dataset.tokenizer.save(session.directory.path / "tokenizer.model")
        evaluate = make_evaluator(
            model, config.execution, sharding, rows, config.data.sequence_length
        )
        quick = dataset.heldout.subset(config.evaluation.tokens)
        batches = dataset.iterate(start)
        for step in range(start, total_steps):
            batch = to_mesh(sharding, next(batches), rows)
            session.before(step)
            state, metrics = train_step(state, batch)
            session.finished(step + 1, state, metrics, batches.wait_seconds)
            if config.evaluation.due(step + 1, total_steps) and quick.documents:
                with session.aside():
                    figures = evaluate(state.best_params, quick)
                    report.evaluation(step + 1, figures | {"loss": figures["nll"]}, "heldout")
        batches.close()
        session.flush()
        return finish(session, config, dataset, evaluate, state.best_params)


def optimizer_and_state(config: PretrainConfig, sharding: Sharding, rows: int):
    """The optimizer of a run with batches of ``rows`` rows, and the abstract state it trains."""
    specs, tokens = config.model.specs(), rows * config.data.sequence_length
    total_steps = config.training.total_steps(tokens)
    optimizer = make_optimizer(
        config.optimizer,
        specs,
        total_steps=total_steps,
        tokens=float(total_steps * tokens),
        sharding=sharding,
    )
    use_ema = config.training.ema_decay is not None
    return optimizer, abstract_state(specs, optimizer, sharding, ema=use_ema)


def compile_step(
    config: PretrainConfig, optimizer, sharding, state_like, rows: int, compiler_options=None
):
    """The compiled train step, see ``compile_train_step``; neither data nor devices are needed."""
    batch = empty_batch(1, config.data.sequence_length, pad_id=0)
    return compile_train_step(
        make_loss(config.model, config.execution, sharding, config.training.z_loss),
        optimizer,
        sharding,
        state_like,
        abstract_batch(sharding, batch, rows),
        accumulation=config.training.accumulation,
        clip_norm=config.optimizer.clip_norm,
        ema_decay=config.training.ema_decay,
        compute_dtype=config.execution.dtype,
        seed=config.run.seed,
        report=functools.partial(expert_health.report, config.model),
        compiler_options=compiler_options,
    )


def work(config: PretrainConfig, tokens: int, sharding: Sharding) -> Work:
    """Tokens and operations of a step, and the peak of all devices at the compute precision."""
    flops = tokens * train_flops_per_token(config.model, config.data.sequence_length)
    precision = hardware.PRECISION[config.execution.dtype]
    peak = hardware.peak_flops(sharding.mesh.devices.flat[0], precision)
    return Work(tokens, flops, None if peak is None else peak * sharding.mesh.size)


def header(
    config, optimizer, dataset, total_steps, state_like, train_step, chosen: dict[str, str]
) -> dict[str, Any]:
    """What the run shows before its first step; ``chosen`` as of :func:`implementations`."""
    model, T = config.model, config.data.sequence_length
    specs = model.specs()
    tokens = dataset.batch_size * T
    need, limit = needed(train_step), available(jax.local_devices()[0])
    values: dict[str, Any] = {
        "parameters": spec_lib.count(specs),
        "active for a token": spec_lib.count(specs, active=True),
        "of which in matrices": spec_lib.count(specs, roles=("matrix",)),
        **chosen,
        "tokens per step": f"{tokens:,} ({dataset.batch_size} rows of {T})",
        "steps": f"{total_steps:,} ({total_steps * tokens:,} tokens, "
        f"{total_steps * tokens / max(1, dataset.tokens_per_epoch):.2f} epochs)",
        "peak learning rate": f"{optimizer.peak:.3g}",
        "cache per token": f"{cache_bytes_per_token(model):,} bytes",
    }
    if need is not None and limit is not None:
        state = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state_like))
        values["memory per device"] = (
            f"{need / 1e9:.3g} GB predicted of {limit / 1e9:.3g} GB "
            f"(whole state {state / 1e9:.3g} GB)"
        )
    for i, note in enumerate(optimizer.notes, 1):
        values[f"note {i}"] = note
    return values


def implementations(config: PretrainConfig, sharding: Sharding) -> dict[str, str]:
    """Operation -> ``what was asked for -> what it is computed with``.

    Raises:
      ConfigError: an implementation that was named cannot be had on these devices.
    """
    asked, device = config.execution, sharding.mesh.devices.flat[0]
    blocks = [block for group in config.model.layers for block in group.blocks]
    names = ", ".join(attention_implementations(config, sharding))
    values = {"attention": f"{asked.attention} -> {names}"}
    name = grouped_matmul.resolve(asked.grouped_matmul, device)
    if any(isinstance(block.mlp, MoE) for block in blocks):
        values["grouped matmul"] = f"{asked.grouped_matmul} -> {name}"
    return values | {"loss": f"{asked.loss} -> {cross_entropy.resolve(asked.loss, device)}"}


def attention_implementations(config: PretrainConfig, sharding: Sharding) -> list[str]:
    """What the layers' attention is computed with, each named once."""
    T = config.data.sequence_length
    names = []
    for kind in (block.attention for g in config.model.layers for block in g.blocks):
        width, value_width = kind.score_and_value_widths()
        problem = attention.Problem(
            width,
            value_width,
            queries=T,
            keys=T,
            dtype=config.execution.dtype,
            alibi=alibi(kind.position) is not None,
            in_order=sharding.size("context") == 1,
        )
        device = sharding.mesh.devices.flat[0]
        names.append(attention.resolve(config.execution.attention, problem, device))
    return sorted(set(names))


def cache_bytes_per_token(model: Decoder, bytes_per_number: int = 2) -> int:
    """Bytes that decoding adds for every token; windowed layers stay at one window and add none.

    ``bytes_per_number`` is 2 for a cache of 16 bits.
    """
    entries = (
        (group.repeat, entry)
        for group in model.layers
        for block in group.blocks
        if block.attention.window is None
        for entry in block.attention.cache_entries()
    )
    return bytes_per_number * sum(repeat * math.prod(entry) for repeat, entry in entries)


def finish(session: Session, config: PretrainConfig, dataset, evaluate, params):
    """Scores every held-out token, writes samples and the plot, and says where everything is."""
    report, directory = session.reporter, session.directory
    result = evaluate(params, dataset.heldout) if dataset.heldout.documents else {}
    if result:
        report.evaluation(session.total_steps, result | {"loss": result["nll"]}, "final")
    baselines = dataset.heldout.compressed_bits_per_byte() if session.primary else {}
    texts = write_samples(config, session.sharding, dataset.tokenizer, params)
    if session.primary:
        directory.samples.mkdir(exist_ok=True)
        path = directory.samples / f"step_{session.total_steps}.txt"
        path.write_text("\n\n".join(texts), encoding="utf-8")
        for text in texts[:1]:
            report.event(f"sample:\n{text}")
        plots.plot_run(directory.path, directory.plots / "loss.png")
    counters = {f"data {name}": value for name, value in dataset.counters().items() if value}
    report.summary(
        {
            "status": "done",
            **{f"held-out {name}": value for name, value in result.items()},
            **{f"{name} bits per byte": value for name, value in baselines.items()},
            **counters,
            "seconds": time.perf_counter() - session.opened,
        }
    )
    report.event(
        f"everything is in {directory.path}: the loss in plots/loss.png, texts in samples/\n"
        f"write more:   step-jax generate {directory.path} --prompt 'import os'\n"
        f"score it:     step-jax eval {directory.path}\n"
        f"compare runs: step-jax runs {directory.path.parent}"
    )
    return result


def write_samples(config: PretrainConfig, sharding: Sharding, tokenizer, params) -> list[str]:
    """One text per prompt of ``config.sample``, prompt included."""
    sample, length = config.sample, config.data.sequence_length
    if not sample.tokens:
        return []
    written = generate(
        params,
        config.model,
        [tokenizer.encode(prompt).tolist() for prompt in sample.prompts],
        SamplingConfig(
            max_new_tokens=sample.tokens,
            temperature=sample.temperature,
            top_p=sample.top_p,
            seed=config.run.seed,
        ),
        max_length=length,
        stop_ids=(tokenizer.eos_id,),
        start_id=tokenizer.bos_id,
        execution=config.execution,
        sharding=sharding,
    )
    return [p + tokenizer.decode(t) for p, t in zip(sample.prompts, written.tokens, strict=True)]
