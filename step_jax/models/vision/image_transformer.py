"""A class-conditional transformer over the patches of an image: DiT (arXiv 2212.09748, AdaLN).

Shape suffixes: B batch, H height, W width, C channels, T patches, P numbers in a patch, D model
width, M modulations of a block.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from step_jax.core import checks
from step_jax.core import spec as specs_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.core.spec import ZEROS, ParamSpec
from step_jax.models.context import Context, Execution
from step_jax.models.layers.attention import AttentionKind
from step_jax.models.layers.block import Block
from step_jax.models.layers.initialisation import FanIn, Initialisation
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.tokens import Tokens
from step_jax.models.trunk import Group, Trunk, gather
from step_jax.ops.einsum import einsum
from step_jax.ops.norm import rms_norm

EPS = 1e-6


@struct.dataclass
class ModulatedBlockParams:
    modulation_DMD: Any
    attention: Any
    mlp: Any


@dataclass(frozen=True)
class ModulatedBlock(Block):
    """A layer whose norms have scale, shift and gate linear in a condition (AdaLN)."""

    def specs(self, width: int, norm: RMSNorm, init: Initialisation) -> ModulatedBlockParams:
        return ModulatedBlockParams(
            modulation_DMD=_modulation(width, 6),
            attention=self.attention.specs(width, init),
            mlp=self.mlp.specs(width, init),
        )

    def apply(
        self, p, norm: RMSNorm, x_BTD, ctx: Context, cache=None, chosen_BTK=None, condition=None
    ):
        """As of :class:`Block`; ``condition`` is (B, D). Of ``norm``, only the ``eps`` is used.

        The gates are 1 + g, not DiT's g: the branches' last weights start at zero.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _modulations(
            p.modulation_DMD, condition
        )
        y_BTD = rms_norm(x_BTD, None, norm.eps) * (1 + scale_a) + shift_a
        y_BTD, cache = self.attention.apply(p.attention, y_BTD, ctx, cache)
        x_BTD = ctx.constrain(x_BTD + (1 + gate_a) * y_BTD, "batch", "sequence", None)
        y_BTD = rms_norm(x_BTD, None, norm.eps) * (1 + scale_m) + shift_m
        y_BTD, stats = self.mlp.apply(p.mlp, y_BTD, ctx, chosen_BTK)
        x_BTD = ctx.constrain(x_BTD + (1 + gate_m) * y_BTD, "batch", "sequence", None)
        return x_BTD, cache, stats


@struct.dataclass
class ImageTransformerParams:
    patch_PD: Any
    position_TD: Any
    class_KD: Any
    time_in_DD: Any
    time_out_DD: Any
    blocks: Any  # ModulatedBlockParams, stacked
    modulation_DMD: Any
    head_DP: Any


@dataclass(frozen=True)
class ImageTransformer:
    """Attention and SwiGLU blocks whose scale, shift and gate are linear in (time, class).

    patch: side of a patch in pixels.
    size, channels, classes: of the images.
    """

    kind: ClassVar[str] = "image_transformer"
    width: int
    depth: int
    attention: AttentionKind
    mlp: SwiGLU
    patch: int = 2
    size: int = 8
    channels: int = 1
    classes: int = 10
    init: Initialisation = field(default_factory=FanIn)

    def validate(self):
        checks.at_least(self, size=1, channels=1, classes=1)
        if self.width < 2 or self.width % 2 or self.depth < 1:
            raise ConfigError("an image transformer needs an even width and at least one layer")
        if self.patch < 1 or self.size % self.patch:
            raise ConfigError(f"patch {self.patch} does not divide the image size {self.size}")

    @property
    def patches(self) -> int:
        return (self.size // self.patch) ** 2

    @functools.cached_property
    def trunk(self) -> Trunk:
        """The layers, all of one stack."""
        group = Group(self.depth, (ModulatedBlock(self.attention, self.mlp),))
        return Trunk(self.width, (group,), RMSNorm(EPS), self.init)

    def specs(self) -> ImageTransformerParams:
        """The parameter table."""
        D, T, P = self.width, self.patches, self.channels * self.patch**2
        table, square = self.init.embedding(D, tied=False), self.init.matrix(D)
        return ImageTransformerParams(
            patch_PD=ParamSpec((P, D), (None, "embed"), self.init.matrix(P)),
            position_TD=ParamSpec((T, D), (None, "embed"), table, role="embedding"),
            class_KD=ParamSpec((self.classes, D), (None, "embed"), table, role="embedding"),
            time_in_DD=ParamSpec((D, D), (None, "embed"), square),
            time_out_DD=ParamSpec((D, D), ("embed", None), square),
            blocks=self.trunk.specs()[0][0],
            modulation_DMD=_modulation(D, 2),
            head_DP=ParamSpec((D, P), ("embed", None), self.init.head(D), role="head"),
        )

    def initialise(self, key) -> ImageTransformerParams:
        """Fresh float32 parameters."""
        return specs_lib.init(self.specs(), key, lambda name: (0, 1))

    def apply(
        self,
        p: ImageTransformerParams,
        x_BHWC,
        time_B,
        class_B,
        execution: Execution,
        sharding: Sharding | None = None,
    ):
        """What the model predicts for every number of an image: float32 (B, H, W, C).

        Args:
          x_BHWC: noisy images, any float dtype.
          time_B: float32 in [0, 1].
          class_B: int32 below ``classes``.
        """
        tokens = Tokens.in_order(x_BHWC.shape[0], self.patches, causal=False)
        ctx = Context(tokens, sharding=sharding, execution=execution)
        blocks, specs = p.blocks, replace(self.specs(), blocks=None)
        p = gather(specs, replace(p, blocks=None), ctx)
        condition_BD = self._condition(p, time_B, class_B, execution.dtype)
        x_BTP = self._patches(x_BHWC).astype(execution.dtype)
        x_BTD = einsum("BTP,PD->BTD", x_BTP, p.patch_PD) + p.position_TD.astype(execution.dtype)
        x_BTD = ctx.constrain(x_BTD, "batch", "sequence", None)
        x_BTD, *_ = self.trunk.apply(((blocks,),), x_BTD, ctx, condition=condition_BD)
        shift_B1D, scale_B1D = _modulations(p.modulation_DMD, condition_BD)
        x_BTD = rms_norm(x_BTD, None, EPS) * (1 + scale_B1D) + shift_B1D
        return self._image(einsum("BTD,DP->BTP", x_BTD, p.head_DP).astype(jnp.float32))

    def _condition(self, p, time_B, class_B, dtype):
        """(B, D) from sinusoids of ``1000 t`` through an SwiGLU, plus the class's embedding."""
        half = self.width // 2
        frequency_h = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angle_Bh = 1000.0 * time_B.astype(jnp.float32)[:, None] * frequency_h
        waves_BD = jnp.concatenate([jnp.cos(angle_Bh), jnp.sin(angle_Bh)], -1).astype(dtype)
        hidden_BD = jax.nn.silu(einsum("BD,DE->BE", waves_BD, p.time_in_DD))
        time_BD = einsum("BD,DE->BE", hidden_BD, p.time_out_DD)
        return jax.nn.silu(time_BD + p.class_KD.astype(dtype)[class_B])

    def _patches(self, x_BHWC):
        B, n, s, C = x_BHWC.shape[0], self.size // self.patch, self.patch, self.channels
        x = x_BHWC.reshape(B, n, s, n, s, C).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(B, n * n, s * s * C)

    def _image(self, x_BTP):
        B, n, s, C = x_BTP.shape[0], self.size // self.patch, self.patch, self.channels
        x = x_BTP.reshape(B, n, n, s, s, C).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(B, self.size, self.size, C)


def _modulation(width: int, n: int) -> ParamSpec:
    return ParamSpec((width, n, width), ("embed", None, None), ZEROS)


def _modulations(w_DMD, condition_BD):
    """M arrays (B, 1, D), linear in the condition."""
    m_BMD = einsum("BD,DME->BME", condition_BD, w_DMD)
    return [m_BMD[:, i, None] for i in range(w_DMD.shape[1])]
