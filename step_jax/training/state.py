"""The state of a training loop: everything that a step reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from step_jax.core import spec as spec_lib
from step_jax.core.sharding import Sharding
from step_jax.training.learner import Learner, Learning

#: The kind of memory of a host that its devices read.
HOST = "pinned_host"


@struct.dataclass
class TrainState:
    """All of it is checkpointed, and all of it is donated to the step.

    Attributes:
      step: int32 scalar, batches consumed (skipped ones included): the schedules' clock.
      learners: by name; see :class:`Learner`.
      skipped: int32 scalar, non-finite steps in a row, 0 after every good step.
      skipped_total: int32 scalar, non-finite steps of the whole run.
    """

    step: Any  # jax.Array, or its shape or sharding, as of all leaves
    learners: dict[str, Learner]
    skipped: Any
    skipped_total: Any


def init_state(params: Mapping[str, Any], learnings: Mapping[str, Learning]) -> TrainState:
    """The state before the first step; call it under ``jit`` with ``out_shardings`` on a mesh.

    Args:
      params: what each learner keeps (``Learning.stored``).
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        learners={name: how.initial(params[name]) for name, how in learnings.items()},
        skipped=jnp.zeros((), jnp.int32),
        skipped_total=jnp.zeros((), jnp.int32),
    )


def abstract_state(
    learnings: Mapping[str, Learning], sharding: Sharding | None = None
) -> TrainState:
    """The state's shapes and dtypes (and shardings on a mesh) without a single array.

    What a checkpoint is restored into, and what a step can be compiled against.
    """
    abstract = {name: spec_lib.abstract(how.specs) for name, how in learnings.items()}
    state = jax.eval_shape(lambda params: init_state(params, learnings), abstract)
    if sharding is None:
        return state
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        state_shardings(state, learnings, sharding),
    )


def state_shardings(
    state: TrainState, learnings: Mapping[str, Learning], sharding: Sharding
) -> TrainState:
    """A NamedSharding for every leaf of ``state`` (arrays or abstract).

    An array of the optimizer that belongs to a parameter (its path ends with the parameter's, and
    the shapes agree) is laid out like it, with ``offload`` in the host's memory; scalars are
    replicated.

    Raises:
      ValueError: an optimizer array that is neither.
    """
    replicated = sharding.replicated()

    def learner(name: str, how: Learning) -> Learner:
        params, held = sharding.params(how.specs), state.learners[name]
        trained = spec_lib.trained(how.specs, params)
        return Learner(
            params=params,
            opt_state=_like_params(held.opt_state, how, sharding),
            average=None if held.average is None else trained,
        )

    return TrainState(
        step=replicated,
        learners={name: learner(name, how) for name, how in learnings.items()},
        skipped=replicated,
        skipped_total=replicated,
    )


def on_device(state: TrainState, layout: TrainState) -> TrainState:
    """A state, under ``jit``, with all of it in the devices' memory; ``layout`` is its own."""

    def leaf(a, s):
        return jax.device_put(a, s.with_memory_kind("device")) if s.memory_kind == HOST else a

    return jax.tree.map(leaf, state, layout)


def _like_params(opt_state, how: Learning, sharding: Sharding):
    by_path = dict(jax.tree.leaves_with_path(how.specs, is_leaf=spec_lib.is_spec))

    def leaf(path, x):
        if x.ndim == 0:
            return sharding.replicated()
        for start in range(len(path)):
            spec = by_path.get(path[start:])
            if spec is not None and spec.shape == x.shape:
                layout = sharding.named(spec.axes, spec.shape)
                return layout.with_memory_kind(HOST) if how.optimizer.offload else layout
        raise ValueError(
            f"the optimizer's array {spec_lib.path_name(path)} of shape {x.shape} belongs to no "
            "parameter, so its sharding is unknown"
        )

    return jax.tree.map_with_path(leaf, opt_state)
