"""What experts have room for in training: which of a row's assignments are dropped.

A row is cut into pieces of ``PIECE`` tokens. Of each piece an expert takes ``capacity`` times an
even share of the assignments, rounded up, and a token is dropped by an expert that as many earlier
tokens of the piece chose. So nothing but the row itself decides, each token by those before it: not
other rows, the microbatch, the mesh or how tokens reach their experts. It is the grouping of GShard
(arXiv 2006.16668, 2.2) with groups that no layout cuts differently.

Pieces and not whole rows: a device that holds a part of a long row (context parallelism) needs
buffers for the pieces it touches instead of for all the row's room, and a full expert takes tokens
again in the next piece instead of none until the row ends.

Shape suffixes: B rows, T tokens of a row that this device has, K experts per token, E experts,
P pieces of a row, S devices that share a row.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

PIECE = 4096


def room(tokens: int, top_k: int, experts: int, capacity: float) -> int:
    """Assignments that an expert takes of one piece of a row of ``tokens`` tokens."""
    return math.ceil(min(tokens, PIECE) * top_k * capacity / experts)


def pieces_touched(tokens: int, parts: int) -> int:
    """Of how many pieces one of a row's equal ``parts`` has tokens, at most."""
    T = tokens // parts
    return max(((i + 1) * T - 1) // PIECE - i * T // PIECE + 1 for i in range(parts))


def fitted(place_BTK, experts: int, room: int, axis: str | None = None):
    """The assignments with those that find no room sent nowhere.

    Args:
      place_BTK: int32 experts in any order; E for an assignment that goes nowhere. A token's
        experts are different ones.
      room: see :func:`room`.
      axis: the mesh axis along which a row is cut, inside ``shard_map``; None for whole rows.

    Returns:
      (place_BTK with E in the place of what is dropped, dropped_E: float32 counts of this device).
    """
    T = place_BTK.shape[1]
    mine, parts = (0, 1) if axis is None else (jax.lax.axis_index(axis), jax.lax.axis_size(axis))
    hit_BTE = jnp.any(place_BTK[..., None] == jnp.arange(experts), axis=2)
    # how often an expert was chosen before each of our tokens, and after the last
    sum_BTE = jnp.pad(jnp.cumsum(hit_BTE, axis=1, dtype=jnp.int32), ((0, 0), (1, 0), (0, 0)))
    first, pieces = mine * T, math.ceil(parts * T / PIECE)
    edges = jnp.clip(jnp.arange(pieces + 1) * PIECE - first, 0, T)
    edge_BPE = sum_BTE[:, edges]
    before_BPE = edge_BPE[:, :-1]
    if axis is not None:
        count_SBPE = jax.lax.all_gather(jnp.diff(edge_BPE, axis=1), axis)
        earlier_S = jnp.arange(parts) < mine
        before_BPE -= jnp.einsum("SBPE,S->BPE", count_SBPE, earlier_S.astype(jnp.int32))
    piece_T = (first + jnp.arange(T)) // PIECE
    fits_BTE = sum_BTE[:, :-1] - before_BPE[:, piece_T] < room
    fits_BTK = jnp.take_along_axis(fits_BTE, place_BTK, axis=-1, mode="clip")
    dropped_E = jnp.sum(hit_BTE & ~fits_BTE, (0, 1), dtype=jnp.float32)
    return jnp.where(fits_BTK, place_BTK, experts), dropped_E
