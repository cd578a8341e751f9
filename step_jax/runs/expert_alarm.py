"""Raises the alarm when an expert leaves its layer's others behind, before the loss shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from step_jax.core.errors import ConfigError


@dataclass(frozen=True)
class ExpertHealth:
    """When the experts of a mixture are reported as unwell.

    growth: how many times its usual value (a running geometric mean) the largest expert's
      activations or weights, by their layer's median, may be.
    memory: steps that the running mean remembers, and that pass before the first alarm.
    dropped: the largest share of dropped assignments.
    """

    growth: float = 1.5
    memory: int = 20
    dropped: float = 0.05

    def validate(self):
        if self.growth <= 1 or self.memory < 1 or not 0 <= self.dropped <= 1:
            raise ConfigError(
                f"expert_health needs growth above 1, memory of at least 1 step and dropped in "
                f"[0, 1]: {self}"
            )


@dataclass
class ExpertAlarm:
    """Reads the ``moe/`` metrics of every step (see ``models.expert_health.report``)."""

    config: ExpertHealth
    _usual: dict[str, float] = field(default_factory=dict)
    _seen: int = 0
    _quiet_until: dict[str, int] = field(default_factory=dict)

    def check(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Warnings about this step; one kind at most once in ``memory`` steps."""
        if "moe/load_max" not in metrics:
            return []
        self._seen += 1
        found = {}
        for name in ("activation", "weight"):
            value = metrics[f"moe/{name}_max"]
            usual = self._usual.get(name, value)
            if self._seen > self.config.memory and not value <= usual * self.config.growth:
                layer, expert = (int(metrics[f"moe/{name}_{k}"]) for k in ("layer", "expert"))
                found[name] = (
                    f"expert {expert} of expert layer {layer}: its {name}s are {value:.3g} times "
                    f"its layer's median; the largest is usually {usual:.3g} times"
                )
            elif math.isfinite(value) and value > 0:  # what alarms does not become usual
                share = 1.0 / min(self._seen, self.config.memory)
                self._usual[name] = usual ** (1 - share) * value**share
        if metrics["moe/dropped"] > self.config.dropped:
            found["dropped"] = f"{metrics['moe/dropped']:.1%} of the assignments were dropped"
        said = []
        for kind, text in found.items():
            if step >= self._quiet_until.get(kind, 0):
                self._quiet_until[kind] = step + self.config.memory
                said.append(f"WARNING step {step}: {text}")
        return said
