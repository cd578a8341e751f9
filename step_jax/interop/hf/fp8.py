"""Weights of eight bits with a scale per block (DeepSeek-V3, Step releases), read as float32.

``X.weight`` is float8_e4m3 and ``X.weight_scale_inv`` has, for its last two axes, what every block
of ``weight_block_size`` elements is to be multiplied by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from step_jax.core.errors import CheckpointError, ConfigError
from step_jax.interop.hf.keys import Keys

_SCALE = "_scale_inv"
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def check_quantization(c: Keys) -> tuple[int, int] | None:
    """Rows and columns of a block, None for weights that are not quantized.

    Raises:
      ConfigError: another quantization, noted in ``c.problems`` if it is a matter of one key.
    """
    q = c.table("quantization_config")
    if not q.values:
        return None
    if q.text("quant_method") != "fp8":
        c.unsupported(
            f"quantization_config of the method {q.get('quant_method')!r} (only 'fp8' in blocks)"
        )
        return None
    q.only(fmt="e4m3", activation_scheme="dynamic", expert_dtype="fp8")
    # Which modules are quantized is seen from the tensors, and what the scales are from their type.
    q.without_effect(
        "modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize", "scale_fmt"
    )
    block = q.get("weight_block_size", [128, 128])
    if not (isinstance(block, list) and [type(n) for n in block] == [int, int] and min(block) > 0):
        raise ConfigError(
            f"{q.where} has weight_block_size {block!r}; it must be two positive integers"
        )
    q.note_unread()
    return block[0], block[1]


@dataclass(frozen=True)
class _Scaled:
    """A quantized weight; as an array, float32."""

    weight: Any
    scale: Any
    block: tuple[int, int]
    dtype: np.dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        w = np.asarray(self.weight).astype(np.float32)
        scale = np.asarray(self.scale).astype(np.float32)
        for axis, size in zip((-2, -1), self.block, strict=True):
            scale = np.repeat(scale, size, axis)
        w *= scale[..., : w.shape[-2], : w.shape[-1]]
        return w


def dequantized(state: Mapping[str, Any], block: tuple[int, int] | None) -> dict[str, Any]:
    """The tensors of ``state``, quantized ones with their scale in one float32 tensor.

    Raises:
      CheckpointError: a weight without its scale, or with one of another shape; weights of eight
        bits in a checkpoint that is not said to be quantized.
    """
    out = dict(state)
    for name, weight in state.items():
        if np.dtype(weight.dtype) != _E4M3:
            continue
        if block is None:
            raise CheckpointError(
                f"{name} is float8_e4m3, but config.json has no quantization_config to say so"
            )
        scale = out.pop(name + _SCALE, None)
        if scale is None:
            raise CheckpointError(f"{name} is float8_e4m3, but there is no {name + _SCALE}")
        blocks = tuple(math.ceil(n / b) for n, b in zip(weight.shape[-2:], block, strict=True))
        expected = (*weight.shape[:-2], *blocks)
        if len(weight.shape) < 2 or tuple(scale.shape) != expected:
            raise CheckpointError(
                f"{name + _SCALE} has shape {tuple(scale.shape)}; the blocks of {block[0]} by "
                f"{block[1]} of {name} {tuple(weight.shape)} need {expected}"
            )
        out[name] = _Scaled(weight, scale, block)
    return out
