"""Causal 3-D convolutions of clips, norms of single frames, and moves between space and channels.

A causal layer sees no later frame, so a clip can be computed in pieces: every layer that looks back
takes what an earlier piece left from a :class:`Carry` and leaves there what the next one needs. The
pieces' outputs are the whole clip's, as long as the first piece has one frame more than a multiple
of what time is reduced by, and the others have multiples.

Shape suffixes: B clips, T frames, H height, W width, I and O channels in and out, C channels, K the
sides of a kernel, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from step_jax.core.spec import ONES, ZEROS, Init, Normal, ParamSpec
from step_jax.ops.einsum import precision

Sides = tuple[int, int, int]
EPS = 1e-5  # of all norms here


class Carry:
    """What causal layers keep of the pieces of a clip, in the order in which the layers run.

    Made inside a pure function, of what it was given; ``kept`` is what it returns for the next
    piece.

    Attributes:
      first: whether this is the beginning of the clip.
      kept: one array for each layer that looks back.
    """

    def __init__(self, before: Sequence[Any] | None = None):
        self.first = before is None
        self.kept: list[Any] = []
        self._before = iter(() if before is None else before)

    def joined(self, x_BTHWC, zeros: int, keep: int):
        """The frames with those before them: so many of zeros at the beginning of the clip, later
        the ``keep`` last of the piece before."""
        if self.first:
            before = jnp.zeros((x_BTHWC.shape[0], zeros, *x_BTHWC.shape[2:]), x_BTHWC.dtype)
        else:
            before = next(self._before)
        joined = jnp.concatenate([before, x_BTHWC], 1)
        self.kept.append(joined[:, joined.shape[1] - keep :])
        return joined

    def all_before(self, x_BTC):
        """The tokens with all those before them, which are all kept."""
        return self.joined(x_BTC, 0, x_BTC.shape[1] + self._length(x_BTC))

    def _length(self, x_BTC) -> int:
        if self.first:
            return 0
        self._before = iter(rest := list(self._before))
        return rest[0].shape[1]


@struct.dataclass
class ConvParams:
    weight_KKKIO: Any
    bias_O: Any


@dataclass(frozen=True)
class CausalConv:
    """A convolution over time, height and width that sees no later frame.

    Attributes:
      inputs, outputs: channels.
      kernel: its sides in time, height and width.
      stride: likewise. With one in time, a clip's first frame stays alone: 1 + 2 n frames become
        1 + n.
      one_sided: pad the picture only at its end (right and below), as before a strided convolution
        of some encoders, instead of on both sides.
    """

    inputs: int
    outputs: int
    kernel: Sides = (3, 3, 3)
    stride: Sides = (1, 1, 1)
    one_sided: bool = False

    def specs(self, init: Init | None = None) -> ConvParams:
        """``init`` of the weight; by default one that keeps the variance."""
        fan_in = math.prod(self.kernel) * self.inputs
        axes = ("embed", None) if self.inputs >= self.outputs else (None, "embed")
        return ConvParams(
            weight_KKKIO=ParamSpec(
                (*self.kernel, self.inputs, self.outputs),
                (None, None, None, *axes),
                Normal(fan_in**-0.5) if init is None else init,
                fan_in=4,
            ),
            bias_O=ParamSpec((self.outputs,), (None,), ZEROS, role="vector"),
        )

    def apply(self, p: ConvParams, x_BTHWI, carry: Carry):
        """(B, T', H', W', O) in the dtype of the input."""
        times, *sides = self.kernel
        x_BTHWI = carry.joined(x_BTHWI, times - 1, times - self.stride[0]) if times > 1 else x_BTHWI
        if self.one_sided:
            padding = [(0, k - s) for k, s in zip(sides, self.stride[1:], strict=True)]
        else:
            padding = [(k // 2, k // 2) for k in sides]
        weight_KKKIO = p.weight_KKKIO.astype(x_BTHWI.dtype)
        y_BTHWO = jax.lax.conv_general_dilated(
            x_BTHWI,
            weight_KKKIO,
            self.stride,
            [(0, 0), *padding],
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            precision=precision(x_BTHWI, weight_KKKIO),
        )
        return y_BTHWO + p.bias_O.astype(x_BTHWI.dtype)


@struct.dataclass
class NormParams:
    scale_C: Any
    bias_C: Any


def norm_specs(channels: int) -> NormParams:
    return NormParams(
        scale_C=ParamSpec((channels,), (None,), ONES, role="vector"),
        bias_C=ParamSpec((channels,), (None,), ZEROS, role="vector"),
    )


def spatial_group_norm(p: NormParams, x_BTHWC, groups: int):
    """Group normalisation (arXiv 1803.08494) of every frame by itself, so that it is causal and a
    clip's length changes nothing; in float32, returned in the input's dtype."""
    *frames, H, W, C = x_BTHWC.shape
    x = x_BTHWC.astype(jnp.float32).reshape(*frames, H, W, groups, C // groups)
    mean = jnp.mean(x, (2, 3, 5), keepdims=True)
    centred = x - mean
    variance = jnp.mean(jnp.square(centred), (2, 3, 5), keepdims=True)
    y_BTHWC = (centred * jax.lax.rsqrt(variance + EPS)).reshape(x_BTHWC.shape)
    return (y_BTHWC * p.scale_C + p.bias_C).astype(x_BTHWC.dtype)


def space_to_depth(x_BTHWC, factor: int, carry: Carry):
    """Blocks of ``factor`` frames, rows and columns become channels, ordered (C, t, h, w).

    At the beginning of a clip ``factor - 1`` frames of zeros are put before it.
    """
    if carry.first and factor > 1:
        x_BTHWC = jnp.pad(x_BTHWC, ((0, 0), (factor - 1, 0), (0, 0), (0, 0), (0, 0)))
    B, T, H, W, C = x_BTHWC.shape
    f = factor
    x = x_BTHWC.reshape(B, T // f, f, H // f, f, W // f, f, C).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(B, T // f, H // f, W // f, C * f**3)


def depth_to_space(x_BTHWC, factor: int, carry: Carry):
    """The inverse of :func:`space_to_depth`; the frames that it put before a clip are dropped."""
    B, T, H, W, C = x_BTHWC.shape
    f = factor
    x = x_BTHWC.reshape(B, T, H, W, C // f**3, f, f, f).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(B, T * f, H * f, W * f, C // f**3)
    return x[:, f - 1 :] if carry.first else x


def mean_of_channels(x_BTHWC, channels: int):
    """Fewer channels, each the mean of a group of neighbours."""
    return x_BTHWC.reshape(*x_BTHWC.shape[:-1], channels, -1).mean(-1)


def repeated_channels(x_BTHWC, channels: int):
    """More channels, each repeated in place."""
    return jnp.repeat(x_BTHWC, channels // x_BTHWC.shape[-1], -1)
