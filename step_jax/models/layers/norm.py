"""Normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax import struct

from step_jax.core import checks
from step_jax.core.spec import ONES, ZEROS, ParamSpec
from step_jax.ops.norm import layer_norm, rms_norm


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


@struct.dataclass
class LayerNormParams:
    scale_D: Any
    bias_D: Any


@dataclass(frozen=True)
class LayerNorm:
    """Mean and deviation norm with scale and bias (arXiv 1607.06450)."""

    eps: float = 1e-5

    def specs(self, width: int) -> LayerNormParams:
        scale, bias = (ParamSpec((width,), (None,), init, role="vector") for init in (ONES, ZEROS))
        return LayerNormParams(scale, bias)

    def apply(self, p: LayerNormParams, x):
        """Normalises the last axis of ``x``."""
        return layer_norm(x, p.scale_D, p.bias_D, self.eps)


Norm = RMSNorm | LayerNorm
