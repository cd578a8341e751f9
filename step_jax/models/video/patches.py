"""Latents of clips as rows of patches, and back.

Shape suffixes: B clips, F frames, H height, W width, C channels, T patches, P numbers in a patch, A
axes of a place (time, row, column).
"""

from __future__ import annotations

import math

import numpy as np

from step_jax.core.errors import ConfigError

Sizes = tuple[int, int, int]


def grid(size: Sizes, patch: Sizes) -> Sizes:
    """How many patches a clip of (frames, height, width) has along each axis.

    Raises:
      ConfigError: the patch does not divide the size.
    """
    if any(n % p for n, p in zip(size, patch, strict=True)):
        raise ConfigError(
            f"latents of {' x '.join(map(str, size))} (frames x height x width) do not divide into "
            f"patches of {' x '.join(map(str, patch))}"
        )
    f, h, w = (n // p for n, p in zip(size, patch, strict=True))
    return f, h, w


def patches_of(x_BFHWC, patch: Sizes):
    """(B, T, P): patches in the order of (time, row, column), and so their numbers.

    Works on NumPy and on JAX arrays.
    """
    B, *size, C = x_BFHWC.shape
    (f, h, w), (a, b, c) = grid((size[0], size[1], size[2]), patch), patch
    x = x_BFHWC.reshape(B, f, a, h, b, w, c, C).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(B, f * h * w, a * b * c * C)


def clip_of(x_BTP, size: Sizes, patch: Sizes):
    """The inverse of :func:`patches_of`: (B, F, H, W, C)."""
    (f, h, w), (a, b, c) = grid(size, patch), patch
    B, C = x_BTP.shape[0], x_BTP.shape[2] // math.prod(patch)
    x = x_BTP.reshape(B, f, h, w, a, b, c, C).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, *size, C)


def places_of(size: Sizes, patch: Sizes) -> np.ndarray:
    """(time, row, column) of every patch in units of patches, int32 (T, 3)."""
    axes = np.meshgrid(*map(np.arange, grid(size, patch)), indexing="ij")
    return np.stack([a.ravel() for a in axes], -1).astype(np.int32)
