"""Flow-GRPO: a diffusion transformer learns from rewards of the clips that it draws itself.

Its sampler draws some steps by chance (``models.video.flow_policy``); those of clips that were
better than others of the same caption become likelier (arXiv 2505.05470). The policy of every so
many steps draws anew. The loop is :func:`run`, read top to bottom.

Shape suffixes: B choices, T tokens, P numbers in a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax

from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding, bytes_on_device
from step_jax.data.batches import process_rows, to_mesh
from step_jax.data.clips import Shape, check_same
from step_jax.data.schema import Field, Schema
from step_jax.interop.artifacts import Start, starting_point
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.flops import forward_flops, tokens_of, train_flops
from step_jax.models.video.flow import Flow
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
from step_jax.trainers.diffusion.groups import GroupData, GroupMaker, Round, choice_schema
from step_jax.trainers.diffusion.grpo import FlowGRPO, Steps, flow_grpo, velocities
from step_jax.trainers.diffusion.preview import Preview
from step_jax.trainers.reference import frozen_reference
from step_jax.training.learner import learn
from step_jax.training.losses.flow import REFERENCE
from step_jax.training.optimizers.config import check_optimizer
from step_jax.training.program import Program, Work


@dataclass(frozen=True, kw_only=True)
class Config(CaptionedLoop):
    """Tune a diffusion transformer by rewards of its own clips: the one of ``init_from``, or a
    fresh ``model``.

    training: its ``batch_size`` counts choices, steps of clips.
    reference: the artifact that ``loss.kl`` keeps the policy near, which stays as it is; null for
      the one that ``init_from`` names.
    """

    training: Training
    data: GroupData
    loss: FlowGRPO = FlowGRPO()
    reference: str | None = None
    loop: Literal["video-rl"] = "video-rl"

    def validate(self):
        super().validate()
        if self.loss.kl and self.reference is None and self.init_from is None:
            raise ConfigError(
                "loss.kl compares with a reference, and a fresh model is none: give init_from, or "
                "reference"
            )
        if self.reference is not None and not self.loss.kl:
            raise ConfigError(
                "nothing is compared with the reference: set loss.kl, or leave it out"
            )
        if self.text.dropout:
            raise ConfigError("every clip is drawn by its caption: set text.dropout to 0")
        if self.flow != Flow():
            raise ConfigError("the times are those of data.sampler (its shift), not of flow")
        if self.model is not None:
            tokens_of(self.model, self.data.buckets[0])
        check_optimizer(self.optimizer, self.training.steps)
        self.run.profile.check(self.training.steps)


def schema_of(config: Config, model: VideoDiT) -> Schema:
    """The arrays of a batch but for the reference's velocities."""
    (size,) = config.data.buckets
    shape = Shape(config.training.batch_size, tokens_of(model, size), 1, size)
    return choice_schema(shape, model.numbers, reads_of(model), text_shapes(model))


def velocities_of(config: Config, model: VideoDiT) -> Field:
    """Those of a batch by the reference."""
    return schema_of(config, model)["next"]


def program(config: Config, sharding: Sharding) -> Program:
    """What the loop compiles, without data."""
    begin = starting_point(config.model, config.init_from, sharding, VideoDiT, arrays=False)
    return make_program(config, begin, sharding)


def make_program(config: Config, begin: Start, sharding: Sharding) -> Program:
    c, model, kl = config.training, begin.model, bool(config.loss.kl)
    learning = learn(
        model,
        config.optimizer,
        total_steps=c.steps,
        sharding=sharding,
        freeze=begin.freeze,
        lora=begin.lora,
    )
    steps = Steps.of(config.data.sampler, config.data.choices)

    def loss(params, batch, key):
        rest = (config.loss, steps, config.execution, sharding)
        return flow_grpo(params[LEARNER], model, batch, *rest)

    schema = schema_of(config, model)
    tokens = tokens_of(model, config.data.buckets[0])
    per_row = train_flops(model, tokens) + kl * forward_flops(model, tokens)
    return Program.build(
        loss,
        {LEARNER: model},
        {LEARNER: learning},
        {**schema, **({REFERENCE: velocities_of(config, model)} if kl else {})},
        sharding,
        total_steps=c.steps,
        accumulation=c.accumulation,
        work=Work(c.batch_size, "choices", c.batch_size * per_row, config.execution.dtype),
        seed=config.run.seed,
        notes=("drawing clips, and the reference's velocities, are programs of their own",),
        beside=frozen_like(config, model, sharding) if kl else None,
    )


class Reference:
    """The frozen model that the policy is kept near.

    Attributes:
      facts: what a checkpoint says of it; None where none is asked for.
    """

    def __init__(self, config: Config, begin: Start, tokenizer, sharding: Sharding, was: Any):
        self.facts = None
        if not config.loss.kl:
            return
        model, c = begin.model, config.training
        steps = Steps.of(config.data.sampler, config.data.choices)
        params, self.facts = frozen_reference(
            config.reference, config.init_from, begin, tokenizer, sharding, was
        )

        def of(params, batch):
            return velocities(params, model, batch, steps, config.execution, sharding)

        schema, result = schema_of(config, model), velocities_of(config, model)
        self._of = frozen(config, model, params, of, schema, result, sharding, c.accumulation)

    def beside(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The batch with the reference's velocities, if they are asked for."""
        return batch if self.facts is None else batch | {REFERENCE: self._of(batch)}


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
        source = config.data.open(sharding, report)
        tokenizer, bank = read_texts(config, begin, source, sharding, report)
        maker = GroupMaker(config.data, source, model, bank, config.execution, sharding, report)
        built = make_program(config, begin, sharding)
        beside = bytes_on_device(built.beside)
        train_step = fitting(built.compile, jax.local_devices()[0], force, beside)
        saved: dict[str, Any] = {}

        def check(meta, step):
            check_same(maker.fingerprint, meta["data"], step)
            saved.update(meta)

        state, start = session.start(built, begin.given(LEARNER), check)
        reference = Reference(config, begin, tokenizer, sharding, saved.get("reference"))
        session.describe(
            config,
            description(config.loop, config, begin, tokenizer, average=False),
            processor_of(tokenizer),
            header(config, built, reference),
            units={"loss": "policy loss"},
            meta={
                "data": maker.fingerprint,
                "guidable": guidable(config, session),
                "reference": reference.facts,
            },
        )
        preview = Preview(session, config, model, bank, source)
        schema, part = schema_of(config, model), process_rows(sharding, c.batch_size)
        learned_from = Round(**session.carried) if start else None

        def policy():
            return built.learnings[LEARNER].view(state.learners[LEARNER].params)

        if config.sample.every_steps and start == 0:
            preview.draw(0, policy())
        for step in range(start, c.steps):
            if learned_from is None or config.data.begins(step):
                with session.aside():
                    learned_from, figures = maker.drawn(policy(), step, config.loss.algorithm)
                    if not session.recorded(step, "groups"):
                        session.reporter.evaluation(step, figures, "groups")
            rows = maker.batch(learned_from, c.batch_size, step, *part)
            batch = to_mesh(sharding, schema, rows)
            session.before(step)
            state, metrics = train_step(state, reference.beside(batch))
            session.finished(step + 1, state, metrics, carried=learned_from._asdict)
            if config.sample.due(step + 1, c.steps):
                with session.aside():
                    preview.draw(step + 1, policy())
        session.flush()
        return preview.finish(policy())


def header(config: Config, built: Program, reference: Reference) -> dict[str, Any]:
    """What is shown before the first step."""
    data, every = config.data, config.data.refresh_every
    rounds = "the start alone" if every is None else f"the policy of every {every} steps"
    return {
        "parameters": spec_lib.count(built.learnings[LEARNER].model_specs),
        "reference": "none" if reference.facts is None else reference.facts["name"],
        "groups": f"{data.groups} captions x {data.clips} clips, drawn by {rounds}",
        "choices": f"{data.chosen} of the {data.sampler.steps} steps of a clip",
        "reward": ", ".join(data.reward),
        "steps": config.training.steps,
    }
