"""From an optimizer's configuration and the parameter table to the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from step_jax.core import spec as spec_lib
from step_jax.core.sharding import Sharding
from step_jax.training import scaling_laws, schedules
from step_jax.training.optimizers import muon
from step_jax.training.optimizers.config import AdamW, Muon, OptimizerConfig

DECAYED_ROLES = ("matrix", "embedding", "head", "router")


@dataclass(frozen=True)
class Optimizer:
    """What a train step needs of an optimizer.

    Attributes:
      direction: optax transformation from float32 gradients to the direction d of the update
        p <- p - rate * d, weight decay included; it knows nothing of the rate.
      rate: learning rate of the update with this 0-based index, float32 scalar.
      peak: the highest rate.
      specs: the table of the parameters that it trains (None in the place of frozen ones).
      clip_norm: the largest global norm of the gradient, None for no clipping.
      offload: what it remembers lies in the host's memory between the steps.
      notes: choices made for the user (dtype by backend, extrapolated law), for the run's header.
    """

    direction: optax.GradientTransformation
    rate: Callable[[jax.Array | int], jax.Array]
    peak: float
    specs: Any
    clip_norm: float | None = None
    offload: bool = False
    notes: tuple[str, ...] = ()

    def norm(self, gradients) -> jax.Array:
        """Global norm of a gradient: of what is learned by it (no ``balance`` leaf)."""
        kept = spec_lib.map_specs(
            lambda s, g: g if s.role != "balance" else (), self.specs, gradients
        )
        return optax.tree.norm(kept)


def make_optimizer(
    config: OptimizerConfig,
    specs,
    *,
    total_steps: int,
    tokens: float | None = None,
    sharding: Sharding | None = None,
) -> Optimizer:
    """The optimizer of ``config`` for parameters ``specs``.

    Args:
      config: AdamW or Muon.
      specs: tree of ParamSpec; roles choose the group and the decay of every parameter that is
        trainable, and the others are no business of the optimizer.
      total_steps: updates of the whole run (where the schedule ends).
      tokens: training tokens of the whole run; needed for ``learning_rate: step_law``.
      sharding: mesh and rules of the parameters; None on one device.

    Raises:
      ConfigError: values out of range, a schedule that does not fit, step_law without tokens.
    """
    config.validate()
    peak, notes = _peak_rate(config, specs, tokens)
    specs = spec_lib.trained(specs)
    groups = {"balance": _balance(specs, peak)}
    if isinstance(config, Muon):
        dtype, note = _polar_dtype(config.polar_dtype, sharding)
        notes += (note,)
        groups["muon"] = muon.scale_by_muon(specs, config.momentum, dtype, sharding)
        groups["adamw"] = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    else:
        groups["adamw"] = optax.scale_by_adam(
            config.beta1, config.beta2, config.eps, mu_dtype=config.mu_dtype
        )
    labels = group_labels(specs, matrices="muon" if isinstance(config, Muon) else "adamw")
    if set(jax.tree.leaves(labels)) == {"adamw"}:
        direction = groups["adamw"]
    else:
        direction = optax.partition(groups, labels)
    if config.weight_decay:
        decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask(specs))
        direction = optax.chain(direction, decay)
    if any(spec.rate != 1.0 for spec in jax.tree.leaves(specs, is_leaf=spec_lib.is_spec)):
        direction = optax.chain(direction, _own_rates(specs))
    rate = schedules.build(config.schedule, peak, total_steps)
    return Optimizer(direction, rate, peak, specs, config.clip_norm, config.offload, notes)


def decay_mask(specs):
    """True where weight decay applies: every role but ``vector`` and ``balance``."""
    return spec_lib.map_specs(lambda s: s.role in DECAYED_ROLES, specs)


def group_labels(specs, matrices: str = "muon"):
    """``matrices`` for matrices, ``balance`` for selection biases, else ``adamw``."""

    def label(s) -> str:
        return {"matrix": matrices, "balance": "balance"}.get(s.role, "adamw")

    return spec_lib.map_specs(label, specs)


def _own_rates(specs) -> optax.GradientTransformation:
    """Multiplies the direction of every parameter by its own rate."""

    def update(directions, params=None):
        del params
        return spec_lib.map_specs(
            lambda spec, d: d if spec.rate == 1.0 else d * spec.rate, specs, directions
        )

    return optax.stateless(update)


def _balance(specs, peak: float) -> optax.GradientTransformation:
    """The sign of an expert's load above the mean (loss-free balancing, arXiv 2408.15664).

    The bias moves by ``balance_rate`` while the rate is at its peak and less as the schedule
    falls: it comes to rest in annealing, as Step-3.5-Flash's does (arXiv 2602.10604).
    """

    def update(loads, state, params=None):
        del params

        def leaf(load, spec):
            if isinstance(load, optax.MaskedNode):
                return load
            return jnp.sign(load) * (spec.balance_rate / peak)

        is_leaf = lambda x: isinstance(x, optax.MaskedNode) or spec_lib.is_spec(x)  # noqa: E731
        return jax.tree.map(leaf, loads, specs, is_leaf=is_leaf), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _peak_rate(config: OptimizerConfig, specs, tokens) -> tuple[float, tuple[str, ...]]:
    if config.learning_rate != "step_law":
        return float(config.learning_rate), ()
    if tokens is None:
        raise ValueError("learning_rate: step_law needs the number of training tokens")
    # The law's N counts the matrices of the layers: no embedding, no head, no norms.
    parameters = spec_lib.count(specs, roles=("matrix",))
    peak = scaling_laws.step_law_learning_rate(parameters, tokens)
    notes = [f"step_law: peak rate {peak:.3g} for N={parameters:.4g}, D={tokens:.4g} tokens"]
    if extrapolation := scaling_laws.step_law_extrapolation(parameters, tokens):
        notes.append(extrapolation)
    if not isinstance(config, AdamW):
        notes.append(f"Step Law was fitted with AdamW, not {config.kind}")
    return peak, tuple(notes)


def _polar_dtype(choice: str, sharding: Sharding | None) -> tuple[jnp.dtype, str]:
    if choice == "auto":
        # A mesh may be of devices that this process only compiles for.
        device = jax.devices()[0] if sharding is None else sharding.mesh.devices.flat[0]
        name = "float16" if device.platform in ("gpu", "cuda", "rocm") else "float32"
        return jnp.dtype(name), f"muon polar_dtype: {name} (auto on {device.platform})"
    return jnp.dtype(choice), f"muon polar_dtype: {choice}"
