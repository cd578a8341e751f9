"""Optimizer configuration, a tagged union by ``kind`` (importable without JAX)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from step_jax.core.errors import ConfigError
from step_jax.training import schedules
from step_jax.training.schedules import Cosine, Schedule

LearningRate = float | Literal["step_law"]


@dataclass(frozen=True)
class AdamW:
    """AdamW with decoupled weight decay, scaled by the learning rate (arXiv 1711.05101).

    learning_rate: the peak rate, or ``step_law`` (arXiv 2503.04715) from model and data size.
    weight_decay: of matrices, embeddings and the head; never of vectors (norms, biases, gates).
    clip_norm: the gradient's global norm is clipped to this; null for no clipping.
    mu_dtype: of the first moment in memory; the second moment and the parameters are float32.
    offload: the moments lie in the host's memory between the updates.
    """

    kind: ClassVar[str] = "adamw"
    learning_rate: LearningRate = "step_law"
    schedule: Schedule = Cosine()
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    offload: bool = False

    def validate(self) -> None:
        _validate_common(self)


@dataclass(frozen=True)
class Muon:
    """Muon for matrices, AdamW for vectors, embeddings and the head (arXiv 2602.10604).

    learning_rate: shared by both groups: Muon's update has the root mean square of AdamW's.
    momentum: of Muon's Nesterov momentum. beta1, beta2 and eps belong to the AdamW group.
    polar_dtype: of the matrix products of the orthogonalisation. ``auto`` is float16 on GPU (bf16
        causes loss spikes) and float32 on CPU and on TPU, whose matrix units have no float16.
    offload: the moments lie in the host's memory between the updates.
    """

    kind: ClassVar[str] = "muon"
    learning_rate: LearningRate = "step_law"
    schedule: Schedule = Cosine()
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    momentum: float = 0.95
    beta1: float = 0.95
    beta2: float = 0.95
    eps: float = 1e-8
    polar_dtype: Literal["auto", "float16", "float32"] = "auto"
    offload: bool = False

    def validate(self) -> None:
        _validate_common(self)
        if not 0 <= self.momentum < 1:
            raise ConfigError(
                f"optimizer muon: momentum is {self.momentum}; use a number in [0, 1)"
            )
        if self.polar_dtype not in ("auto", "float16", "float32"):
            raise ConfigError(
                f"optimizer muon: polar_dtype is {self.polar_dtype!r}; use auto, float16 or float32"
            )


OptimizerConfig = AdamW | Muon


def check_optimizer(config: OptimizerConfig, total_steps: int, tokens: float | None = None) -> None:
    """Raises ConfigError if ``make_optimizer`` would, as far as that is known without a model."""
    rate = config.learning_rate
    if rate == "step_law":
        if tokens is None:
            raise ConfigError(
                "step_law is a law of pretraining tokens, and this loop has none: set "
                "optimizer.learning_rate to a number"
            )
        rate = 1.0
    schedules.check(config.schedule, rate, total_steps)


def _validate_common(c: AdamW | Muon) -> None:
    name = c.kind
    if c.learning_rate != "step_law" and not (
        isinstance(c.learning_rate, int | float) and 0 < c.learning_rate < math.inf
    ):
        raise ConfigError(
            f"optimizer {name}: learning_rate is {c.learning_rate!r}; use a positive number or "
            "step_law"
        )
    for field in ("beta1", "beta2"):
        if not 0 <= getattr(c, field) < 1:
            raise ConfigError(
                f"optimizer {name}: {field} is {getattr(c, field)}; use a number in [0, 1)"
            )
    if not 0 < c.eps < math.inf:
        raise ConfigError(f"optimizer {name}: eps is {c.eps}; use a positive number")
    if not 0 <= c.weight_decay < math.inf:
        raise ConfigError(f"optimizer {name}: weight_decay is {c.weight_decay}; use 0 or more")
    if c.clip_norm is not None and c.clip_norm <= 0:
        raise ConfigError(
            f"optimizer {name}: clip_norm is {c.clip_norm}; use a positive number, or null for no "
            "clipping"
        )
