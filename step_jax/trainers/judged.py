"""What the loops share that learn from judged answers: data, the steps, held-out figures, the end.

Shape suffixes: B rows, S the two sides of an example, T tokens of a half, K examples of a row.
"""

from __future__ import annotations

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
from step_jax.runs.session import Session
from step_jax.trainers.text import (
    LEARNER,
    TextLoop,
    conclude,
    rows_read,
    take_steps,
    tell_another_tokenizer,
)
from step_jax.training.program import Program
from step_jax.training.step import LossFn

Evaluate = Callable[[Any, int | None], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class JudgedLoop(TextLoop):
    """The configuration that the loops on judged answers share."""

    data: PreferenceConfig

    @property
    def verdicts(self) -> bool:
        """Whether single answers are read instead of pairs."""
        return False

    def validate(self):
        super().validate()
        if self.training.z_loss:
            raise ConfigError("training.z_loss is of pretraining: losses of answers have none")


def prepare_data(config: JudgedLoop, begin: Start, sharding: Sharding, report) -> PreferenceDataset:
    """The dataset of this process's rows; processes that share rows read the same ones."""
    rows = rows_read(config, begin, sharding)
    dataset = PreferenceDataset.build(config.data, verdicts=config.verdicts, report=report, **rows)
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
    return take_steps(
        session,
        config,
        dataset,
        train_step,
        state,
        start,
        lambda params: evaluate(params, config.evaluation.tokens),
    )


def finish(
    session: Session,
    dataset: PreferenceDataset,
    figures: dict[str, float],
    texts: list[str],
    go_on: str,
) -> dict[str, float]:
    """Records the held-out figures, keeps the texts, draws the plot, and says where all is."""
    if figures:
        session.reporter.evaluation(session.total_steps, figures, "final")
    conclude(session, dataset, figures, texts, go_on)
    return figures
