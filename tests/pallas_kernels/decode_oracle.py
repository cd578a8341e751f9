"""Decode attention once more, in float64 NumPy, one query and one head at a time; and its inputs.

Shape suffixes: B rows, T new tokens, N query heads, K key/value heads, H head width, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_call import DecodeCall

THETA = 10_000.0


def attention(q_BTNH, k_BSKH, v_BSKH, positions_BT, lengths_B, scale, window=None, theta=None):
    """(B, T, N, H) float64. ``v_BSKH`` None: keys are their own values before rotation."""
    q, k = np.asarray(q_BTNH, np.float64), np.asarray(k_BSKH, np.float64)
    v = k if v_BSKH is None else np.asarray(v_BSKH, np.float64)
    B, T, N, _ = q.shape
    S, K = k.shape[1:3]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        last = positions_BT[b, t]
        seen = [
            p
            for p in range(max(0, lengths_B[b] - S), lengths_B[b])
            if p <= last and (window is None or p > last - window)
        ]
        if not seen:
            continue
        slots, head = [p % S for p in seen], n // (N // K)
        keys, values = k[b, slots, head], v[b, slots, head]
        scores = (keys if theta is None else rotated(keys, seen, theta)) @ q[b, t, n] * scale
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ values
    return out


def rotated(x_SH, positions, theta):
    half = x_SH.shape[1] // 2
    turn_SF = np.exp(1j * np.outer(positions, theta ** (-np.arange(half) / half)))
    turned_SF = (x_SH[:, :half] + 1j * x_SH[:, half:]) * turn_SF
    return np.concatenate([turned_SF.real, turned_SF.imag], axis=1)


def frequency_F(theta, width):
    half = width // 2
    return (theta ** (-np.arange(half) / half)).astype(np.float32)


@dataclass
class Case:
    """Random inputs with ``T`` consecutive queries at the end of every row; -1 where there is none.

    Arrays are rounded to ``dtype`` first, so that the oracle sees what the kernel sees.
    """

    lengths: tuple[int, ...]
    slots: int
    tokens: int = 1
    heads: int = 4
    kv_heads: int = 1
    width: int = 128
    reuse: bool = False
    dtype: type = np.float32
    seed: int = 0

    def arrays(self):
        """(q_BTNH, k_BSKH, v_BSKH or None, positions_BT, lengths_B)."""
        rng = np.random.default_rng(self.seed)
        B, K, H = len(self.lengths), self.kv_heads, self.width

        def normal(*shape):
            return rng.standard_normal(shape).astype(np.float32).astype(self.dtype)

        q_BTNH = normal(B, self.tokens, self.heads, H)
        k_BSKH = normal(B, self.slots, K, H)
        v_BSKH = None if self.reuse else normal(B, self.slots, K, H)
        lengths_B = np.asarray(self.lengths, np.int32)
        positions_BT = lengths_B[:, None] - self.tokens + np.arange(self.tokens, dtype=np.int32)
        return q_BTNH, k_BSKH, v_BSKH, np.maximum(positions_BT, -1), lengths_B


def paged(caches, page: int, seed: int = 1):
    """(caches cut into pages that lie in random order in a pool, page_table_BM)."""
    B, S = caches[0].shape[:2]
    M = S // page
    order = np.random.default_rng(seed).permutation(B * M).astype(np.int32)

    def pool(cache):
        if cache is None:
            return None
        pages = np.empty((B * M, page, *cache.shape[2:]), cache.dtype)
        pages[order] = cache.reshape(pages.shape)
        return pages

    return tuple(pool(c) for c in caches), order.reshape(B, M)


def decoded(decode, case: Case, *, page=None, cache_dtype=None, window=None):
    """(what ``decode`` makes of the call of a case, what the oracle does, float64).

    Args:
      page: size of the pages the caches are cut into, None for no pages.
      cache_dtype: what the caches are rounded to, None for the case's.
    """
    q, k, v, positions, lengths = case.arrays()
    if cache_dtype is not None:
        k, v = (None if c is None else c.astype(cache_dtype) for c in (k, v))
    theta, scale = (THETA if case.reuse else None), case.width**-0.5
    caches, table = ((k, v), None) if page is None else paged((k, v), page)
    frequency = None if theta is None else jnp.asarray(frequency_F(theta, case.width))
    call = DecodeCall(
        q, *caches, positions, lengths, scale=scale, window=window, frequency_F=frequency,
        page_table_BM=table,
    )  # fmt: skip
    got = decode(call)
    assert got.dtype == q.dtype
    expected = attention(q, k, v, positions, lengths, scale, window, theta)
    return np.asarray(got, np.float64), expected
