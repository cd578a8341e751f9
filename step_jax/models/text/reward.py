"""A reward model: a decoder's trunk that gives a text one number.

Shape suffixes: B batch, T tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct

from step_jax.core import spec as specs_lib
from step_jax.core.spec import ZEROS, ParamSpec
from step_jax.models.context import Context
from step_jax.models.text.decoder import Decoder, DecoderParams
from step_jax.ops.einsum import product


@struct.dataclass
class RewardParams:
    """decoder: without an output head and heads further ahead. score_D: what reads the score."""

    decoder: DecoderParams
    score_D: Any


@dataclass(frozen=True)
class RewardModel:
    """Scores of texts, read from the normed hidden state of their last token (arXiv 2203.02155).

    decoder: embedding, layers and final norm are used; its output heads are left out.
    """

    kind: ClassVar[str] = "reward"
    decoder: Decoder

    def specs(self) -> RewardParams:
        """The parameter table. Fresh, every score is 0. Raises ConfigError as ``Decoder.specs``."""
        return RewardParams(
            decoder=headless(self.decoder.specs()),
            score_D=ParamSpec((self.decoder.width,), ("embed",), ZEROS, role="vector"),
        )

    def initialise(self, key) -> RewardParams:
        """Fresh float32 parameters; see ``Decoder.initialise``."""
        return specs_lib.init(
            self.specs(), key, lambda name: self.decoder.layers_of(name.removeprefix("decoder/"))
        )

    def scores(self, p: RewardParams, tokens_BT, ctx: Context):
        """(float32 (B, T), what a text that ended with each token would score; stats)."""
        x_BTD, _, stats = self.decoder.hidden(p.decoder, tokens_BT, ctx)
        x_BTD = self.decoder.normed(p.decoder, x_BTD)
        return product("BTD,D->BT", x_BTD, p.score_D, jnp.float32), stats


def headless(p: DecoderParams) -> DecoderParams:
    """Parameters (or specs) of a decoder without those of its output heads."""
    return replace(p, head_DV=None, mtp=())
