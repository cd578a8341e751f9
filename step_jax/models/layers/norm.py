"""Normalisation."""

from __future__ import annotations

from dataclasses import dataclass

from step_jax.core import checks
from step_jax.core.spec import ONES, ZEROS, ParamSpec
from step_jax.ops.norm import rms_norm


@dataclass(frozen=True)
class RMSNorm:
    """Root-mean-square norm; ``zero_centred`` stores the scale minus one (Step-3.5-Flash)."""

    eps: float = 1e-5
    zero_centred: bool = False

    def validate(self):
        checks.at_least(self, eps=0)

    def specs(self, width: int) -> ParamSpec:
        return ParamSpec((width,), (None,), ZEROS if self.zero_centred else ONES, role="vector")

    def apply(self, scale, x):
        """Normalises the last axis of ``x``."""
        return rms_norm(x, scale, self.eps, self.zero_centred)
