"""A training loop in one file: a decoder learns to count in steps. B rows, T tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from step_jax.checkpoint.artifact import Description
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data.batches import process_rows, to_mesh
from step_jax.data.packing import text_schema
from step_jax.interop.artifacts import InitFrom, starting_point
from step_jax.models.context import Execution
from step_jax.models.text.decoder import Decoder
from step_jax.runs.session import RunConfig, Session
from step_jax.training.learner import learn
from step_jax.training.losses.text import packed_text_loss
from step_jax.training.optimizers.config import AdamW, OptimizerConfig
from step_jax.training.program import Program, Work


@dataclass(frozen=True)
class Config:
    """Learn to go on with 3 5 7 9 ...: a fresh ``model``, or the one of ``init_from``."""

    run: RunConfig
    model: Decoder | None = None
    init_from: InitFrom | None = None
    steps: int = 100
    rows: int = 32
    length: int = 16
    optimizer: OptimizerConfig = AdamW(learning_rate=1e-2)
    execution: Execution = Execution(dtype="float32")
    parallel: MeshConfig = MeshConfig(fsdp=-1)
    loop: str = "counting.py"


def batch(config: Config, vocab: int, step: int, index: int, count: int) -> dict[str, np.ndarray]:
    """Part ``index`` of ``count`` of a step's rows: of seed and step alone, so that runs resume."""
    first_B2 = np.random.default_rng((config.run.seed, step)).integers(1, vocab, (config.rows, 2))
    first_b2 = np.split(first_B2, count)[index]
    tokens_BT = (first_b2[:, :1] + first_b2[:, 1:] * np.arange(config.length + 1)) % vocab
    text_BT, next_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    ones_BT, places_BT = np.ones_like(text_BT), np.cumsum(np.ones_like(text_BT), axis=1) - 1
    rows = {"tokens": text_BT, "targets": next_BT, "segments": ones_BT, "positions": places_BT}
    rows = {name: a.astype(np.int32) for name, a in rows.items()}
    return rows | {"weights": ones_BT.astype(np.float32)}


def program(config: Config, sharding: Sharding, start=None) -> Program:
    """What the loop compiles; ``step-jax plan`` asks for it too."""
    start = start or starting_point(config.model, config.init_from, sharding, Decoder, arrays=False)
    loss = packed_text_loss(start.model, config.execution, sharding)
    how = learn(start.model, config.optimizer, total_steps=config.steps, sharding=sharding,
                freeze=start.freeze, lora=start.lora)  # fmt: skip
    return Program.build(
        lambda params, rows, key: loss(params["model"], rows), {"model": start.model},
        {"model": how}, text_schema(config.rows, config.length), sharding,
        total_steps=config.steps, work=Work(config.rows * config.length), seed=config.run.seed,
    )  # fmt: skip


def run(config: Config, force: bool = False) -> dict[str, float]:
    with Session(config) as session:
        mesh, source = session.sharding, session.goes_on_from
        begin = starting_point(config.model, config.init_from, mesh, Decoder, source)
        built = program(config, mesh, begin)
        state, start = session.start(built, begin.given("model"))
        train_step, metrics = built.compile(), {}
        held = Description(config.loop, {"model": begin.part()}, origin=begin.origin)
        session.describe(config, held, {}, {"steps": config.steps})
        for step in range(start, config.steps):
            rows = batch(config, begin.model.vocab, step, *process_rows(mesh, config.rows))
            session.before(step)
            state, metrics = train_step(state, to_mesh(mesh, built.schema, rows))
            session.finished(step + 1, state, metrics)
        session.flush()
        session.reporter.summary({"status": "done"})
        return {name: float(value) for name, value in metrics.items()}
