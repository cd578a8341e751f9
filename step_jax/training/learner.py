"""A learner: parameters, what they learn by, and the average that is kept of them.

A state holds named learners (``model``; ``policy`` and ``critic``; ``generator`` and
``discriminator``). What is frozen has no gradient, no optimizer memory and no average; adapters of
low rank (LoRA) are parameters beside a frozen model. Both are functions over the parameter table.

Shape suffixes: I rows and O columns of a matrix, R rank, S stacked axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.core.spec import ZEROS, Normal, ParamSpec
from step_jax.ops.einsum import product
from step_jax.training.optimizers.build import Optimizer, make_optimizer
from step_jax.training.optimizers.config import OptimizerConfig


@struct.dataclass
class Learner:
    """The part of a state that one learner owns; all of it is checkpointed.

    Attributes:
      params: float32 master parameters; a model's, or :class:`Adapted`.
      opt_state: of ``Optimizer.direction``, of the trained parameters alone.
      average: exponential moving average of the trained parameters (None in the place of frozen
        ones), or None.
    """

    params: Any
    opt_state: Any
    average: Any


@dataclass(frozen=True)
class LoRA:
    """Adapters ``W + scale * A B`` of matrices whose own weights stay (arXiv 2106.09685).

    rank: columns of A and rows of B.
    alpha: the scale is ``alpha / rank``.
    targets: which matrices, as paths with ``*`` (``spec.matching``).
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*/attention/*", "*/mlp/*")

    def validate(self):
        if self.rank < 1 or self.alpha <= 0:
            raise ConfigError(f"lora needs a rank and an alpha above 0: {self}")


@struct.dataclass
class Adapted:
    """A frozen model and the two factors of each adapted matrix, by the matrix's path."""

    base: Any
    down_SIR: dict[str, Any]
    up_SRO: dict[str, Any]


def adapted_specs(specs, lora: LoRA) -> Adapted:
    """The table of a model whose matrices get adapters; everything else is frozen.

    Raises:
      ConfigError: a pattern that names nothing, or no matrix.
    """
    table = spec_lib.by_name(specs)
    chosen = spec_lib.matching(table, lora.targets)
    matrices = sorted(name for name in chosen if table[name].role == "matrix")
    if not matrices:
        raise ConfigError(f"lora.targets {list(lora.targets)} name no matrix")
    down, up = {}, {}
    for name in matrices:
        spec = table[name]
        stack, rows, columns = spec.matrix_shape
        axes = spec.axes[: spec.stacked]
        row_axis = spec.axes[spec.stacked] if spec.fan_in == 1 else None
        down[name] = ParamSpec(
            (*stack, rows, lora.rank), (*axes, row_axis, None), Normal(rows**-0.5)
        )
        up[name] = ParamSpec((*stack, lora.rank, columns), (*axes, None, None), ZEROS)
    frozen = spec_lib.map_specs(lambda s: replace(s, trainable=False), specs)
    return Adapted(frozen, down, up)


def view(model_specs, params, lora: LoRA | None):
    """The model's parameters in what is kept of it, adapters added; differentiable."""
    if lora is None:
        return params
    p: Adapted = params

    def leaf(path, spec, w):
        name = spec_lib.path_name(path)
        if name not in p.down_SIR:
            return w
        added = product("...IR,...RO->...IO", p.down_SIR[name], p.up_SRO[name])
        return w + (lora.alpha / lora.rank) * added.reshape(w.shape).astype(w.dtype)

    return jax.tree_util.tree_map_with_path(leaf, model_specs, p.base, is_leaf=spec_lib.is_spec)


@dataclass(frozen=True)
class Learning:
    """How one learner learns.

    Attributes:
      model_specs: the table of the model that losses see.
      specs: the table of the parameters that are kept: the model's, or with adapters.
      optimizer: of the trained ones.
      average: decay of their moving average (see ``step.average_decay``), None for none.
      lora: the adapters, None for none.
    """

    model_specs: Any
    specs: Any
    optimizer: Optimizer
    average: float | None = None
    lora: LoRA | None = None

    def __post_init__(self):
        if self.average is not None and not 0 <= self.average < 1:
            raise ConfigError(f"the EMA decay is {self.average}; use a number in [0, 1)")

    def stored(self, params, key) -> Any:
        """What is kept of a model's parameters: they themselves, or with fresh adapters."""
        if self.lora is None:
            return params
        factors = spec_lib.init(self.specs.replace(base=None), key)
        return factors.replace(base=params)

    def view(self, params) -> Any:
        """The model's parameters in what is kept; differentiable."""
        return view(self.model_specs, params, self.lora)

    def best(self, learner: Learner) -> Any:
        """The model's parameters to use: of the moving average, if there is one."""
        params = learner.params
        if learner.average is not None:
            params = spec_lib.completed(self.specs, learner.average, params)
        return self.view(params)

    def initial(self, params) -> Learner:
        """The learner before its first step; call it under ``jit``."""
        # No two leaves may share a buffer, or donating the state would donate it twice.
        trained = spec_lib.trained(self.specs, params)
        return Learner(
            params=params,
            opt_state=self.optimizer.direction.init(trained),
            average=None if self.average is None else jax.tree.map(jnp.copy, trained),
        )


def learn(
    model: Any,
    config: OptimizerConfig,
    *,
    total_steps: int,
    sharding: Sharding,
    tokens: float | None = None,
    average: float | None = None,
    freeze: Sequence[str] = (),
    lora: LoRA | None = None,
) -> Learning:
    """How a model learns by an optimizer's configuration; see ``make_optimizer`` and ``tables``."""
    model_specs, specs = tables(model.specs(), freeze, lora)
    optimizer = make_optimizer(
        config, specs, total_steps=total_steps, tokens=tokens, sharding=sharding
    )
    return Learning(model_specs, specs, optimizer, average, lora)


def tables(model_specs, freeze: Sequence[str] = (), lora: LoRA | None = None) -> tuple[Any, Any]:
    """(the model's table with what is frozen marked, the table of what is kept).

    Raises:
      ConfigError: a pattern that names nothing, or nothing is left to train.
    """
    if lora is not None:
        return model_specs, adapted_specs(model_specs, lora)
    specs = spec_lib.freeze(model_specs, freeze)
    if not jax.tree.leaves(spec_lib.trained(specs), is_leaf=spec_lib.is_spec):
        raise ConfigError(f"freeze {list(freeze)} leaves nothing to train")
    return specs, specs
