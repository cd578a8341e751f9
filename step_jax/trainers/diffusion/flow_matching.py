"""Flow matching: a diffusion transformer learns to draw pictures and clips from captions.

One loop for every stage of Step-Video (arXiv 2502.10248): pictures, clips of low and of high
resolution, fine-tuning, clips from a first frame. Stages are recipes that start from each other.
The loop is :func:`run`, read top to bottom.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax

from step_jax.core import checks
from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.data.batches import process_rows, to_mesh
from step_jax.data.captions import text_fields
from step_jax.data.clips import ClipDataset, Packs, Shape, bucket_rows, clip_schema
from step_jax.interop.artifacts import Start, starting_point
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.flops import tokens_of, train_flops
from step_jax.runs.device_memory import fitting
from step_jax.runs.session import Session
from step_jax.trainers.diffusion.captioned import (
    LEARNER,
    CaptionedLoop,
    check_inputs,
    description,
    guidable,
    processor_of,
    read_texts,
    reads_of,
    text_shapes,
)
from step_jax.trainers.diffusion.preview import Preview
from step_jax.trainers.diffusion.sources import ClipData, DigitsData
from step_jax.training.learner import learn
from step_jax.training.losses.flow import flow_matching
from step_jax.training.optimizers.config import check_optimizer
from step_jax.training.program import Program, Work

UNIT = "clips"


@dataclass(frozen=True)
class Training:
    """How long, and on how much at once.

    batch_size: rows of a batch of the costliest bucket; batches of other buckets have as many rows
      as make no more operations. Of packs, rows of every batch.
    packs: fill rows with samples of any size instead of buckets.
    accumulation: microbatches that a step is computed in; changes memory, not results.
    ema_decay: of a moving average of the parameters, which previews and the artifact use.
    """

    steps: int
    batch_size: int = 64
    packs: Packs | None = None
    accumulation: int = 1
    ema_decay: float | None = 0.99

    def validate(self):
        checks.at_least(self, steps=1, batch_size=1, accumulation=1)
        checks.decay(self, "ema_decay")


@dataclass(frozen=True, kw_only=True)
class Config(CaptionedLoop):
    """Train a text-conditioned flow-matching model on pictures or clips."""

    training: Training
    data: ClipData = DigitsData()
    loop: Literal["diffusion"] = "diffusion"

    def validate(self):
        super().validate()
        if self.model is not None:
            for size in self.data.buckets:
                tokens_of(self.model, size)
        check_optimizer(self.optimizer, self.training.steps)
        self.run.profile.check(self.training.steps)


def shapes_of(config: Config, model: VideoDiT, sharding: Sharding) -> list[Shape]:
    """The shapes of the batches, the costliest first, without opening the data."""
    c = config.training
    if c.packs is not None:
        return [Shape(c.batch_size, c.packs.tokens, c.packs.samples, None)]
    flops = {size: train_flops(model, tokens_of(model, size)) for size in config.data.buckets}
    rows = bucket_rows(flops, c.batch_size, sharding.ways("batch") * c.accumulation)
    costliest = sorted(rows, key=lambda size: -flops[size] * rows[size])
    return [Shape(rows[size], tokens_of(model, size), 1, size) for size in costliest]


def program(config: Config, sharding: Sharding) -> Program:
    """What the loop compiles for its costliest batches."""
    begin = starting_point(config.model, config.init_from, sharding, VideoDiT, arrays=False)
    shape = shapes_of(config, begin.model, sharding)[0]
    return make_program(config, begin, shape, sharding)


def make_program(config: Config, begin: Start, shape: Shape, sharding: Sharding) -> Program:
    """The program of batches of one shape; all of a run have the same state."""
    c, model, seed = config.training, begin.model, config.run.seed
    learning = learn(
        model,
        config.optimizer,
        total_steps=c.steps,
        sharding=sharding,
        average=c.ema_decay,
        freeze=begin.freeze,
        lora=begin.lora,
    )

    def loss(params, batch, key):
        return flow_matching(
            params[LEARNER],
            model,
            batch,
            config.flow,
            seed,
            config.execution,
            sharding,
            noise_seed=config.data.noise_seed,
        )

    return Program.build(
        loss,
        {LEARNER: model},
        {LEARNER: learning},
        clip_schema(
            shape,
            model.numbers,
            reads_of(model),
            text_fields(text_shapes(model)),
            own_noise=config.data.noise_seed is not None,
        ),
        sharding,
        total_steps=c.steps,
        accumulation=c.accumulation,
        work=Work(
            shape.rows,
            UNIT if shape.size else "packs",
            shape.rows * train_flops(model, shape.tokens) if shape.size else 0.0,
            config.execution.dtype,
        ),
        seed=seed,
    )


def run(config: Config, force: bool = False) -> dict[str, float]:
    """Trains, draws, and judges what it drew if the data can tell; returns the figures.

    Args:
      force: try a step that needs more memory than a device has.
    """
    c = config.training
    with Session(config) as session:
        sharding, report = session.sharding, session.reporter.event
        begin = starting_point(
            config.model, config.init_from, sharding, VideoDiT, session.goes_on_from
        )
        check_inputs(begin.model, config)
        source = config.data.open(sharding, report)
        if source.channels != begin.model.channels:
            raise ConfigError(
                f"the data have {source.channels} channels, the model {begin.model.channels}"
            )
        tokenizer, bank = read_texts(config, begin, source, sharding, report)
        shapes = shapes_of(config, begin.model, sharding)
        dataset = ClipDataset(
            source,
            bank,
            reads_of(begin.model),
            rows=c.batch_size if c.packs else {s.size: s.rows for s in shapes if s.size},
            packs=c.packs,
            seed=config.run.seed,
            dropout=config.text.dropout,
        )
        if not 0.5 <= (found := dataset.deviation) <= 2:
            report(
                f"the data's numbers deviate by {found:.2g} of model.deviation: noise hides what "
                f"the flow's times say near 1, so with {found * begin.model.deviation:.2g}"
            )
        # every bucket's step is compiled before the first one: none is compiled later
        programs = {shape: make_program(config, begin, shape, sharding) for shape in shapes}
        compiled = {
            shape: fitting(built.compile, jax.local_devices()[0], force)
            for shape, built in programs.items()
        }
        built = programs[shapes[0]]
        state, start = session.start(
            built,
            begin.given(LEARNER),
            check=lambda meta, step: dataset.check(meta["data"], step),
        )
        session.describe(
            config,
            description(config.loop, config, begin, tokenizer, average=c.ema_decay is not None),
            processor_of(tokenizer),
            header(config, built, dataset),
            units={"loss": "squared error of a number"},
            meta={"data": dataset.fingerprint, "guidable": guidable(config, session)},
        )
        best = built.learnings[LEARNER].best
        preview = Preview(session, config, begin.model, bank, source)
        for step in range(start, c.steps):
            shape = dataset.shape_at(step)
            schema, part = programs[shape].schema, process_rows(sharding, shape.rows)
            batch = to_mesh(sharding, schema, dataset.batch(step, *part))
            session.before(step)
            state, metrics = compiled[shape](state, batch)
            work = replace(programs[shape].work, done=dataset.samples_before(step + 1))
            session.finished(step + 1, state, metrics, work=work)
            if config.sample.due(step + 1, c.steps):
                with session.aside():
                    preview.draw(step + 1, best(state.learners[LEARNER]))
        session.flush()
        return preview.finish(best(state.learners[LEARNER]))


def header(config: Config, built: Program, dataset: ClipDataset) -> dict[str, Any]:
    """What is shown before the first step."""
    learning = built.learnings[LEARNER]
    buckets = [
        f"{' x '.join(map(str, s.size or ('packs of', s.tokens)))}: {s.rows} rows"
        for s in dataset.shapes
    ]
    return {
        "parameters": spec_lib.count(learning.model_specs),
        "clips": len(dataset.source.captions),
        "texts": len(dataset.bank.index),
        "batches": "; ".join(buckets),
        "steps": config.training.steps,
    }
