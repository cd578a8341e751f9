"""Attention of one new token of each row over a cache.

Shape suffixes: B rows, T new tokens, N query heads, K key/value heads, H head width, S slots, L
layers, F rotated pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_call import DecodeCall
from step_jax.ops import decode_attention, registry
from step_jax.ops.rope import frequencies_F, rotate
from step_jax.ops.selfcheck.case import HUGE, normal

LAYERS = 3


@dataclass(frozen=True)
class Decode:
    """One token of ``heads`` query heads on ``kv_heads``, over ``slots`` slots of a row.

    reuse: keys are cached before their rotation and are their own values.
    lengths: tokens stored, as parts of the slots: a full row, one that has gone round its ring, one
      with a single token, one with none.
    """

    operation: ClassVar[registry.Operation] = decode_attention.OPERATION

    implementation: str
    heads: int
    kv_heads: int
    width: int
    slots: int
    window: int | None = None
    reuse: bool = False
    dtype: str = "bfloat16"
    lengths: tuple[float, ...] = (1.0, 2.3, 0.37, 0.0, 0.0)

    def shapes(self) -> str:
        words = [f"{self.heads} heads on {self.kv_heads} of {self.width}", f"{self.slots} slots"]
        words += [f"window {self.window}"] if self.window else []
        return ", ".join([*words, *(["keys reused"] if self.reuse else []), self.dtype])

    def at_work(self, tokens):
        return replace(self, slots=tokens, lengths=(1.0,) * 16)

    def _lengths_B(self):
        lengths_B = np.array([int(part * self.slots) for part in self.lengths], np.int32)
        lengths_B[-1:] = np.maximum(lengths_B[-1:], 1)
        return lengths_B

    def draw(self, key) -> tuple:
        """(call,). All layers of the cache but the one to read are NaN.

        A query looks hardest at the newest key and at those on both sides of the end of its
        window or of what is stored.
        """
        lengths_B = self._lengths_B()
        B, S = len(lengths_B), self.slots
        cache = (B, S, self.kv_heads, self.width)
        k_BSKH, v_BSKH = (normal(key, number, cache, self.dtype) for number in (0, 1))
        frequency_F = frequencies_F(1e4, self.width // 2) if self.reuse else None
        held_BS = decode_attention.slot_positions_BS(jnp.asarray(lengths_B), S)
        seen_BSKH = k_BSKH.astype(jnp.float32)
        if self.reuse:
            seen_BSKH = rotate(seen_BSKH, held_BS, frequency_F)
        edges = [0, 1, *([self.window - 1, self.window] if self.window else [S - 1])]
        slot_BE = (lengths_B[:, None] - 1 - np.array(edges)) % S
        near_BKH = sum(seen_BSKH[jnp.arange(B), slot_BE[:, e]] for e in range(len(edges)))
        hard = (np.log(S) + 1) * self.width**-0.5
        q_BNH = jnp.repeat(hard * near_BKH, self.heads // self.kv_heads, axis=1)
        q_BNH += 0.3 * normal(key, 2, q_BNH.shape)

        def of_layers(x_BSKH):
            x_BSKH = jnp.where(held_BS[:, :, None, None] >= 0, x_BSKH, HUGE)
            other_BSKH = jnp.full_like(x_BSKH, jnp.nan)
            return jnp.stack([other_BSKH, x_BSKH, other_BSKH]).astype(self.dtype)

        call = DecodeCall(
            q_BNH[:, None].astype(self.dtype),
            of_layers(k_BSKH),
            None if self.reuse else of_layers(v_BSKH),
            jnp.asarray(lengths_B)[:, None] - 1,
            jnp.asarray(lengths_B),
            scale=self.width**-0.5,
            window=self.window,
            frequency_F=frequency_F,
            layer=jnp.int32(1),
        )
        return (call,)

    def results(self, implementation, device):
        def run(call):
            o_BTNH = decode_attention.decode_attention(
                call, implementation=implementation, device=device
            )
            return {"o": o_BTNH}

        return run

    def reference(self):
        def run(call):
            return {"o": decode_attention.reference(
                replace(call, q_BTNH=call.q_BTNH.astype(jnp.float32))
            )}  # fmt: skip

        return run

    def _seen(self) -> int:
        most = self.slots if self.window is None else min(self.window, self.slots)
        return int(np.minimum(self._lengths_B(), most).sum())

    def operations(self):
        return 4.0 * self._seen() * self.heads * self.width

    def traffic(self):
        arrays = 1 if self.reuse else 2
        itemsize = jnp.dtype(self.dtype).itemsize
        return float(self._seen() * self.kv_heads * self.width * arrays * itemsize)
