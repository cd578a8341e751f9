"""One training step, shared by every loop: gradient, clipping, update, EMA, guard and metrics.

Shape suffixes: A microbatches, M rows of one microbatch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from step_jax.core import rng
from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError, StepError
from step_jax.training.optimizers.build import Optimizer
from step_jax.training.state import TrainState

Batch = Any
Metrics = dict[str, jax.Array]


@struct.dataclass
class LossOutput:
    """What a loss function returns: sums, so that microbatches and hosts simply add up.

    Attributes:
      loss_sum: scalar; its gradient, divided by the whole batch's ``weight``, is the step's.
      weight: scalar, e.g. the number of target tokens.
      metrics: name to (sum, weight), each reported as its weighted mean over the batch.
      sums: a tree of arrays that add up, for ``make_train_step``'s ``report``.
    """

    loss_sum: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]] = struct.field(default_factory=dict)
    sums: Any = None


LossFn = Callable[[Any, Batch, jax.Array], LossOutput]


class DivergedError(StepError, FloatingPointError):
    """Too many steps in a row had a non-finite loss or gradient."""


def make_train_step(
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    accumulation: int = 1,
    clip_norm: float | None = None,
    ema_decay: float | None = None,
    compute_dtype=jnp.bfloat16,
    seed: int = 0,
    param_shardings=None,
    report: Callable[[Any, Any], Metrics] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A pure function (state, batch) -> (state, metrics), for the caller to ``jit`` and donate to.

    Args:
      loss_fn: (params in ``compute_dtype``, microbatch, key) -> LossOutput.
      optimizer: see ``make_optimizer``.
      accumulation: microbatches per batch, summed in float32: the result is the large batch's.
        Row r goes to microbatch r mod ``accumulation``, so every device keeps its own rows.
      clip_norm: the largest global norm of the gradient, None for no clipping.
      ema_decay: of the moving average in ``TrainState.ema``, None for none.
      compute_dtype: dtype that the float32 parameters are cast to, once per step.
      seed: the key of microbatch i is ``rng.fold(seed, step, "loss", i)``.
      param_shardings: tree of NamedSharding; fixes the layout of the gradients on a mesh.
      report: (float32 params, LossOutput.sums of the whole batch) -> more metrics.

    Returns:
      The step. ``batch`` is a tree of arrays with leading dimension A*M. If the loss or the
      gradient's norm is not finite (or the batch has no weight at all), parameters, optimizer and
      EMA stay as they are and only the counters move. Metrics are float32 scalars (counters int32):
      loss, loss_weight, grad_norm (before clipping), param_norm (before the update), lr, skipped,
      skipped_total, and those of LossOutput.
    """
    if accumulation < 1:
        raise ConfigError(f"gradient accumulation must be at least 1, not {accumulation}")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ConfigError(f"the EMA decay is {ema_decay}; use a number in [0, 1)")

    def constrain(tree):
        if param_shardings is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, param_shardings)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if (ema_decay is None) != (state.ema is None):
            raise ValueError("ema_decay and TrainState.ema must both be given or both be None")
        compute_params = spec_lib.cast(state.params, compute_dtype, optimizer.specs)

        def micro(i, rows):
            key = rng.fold(seed, state.step, "loss", i)
            grads, out = _gradient(loss_fn, compute_params, rows, key)
            return constrain(grads), out

        grads, out = _accumulate(micro, batch, accumulation, constrain)
        grad_norm = optimizer.norm(grads) / jnp.abs(out.weight)
        finite = jnp.isfinite(out.loss_sum / out.weight) & jnp.isfinite(grad_norm)
        scale = 1.0 / out.weight
        if clip_norm is not None:
            scale *= jnp.minimum(1.0, clip_norm / grad_norm)
        grads = optax.tree.scale(scale, grads)

        rate = optimizer.rate(state.step)
        new_state = _update(state, grads, rate, optimizer, ema_decay)
        new_state = _guard(state, new_state, finite)
        more = {} if report is None else report(state.params, out.sums)
        return new_state, _means(out) | more | _own_metrics(state, new_state, out, grad_norm, rate)

    return train_step


def check_skipped(skipped: int, budget: int, step: int) -> None:
    """Raises DivergedError if more than ``budget`` steps in a row were skipped, up to ``step``."""
    if skipped > budget:
        raise DivergedError(
            f"the loss or the gradient was not finite in the last {skipped} steps up to step "
            f"{step} (allowed in a row: {budget}). The parameters are those before them: lower the "
            "learning rate, or look at the batches of these steps"
        )


def _gradient(loss_fn: LossFn, params, rows: Batch, key):
    """(float32 gradient of loss_sum, LossOutput of float32 scalars) of one microbatch."""

    def scalar(params):
        out = loss_fn(params, rows, key)
        return out.loss_sum, out

    grads, out = jax.grad(scalar, has_aux=True)(params)
    return optax.tree.cast(grads, jnp.float32), optax.tree.cast(out, jnp.float32)


def _accumulate(micro, batch: Batch, accumulation: int, constrain):
    """Sums of ``micro(i, rows)`` over the microbatches of ``batch``."""
    if accumulation == 1:
        return micro(0, batch)

    def split(x):
        if x.shape[0] % accumulation:
            raise ConfigError(
                f"a batch of {x.shape[0]} rows cannot be split into {accumulation} microbatches; "
                "make the batch a multiple of the accumulation"
            )
        # Rows lie in contiguous blocks on the devices: (A, M) would tear every block apart.
        return x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:])

    batch_MA = jax.tree.map(split, batch)

    def rows(i):
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, False), batch_MA)

    def body(sums, i):
        return jax.tree.map(jnp.add, sums, micro(i, rows(i))), None

    shapes = jax.eval_shape(lambda: micro(0, rows(0)))
    grads, out = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums, _ = jax.lax.scan(body, (constrain(grads), out), jnp.arange(accumulation))
    return sums


def _update(state: TrainState, grads, rate, optimizer: Optimizer, ema_decay) -> TrainState:
    direction, opt_state = optimizer.direction.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
    ema = state.ema
    if ema_decay is not None:
        ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params)
    return state.replace(params=params, opt_state=opt_state, ema=ema)


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


def _own_metrics(old: TrainState, new: TrainState, out: LossOutput, grad_norm, rate) -> Metrics:
    """The metrics of the names in ``RESERVED``."""
    return {
        "loss": out.loss_sum / out.weight,
        "loss_weight": out.weight,
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(old.params),
        "lr": rate,
        "skipped": new.skipped,
        "skipped_total": new.skipped_total,
    }


def _means(out: LossOutput) -> Metrics:
    if taken := sorted(set(out.metrics) & set(RESERVED)):
        raise ValueError(f"the step reports metrics of these names itself: {', '.join(taken)}")
    return {name: total / weight for name, (total, weight) in out.metrics.items()}
