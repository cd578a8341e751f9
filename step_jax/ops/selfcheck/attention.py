"""Attention, forward and backward, on rows of documents.

Shape suffixes: B batch, T queries, S keys, N query heads, K key/value heads, H width of queries and
keys, V width of values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.ops import attention, registry
from step_jax.ops.selfcheck.case import HUGE, normal

#: Where the documents of a packed row end, in parts of it: short ones, and some that end inside a
#: block, are among them. The last part is padding.
_ENDS = (0.07, 0.41, 0.415, 0.85)


@dataclass(frozen=True)
class Attention:
    """Causal attention of ``heads`` query heads on ``kv_heads``, of one device.

    tokens: of a row. window: see ``ops.attention.Mask``. rows: the first is one document, the
      second several and padding.
    context: pieces of a row over devices; the queries are then those of the last piece.
    """

    operation: ClassVar[registry.Operation] = attention.OPERATION

    implementation: str
    heads: int
    kv_heads: int
    width: int
    value_width: int
    tokens: int
    window: int | None = None
    dtype: str = "bfloat16"
    context: int = 1
    rows: int = 2

    def shapes(self) -> str:
        widths = f"{self.width}" + f"/{self.value_width}" * (self.width != self.value_width)
        words = [f"{self.heads} heads on {self.kv_heads} of {widths}", f"{self.tokens} tokens"]
        words += [f"window {self.window}"] if self.window else []
        words += [f"1/{self.context} of the queries"] if self.context > 1 else []
        return ", ".join([*words, self.dtype])

    @property
    def queries(self) -> int:
        return -(-self.tokens // self.context)

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def _documents(self):
        """int32 (positions_BS, segments_BS); padding has segment 0."""
        S = self.tokens
        positions_BS = np.tile(np.arange(S, dtype=np.int32), (self.rows, 1))
        segments_BS = np.ones((self.rows, S), np.int32)
        for row in range(1, self.rows):
            ends = [max(1, round(S * part)) for part in _ENDS]
            segments_BS[row] = 0
            for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
                segments_BS[row, start:end] = number + 1
                positions_BS[row, start:end] = np.arange(end - start)
            positions_BS[row, ends[-1] :] = 0
        return positions_BS, segments_BS

    def _mask(self) -> attention.Mask:
        positions_BS, segments_BS = self._documents()
        q = (a[:, -self.queries :] for a in (positions_BS, segments_BS))
        q_positions_BT, q_segments_BT = q
        return attention.Mask(
            *(q_positions_BT, positions_BS, q_segments_BT, segments_BS),
            window=self.window,
            in_order=self.context == 1,
        )

    def draw(self, key) -> tuple:
        """(q_BTNH, k_BSKH, v_BSKV, do_BTNV, mask).

        Every query looks hardest at the keys on both sides of every edge of its mask, so that one
        key too many or too few changes its output by a part of it that no rounding hides.
        """
        B, S, N, K = self.rows, self.tokens, self.heads, self.kv_heads
        k_BSKH = normal(key, 0, (B, S, K, self.width), self.dtype)
        v_BSKV = normal(key, 1, (B, S, K, self.value_width), self.dtype)
        do_BTNV = normal(key, 2, (B, self.queries, N, self.value_width), self.dtype)
        edges = {-1, 0, 1} | ({self.window - 1, self.window} if self.window else set())
        edges = {distance for distance in edges if abs(distance) < S}
        near_BSKH = jnp.zeros(k_BSKH.shape)
        for distance in sorted(edges):
            near_BSKH += jnp.roll(k_BSKH.astype(jnp.float32), distance, axis=1)
        # each with as much weight as all other keys together
        hard = (np.log(S) + 1) * self.width**-0.5
        aim_BTKH = hard * near_BSKH[:, -self.queries :]
        q_BTNH = jnp.repeat(aim_BTKH, N // K, axis=2)
        q_BTNH += 0.3 * normal(key, 3, (B, self.queries, N, self.width))
        mask = jax.tree.map(jnp.asarray, self._mask())

        def hide(x, segments):
            return jnp.where(segments[:, :, None, None] > 0, x, HUGE).astype(self.dtype)

        q, do = (hide(x, mask.q_segments_BT) for x in (q_BTNH, do_BTNV))
        k, v = (hide(x, mask.kv_segments_BS) for x in (k_BSKH, v_BSKV))
        return q, k, v, do, mask

    def results(self, implementation, device):
        def run(q, k, v, do, mask):
            def forward(q, k, v):
                return attention.attention(
                    q, k, v, mask, scale=self.scale, implementation=implementation, device=device
                )

            o, back = jax.vjp(forward, q, k, v)
            return dict(zip(("o", "dq", "dk", "dv"), (o, *back(do)), strict=True))

        return run

    def reference(self):
        """One query head at a time: of all of them the scores would not fit."""

        def run(q_BTNH, k_BSKH, v_BSKV, do_BTNV, mask):
            K, G = self.kv_heads, self.heads // self.kv_heads

            def head(inputs):
                n, q_BTH, do_BTV = inputs
                k_BSH, v_BSV = (x[:, :, n // G].astype(jnp.float32) for x in (k_BSKH, v_BSKV))

                def forward(q_BTH, k_BSH, v_BSV):
                    one = (q_BTH[:, None, None], k_BSH[:, None], v_BSV[:, None])
                    return attention.reference(*one, mask, self.scale, None)[:, 0, 0]

                o_BTV, back = jax.vjp(forward, q_BTH.astype(jnp.float32), k_BSH, v_BSV)
                return o_BTV, *back(do_BTV.astype(jnp.float32))

            heads = (
                jnp.arange(self.heads),
                jnp.moveaxis(q_BTNH, 2, 0),
                jnp.moveaxis(do_BTNV, 2, 0),
            )
            o, dq, dk, dv = (jnp.moveaxis(x, 0, 2) for x in jax.lax.map(head, heads))
            dk, dv = (x.reshape(*x.shape[:2], K, G, -1).sum(axis=3) for x in (dk, dv))
            return {"o": o, "dq": dq, "dk": dk, "dv": dv}

        return run

    def operations(self):
        seen = np.arange(self.tokens - self.queries, self.tokens) + 1  # of a whole document
        pairs = int(np.minimum(seen, self.window or self.tokens).sum()) * self.rows * self.heads
        return 2.0 * pairs * (4 * self.width + 3 * self.value_width)

    def traffic(self):
        return 0.0

    def at_work(self, tokens):
        return replace(self, tokens=tokens, rows=1)
