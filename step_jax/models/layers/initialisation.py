"""Named initialisations: what each kind of weight starts as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from step_jax.core import checks
from step_jax.core.spec import ZEROS, Normal


@dataclass(frozen=True)
class FanIn:
    """Ours: variance-preserving inputs, and blocks that start as the identity.

    A weight that reads ``n`` coordinates has deviation ``gain/sqrt(n)``, however many factors a
    projection is made of (which is what low-rank attention is sensitive to); the last weight of
    every residual branch is zero, as is customary since arXiv 1901.09321, and so is the output
    head, so that the first loss is the logarithm of the vocabulary.
    """

    kind: ClassVar[str] = "fan_in"
    gain: float = 1.0

    def validate(self):
        checks.at_least(self, gain=0)

    def matrix(self, fan_in: int):
        return Normal(self.gain * fan_in**-0.5)

    def attention_output(self, fan_in: int):
        return ZEROS

    def mlp_output(self, fan_in: int):
        return ZEROS

    def embedding(self, width: int, tied: bool):
        # a tied embedding is the head too: any larger, and every token predicts itself at first
        return Normal(self.gain / width if tied else self.gain * width**-0.5)

    def head(self, width: int):
        return ZEROS


@dataclass(frozen=True)
class Fixed:
    """One deviation for every weight; ``std = 0.006`` is DeepSeek's, 0.02 the usual one.

    ``scale_mlp_output`` divides the MLP's output weight of layer l (from 1) by sqrt(2 l), as in
    the ablations of the MFA paper (arXiv 2412.19255).
    """

    kind: ClassVar[str] = "fixed"
    std: float = 0.02
    scale_mlp_output: bool = True

    def validate(self):
        checks.at_least(self, std=0)

    def matrix(self, fan_in: int):
        return Normal(self.std)

    attention_output = head = matrix

    def embedding(self, width: int, tied: bool):
        return Normal(self.std)

    def mlp_output(self, fan_in: int):
        return Normal(self.std, depth="layer" if self.scale_mlp_output else "none")


Initialisation = FanIn | Fixed
