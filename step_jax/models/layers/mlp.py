"""Multi-layer perceptrons.

Shape suffixes: B batch, T tokens, D model width, F hidden width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.core.spec import ParamSpec
from step_jax.models.context import Context
from step_jax.models.layers.initialisation import Initialisation
from step_jax.ops.einsum import einsum


@struct.dataclass
class SwiGLUParams:
    gate_DF: Any
    up_DF: Any
    down_FD: Any


@dataclass(frozen=True)
class SwiGLU:
    """``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202).

    ``clamp`` bounds the two factors, ``min(silu(g), L) * clip(u, -L, L)`` (Step-3.5-Flash,
    arXiv 2602.10604, its guard against exploding activations).
    """

    kind: ClassVar[str] = "swiglu"
    hidden: int
    clamp: float | None = None

    def validate(self):
        if self.hidden < 1:
            raise ConfigError(f"the hidden width of an MLP is {self.hidden}")
        checks.above(self, clamp=0)

    def specs(self, width: int, init: Initialisation) -> SwiGLUParams:
        read = ParamSpec((width, self.hidden), ("embed", "mlp"), init.matrix(width))
        down = ParamSpec((self.hidden, width), ("mlp", "embed"), init.mlp_output(self.hidden))
        return SwiGLUParams(gate_DF=read, up_DF=read, down_FD=down)

    def apply(self, p: SwiGLUParams, x_BTD, ctx: Context, chosen_BTK=None):
        """((B, T, D), None): the second is what a mixture of experts has to tell."""
        x = ctx.as_matrix(x_BTD)
        gate = checkpoint_name(einsum("...D,DF->...F", x, p.gate_DF), "mlp")
        up = checkpoint_name(einsum("...D,DF->...F", x, p.up_DF), "mlp")
        hidden = gated_unit(gate, up, self.clamp)
        tokens = ("batch", "sequence")[: hidden.ndim - 1]
        y = einsum("...F,FD->...D", ctx.constrain(hidden, *tokens, "mlp"), p.down_FD)
        return y.reshape(x_BTD.shape), None


# Kept for the backward pass: the two factors, but none of the elementwise results between.
@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def gated_unit(gate, up, clamp: float | None):
    """``silu(gate) * up`` with its factors bounded by ``clamp``."""
    gate = jax.nn.silu(gate)
    if clamp is not None:
        gate, up = jnp.minimum(gate, clamp), jnp.clip(up, -clamp, clamp)
    return gate * up


@struct.dataclass
class GELUParams:
    up_DF: Any
    down_FD: Any


@dataclass(frozen=True)
class GELU:
    """``down(gelu(up(x)))`` without gate or bias, by the tanh approximation (arXiv 1606.08415)."""

    kind: ClassVar[str] = "gelu"
    hidden: int

    def validate(self):
        checks.at_least(self, hidden=1)

    def specs(self, width: int, init: Initialisation) -> GELUParams:
        return GELUParams(
            up_DF=ParamSpec((width, self.hidden), ("embed", "mlp"), init.matrix(width)),
            down_FD=ParamSpec((self.hidden, width), ("mlp", "embed"), init.mlp_output(self.hidden)),
        )

    def apply(self, p: GELUParams, x_BTD, ctx: Context, chosen_BTK=None):
        """As of :class:`SwiGLU`."""
        x = ctx.as_matrix(x_BTD)
        hidden = gelu(checkpoint_name(einsum("...D,DF->...F", x, p.up_DF), "mlp"))
        tokens = ("batch", "sequence")[: hidden.ndim - 1]
        y = einsum("...F,FD->...D", ctx.constrain(hidden, *tokens, "mlp"), p.down_FD)
        return y.reshape(x_BTD.shape), None


# Kept for the backward pass: what goes in, but none of the elementwise results between.
@functools.partial(jax.checkpoint, prevent_cse=False)
def gelu(x):
    """The Gaussian error linear unit by its tanh approximation."""
    return jax.nn.gelu(x, approximate=True)
