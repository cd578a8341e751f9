"""Faults put into kernels on purpose, by which their check is checked.

Each is a function of a monkeypatch that changes one piece of a kernel as a wrong edit, compiler or
chip would: what is left computes, and most of its results are right.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tpu import attention as tpu_attention
from pallas_kernels.tpu import attention_backward, attention_forward, block_sizes, visits
from pallas_kernels.tpu import cross_entropy as tpu_cross_entropy
from pallas_kernels.tpu import decode as tpu_decode
from pallas_kernels.tpu import grouped_matmul as tpu_grouped_matmul

# --- attention ------------------------------------------------------------------------------------


def _may_see(patch, seen):
    patch.setattr(visits.Pattern, "may_see", seen)


def one_later_key(patch):
    """The edge of causality one too far."""
    _may_see(patch, lambda self, d: (d >= -1) & ((d < self.window) if self.window else True))


def not_itself(patch):
    """The edge of causality one too near."""
    _may_see(patch, lambda self, d: (d >= 1) & ((d < self.window) if self.window else True))


def window_too_long(patch):
    _may_see(patch, lambda self, d: (d >= 0) & ((d <= self.window) if self.window else True))


def window_too_short(patch):
    _may_see(patch, lambda self, d: (d >= 0) & ((d < self.window - 1) if self.window else True))


def _changed_plan(patch, change):
    """``change(visits_BW) -> visits_BW`` of every plan."""
    plan = tpu_attention.plan

    def changed(*arguments):
        visits_BW, steps = plan(*arguments)
        return change(visits_BW), steps

    patch.setattr(tpu_attention, "plan", changed)


def dropped_block(patch):
    """The second visit of a row computes nothing."""
    work = visits.COMPUTE | visits.MASKED
    _changed_plan(patch, lambda v_BW: v_BW.at[:, 1].set(v_BW[:, 1] & ~work))


def blocks_without_their_mask(patch):
    """Blocks at an edge are taken for whole ones."""
    _changed_plan(patch, lambda v_BW: v_BW & ~visits.MASKED)


def documents_see_each_other(patch):
    """Blocks within one row are masked by position alone."""
    attention = tpu_attention._attention

    def one_document(static, q, k, v, arrays):
        q_positions, q_segments, kv_positions, kv_segments = arrays
        one = (jnp.minimum(q_segments, 1), jnp.minimum(kv_segments, 1))
        return attention(static, q, k, v, (q_positions, one[0], kv_positions, one[1]))

    patch.setattr(tpu_attention, "_attention", one_document)


def padding_is_read(patch):
    """Keys behind the last document count."""
    attention = tpu_attention._attention

    def all_kept(static, q, k, v, arrays):
        q_positions, q_segments, kv_positions, kv_segments = arrays
        kept = jnp.where(kv_segments < 0, 4, kv_segments)
        return attention(static, q, k, v, (q_positions, q_segments, kv_positions, kept))

    patch.setattr(tpu_attention, "_attention", all_kept)


def nan_beyond_the_row(patch):
    """Rows are not filled up to whole blocks: what lies behind them is read."""
    pad = tpu_attention._pad

    def garbage(x, length, axis, value=0):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return pad(x, length, axis, jnp.nan if floating else value)

    patch.setattr(tpu_attention, "_pad", garbage)


def first_block_not_cleared(patch):
    """Sums begin with what the scratch memory holds."""
    _changed_plan(patch, lambda v_BW: v_BW & ~visits.FIRST)


def a_block_never_written(patch):
    """The results of the last block of queries are what memory held before."""
    forward = tpu_attention.forward

    def lost(*arguments, **options):
        o, lse = forward(*arguments, **options)
        return o.at[:, :, :, -block_sizes.LANES :].set(jnp.nan), lse

    patch.setattr(tpu_attention, "forward", lost)


def a_head_reads_its_neighbour(patch):
    """One head of a key head's group is computed with the queries of another."""
    forward = tpu_attention.forward

    def mixed(visits_, tokens, q_BKGTH, *rest, **options):
        return forward(visits_, tokens, q_BKGTH.at[:, :, 1].set(q_BKGTH[:, :, 0]), *rest, **options)

    patch.setattr(tpu_attention, "forward", mixed)


def gradient_of_keys_not_scaled(patch):
    backward = tpu_attention.backward_of_chunk

    def unscaled(*arguments, scale, **options):
        dq, dk, dv = backward(*arguments, scale=scale, **options)
        return dq, dk / scale, dv

    patch.setattr(tpu_attention, "backward_of_chunk", unscaled)


def products_rounded(patch):
    """Float32 is multiplied as bfloat16."""
    for module in (attention_forward, attention_backward):
        product = module.product

        def rounded(a, b, contract, product=product):
            a, b = (x.astype(jnp.bfloat16) for x in (a, b))
            return product(a, b, contract)

        patch.setattr(module, "product", rounded)


# --- products -------------------------------------------------------------------------------------


def rows_of_no_group_are_added(patch):
    """What another group's rows hold, NaN behind the last, reaches the gradient of the matrices."""
    parts = tpu_grouped_matmul._parts

    def all_own(lo, hi, block, body):
        parts(lo, hi, block, lambda rows, own_R1: body(rows, jnp.ones_like(own_R1)))

    patch.setattr(tpu_grouped_matmul, "_parts", all_own)


def border_one_row_off(patch):
    own = tpu_grouped_matmul._own

    def shifted(group_V, block_V, border_C, v, block):
        lo, hi = own(group_V, block_V, border_C, v, block)
        return lo, jnp.where(hi < block, jnp.maximum(hi - 1, lo), hi)

    patch.setattr(tpu_grouped_matmul, "_own", shifted)


def a_visit_left_out(patch):
    """The grid is one visit short."""
    made = tpu_grouped_matmul._visits

    def fewer(*arguments, **options):
        count, tables = made(*arguments, **options)
        return count - 1, tables

    patch.setattr(tpu_grouped_matmul, "_visits", fewer)


def words_beyond_the_last(patch):
    """What is read past the vocabulary counts."""
    patch.setattr(
        tpu_cross_entropy, "_each_block", lambda block, width, vocabulary, body: body(None)
    )


def last_word_left_out(patch):
    logits = tpu_cross_entropy._logits

    def fewer(x, w, target, logits_Tv, block, end, by_words):
        return logits(x, w, target, logits_Tv, block, None if end is None else end - 1, by_words)

    patch.setattr(tpu_cross_entropy, "_logits", fewer)


# --- decoding -------------------------------------------------------------------------------------


def another_layer(patch):
    """The layer before the one that was asked for is read."""
    first = tpu_decode.DecodeCall.first_part
    patch.setattr(
        tpu_decode.DecodeCall, "first_part", lambda self: first(self) - self.k_cache.shape[-4]
    )


def _changed_visible(patch, change):
    visible = tpu_decode._visible_RC

    def changed(call, row_ref, position_BT, row, oldest, end, first_slot, lap_start):
        oldest, end = change(oldest, end)
        return visible(call, row_ref, position_BT, row, oldest, end, first_slot, lap_start)

    patch.setattr(tpu_decode, "_visible_RC", changed)


def slots_never_written(patch):
    """Every slot counts as stored: queries see what memory held."""

    def all_seen(call, row_ref, *rest):
        return jnp.ones((call.rows, call.cut.tile * call.K), bool)

    patch.setattr(tpu_decode, "_visible_RC", all_seen)


def oldest_key_forgotten(patch):
    _changed_visible(patch, lambda oldest, end: (oldest + 1, end))


def newest_key_forgotten(patch):
    _changed_visible(patch, lambda oldest, end: (oldest, end - 1))


def decode_window_too_long(patch):
    made = tpu_decode.make_plan
    visible = tpu_decode._visible_RC

    def longer(*arguments):
        *rest, window = arguments
        return made(*rest, window and window + 1)

    patch.setattr(tpu_decode, "make_plan", longer)
    patch.setattr(
        tpu_decode,
        "_visible_RC",
        lambda call, *rest: visible(call._replace(window=call.window and call.window + 1), *rest),
    )


def keys_rotated_one_position_off(patch):
    rotate = tpu_decode._rotate

    def off(q, k, base, *tables):
        return rotate(q, k, base + 1, *tables)

    patch.setattr(tpu_decode, "_rotate", off)


# --- any ------------------------------------------------------------------------------------------


def not_repeatable(patch, entries: dict, name: str):
    """Every call adds something else, far below what a bound could hold against it."""
    entry, calls = entries[name], itertools.count(1)

    def noisy(*arguments, **options):
        out = entry.compute(*arguments, **options)
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        noise = jax.pure_callback(lambda: np.float32(1e-6 * next(calls)), shape)
        return jax.tree.map(lambda o: (o * (1 + noise)).astype(o.dtype), out)

    patch.setitem(entries, name, dataclasses.replace(entry, compute=noisy))


#: The faults that each kernel is given, the likeliest first.
ATTENTION = (
    *(window_too_long, one_later_key, dropped_block, nan_beyond_the_row),
    *(window_too_short, not_itself, blocks_without_their_mask, documents_see_each_other),
    *(padding_is_read, first_block_not_cleared, a_block_never_written),
    *(a_head_reads_its_neighbour, gradient_of_keys_not_scaled, products_rounded),
)
GROUPED_MATMUL = (rows_of_no_group_are_added, border_one_row_off, a_visit_left_out)
CROSS_ENTROPY = (words_beyond_the_last, last_word_left_out)
DECODE = (
    *(slots_never_written, another_layer, oldest_key_forgotten, newest_key_forgotten),
    decode_window_too_long,
)
DECODE_OF_REUSED_KEYS = (keys_rotated_one_position_off,)
