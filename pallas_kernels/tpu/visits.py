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
_NO_VISIT = np.int32(2**31 - 1)  # names a key block that no row has


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

    def visited(self, queries: int, keys: int) -> float:
        """The share of ``candidates`` that a row of one document visits if its queries are the last
        of its keys: the most that any device has whose queries are a part of the row."""
        share = 1.0
        if self.causal and not self.in_order:
            share -= min(queries, keys) / (2 * keys)
        if self.window is not None and not self.in_order:
            share = min(share, self.window / keys)
        return share


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

    def of_queries(x_BQ):
        return x_BQ[:, :, None]

    def of_keys(x_BP):
        return x_BP[:, None]

    q_low, q_high = map(of_queries, _range(q_positions_BT, q_segments_BT, q_block))
    k_low, k_high = map(of_keys, _range(kv_positions_BS, kv_segments_BS, kv_block))
    qs_low, qs_high = map(of_queries, _range(q_segments_BT, q_segments_BT, q_block))
    ks_low, ks_high = map(of_keys, _range(kv_segments_BS, kv_segments_BS, kv_block))
    active_BQP = (qs_low <= ks_high) & (ks_low <= qs_high)
    # raw minima, empty slots included: a block with one is never seen whole
    B = q_segments_BT.shape[0]
    raw_q = of_queries(q_segments_BT.reshape(B, -1, q_block).min(-1))
    raw_k = of_keys(kv_segments_BS.reshape(B, -1, kv_block).min(-1))
    whole_BQP = (raw_q == qs_high) & (raw_k == ks_high) & (raw_q == raw_k) & (raw_q >= 0)
    if pattern.causal:
        active_BQP &= q_high >= k_low
        whole_BQP &= q_low >= k_high
    if pattern.window is not None:
        active_BQP &= q_low - k_high < pattern.window
        whole_BQP &= q_high - k_low < pattern.window
    flags_BQP = jnp.where(active_BQP, COMPUTE, 0) | jnp.where(active_BQP & ~whole_BQP, MASKED, 0)
    Q, P = flags_BQP.shape[1:]
    flags_BC = flags_BQP.reshape(B, Q * P)[:, q_C * P + kv_C]
    visit_C = jnp.asarray((q_C << 16) | (kv_C << 4), jnp.int32)
    return _compact(visit_C | flags_BC, (flags_BC != 0) | keep_C)


def _compact(visits_BC, kept_BC):
    """Kept visits first, in order, with the FIRST and LAST of each query block flagged."""
    # candidates are in ascending order, so to sort is to move what is not kept to the end
    visits_BC = jnp.sort(jnp.where(kept_BC, visits_BC, _NO_VISIT), axis=1)
    in_use_BC = visits_BC != _NO_VISIT
    # a row with fewer visits than another stays where it was and does nothing
    final_B1 = jnp.where(in_use_BC, visits_BC, 0).max(axis=1, keepdims=True)
    idle_B1 = final_B1 & ~(COMPUTE | MASKED)
    q_BC = jnp.where(in_use_BC, visits_BC >> 16, -1)
    first_BC = q_BC != jnp.pad(q_BC, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    last_BC = q_BC != jnp.pad(q_BC, ((0, 0), (0, 1)), constant_values=-1)[:, 1:]
    visits_BC |= jnp.where(first_BC, FIRST, 0) | jnp.where(last_BC, LAST, 0)
    count = in_use_BC.sum(axis=1, dtype=jnp.int32).max()
    return jnp.where(in_use_BC, visits_BC, idle_B1), count
