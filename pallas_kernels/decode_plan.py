"""Which blocks of a cache a decoding step reads, and in which order: a list as long as the work.

Shape suffixes: B rows (sequences), T new tokens of a row, I items of the list, P splits.

Position p of a row lives in slot ``p % slots``. A row's stored positions, cut where a block of
slots or a lap of the ring ends, are its *blocks*, numbered by

    block(p) = p // slots * per_lap + p % slots // block,   per_lap = ceil(slots / block)

so that a cache longer than the text, a ring and a ring that is being overwritten in the middle of a
block (read once for either lap) are the same case. The blocks of all rows form one list, which is
cut into P equal splits whatever the rows' lengths are; a row in two splits has two partial results.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp


class Plan(NamedTuple):
    """Items of the list, int32.

    row_I: the row of every item (the last row beyond the end of the list).
    start_B1: (B + 1,) first item of every row; the last entry is the number of items.
    first_B: block number of a row's first item; the following ones count up.
    oldest_B, end_B: positions ``oldest <= p < end`` are stored and may be seen by a query.
    """

    row_I: jnp.ndarray
    start_B1: jnp.ndarray
    first_B: jnp.ndarray
    oldest_B: jnp.ndarray
    end_B: jnp.ndarray


def make_plan(positions_BT, lengths_B, slots: int, block: int, window: int | None) -> Plan:
    """The blocks that queries at ``positions_BT`` see of rows with ``lengths_B`` cached tokens.

    Args:
      positions_BT: int32 positions of the queries; negative ones see nothing.
      lengths_B: int32 tokens stored so far, those of this call included.
      slots: of a row. block: slots of a block.
      window: a query sees itself and the ``window - 1`` positions before it; None for all.
    """
    B = positions_BT.shape[0]
    per_lap = -(-slots // block)
    real_BT = positions_BT >= 0
    newest_B = jnp.max(positions_BT, axis=1)
    oldest_query_B = jnp.min(jnp.where(real_BT, positions_BT, jnp.iinfo(jnp.int32).max), axis=1)
    end_B = jnp.minimum(lengths_B, newest_B + 1)
    oldest_B = jnp.maximum(lengths_B - slots, 0)
    if window is not None:
        oldest_B = jnp.maximum(oldest_B, oldest_query_B - (window - 1))

    def number(position_B):
        return position_B // slots * per_lap + position_B % slots // block

    first_B = number(oldest_B)
    count_B = jnp.where(end_B > oldest_B, number(end_B - 1) - first_B + 1, 0)
    start_B1 = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count_B, dtype=jnp.int32)])
    # one block more than a lap: the one in which the newest and the oldest position meet
    item_I1 = jnp.arange(B * (per_lap + 1), dtype=jnp.int32)[:, None]
    row_I = jnp.sum(item_I1 >= start_B1[None, 1:], axis=1, dtype=jnp.int32)
    return Plan(jnp.minimum(row_I, B - 1), start_B1, first_B, oldest_B, end_B)


def touched_PB(plan: Plan, splits: int):
    """Whether a split holds an item of a row; without one it has no result for the row."""
    total = plan.start_B1[-1]
    per_split = -(-total // splits)
    begin_P1 = jnp.arange(splits, dtype=jnp.int32)[:, None] * per_split
    end_P1 = jnp.minimum(begin_P1 + per_split, total)
    first_1B, last_1B = plan.start_B1[None, :-1], plan.start_B1[None, 1:]
    return jnp.maximum(first_1B, begin_P1) < jnp.minimum(last_1B, end_P1)


def combine(o_PBRV, lse_PBR, touched_PB):
    """One result from those of the splits, float32; zeros for a row without any.

    ``lse_PBR`` is the base-2 logarithm of the sum of exponentials behind each partial result, as in
    split-key decoding (Flash-Decoding). Untouched partial results may hold anything.
    """
    touched_PB11 = touched_PB[:, :, None, None]
    lse_PBR1 = jnp.where(touched_PB11, lse_PBR[..., None], -jnp.inf)
    top_BR1 = jnp.max(lse_PBR1, axis=0)
    weight_PBR1 = jnp.exp2(lse_PBR1 - jnp.where(jnp.isfinite(top_BR1), top_BR1, 0.0))
    total_BR1 = jnp.sum(weight_PBR1, axis=0)
    o_BRV = jnp.sum(jnp.where(touched_PB11, o_PBRV, 0.0) * weight_PBR1, axis=0)
    return o_BRV / jnp.where(total_BR1 == 0.0, 1.0, total_BR1)
