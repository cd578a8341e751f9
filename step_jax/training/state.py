"""The state of a training loop: everything that a step reads and writes."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from step_jax.core import spec as spec_lib
from step_jax.core.sharding import Sharding
from step_jax.training.optimizers.build import Optimizer


@struct.dataclass
class TrainState:
    """All of it is checkpointed, and all of it is donated to the step.

    Attributes:
      step: int32 scalar, batches consumed (skipped ones included): the schedule's clock.
      params: float32 master parameters.
      opt_state: of ``Optimizer.direction``; its own counters count applied updates only.
      ema: exponential moving average of ``params``, or None.
      skipped: int32 scalar, non-finite steps in a row, 0 after every good step.
      skipped_total: int32 scalar, non-finite steps of the whole run.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    skipped: jax.Array
    skipped_total: jax.Array

    @property
    def best_params(self):
        """The moving average if the run keeps one, else the parameters."""
        return self.params if self.ema is None else self.ema


def init_state(params, optimizer: Optimizer, *, ema: bool = False) -> TrainState:
    """The state before the first step; call it under ``jit`` with ``out_shardings`` on a mesh."""
    # No two leaves may share a buffer, or donating the state would donate it twice.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.direction.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        skipped=jnp.zeros((), jnp.int32),
        skipped_total=jnp.zeros((), jnp.int32),
    )


def abstract_state(
    specs, optimizer: Optimizer, sharding: Sharding | None = None, *, ema: bool = False
) -> TrainState:
    """The state's shapes and dtypes (and shardings on a mesh) without a single array.

    What a checkpoint is restored into, and what a step can be compiled against.
    """
    state = jax.eval_shape(
        partial(init_state, optimizer=optimizer, ema=ema), spec_lib.abstract(specs)
    )
    if sharding is None:
        return state
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        state_shardings(state, specs, sharding),
    )


def state_shardings(state: TrainState, specs, sharding: Sharding) -> TrainState:
    """A NamedSharding for every leaf of ``state`` (arrays or abstract).

    An array of the optimizer that belongs to a parameter (its path ends with the parameter's, and
    the shapes agree) is laid out like it; scalars are replicated.

    Raises:
      ValueError: an optimizer array that is neither.
    """
    params = sharding.params(specs)
    replicated = sharding.replicated()
    return TrainState(
        step=replicated,
        params=params,
        opt_state=_like_params(state.opt_state, specs, sharding),
        ema=None if state.ema is None else params,
        skipped=replicated,
        skipped_total=replicated,
    )


def _like_params(opt_state, specs, sharding: Sharding):
    by_path = dict(jax.tree.leaves_with_path(specs, is_leaf=spec_lib.is_spec))

    def leaf(path, x):
        if x.ndim == 0:
            return sharding.replicated()
        for start in range(len(path)):
            spec = by_path.get(path[start:])
            if spec is not None and spec.shape == x.shape:
                return sharding.named(spec.axes, spec.shape)
        raise ValueError(
            f"the optimizer's array {spec_lib.path_name(path)} of shape {x.shape} belongs to no "
            "parameter, so its sharding is unknown"
        )

    return jax.tree.map_with_path(leaf, opt_state)
