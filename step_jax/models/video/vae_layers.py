"""Layers of the video autoencoder of Step-Video-T2V (arXiv 2502.10248, section 4.1).

Every layer is a frozen dataclass with ``specs()`` and ``apply(p, x, carry)``, causal in time; see
``models.layers.convolution`` for the carry.

Shape suffixes: B clips, T frames, H height, W width, C channels (I in, O out), N places of a clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from step_jax.core.spec import ZEROS
from step_jax.models.layers.convolution import (
    Carry,
    CausalConv,
    ConvParams,
    NormParams,
    depth_to_space,
    mean_of_channels,
    norm_specs,
    repeated_channels,
    space_to_depth,
    spatial_group_norm,
)
from step_jax.ops.attention import Mask, attention

#: How the last reduction by 2 x 2 x 2 is done, or that there is none.
Head = Literal["dual_path", "plain", "none"]


@struct.dataclass
class ResBlockParams:
    norm_in: NormParams
    conv_in: ConvParams
    norm_out: NormParams
    conv_out: ConvParams
    shortcut: Any  # ConvParams, or None


@dataclass(frozen=True)
class ResBlock:
    """Norm, SiLU and convolution, twice, beside a shortcut; starts as the shortcut."""

    inputs: int
    outputs: int
    groups: int

    def _convs(self) -> tuple[CausalConv, CausalConv, CausalConv]:
        return (
            CausalConv(self.inputs, self.outputs),
            CausalConv(self.outputs, self.outputs),
            CausalConv(self.inputs, self.outputs, (1, 1, 1)),
        )

    def specs(self) -> ResBlockParams:
        conv_in, conv_out, shortcut = self._convs()
        return ResBlockParams(
            norm_specs(self.inputs),
            conv_in.specs(),
            norm_specs(self.outputs),
            conv_out.specs(ZEROS),
            None if self.inputs == self.outputs else shortcut.specs(),
        )

    def apply(self, p: ResBlockParams, x_BTHWC, carry: Carry):
        conv_in, conv_out, shortcut = self._convs()
        h = jax.nn.silu(spatial_group_norm(p.norm_in, x_BTHWC, self.groups))
        h = conv_in.apply(p.conv_in, h, carry)
        h = jax.nn.silu(spatial_group_norm(p.norm_out, h, self.groups))
        h = conv_out.apply(p.conv_out, h, carry)
        return h + (x_BTHWC if p.shortcut is None else shortcut.apply(p.shortcut, x_BTHWC, carry))


@struct.dataclass
class PlaceAttentionParams:
    norm: NormParams
    query: ConvParams
    key: ConvParams
    value: ConvParams
    out: ConvParams


@dataclass(frozen=True)
class PlaceAttention:
    """Attention of one head in which every place sees those before it, in raster order of time,
    height and width; as the released model has it."""

    channels: int
    groups: int

    @property
    def _conv(self) -> CausalConv:
        return CausalConv(self.channels, self.channels, (1, 1, 1))

    def specs(self) -> PlaceAttentionParams:
        conv = self._conv
        return PlaceAttentionParams(
            norm_specs(self.channels), conv.specs(), conv.specs(), conv.specs(), conv.specs(ZEROS)
        )

    def apply(self, p: PlaceAttentionParams, x_BTHWC, carry: Carry):
        B, C = x_BTHWC.shape[0], self.channels
        h = spatial_group_norm(p.norm, x_BTHWC, self.groups)
        q_BNC, k_BNC, v_BNC = (
            self._conv.apply(w, h, carry).reshape(B, -1, C) for w in (p.query, p.key, p.value)
        )
        whole = carry.first
        k_BNC, v_BNC = carry.all_before(k_BNC), carry.all_before(v_BNC)
        keys = jnp.broadcast_to(jnp.arange(k_BNC.shape[1]), k_BNC.shape[:2])
        mask = Mask(keys[:, -q_BNC.shape[1] :], keys, causal=True, in_order=whole)
        o_BN1C = attention(
            q_BNC[:, :, None], k_BNC[:, :, None], v_BNC[:, :, None], mask, scale=C**-0.5
        )
        return x_BTHWC + self._conv.apply(p.out, o_BN1C.reshape(x_BTHWC.shape), carry)


@dataclass(frozen=True)
class Downsample:
    """A strided convolution: half the height and width and, if ``temporal``, half the time."""

    channels: int
    temporal: bool

    @property
    def _conv(self) -> CausalConv:
        if self.temporal:
            return CausalConv(self.channels, self.channels, stride=(2, 2, 2))
        return CausalConv(self.channels, self.channels, (1, 3, 3), (1, 2, 2), one_sided=True)

    def specs(self) -> ConvParams:
        return self._conv.specs()

    def apply(self, p: ConvParams, x_BTHWC, carry: Carry):
        return self._conv.apply(p, x_BTHWC, carry)


@struct.dataclass
class UpsampleParams:
    conv_in: ConvParams
    norm_in: Any  # NormParams, or None
    conv_out: Any  # ConvParams, or None
    norm_out: Any


@dataclass(frozen=True)
class Upsample:
    """Every pixel twice in height and width, then a convolution; if ``temporal`` every frame twice
    too, then a residual block whose norms come last. Of T frames it makes 2 T: what is too many of
    a clip's beginning is dropped at the decoder's end."""

    channels: int
    temporal: bool
    groups: int

    @property
    def _conv(self) -> CausalConv:
        return CausalConv(self.channels, self.channels, (3 if self.temporal else 1, 3, 3))

    def specs(self) -> UpsampleParams:
        C, conv = self.channels, self._conv
        if not self.temporal:
            return UpsampleParams(conv.specs(), None, None, None)
        return UpsampleParams(conv.specs(), norm_specs(C), conv.specs(), norm_specs(C))

    def apply(self, p: UpsampleParams, x_BTHWC, carry: Carry):
        x_BTHWC = jnp.repeat(jnp.repeat(x_BTHWC, 2, 2), 2, 3)
        if not self.temporal:
            return self._conv.apply(p.conv_in, x_BTHWC, carry)
        x_BTHWC = jnp.repeat(x_BTHWC, 2, 1)
        h = self._conv.apply(p.conv_in, x_BTHWC, carry)
        h = jax.nn.silu(spatial_group_norm(p.norm_in, h, self.groups))
        h = spatial_group_norm(p.norm_out, self._conv.apply(p.conv_out, h, carry), self.groups)
        return jax.nn.silu(h + x_BTHWC) + x_BTHWC


FACTOR = 2  # of a head in time, height and width
BLOCK = FACTOR**3


@struct.dataclass
class HeadParams:
    resample: Any  # ConvParams, or None
    conv: ConvParams


@dataclass(frozen=True)
class DownHead:
    """From the encoder's last features to the numbers of the latent, by 2 x 2 x 2 smaller.

    ``dual_path``: a convolution and a move of space to channels, plus a shortcut without
    parameters: space to channels, and the mean of neighbouring channels. So is the last
    convolution. ``plain`` has the convolutions alone, ``none`` only the last, and reduces nothing.
    """

    head: Head
    inputs: int
    width: int
    outputs: int

    def _convs(self) -> tuple[CausalConv, CausalConv]:
        wide = self.inputs if self.head == "none" else self.width
        return CausalConv(self.inputs, self.width // BLOCK), CausalConv(wide, self.outputs)

    def specs(self) -> HeadParams:
        resample, conv = self._convs()
        return HeadParams(None if self.head == "none" else resample.specs(), conv.specs())

    def apply(self, p: HeadParams, x_BTHWC, carry: Carry):
        resample, conv = self._convs()
        if self.head == "none":
            return conv.apply(p.conv, x_BTHWC, carry)
        h = space_to_depth(resample.apply(p.resample, x_BTHWC, carry), FACTOR, carry)
        if self.head == "plain":
            return conv.apply(p.conv, h, carry)
        h += mean_of_channels(space_to_depth(x_BTHWC, FACTOR, carry), self.width)
        return conv.apply(p.conv, h, carry) + mean_of_channels(h, self.outputs)


@dataclass(frozen=True)
class UpHead:
    """The mirror of :class:`DownHead`; its shortcuts repeat channels."""

    head: Head
    inputs: int
    width: int
    outputs: int

    def _convs(self) -> tuple[CausalConv, CausalConv]:
        wide = self.outputs if self.head == "none" else self.width
        return CausalConv(self.inputs, wide), CausalConv(self.width, self.outputs * BLOCK)

    def specs(self) -> HeadParams:
        conv, resample = self._convs()
        return HeadParams(None if self.head == "none" else resample.specs(), conv.specs())

    def apply(self, p: HeadParams, z_BTHWC, carry: Carry):
        conv, resample = self._convs()
        h = conv.apply(p.conv, z_BTHWC, carry)
        if self.head == "none":
            return h
        if self.head == "dual_path":
            h += repeated_channels(z_BTHWC, self.width)
        x = depth_to_space(resample.apply(p.resample, h, carry), FACTOR, carry)
        if self.head == "dual_path":
            x += depth_to_space(repeated_channels(h, self.outputs * BLOCK), FACTOR, carry)
        return x
