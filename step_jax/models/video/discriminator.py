"""A 3-D discriminator of patches (arXiv 1611.07004, in time as well): is this a real clip?

Shape suffixes: B clips, T frames, H height, W width, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from flax import struct

from step_jax.core import checks
from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.fsdp import gathered
from step_jax.core.sharding import Sharding
from step_jax.models.layers.convolution import (
    Carry,
    CausalConv,
    ConvParams,
    norm_specs,
    spatial_group_norm,
)

SLOPE = 0.2  # of the leaky ReLU


@struct.dataclass
class DiscriminatorParams:
    convs: tuple[ConvParams, ...]
    norms: tuple[Any, ...]  # NormParams of all convolutions but the first and the last


@dataclass(frozen=True)
class Discriminator:
    """Strided convolutions that halve height and width, and after the first one time too; then one
    that says of every patch how real it is.

    widths: channels after each strided convolution.
    groups: of the norms.
    channels: of a clip.
    """

    kind: ClassVar[str] = "video_discriminator"
    widths: tuple[int, ...] = (64, 128, 256)
    groups: int = 32
    channels: int = 3

    def validate(self):
        checks.at_least(self, groups=1, channels=1)
        if not self.widths or any(width % self.groups for width in self.widths):
            raise ConfigError(f"widths {self.widths} must be multiples of {self.groups} groups")

    def _convs(self) -> list[CausalConv]:
        inputs = (self.channels, *self.widths)
        strides = [(1, 2, 2), *[(2, 2, 2)] * (len(self.widths) - 1)]
        convs = [
            CausalConv(i, o, stride=s)
            for i, o, s in zip(inputs, self.widths, strides, strict=False)
        ]
        return [*convs, CausalConv(self.widths[-1], 1)]

    def specs(self) -> DiscriminatorParams:
        """The parameter table."""
        return DiscriminatorParams(
            tuple(conv.specs() for conv in self._convs()),
            tuple(norm_specs(width) for width in self.widths[1:]),
        )

    def initialise(self, key) -> DiscriminatorParams:
        """Fresh float32 parameters."""
        return spec_lib.init(self.specs(), key)

    def apply(self, params: DiscriminatorParams, x_BTHWC, sharding: Sharding | None = None):
        """How real every patch is: (B, T', H', W', 1)."""
        if sharding is not None:
            params = spec_lib.map_specs(
                lambda s, w: gathered(w, s.axes, sharding), self.specs(), params
            )
        convs = self._convs()
        x = convs[0].apply(params.convs[0], x_BTHWC, Carry())
        for i, conv in enumerate(convs[1:], 1):
            x = jax.nn.leaky_relu(x, SLOPE)
            x = conv.apply(params.convs[i], x, Carry())
            if i < len(convs) - 1:
                x = spatial_group_norm(params.norms[i - 1], x, self.groups)
        return x
