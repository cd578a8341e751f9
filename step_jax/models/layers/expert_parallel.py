"""Moving tokens to the devices that hold their experts, and the results back.

Everything here runs inside ``shard_map``: it sees one device's tokens and one device's experts.
Shape suffixes: N tokens of this device (of the whole expert axis after a gather), K experts per
token, D model width, M rows of sorted assignments, P expert shards, e experts of one shard,
E = P e experts in the order of the shards that hold them.

An assignment is one (token, expert) pair, number ``n K + k``. Two exchanges give the same result:

* ``gather``: every shard of the expert axis gets all its tokens (all-gather), computes those meant
  for its experts, and the shards' results are added up (reduce-scatter). Any backend.
* ``ragged``: each assignment's row travels to the one shard that needs it (ragged all-to-all).
  It moves K / P of what ``gather`` moves. TPU; elsewhere the collective is emulated.

Nothing is dropped here: a shard's buffer holds whatever can be sent to it (:func:`rows_needed`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from step_jax.core.sharding import vary_alike

Exchange = Literal["gather", "ragged"]


def rows_needed(tokens: int, top_k: int, shards: int, shard_experts: int, room: int | None = None):
    """Rows that a shard can be sent at most, by ``tokens`` tokens on each of ``shards`` devices.

    Args:
      room: assignments that an expert takes of such tokens (``models.layers.capacity``); None for
        all of them.
    """
    most = tokens * min(top_k, shard_experts)
    return shards * (most if room is None else min(most, room * shard_experts))


def apply_experts(
    experts: Callable,
    x_ND,
    place_NK,
    weight_NK,
    *,
    shards: int,
    shard_experts: int,
    exchange: Exchange,
    rows: int,
    emulate: bool,
    axis: str = "expert",
):
    """The weighted sum of every token's experts.

    Args:
      experts: (rows_MD sorted by expert, sizes_e) -> (rows_MD, anything); rows past the sizes are
        zero.
      x_ND: this device's tokens.
      place_NK: int32 experts in shard order; E for an assignment that goes nowhere.
      weight_NK: float32.
      rows: of a shard's buffer, as many as it can be sent.
      emulate: the backend has no ragged all-to-all.

    Returns:
      (y_ND in ``x_ND.dtype``, what ``experts`` gave besides).
    """
    if shards > 1 and exchange == "ragged":
        move = _Ragged(place_NK, shards, shard_experts, rows, emulate, axis)
        return move.there_and_back(experts, x_ND, weight_NK)
    if shards > 1:
        gather = functools.partial(jax.lax.all_gather, axis_name=axis, tiled=True)
        x_ND, place_NK, weight_NK = gather(x_ND), gather(place_NK), gather(weight_NK)
        place_NK = place_NK - jax.lax.axis_index(axis) * shard_experts
    elsewhere_NK = (place_NK < 0) | (place_NK >= shard_experts)
    place_NK = jnp.where(elsewhere_NK, shard_experts, place_NK)
    order_M, inverse_NK, sizes_e = _sorted(place_NK, shard_experts)
    order_M = order_M[:rows]
    done_MD, more = experts(spread(x_ND, order_M, inverse_NK), sizes_e)
    y_ND = combine(*vary_alike(done_MD, weight_NK), order_M, inverse_NK)
    if shards > 1:
        y_ND = jax.lax.psum_scatter(y_ND, axis, scatter_dimension=0, tiled=True)
    return y_ND, more


def _sorted(key, kinds: int):
    """(order_M, inverse like ``key``, sizes): a stable sort of assignments by ``key``.

    Keys of ``kinds`` and above come last and count in no size.
    """
    flat_M = key.reshape(-1)
    order_M = jnp.argsort(flat_M, stable=True).astype(jnp.int32)
    index_M = jnp.arange(flat_M.size, dtype=jnp.int32)
    inverse_M = jnp.zeros_like(order_M).at[order_M].set(index_M, unique_indices=True)
    # comparisons, not searchsorted: in a pipeline's stage jax (0.12) takes its result to vary over
    # the pipeline axis as well
    sizes = jnp.sum(flat_M == jnp.arange(kinds)[:, None], axis=1, dtype=jnp.int32)
    return order_M, inverse_M.reshape(key.shape), sizes


def _rows(a_MD, index):
    return a_MD.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def spread(x_ND, order_M, inverse_NK):
    """Each assignment's token, in sorted order: (M, D). Its gradient is a gather too."""
    return x_ND[order_M // inverse_NK.shape[1]]


def _spread_forward(x_ND, order_M, inverse_NK):
    return spread(x_ND, order_M, inverse_NK), inverse_NK


def _spread_backward(inverse_NK, g_MD):
    columns = (inverse_NK[:, k] for k in range(inverse_NK.shape[1]))
    return sum(_rows(g_MD, index_N) for index_N in columns), None, None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def combine(rows_MD, weight_NK, order_M, inverse_NK):
    """Sum over a token's assignments of weight times row, float32 inside: (N, D)."""
    total_ND = jnp.zeros((weight_NK.shape[0], rows_MD.shape[1]), jnp.float32)
    for k in range(weight_NK.shape[1]):  # never (N, K, D) at once
        row_ND = _rows(rows_MD, inverse_NK[:, k]).astype(jnp.float32)
        total_ND += weight_NK[:, k, None] * row_ND
    return total_ND.astype(rows_MD.dtype)


def _combine_forward(rows_MD, weight_NK, order_M, inverse_NK):
    kept = rows_MD, weight_NK, order_M, inverse_NK
    return combine(*kept), kept


def _combine_backward(residuals, g_ND):
    rows_MD, weight_NK, order_M, inverse_NK = residuals
    weight_M = weight_NK.reshape(-1)[order_M]
    g_MD = weight_M[:, None] * g_ND[order_M // weight_NK.shape[1]].astype(jnp.float32)

    def product(k: int):
        row_ND = _rows(rows_MD, inverse_NK[:, k]).astype(jnp.float32)
        return jnp.sum(row_ND * g_ND.astype(jnp.float32), -1)

    dweight_NK = jnp.stack([product(k) for k in range(weight_NK.shape[1])], axis=1)
    return g_MD.astype(rows_MD.dtype), dweight_NK, None, None


combine.defvjp(_combine_forward, _combine_backward)


class _Ragged:
    """What every shard sends to every other, known to all of them from the experts' counts."""

    def __init__(self, place_NK, shards: int, shard_experts: int, rows: int, emulate, axis: str):
        me = jax.lax.axis_index(axis)
        self.order_M, self.inverse_NK, counts_E = _sorted(place_NK, shards * shard_experts)
        counts_PPe = jax.lax.all_gather(counts_E, axis).reshape(shards, shards, shard_experts)
        sent_PP = jnp.sum(counts_PPe, -1)  # (from, to)
        start_PP = jnp.cumsum(sent_PP, 1) - sent_PP  # in the sender's sorted rows
        place_PP = jnp.cumsum(sent_PP, 0) - sent_PP  # in the receiver's buffer
        # (offset here, size, offset there, size received) of each peer
        self.there = (start_PP[me], sent_PP[me], place_PP[me], sent_PP[:, me])
        self.back = (place_PP[:, me], sent_PP[:, me], start_PP[:, me], sent_PP[me])
        self.rows, self.emulate, self.axis = rows, emulate, axis
        # received: source after source, each sorted by expert
        bounds = jnp.cumsum(counts_PPe[:, me].reshape(-1))
        run_M = jnp.sum(jnp.arange(rows)[:, None] >= bounds, axis=1)
        expert_M = jnp.where(run_M < bounds.size, run_M % shard_experts, shard_experts)
        self.by_expert, self.by_source, self.sizes_e = _sorted(expert_M[:, None], shard_experts)

    def there_and_back(self, experts, x_ND, weight_NK):
        rows_MD = spread(x_ND, self.order_M, self.inverse_NK)
        there = (self.there, self.back)
        here_MD = exchange_rows(rows_MD, *there, self.rows, self.emulate, self.axis)
        # a permutation of rows is a spread of one assignment a token
        sorted_MD = spread(here_MD, self.by_expert, self.by_source)
        done_MD, more = experts(sorted_MD, self.sizes_e)
        source_M1, expert_M = self.by_expert[:, None], self.by_source[:, 0]
        done_MD = spread(done_MD, expert_M, source_M1)
        home_MD = exchange_rows(
            done_MD, self.back, self.there, rows_MD.shape[0], self.emulate, self.axis
        )
        return combine(*vary_alike(home_MD, weight_NK), self.order_M, self.inverse_NK), more


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def exchange_rows(rows_MD, plan, reverse, out_rows: int, emulate: bool, axis: str):
    """Rows sent as ``plan`` says; (out_rows, D), zero where nothing arrives.

    plan, reverse: (P,) int32 each of: offset in our rows, size, offset in the peer's result, size
    received; ``reverse`` is the plan of the way back, which is what the gradient takes.
    """
    if emulate:
        return _emulated(rows_MD, plan, out_rows, axis)
    out_MD = jnp.zeros((out_rows, rows_MD.shape[1]), rows_MD.dtype)
    _, out_MD = vary_alike(rows_MD, out_MD)
    return jax.lax.ragged_all_to_all(rows_MD, out_MD, *plan, axis_name=axis)


def _emulated(rows_MD, plan, out_rows: int, axis: str):
    start_P, _, _, received_P = plan
    all_PMD = jax.lax.all_gather(rows_MD, axis)
    start_PP = jax.lax.all_gather(start_P, axis)
    first_P = _offsets(plan, axis)
    index_M = jnp.arange(out_rows)
    inside_PM = (index_M >= first_P[:, None]) & (index_M < (first_P + received_P)[:, None])
    peer_M = jnp.argmax(inside_PM, 0)
    row_M = start_PP[peer_M, jax.lax.axis_index(axis)] + index_M - first_P[peer_M]
    flat = peer_M * all_PMD.shape[1] + row_M
    flat = jnp.where(jnp.any(inside_PM, 0), flat, all_PMD.shape[0] * all_PMD.shape[1])
    return _rows(all_PMD.reshape(-1, all_PMD.shape[-1]), flat)


def _offsets(plan, axis: str):
    """Where each peer's rows start in our result."""
    there_PP = jax.lax.all_gather(plan[2], axis)
    return there_PP[:, jax.lax.axis_index(axis)]


def _exchange_forward(rows_MD, plan, reverse, out_rows, emulate, axis):
    out_MD = exchange_rows(rows_MD, plan, reverse, out_rows, emulate, axis)
    return out_MD, (plan, reverse, jnp.zeros((0, rows_MD.shape[0])))


def _exchange_backward(out_rows, emulate, axis, residuals, g_MD):
    plan, reverse, like = residuals
    return exchange_rows(g_MD, reverse, plan, like.shape[1], emulate, axis), None, None


exchange_rows.defvjp(_exchange_forward, _exchange_backward)
