"""Which pairs of query block and key block are computed, and in which order.

Shape suffixes: B batch, T queries, S keys, Q blocks of queries, P blocks of keys, C candidate pairs
of blocks, W visits.

A *visit* is one grid step of an attention kernel: one block of queries meets one block of keys.
Pairs of which nothing can be seen are not visited. What can be seen is read off the smallest and
largest position and document of each block, so it is exact for packed rows, for windows and for
queries that are a part of the row (context parallelism). A visit is one int32 that the kernel reads
from scalar memory: ``query block << 16 | key block << 4 | flags``.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

FIRST, LAST, COMPUTE, MASKED = 1, 2, 4, 8  # flags
MAX_QUERY_BLOCKS, MAX_KEY_BLOCKS = 1 << 15, 1 << 12
NO_QUERY, NO_KEY = -2, -1  # documents of empty slots: they never meet
_FAR = np.int32(2**30)


@dataclass(frozen=True)
class Pattern:
    """The static part of a mask.

    causal: keys at later positions are hidden.
    window: a query sees itself and the ``window - 1`` positions before it; None for all.
    in_order: queries and keys are the same tokens, and in a document positions rise with the index
      by at least one a token; so index alone proves that some blocks see nothing of each other.
    """

    causal: bool = True
    window: int | None = None
    in_order: bool = False

    def may_see(self, distance):
        """Whether a query may see a key that is ``distance`` positions before it."""
        seen = True
        if self.causal:
            seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        return seen


def candidates(pattern: Pattern, queries: int, keys: int, q_block: int, kv_block: int):
    """Pairs that indices alone do not exclude: int arrays (query block_C, key block_C), in order.

    Every block of queries has at least one, so that its rows are written.
    """
    q_Q1, kv_1P = np.arange(queries // q_block)[:, None], np.arange(keys // kv_block)[None]
    seen_QP = np.ones((q_Q1.size, kv_1P.size), bool)
    if pattern.in_order and pattern.causal:
        seen_QP &= q_Q1 * q_block + q_block - 1 >= kv_1P * kv_block
    if pattern.in_order and pattern.window is not None:
        seen_QP &= q_Q1 * q_block - (kv_1P * kv_block + kv_block - 1) < pattern.window
    seen_QP[:, 0] |= ~seen_QP.any(axis=1)
    return np.nonzero(seen_QP)


def _range(values_BT, segments_BT, block: int):
    """Least and greatest of each block's occupied slots; (far, -far) when all are empty."""
    B = values_BT.shape[0]
    occupied_BT = segments_BT >= 0
    low_BT = jnp.where(occupied_BT, values_BT, _FAR)
    high_BT = jnp.where(occupied_BT, values_BT, -_FAR)
    return low_BT.reshape(B, -1, block).min(-1), high_BT.reshape(B, -1, block).max(-1)


def plan(pattern: Pattern, pairs, q_positions_BT, q_segments_BT, kv_positions_BS, kv_segments_BS):
    """The visits of each row: (int32 (B, C), the greatest number of visits of a row).

    Args:
      pattern: the static part of the mask.
      pairs: ``(query block_C, key block_C, q_block, kv_block, keep_C)``; where ``keep_C`` the pair
        is visited even if it sees nothing (its query block's rows have to be written).
      positions, segments: int32; the segments of empty slots are ``NO_QUERY`` and ``NO_KEY``.
    """
    q_C, kv_C, q_block, kv_block, keep_C = pairs
    q_low, q_high = (x[:, q_C] for x in _range(q_positions_BT, q_segments_BT, q_block))
    k_low, k_high = (x[:, kv_C] for x in _range(kv_positions_BS, kv_segments_BS, kv_block))
    qs_low, qs_high = (x[:, q_C] for x in _range(q_segments_BT, q_segments_BT, q_block))
    ks_low, ks_high = (x[:, kv_C] for x in _range(kv_segments_BS, kv_segments_BS, kv_block))
    active_BC = (qs_low <= ks_high) & (ks_low <= qs_high)
    # raw minima, empty slots included: a block with one is never seen whole
    raw_q = q_segments_BT.reshape(q_low.shape[0], -1, q_block).min(-1)[:, q_C]
    raw_k = kv_segments_BS.reshape(k_low.shape[0], -1, kv_block).min(-1)[:, kv_C]
    whole_BC = (raw_q == qs_high) & (raw_k == ks_high) & (raw_q == raw_k) & (raw_q >= 0)
    if pattern.causal:
        active_BC &= q_high >= k_low
        whole_BC &= q_low >= k_high
    if pattern.window is not None:
        active_BC &= q_low - k_high < pattern.window
        whole_BC &= q_high - k_low < pattern.window
    flags_BC = jnp.where(active_BC, COMPUTE, 0) | jnp.where(active_BC & ~whole_BC, MASKED, 0)
    visit_C = jnp.asarray((q_C << 16) | (kv_C << 4), jnp.int32)
    return _compact(visit_C | flags_BC, active_BC | keep_C)


def _compact(visits_BC, kept_BC):
    """Kept visits first, in order, with the FIRST and LAST of each query block flagged."""
    order_BC = jnp.argsort(~kept_BC, axis=1, stable=True)
    visits_BC = jnp.take_along_axis(visits_BC, order_BC, axis=1)
    count_B1 = kept_BC.sum(axis=1, keepdims=True, dtype=jnp.int32)
    slot_BC = jnp.arange(visits_BC.shape[1], dtype=jnp.int32)[None]
    in_use_BC = slot_BC < count_B1
    q_BC = jnp.where(in_use_BC, visits_BC >> 16, -1)
    first_BC = q_BC != jnp.pad(q_BC, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    last_BC = q_BC != jnp.pad(q_BC, ((0, 0), (0, 1)), constant_values=-1)[:, 1:]
    visits_BC |= jnp.where(first_BC, FIRST, 0) | jnp.where(last_BC, LAST, 0)
    # a row with fewer visits than another stays where it was and does nothing
    final_B1 = jnp.take_along_axis(visits_BC, count_B1 - 1, axis=1)
    idle_B1 = final_B1 & ~(FIRST | LAST | COMPUTE | MASKED)
    return jnp.where(in_use_BC, visits_BC, idle_B1), count_B1.max()
