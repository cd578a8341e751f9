"""What a loop compiles, as one value: for the run, its plan, evaluation and benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from step_jax.core import hardware
from step_jax.core import spec as spec_lib
from step_jax.core.sharding import Sharding
from step_jax.data.batches import abstract_batch
from step_jax.data.schema import Schema
from step_jax.training.learner import Learning
from step_jax.training.state import TrainState, abstract_state, init_state, on_device
from step_jax.training.step import LossFn, make_train_step


@dataclass(frozen=True)
class Work:
    """What one step does, for its rates.

    Attributes:
      count: how many of ``unit`` (tokens, images, ...).
      flops: operations that the model needs for them; 0 if they are not counted.
      dtype: of the products.
      done: of ``unit`` up to the end of the step; None if all steps do as many.
    """

    count: int
    unit: str = "tokens"
    flops: float = 0.0
    dtype: str = "float32"
    done: int | None = None

    def peak_flops(self, sharding: Sharding) -> float | None:
        """Operations per second of all devices at the compute precision; None if unknown."""
        precision = hardware.PRECISION[self.dtype]
        peak = hardware.peak_flops(sharding.mesh.devices.flat[0], precision)
        return None if peak is None else peak * sharding.mesh.size


@dataclass(frozen=True)
class Program:
    """A train step with all that it needs to be compiled; neither data nor devices are touched.

    Attributes:
      models: the model of each learner.
      learnings: how each learner of the state learns.
      schema: of the batch.
      sharding: mesh and rules.
      total_steps: of the whole run.
      accumulation: microbatches of a step.
      work: of one step.
      notes: what of the loop is not in the program, for its plan.
      beside: abstract arrays that lie on the devices all the while and are none of the step's
        arguments: a reference model. None without.
      state_like, batch_like: shapes, dtypes and shardings of the step's arguments.
      step: (state, batch) -> (state, metrics), jitted; the state is donated.
    """

    models: Mapping[str, Any]
    learnings: Mapping[str, Learning]
    schema: Schema
    sharding: Sharding
    total_steps: int
    accumulation: int
    work: Work
    notes: tuple[str, ...]
    state_like: TrainState = field(repr=False)
    batch_like: Mapping[str, jax.ShapeDtypeStruct] = field(repr=False)
    step: Any = field(repr=False)
    beside: Any = field(default=None, repr=False)

    @classmethod
    def build(
        cls,
        loss: LossFn,
        models: Mapping[str, Any],
        learnings: Mapping[str, Learning],
        schema: Schema,
        sharding: Sharding,
        *,
        total_steps: int,
        work: Work,
        seed: int,
        accumulation: int = 1,
        report: Callable[[dict[str, Any], Any], dict[str, jax.Array]] | None = None,
        notes: tuple[str, ...] = (),
        beside: Any = None,
    ) -> Program:
        """See ``make_train_step`` for the arguments.

        Raises:
          ConfigError: sizes that the mesh or the accumulation does not divide.
        """
        state_like = abstract_state(learnings, sharding)
        layout = shardings_of(state_like)
        step = make_train_step(
            loss,
            learnings,
            schema,
            accumulation=accumulation,
            compute_dtype=work.dtype,
            seed=seed,
            shardings=None if sharding.mesh.size == 1 else layout,
            report=report,
        )

        @functools.wraps(step)
        def on_devices(state: TrainState, batch: Any) -> Any:
            return step(on_device(state, layout), batch)

        return cls(
            models=models,
            learnings=learnings,
            schema=schema,
            sharding=sharding,
            total_steps=total_steps,
            accumulation=accumulation,
            work=work,
            notes=notes,
            state_like=state_like,
            batch_like=abstract_batch(sharding, schema),
            step=jax.jit(
                on_devices, donate_argnums=0, out_shardings=(layout, sharding.replicated())
            ),
            beside=beside,
        )

    def compile(self, compiler_options: dict[str, Any] | None = None) -> jax.stages.Compiled:
        """The step as a program of the devices of the mesh.

        Args:
          compiler_options: of XLA, for instance what it shall dump.
        """
        return self.step.lower(self.state_like, self.batch_like).compile(compiler_options)

    def initial_state(self, key: jax.Array, params: Mapping[str, Any] | None = None) -> TrainState:
        """The state before the first step, made where it lies, never whole in one place.

        Args:
          key: of fresh parameters.
          params: by learner, parameters that do not start fresh (None in the place of fresh ones).
        """

        def initialise(given) -> TrainState:
            kept = {}
            for i, (name, how) in enumerate(self.learnings.items()):
                own = jax.random.fold_in(key, i) if i else key
                fresh = self.models[name].initialise(own)  # not computed where it is not used
                if name in given:
                    fresh = spec_lib.map_specs(
                        lambda _, g, f: f if g is None else g, how.model_specs, given[name], fresh
                    )
                kept[name] = how.stored(fresh, own)
            return init_state(kept, self.learnings)

        # drawing random numbers is 12 CPU-seconds of LLVM at its default level for one second's use
        on_cpu = self.sharding.mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        layout = shardings_of(self.state_like)
        return jax.jit(initialise, out_shardings=layout, compiler_options=options)(
            dict(params or {})
        )


@dataclass(frozen=True)
class Phase:
    """A program that a loop runs between its steps, for its plan.

    Attributes:
      name: what it does.
      lower: traces it for the devices of ``sharding``.
      function: its name, by which the compiler's notes of it are found.
      calls: for each step of the loop; of a loop over tokens its turns.
      reads: bytes of main memory of a device that a call cannot but read.
      held: bytes of a device that are taken by what is no argument of it.
      beside: it runs on devices of its own while steps are taken.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    function: str
    sharding: Sharding
    calls: float
    reads: float
    held: float = 0.0
    beside: bool = False


def shardings_of(tree: Any) -> Any:
    """The sharding of every leaf (arrays, or abstract ones that have shardings)."""
    return jax.tree.map(lambda a: a.sharding, tree)
