"""The two programs of every training loop: the one that makes its state and the one that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from step_jax.core.sharding import Sharding
from step_jax.training.optimizers.build import Optimizer
from step_jax.training.state import TrainState, init_state
from step_jax.training.step import LossFn, make_train_step


def layout(tree: Any) -> Any:
    """The sharding of every leaf (arrays, or abstract ones that have shardings)."""
    return jax.tree.map(lambda a: a.sharding, tree)


def compile_initial_state(
    make_params: Callable[..., Any], optimizer: Optimizer, state_like: TrainState
) -> Callable[..., TrainState]:
    """A function of ``make_params``'s arguments that makes the state before the first step.

    Args:
      make_params: fresh parameters from nothing, or the argument itself for trained ones (what is
        an argument is not compiled in).
      state_like: see ``abstract_state``; the state is made where it lies, never whole in one place.
    """

    def initialise(*args) -> TrainState:
        return init_state(make_params(*args), optimizer, ema=state_like.ema is not None)

    # drawing random numbers is 12 CPU-seconds of LLVM at its default level for one second's use
    on_cpu = jax.tree.leaves(layout(state_like))[0].mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(initialise, out_shardings=layout(state_like), compiler_options=options)


def compile_train_step(
    loss_fn: LossFn,
    optimizer: Optimizer,
    sharding: Sharding,
    state_like: TrainState,
    batch_like: Any,
    compiler_options: dict[str, Any] | None = None,
    **options: Any,
) -> jax.stages.Compiled:
    """The compiled (state, batch) -> (state, metrics); the state is donated.

    Args:
      state_like, batch_like: shapes, dtypes and shardings (``abstract_state``, ``abstract_batch``).
      compiler_options: of XLA, for instance what it shall dump.
      options: of ``make_train_step``.
    """
    shardings = layout(state_like)
    step = make_train_step(
        loss_fn,
        optimizer,
        param_shardings=None if sharding.mesh.size == 1 else shardings.params,
        **options,
    )
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated()))
    return jitted.lower(state_like, batch_like).compile(compiler_options)
