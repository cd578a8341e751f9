"""Video-DPO: a diffusion transformer learns which of the clips that it draws itself are better.

The stage of Step-Video after fine-tuning (arXiv 2502.10248): pairs of clips of one caption, of
which a reward has chosen the better, and DPO with errors of the velocity in the place of
likelihoods. The policy of every so many steps draws the pairs anew. The loop is :func:`run`, read
top to bottom.

Shape suffixes: B pairs, M microbatches, 2 winner and loser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding, bytes_on_device
from step_jax.data.batches import process_rows, to_mesh
from step_jax.data.captions import TextBank, text_fields
from step_jax.data.clip_pairs import PairDataset, pair_schema
from step_jax.data.clips import ClipDataset, Shape, check_same, clip_schema
from step_jax.data.latents import LatentFolder
from step_jax.data.schema import Field, Schema
from step_jax.interop.artifacts import Start, starting_point
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.flops import forward_flops, tokens_of, train_flops
from step_jax.runs.device_memory import fitting
from step_jax.runs.session import Session
from step_jax.trainers.diffusion.captioned import (
    LEARNER,
    CaptionedLoop,
    Training,
    check_inputs,
    description,
    frozen,
    frozen_like,
    guidable,
    processor_of,
    read_texts,
    reads_of,
    text_shapes,
)
from step_jax.trainers.diffusion.pairs import PairData, PairMaker
from step_jax.trainers.diffusion.preview import Preview
from step_jax.trainers.reference import frozen_reference
from step_jax.training.learner import learn
from step_jax.training.losses.flow import REFERENCE, FlowDPO, flow_preference, pair_errors
from step_jax.training.optimizers.config import check_optimizer
from step_jax.training.program import Program, Work


@dataclass(frozen=True, kw_only=True)
class Config(CaptionedLoop):
    """Tune a diffusion transformer on pairs of its own clips: the one of ``init_from``, or a fresh
    ``model``.

    reference: the artifact that the policy is compared with, which stays as it is; null for the one
      that ``init_from`` names.
    """

    training: Training
    data: PairData
    loss: FlowDPO = FlowDPO()
    reference: str | None = None
    loop: Literal["video-preference"] = "video-preference"

    def validate(self):
        super().validate()
        if self.reference is None and self.init_from is None:
            raise ConfigError(
                "the loss compares with a reference, and a fresh model is none: give init_from, or "
                "reference"
            )
        if self.model is not None:
            tokens_of(self.model, self.data.buckets[0])
        check_optimizer(self.optimizer, self.training.steps)
        self.run.profile.check(self.training.steps)


def shape_of(config: Config, model: VideoDiT) -> Shape:
    """Of each side of a batch."""
    (size,) = config.data.buckets
    return Shape(config.training.batch_size, tokens_of(model, size), 1, size)


def schema_of(config: Config, model: VideoDiT) -> Schema:
    """The arrays of a batch but for the reference's errors."""
    texts = text_fields(text_shapes(model))
    return pair_schema(clip_schema(shape_of(config, model), model.numbers, reads_of(model), texts))


def errors_of(config: Config) -> Field:
    """The reference's errors of a batch."""
    return Field(("batch", None), (config.training.batch_size, 2))


def program(config: Config, sharding: Sharding) -> Program:
    """What the loop compiles, without data."""
    begin = starting_point(config.model, config.init_from, sharding, VideoDiT, arrays=False)
    return make_program(config, begin, sharding)


def make_program(config: Config, begin: Start, sharding: Sharding) -> Program:
    c, model = config.training, begin.model
    learning = learn(
        model,
        config.optimizer,
        total_steps=c.steps,
        sharding=sharding,
        freeze=begin.freeze,
        lora=begin.lora,
    )
    rest = (config.flow, config.run.seed, config.execution, sharding)

    def loss(params, batch, key):
        return flow_preference(params[LEARNER], model, batch, config.loss, *rest)

    tokens = shape_of(config, model).tokens
    return Program.build(
        loss,
        {LEARNER: model},
        {LEARNER: learning},
        {**schema_of(config, model), REFERENCE: errors_of(config)},
        sharding,
        total_steps=c.steps,
        accumulation=c.accumulation,
        work=Work(
            c.batch_size,
            "pairs",
            2 * c.batch_size * (train_flops(model, tokens) + forward_flops(model, tokens)),
            config.execution.dtype,
        ),
        seed=config.run.seed,
        notes=("drawing pairs, and the reference's errors, are programs of their own",),
        beside=frozen_like(config, model, sharding),
    )


def make_reference(config: Config, model: VideoDiT, params: Any, sharding: Sharding):
    """A function of a batch to the reference's errors, float32 (B, 2)."""
    rest = (config.flow, config.run.seed, config.execution, sharding)

    def errors(params, batch):
        return pair_errors(params, model, batch, *rest)

    schema, result = schema_of(config, model), errors_of(config)
    count = config.training.accumulation
    return frozen(config, model, params, errors, schema, result, sharding, count)


def run(config: Config, force: bool = False) -> dict[str, float]:
    """Trains, draws, and judges what it drew by other captions; returns the figures.

    Args:
      force: try a step that needs more memory than a device has.
    """
    c = config.training
    with Session(config) as session:
        sharding, report = session.sharding, session.reporter.event
        begin = starting_point(
            config.model, config.init_from, sharding, VideoDiT, session.goes_on_from
        )
        model = begin.model
        check_inputs(model, config)
        can_be_guided = guidable(config, session)
        if config.data.sampler.guidance != 1 and not can_be_guided:
            raise ConfigError(
                "data.sampler.guidance needs a model that also learns without text: set it to 1"
            )
        asked = config.data.open(sharding, report)
        tokenizer, bank = read_texts(config, begin, asked, sharding, report)
        maker = PairMaker(config.data, asked, model, bank, config.execution, sharding, report)
        built = make_program(config, begin, sharding)
        beside = bytes_on_device(built.beside)
        train_step = fitting(built.compile, jax.local_devices()[0], force, beside)
        saved: dict[str, Any] = {}

        def check(meta, step):
            check_same(maker.fingerprint, meta["data"], step)
            saved.update(meta)

        state, start = session.start(built, begin.given(LEARNER), check)
        params, compared = frozen_reference(
            config.reference, config.init_from, begin, tokenizer, sharding, saved.get("reference")
        )
        reference = make_reference(config, model, params, sharding)
        del params
        session.describe(
            config,
            description(config.loop, config, begin, tokenizer, average=False),
            processor_of(tokenizer),
            header(config, built, compared["name"]),
            units={"loss": "preference loss"},
            meta={"data": maker.fingerprint, "guidable": can_be_guided, "reference": compared},
        )
        rounds = Rounds(config, session, maker, bank, model)
        preview = Preview(session, config, model, bank, asked)
        schema, part = schema_of(config, model), process_rows(sharding, c.batch_size)

        def policy():
            return built.learnings[LEARNER].view(state.learners[LEARNER].params)

        if config.sample.every_steps and start == 0:
            preview.draw(0, policy())
        for step in range(start, c.steps):
            if rounds.change(step):
                with session.aside():
                    rounds.next(step, policy())
            batch = to_mesh(sharding, schema, rounds.dataset.batch(step, *part))
            session.before(step)
            state, metrics = train_step(state, batch | {REFERENCE: reference(batch)})
            session.finished(step + 1, state, metrics, carried=rounds.carried)
            if config.sample.due(step + 1, c.steps):
                with session.aside():
                    preview.draw(step + 1, policy())
        session.flush()
        return preview.finish(policy())


class Rounds:
    """The pairs that each step learns from.

    Attributes:
      dataset: the batches of the round.
    """

    dataset: PairDataset

    def __init__(
        self,
        config: Config,
        session: Session,
        maker: PairMaker,
        bank: TextBank,
        model: VideoDiT,
    ):
        self._config, self._session, self._maker = config, session, maker
        self._bank, self._model = bank, model
        self._made_by = ""

    def change(self, step: int) -> bool:
        """Whether other pairs than before are needed for the step with this 0-based number."""
        return not self._made_by or self._config.data.begins(step)

    def next(self, step: int, policy: Any) -> None:
        """Has the policy draw a round, or goes on with the one that the checkpoint names."""
        if begins := self._config.data.begins(step):
            self._made_by = self._maker.drawn(policy, step)
        else:
            self._made_by = self._session.carried["pairs"].tobytes().decode()
        sides = self._maker.open(self._made_by)
        if begins and not self._session.recorded(step, "pairs"):
            winners, losers = (float(np.mean(side.scalars["reward"])) for side in sides)
            figures = {"pairs": float(len(sides[0].captions)), "winners": winners, "losers": losers}
            self._session.reporter.evaluation(step, figures, "pairs")
        self.dataset = PairDataset(
            *map(self._batches, sides), shared_noise=self._config.loss.shared_noise
        )

    def carried(self) -> dict[str, np.ndarray]:
        """What a checkpoint has of it."""
        return {"pairs": np.frombuffer(self._made_by.encode(), np.uint8)}

    def _batches(self, side: LatentFolder) -> ClipDataset:
        config = self._config
        return ClipDataset(
            side,
            self._bank,
            reads_of(self._model),
            rows={config.data.buckets[0]: config.training.batch_size},
            packs=None,
            seed=config.run.seed,
            dropout=config.text.dropout,
        )


def header(config: Config, built: Program, reference: str) -> dict[str, Any]:
    """What is shown before the first step."""
    data, every = config.data, config.data.refresh_every
    rounds = "the start alone" if every is None else f"the policy of every {every} steps"
    return {
        "parameters": spec_lib.count(built.learnings[LEARNER].model_specs),
        "reference": reference,
        "pairs": f"{data.captions} captions x {data.clips} clips, drawn by {rounds}",
        "reward": ", ".join(data.reward),
        "steps": config.training.steps,
    }
