"""One training step, shared by every loop: gradient, clipping, update, average, guard, metrics.

A loss is a function of sums over the whole batch: of parts, each divided by its own weight, and of
whatever else adds up. So microbatches, packing and devices change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from step_jax.core import rng
from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError, StepError
from step_jax.data.batches import microbatches
from step_jax.data.schema import Schema
from step_jax.training.learner import Learner, Learning
from step_jax.training.state import TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@struct.dataclass
class Part:
    """One part of a loss: ``coefficient * total / weight`` of the whole batch.

    Attributes:
      total: scalar sum, differentiable.
      weight: scalar that the whole batch's total is divided by (the number of its targets); a
        constant to the gradient. A part without any weight counts nothing.
      coefficient: of the part in the loss.
    """

    total: jax.Array
    weight: jax.Array
    coefficient: float = struct.field(pytree_node=False, default=1.0)

    def value(self) -> jax.Array:
        """The part of the loss; 0 without weight."""
        weight = jax.lax.stop_gradient(self.weight)
        value = self.coefficient * self.total / jnp.where(weight == 0, 1.0, weight)
        return jnp.where(weight == 0, 0.0, value)


@struct.dataclass
class LossOutput:
    """What a loss function returns: sums, so that microbatches and hosts simply add up.

    Attributes:
      parts: by name.
      metrics: name to (sum, weight), each reported as its weighted mean over the batch.
      sums: a tree of arrays that add up, for ``joint`` and for ``make_train_step``'s ``report``.
      joint: more parts of the loss, as a function of the whole batch's ``sums``: what is no sum
        over rows (the balance of experts); the same function object in every call. None for none.
    """

    parts: dict[str, Part]
    metrics: dict[str, tuple[jax.Array, jax.Array]] = struct.field(default_factory=dict)
    sums: Any = None
    joint: Callable[[Any], dict[str, jax.Array]] | None = struct.field(
        pytree_node=False, default=None
    )

    def values(self) -> dict[str, jax.Array]:
        """The parts of the loss of the batch that the sums are of."""
        joint = {} if self.joint is None else self.joint(self.sums)
        return {name: part.value() for name, part in self.parts.items()} | joint

    @property
    def single(self) -> Part | None:
        """The part that is the loss, if there is but one: its gradient may be divided after it is
        summed."""
        parts = list(self.parts.values())
        alone = len(parts) == 1 and self.joint is None and parts[0].coefficient == 1.0
        return parts[0] if alone else None


#: (params by learner, microbatch, key) -> LossOutput
LossFn = Callable[[dict[str, Any], Batch, jax.Array], LossOutput]


class DivergedError(StepError, FloatingPointError):
    """Too many steps in a row had a non-finite loss or gradient."""


def make_train_step(
    loss_fn: LossFn,
    learnings: Mapping[str, Learning],
    schema: Schema,
    *,
    accumulation: int = 1,
    compute_dtype=jnp.bfloat16,
    seed: int = 0,
    shardings: TrainState | None = None,
    report: Callable[[dict[str, Any], Any], Metrics] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A pure function (state, batch) -> (state, metrics), for the caller to ``jit`` and donate to.

    Args:
      loss_fn: (parameters in ``compute_dtype`` by learner, microbatch, key) -> LossOutput. The
        gradient of the whole loss goes to every learner whose parameters it touches; a part that
        must not train one stops its gradient there.
      learnings: how each learner of the state learns.
      schema: of the batch.
      accumulation: microbatches per batch, summed in float32: the result is the large batch's. A
        loss of several parts takes two sweeps: the first is for their weights (the compiler drops
        all else) and for what ``joint`` needs.
      compute_dtype: dtype that the float32 parameters are cast to, once per step.
      seed: the key of microbatch i is ``rng.fold(seed, step, "loss", i)``.
      shardings: of the state's leaves; fixes the layout of the gradients on a mesh.
      report: (float32 parameters by learner, LossOutput.sums of the batch) -> more metrics.

    Returns:
      The step. If the loss or a gradient's norm is not finite (or the batch has no weight at all),
      learners stay as they are and only the counters move. Metrics are float32 scalars (counters
      int32): loss, skipped, skipped_total; grad_norm (before clipping), param_norm (before the
      update) and lr of the learner, or of each as ``grad_norm/NAME``; loss_weight, or of each part
      ``loss/NAME`` and ``loss_weight/NAME``; and those of LossOutput.
    """
    if accumulation < 1:
        raise ConfigError(f"gradient accumulation must be at least 1, not {accumulation}")

    def constrain(grads):
        if shardings is None:
            return grads
        layout = {
            name: spec_lib.trained(how.specs, shardings.learners[name].params)
            for name, how in learnings.items()
        }
        return jax.lax.with_sharding_constraint(grads, layout)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        params = {
            name: spec_lib.cast(state.learners[name].params, compute_dtype, how.specs)
            for name, how in learnings.items()
        }
        out_of = _views(loss_fn, learnings, params)
        trained = {n: spec_lib.trained(how.specs, params[n]) for n, how in learnings.items()}
        microbatch = microbatches(schema, batch, accumulation) if accumulation > 1 else None

        def rows_and_key(i):
            rows = batch if microbatch is None else microbatch(i)
            return rows, rng.fold(seed, state.step, "loss", i)

        whole = _whole(out_of, trained, rows_and_key, accumulation)

        def micro(i):
            rows, key = rows_and_key(i)
            grads, out = _gradient(out_of, trained, rows, key, whole)
            return constrain(grads), out

        grads, out = _sum(micro, accumulation, lambda zeros: (constrain(zeros[0]), zeros[1]))
        new_state, own = _update(state, grads, out, learnings)
        kept = {name: learnings[name].view(held.params) for name, held in state.learners.items()}
        more = {} if report is None else report(kept, out.sums)
        return new_state, _metrics(out) | more | own

    return train_step


def check_skipped(skipped: int, budget: int, step: int) -> None:
    """Raises DivergedError if more than ``budget`` steps in a row were skipped, up to ``step``."""
    if skipped > budget:
        raise DivergedError(
            f"the loss or the gradient was not finite in the last {skipped} steps up to step "
            f"{step} (allowed in a row: {budget}). The parameters are those before them: lower the "
            "learning rate, or look at the batches of these steps"
        )


def _views(loss_fn: LossFn, learnings: Mapping[str, Learning], params):
    """(trained parameters by learner, rows, key) -> LossOutput in float32."""

    def out_of(trained, rows, key) -> LossOutput:
        models = {
            name: how.view(spec_lib.completed(how.specs, trained[name], params[name]))
            for name, how in learnings.items()
        }
        return optax.tree.cast(loss_fn(models, rows, key), jnp.float32)

    return out_of


def _whole(out_of, trained, rows_and_key, accumulation: int):
    """How the loss changes with each sum of the whole batch; None where that is not needed.

    With it, the gradient of the loss is the sum over microbatches of the gradient of their own sums
    times these numbers, whatever function of the sums the loss is.
    """
    if accumulation == 1:
        return None

    def sums(i):
        return jax.lax.stop_gradient(out_of(trained, *rows_and_key(i)))

    if jax.eval_shape(sums, 0).single is not None:
        return None
    out = _sum(sums, accumulation)
    return jax.grad(lambda out: sum(out.values().values()), allow_int=True)(out)


def _gradient(out_of, trained, rows: Batch, key, whole: LossOutput | None):
    """(float32 gradient, LossOutput) of one microbatch; of a single part the sum's gradient."""

    def scalar(trained):
        out = out_of(trained, rows, key)
        if out.single is not None:
            return out.single.total, out
        if whole is None:
            return sum(out.values().values()), out
        slopes = jax.tree.leaves((whole.parts, whole.sums))
        terms = zip(slopes, jax.tree.leaves((out.parts, out.sums)), strict=True)
        return sum(jnp.sum(a * b) for a, b in terms if jnp.issubdtype(b.dtype, jnp.inexact)), out

    grads, out = jax.grad(scalar, has_aux=True)(trained)
    return optax.tree.cast(grads, jnp.float32), out


def _sum(micro, accumulation: int, laid_out=lambda zeros: zeros):
    """The sum of ``micro(i)`` over the microbatches; ``laid_out`` fixes where it is kept."""
    if accumulation == 1:
        return micro(0)

    def body(sums, i):
        return jax.tree.map(jnp.add, sums, micro(i)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(micro, 0))
    sums, _ = jax.lax.scan(body, laid_out(zeros), jnp.arange(accumulation))
    return sums


def _update(state: TrainState, grads, out: LossOutput, learnings: Mapping[str, Learning]):
    """(the state after the step, the metrics of the names in ``RESERVED``)."""
    single = out.single
    divisor = jnp.float32(1.0) if single is None else single.weight
    values = {} if single is not None else out.values()
    loss = sum(values.values()) if single is None else single.total / single.weight
    norms = {
        name: how.optimizer.norm(grads[name]) / jnp.abs(divisor) for name, how in learnings.items()
    }
    finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
    if single is None:
        finite &= jnp.any(jnp.stack([part.weight != 0 for part in out.parts.values()]))
    learners, rates = {}, {}
    for name, how in learnings.items():
        scale = 1.0 / divisor
        if how.optimizer.clip_norm is not None:
            scale *= jnp.minimum(1.0, how.optimizer.clip_norm / norms[name])
        rates[name] = how.optimizer.rate(state.step)
        learners[name] = _learned(
            state.learners[name],
            optax.tree.scale(scale, grads[name]),
            rates[name],
            how,
            state.step - state.skipped_total,
        )
    new = _guard(state, replace(state, learners=learners), finite)
    metrics = {"loss": loss, "skipped": new.skipped, "skipped_total": new.skipped_total}
    if single is not None:
        metrics["loss_weight"] = single.weight
    else:
        metrics |= {f"loss/{name}": value for name, value in values.items()}
        metrics |= {f"loss_weight/{name}": part.weight for name, part in out.parts.items()}
    for name in learnings:
        suffix = "" if len(learnings) == 1 else f"/{name}"
        metrics[f"grad_norm{suffix}"] = norms[name]
        metrics[f"param_norm{suffix}"] = optax.tree.norm(state.learners[name].params)
        metrics[f"lr{suffix}"] = rates[name]
    return new, metrics


def _learned(held: Learner, grads, rate, how: Learning, updates) -> Learner:
    """The learner after one more update than ``updates``."""
    params = spec_lib.trained(how.specs, held.params)
    direction, opt_state = how.optimizer.direction.update(grads, held.opt_state, params)
    params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
    average = held.average
    if how.average is not None:
        decay = average_decay(how.average, updates)
        average = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, average, params)
    params = spec_lib.completed(how.specs, params, held.params)
    return replace(held, params=params, opt_state=opt_state, average=average)


def average_decay(decay: float, updates):
    """The decay of the update with this 0-based number: ``min(decay, (1 + n) / (10 + n))``.

    A short run's average would else be its initial parameters for the most part.
    """
    n = jnp.asarray(updates, jnp.float32)
    return jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n))


def _guard(old: TrainState, new: TrainState, finite) -> TrainState:
    """``new`` if the step was finite, else ``old``; the counters move in either case."""
    # A select fuses into the update's own pass over memory; a cond would copy donated buffers.
    chosen = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    bad = 1 - finite.astype(jnp.int32)
    return chosen.replace(
        step=old.step + 1,
        skipped=(old.skipped + 1) * bad,
        skipped_total=old.skipped_total + bad,
    )


RESERVED = ("loss", "loss_weight", "grad_norm", "param_norm", "lr", "skipped", "skipped_total")


def _metrics(out: LossOutput) -> Metrics:
    if taken := sorted(name for name in out.metrics if name.split("/")[0] in RESERVED):
        raise ValueError(f"the step reports metrics of these names itself: {', '.join(taken)}")
    return {name: total / weight for name, (total, weight) in out.metrics.items()}
