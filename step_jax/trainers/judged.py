"""What the loops share that learn from judged answers: data, the steps, held-out figures, the end.

Shape suffixes: B rows, S the two sides of an example, T tokens of a half, K examples of a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.data.batches import to_mesh
from step_jax.data.config import PreferenceConfig
from step_jax.data.preferences import PreferenceDataset
from step_jax.interop.artifacts import Start
from step_jax.runs import plots
from step_jax.runs.expert_alarm import ExpertAlarm
from step_jax.runs.session import Session
from step_jax.trainers.text import LEARNER, TextLoop, rows_read, tell_another_tokenizer
from step_jax.training.program import Program
from step_jax.training.step import LossFn

Evaluate = Callable[[Any, int | None], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class JudgedLoop(TextLoop):
    """The configuration that the loops on judged answers share."""

    data: PreferenceConfig

    def validate(self):
        super().validate()
        if self.training.z_loss:
            raise ConfigError("training.z_loss is of pretraining: losses of answers have none")


def prepare_data(
    config: JudgedLoop, begin: Start, sharding: Sharding, report, *, verdicts: bool = False
) -> PreferenceDataset:
    """The dataset of this process's rows; processes that share rows read the same ones."""
    rows = rows_read(config, begin, sharding)
    dataset = PreferenceDataset.build(config.data, verdicts=verdicts, report=report, **rows)
    tell_another_tokenizer(begin, dataset.tokenizer, report)
    return dataset


def make_evaluator(loss: LossFn, program: Program, dataset: PreferenceDataset) -> Evaluate:
    """A function (the model's parameters, tokens at most or None) -> figures of what is held out.

    They are means over the held-out examples: ``loss`` and the loss's own metrics; none without
    examples. A number of the whole batch in a loss (KTO's z) is one of each batch of them.
    """
    model, dtype = program.models[LEARNER], program.work.dtype
    sharding, schema = program.sharding, program.schema

    @jax.jit
    def sums(params, batch):
        params = spec_lib.cast(params, dtype, model.specs())
        out = loss({LEARNER: params}, batch, jax.random.key(0))
        examples = jnp.sum(batch["judged"])
        value = sum(out.values().values())
        return {"loss": (value * examples, examples)} | out.metrics

    def evaluate(params, tokens: int | None = None) -> dict[str, float]:
        left = float("inf") if tokens is None else tokens
        total: dict[str, list[float]] = {}
        heldout = range(len(dataset.heldout_examples), len(dataset.sources))
        for batch, which_BK in (one for source in heldout for one in dataset.sweep(source)):
            if left <= 0:
                break
            left -= len(which_BK) * 2 * batch["tokens"].shape[-1]
            found = jax.device_get(sums(params, to_mesh(sharding, schema, batch)))
            for name, (value, weight) in found.items():
                held = total.setdefault(name, [0.0, 0.0])
                held[0] += float(value)
                held[1] += float(weight)
        return {name: value / weight for name, (value, weight) in total.items() if weight}

    return evaluate


def train(
    session: Session,
    config: JudgedLoop,
    dataset: PreferenceDataset,
    train_step,
    state,
    start: int,
    evaluate: Evaluate,
):
    """The steps that are left, scored on held-out examples when that is due.

    Returns:
      The model's parameters to use.
    """
    built = session.program
    session.watch = ExpertAlarm(config.expert_health).check
    best = built.learnings[LEARNER].best

    def score(step: int):
        if config.evaluation.due(step, built.total_steps):
            with session.aside():
                figures = evaluate(best(state.learners[LEARNER]), config.evaluation.tokens)
                if figures:
                    session.reporter.evaluation(step, figures, "heldout")

    if not session.recorded(start, "heldout"):  # the run was killed while it was made
        score(start)
    batches = dataset.iterate(start)
    for step in range(start, built.total_steps):
        batch = to_mesh(session.sharding, built.schema, next(batches))
        session.before(step)
        state, metrics = train_step(state, batch)
        session.finished(step + 1, state, metrics, batches.wait_seconds)
        score(step + 1)
    batches.close()
    session.flush()
    return best(state.learners[LEARNER])


def finish(
    session: Session,
    dataset: PreferenceDataset,
    figures: dict[str, float],
    texts: list[str],
    go_on: str,
) -> dict[str, float]:
    """Records the held-out figures, keeps the texts, draws the plot, and says where all is."""
    report, directory = session.reporter, session.directory
    if figures:
        report.evaluation(session.total_steps, figures, "final")
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
            **counters,
            "seconds": time.perf_counter() - session.opened,
        }
    )
    report.event(
        f"everything is in {directory.path}: the loss in plots/loss.png\n{go_on}\n"
        f"compare runs: step-jax runs {directory.path.parent}"
    )
    return figures
