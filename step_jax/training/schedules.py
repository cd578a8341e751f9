"""Learning-rate schedules: configuration (importable without JAX) and the functions it names.

Every schedule maps the 0-based index of an update to its rate, in these phases:

* warm-up: update ``s`` has ``peak * (s + 1) / warmup_steps``, so no update is wasted on a rate of 0
  and update ``warmup_steps - 1`` has the peak;
* decay: ends exactly at ``minimum`` on the last update, ``total_steps - 1``, and stays there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from step_jax.core.errors import ConfigError


@dataclass(frozen=True)
class Constant:
    """The peak rate throughout, after an optional linear warm-up of ``warmup_steps`` updates."""

    kind: ClassVar[str] = "constant"
    warmup_steps: int = 0


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine down to a fixed ``minimum``.

    The defaults are those under which Step Law was fitted (arXiv 2503.04715): the end of the decay
    is an absolute rate, not a fraction of the peak, which would shift the best peak down.
    """

    kind: ClassVar[str] = "cosine"
    warmup_steps: int = 2000
    minimum: float = 1e-5


@dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay (arXiv 2404.06395), the decay as a fraction of all steps.

    ``shape`` of the decay over its progress u in (0, 1]: ``"1-sqrt"`` is 1 - sqrt(u)
    (arXiv 2405.18392), ``"linear"`` is 1 - u.
    """

    kind: ClassVar[str] = "wsd"
    warmup_steps: int = 2000
    decay_fraction: float = 0.2
    shape: Literal["1-sqrt", "linear"] = "1-sqrt"
    minimum: float = 0.0


Schedule = Constant | Cosine | WSD


def build(config: Schedule, peak: float, total_steps: int) -> Callable:
    """The rate as a function of the update's index (int or traced int32), float32 scalar.

    Args:
      config: which schedule.
      peak: the highest rate, > 0.
      total_steps: number of updates of the run, the warm-up and the decay included.

    Raises:
      ConfigError: phases that do not fit into ``total_steps``, or rates out of order.
    """
    import jax.numpy as jnp
    import optax

    check(config, peak, total_steps)
    warmup = config.warmup_steps
    phases, ends = [], []
    if warmup:
        phases.append(optax.linear_schedule(0.0, peak, warmup))
        ends.append(warmup)
    match config:
        case Constant():
            phases.append(optax.constant_schedule(peak))
        case Cosine():
            phases.append(
                optax.cosine_decay_schedule(peak, total_steps - warmup, config.minimum / peak)
            )
        case WSD():
            decay = _decay_steps(config, total_steps)
            phases += [optax.constant_schedule(peak), _wsd_decay(config, peak, decay)]
            ends.append(total_steps - decay)
    joined = optax.join_schedules(phases, ends)
    return lambda step: jnp.asarray(joined(step + 1), jnp.float32)


def _wsd_decay(config: WSD, peak: float, steps: int) -> Callable:
    import jax.numpy as jnp
    import optax

    if config.shape == "linear":
        return optax.linear_schedule(peak, config.minimum, steps)

    def schedule(count):
        u = jnp.clip(count / steps, 0.0, 1.0)
        return config.minimum + (peak - config.minimum) * (1.0 - jnp.sqrt(u))

    return schedule


def _decay_steps(config: WSD, total_steps: int) -> int:
    return max(1, round(config.decay_fraction * total_steps))


def check(config: Schedule, peak: float, total_steps: int) -> None:
    """Raises ConfigError if :func:`build` would, without touching JAX."""
    name = config.kind
    if not peak > 0:
        raise ConfigError(f"the peak learning rate must be positive, not {peak}")
    if total_steps < 1:
        raise ConfigError(f"a run needs at least one step, not {total_steps}")
    if config.warmup_steps < 0:
        raise ConfigError(f"schedule {name}: warmup_steps is {config.warmup_steps}; use 0 or more")
    needed = config.warmup_steps
    if isinstance(config, WSD):
        if not 0 < config.decay_fraction <= 1:
            raise ConfigError(
                f"schedule wsd: decay_fraction is {config.decay_fraction}; use a number in (0, 1], "
                "or the constant schedule for no decay"
            )
        if config.shape not in ("1-sqrt", "linear"):
            raise ConfigError(f"schedule wsd: shape is {config.shape!r}; use '1-sqrt' or 'linear'")
        needed += _decay_steps(config, total_steps)
    elif isinstance(config, Cosine):
        needed += 1
    if total_steps < needed:
        raise ConfigError(
            f"schedule {name}: a warm-up of {config.warmup_steps} steps does not fit into a run of "
            f"{total_steps} steps, which needs {needed} or more; lower warmup_steps or train longer"
        )
    if not isinstance(config, Constant) and not 0 <= config.minimum <= peak:
        raise ConfigError(
            f"schedule {name}: minimum {config.minimum} is not between 0 and the peak rate {peak}"
        )
