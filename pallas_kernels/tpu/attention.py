"""Attention of many query heads on one or few shared key/value heads, for TPU.

Shape suffixes: B batch, K key/value heads, G query heads of one key head, T queries, S keys, H
width of queries and keys, V width of values, 1 an axis of one.

Forward and backward are one kernel each (``attention_forward``, ``attention_backward``). Masks are
positions and documents; blocks that see nothing are not visited (``visits``).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.tpu import block_sizes, chips
from pallas_kernels.tpu.attention_backward import backward_of_chunk
from pallas_kernels.tpu.attention_forward import forward
from pallas_kernels.tpu.chips import CHIPS, TABLES
from pallas_kernels.tpu.visits import NO_KEY, NO_QUERY, Pattern, candidates, plan


@dataclass(frozen=True)
class _Static:
    pattern: Pattern
    scale: float
    chip: str
    sizes: block_sizes.Sizes
    packed: bool
    interpret: Any


def attention(
    q_BKGTH,
    k_BKSH,
    v_BKSV,
    q_positions_BT,
    kv_positions_BS,
    q_segments_BT=None,
    kv_segments_BS=None,
    *,
    pattern: Pattern,
    scale: float,
    chip: str,
    sizes: block_sizes.Sizes | None = None,
    interpret: Any = False,
):
    """Softmax attention and its log-sum-exp; both can be differentiated.

    Args:
      q_BKGTH, k_BKSH, v_BKSV: of one dtype, bfloat16 or float32; widths of ``WIDTHS``.
      q_positions_BT, kv_positions_BS: int32 positions in the document; a negative one is an empty
        slot, seen by nobody.
      q_segments_BT, kv_segments_BS: int32 documents of a packed row, 0 for padding; None if a row
        is one document.
      pattern: causality and window.
      scale: of the scores; positive.
      chip: what is compiled for, a key of ``chips.CHIPS``.
      sizes: block sizes; None for the table's.
      interpret: as in ``pallas_call``.

    Returns:
      (o_BKGTV in the queries' dtype, lse_BKGT float32 of natural base). A query that may see
      nothing has a zero output, and a log-sum-exp below -1e27 * scale.

    Raises:
      ValueError: an unsupported dtype, width, chip or block size, or shapes that do not fit each
        other; the message says what is.
    """
    q, k = (q_positions_BT, q_segments_BT), (kv_positions_BS, kv_segments_BS)
    _check_shapes(q_BKGTH, k_BKSH, v_BKSV, q, k, pattern)
    B, K, G, T, H = q_BKGTH.shape
    S, V = v_BKSV.shape[2:]
    dtypes = {x.dtype.name for x in (q_BKGTH, k_BKSH, v_BKSV)}
    if len(dtypes) > 1:
        raise ValueError(f"queries, keys and values must have one dtype, not {sorted(dtypes)}")
    computed = G
    if sizes is None and not chips.unsupported(chip):
        computed = block_sizes.computed_heads(chip, B * K, G)
    shape = block_sizes.Shape(computed, T, S, H, V, q_BKGTH.dtype.itemsize)
    reason = block_sizes.unsupported(chip, shape, q_BKGTH.dtype.name)
    if reason is None and not scale > 0:
        reason = f"the scale {scale} is not positive"
    if reason is not None:
        raise ValueError(f"TPU attention: {reason}")
    if sizes is None:
        sizes = block_sizes.fit(chip, shape)
    else:
        block_sizes.check(chip, shape, sizes)
    packed = q_segments_BT is not None
    static = _Static(pattern, float(scale), chip, sizes, packed, interpret)
    if not packed:
        q_segments_BT, kv_segments_BS = (
            jnp.ones_like(x) for x in (q_positions_BT, kv_positions_BS)
        )
    q_segments_BT = jnp.where(q_segments_BT > 0, q_segments_BT, NO_QUERY)
    empty_BS = (kv_segments_BS <= 0) | (kv_positions_BS < 0)
    kv_segments_BS = jnp.where(empty_BS, NO_KEY, kv_segments_BS)
    arrays = (q_positions_BT, q_segments_BT, kv_positions_BS, kv_segments_BS)
    o_BKGTV, lse_BKGT = _attention(static, _pad(q_BKGTH, computed, 2), k_BKSH, v_BKSV, arrays)
    return o_BKGTV[:, :, :G], lse_BKGT[:, :, :G]


def _check_shapes(q_BKGTH, k_BKSH, v_BKSV, of_queries, of_keys, pattern: Pattern) -> None:
    """Refuses arrays that do not fit each other; ``of_...`` are (positions, segments or None)."""
    shapes = q_BKGTH.shape, k_BKSH.shape, v_BKSV.shape
    B, K, _, T, H = q_BKGTH.shape if q_BKGTH.ndim == 5 else (0,) * 5
    S, V = v_BKSV.shape[2:] if v_BKSV.ndim == 4 else (0, 0)
    if shapes[1:] != ((B, K, S, H), (B, K, S, V)) or 0 in (*shapes[0], *shapes[2]):
        raise ValueError(
            "TPU attention: expected queries (B, K, G, T, H), keys (B, K, S, H) and values "
            f"(B, K, S, V), none of them empty, got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    for name, arrays, shape in (("queries", of_queries, (B, T)), ("keys", of_keys, (B, S))):
        for array in arrays:
            if array is not None and array.shape != shape:
                raise ValueError(
                    f"TPU attention: positions and segments of the {name} must be {shape}, got "
                    f"{array.shape}"
                )
    if (of_queries[1] is None) != (of_keys[1] is None):
        raise ValueError("TPU attention: segments of the queries and of the keys go together")
    if pattern.window is not None and pattern.window < 1:
        raise ValueError(f"TPU attention: window must be at least 1, got {pattern.window}")
    if pattern.in_order and T != S:
        raise ValueError(
            f"TPU attention: queries and keys in order are the same tokens, got {T} and {S}"
        )


def _pad(x, length: int, axis: int, value=0):
    amount = length - x.shape[axis]
    if amount == 0:
        return x
    return jnp.pad(
        x, [(0, amount if i == axis else 0) for i in range(x.ndim)], constant_values=value
    )


def _tokens(arrays, shape):
    """Positions and documents of whole blocks: each (B, 1, tokens)."""
    q_positions_BT, q_segments_BT, kv_positions_BS, kv_segments_BS = arrays
    return tuple(
        _pad(x.astype(jnp.int32), n, 1, value)[:, None]
        for x, n, value in (
            (q_positions_BT, shape.queries, 0),
            (q_segments_BT, shape.queries, NO_QUERY),
            (kv_positions_BS, shape.keys, 0),
            (kv_segments_BS, shape.keys, NO_KEY),
        )
    )


def _visits(static: _Static, arrays_B1T, s, pairs, keep_C):
    """See ``visits.plan``; ``pairs``: (query block_C, key block_C) of candidates."""
    arrays = (x[:, 0] for x in arrays_B1T)
    visits_BW, steps = plan(static.pattern, (*pairs, s.q_block, s.kv_block, keep_C), *arrays)
    # in-order rows of one document visit all candidates: a static grid
    return visits_BW, steps if static.packed or not static.pattern.in_order else pairs[0].size


def _most_visits(rows: int) -> int:
    """Of a row, such that the tables of all rows fit the scalar memory."""
    return max(TABLES // (4 * rows), 1)


def _of_queries(q_C, most: int):
    """Ranges of query blocks, each of at most ``most`` candidates or one block: (first, last + 1,
    the candidates' slice). All are one range but for very long rows."""
    count_Q, ranges, first = np.bincount(q_C), [], 0
    end_Q = np.cumsum(count_Q)
    while first < count_Q.size:
        done = end_Q[first] - count_Q[first]
        last = max(int(np.searchsorted(end_Q, done + most, side="right")), first + 1)
        ranges.append((first, last, slice(int(done), int(end_Q[last - 1]))))
        first = last
    return ranges


def _of_keys(q_C, kv_C, blocks: range):
    """(candidates, which are kept) of a chunk of keys; at least one: a gradient must be written."""
    inside_C = (kv_C >= blocks.start) & (kv_C < blocks.stop)
    if not inside_C.any():  # nobody may look at these keys
        q_C, kv_C, inside_C = q_C[:1] * 0, kv_C[:1] * 0 + blocks.start, np.ones(1, bool)
    pairs = q_C[inside_C], kv_C[inside_C]
    return pairs, np.arange(pairs[0].size) == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q_BKGTH, k_BKSH, v_BKSV, arrays):
    (o_BKGTV, lse_BKGT), _ = _forward(static, q_BKGTH, k_BKSH, v_BKSV, arrays)
    return o_BKGTV, lse_BKGT


def _shape(q_BKGTH, v_BKSV, s):
    _, _, G, T, H = q_BKGTH.shape
    S, V = v_BKSV.shape[2:]
    return block_sizes.padded(block_sizes.Shape(G, T, S, H, V, q_BKGTH.dtype.itemsize), s)


def _forward(static: _Static, q_BKGTH, k_BKSH, v_BKSV, arrays):
    s = static.sizes[0]
    (B, _, _, T, _), shape = q_BKGTH.shape, _shape(q_BKGTH, v_BKSV, s)
    q_C, kv_C = candidates(static.pattern, shape.queries, shape.keys, s.q_block, s.kv_block)
    padded = (
        _pad(q_BKGTH, shape.queries, 3),
        _pad(k_BKSH, shape.keys, 2),
        _pad(v_BKSV, shape.keys, 2),
    )
    tokens, results = _tokens(arrays, shape), []
    for first, last, mine in _of_queries(q_C, _most_visits(B)):
        rows = slice(first * s.q_block, last * s.q_block)
        these = (*(x[:, :, rows] for x in tokens[:2]), *tokens[2:])
        pairs = q_C[mine] - first, kv_C[mine]
        keep_C = np.diff(pairs[0], prepend=-1) != 0  # every query is visited
        results.append(
            forward(
                _visits(static, these, s, pairs, keep_C),
                these,
                padded[0][:, :, :, rows],
                *padded[1:],
                visited=static.pattern.visited(shape.queries, shape.keys),
                exponent=static.scale * math.log2(math.e),
                pattern=static.pattern,
                sizes=s,
                vmem=CHIPS[static.chip].limit(s.vmem(shape)),
                interpret=static.interpret,
            )
        )
    o_BKGTV = jnp.concatenate([o for o, _ in results], axis=3)[..., :T, :]
    lse_BKG1T = jnp.concatenate([lse for _, lse in results], axis=4)[..., :T]
    o_BKGTV, lse_BKG1T = checkpoint_name((o_BKGTV, lse_BKG1T), "attention")
    saved = (q_BKGTH, k_BKSH, v_BKSV, arrays, o_BKGTV, lse_BKG1T)
    return (o_BKGTV, lse_BKG1T[..., 0, :] * math.log(2)), saved


def _backward(static: _Static, saved, gradients):
    q_BKGTH, k_BKSH, v_BKSV, arrays, o_BKGTV, lse_BKG1T = saved
    do_BKGTV, dlse_BKGT = gradients
    s, dtype = static.sizes[1], q_BKGTH.dtype
    (B, _, G, T, _), S, shape = q_BKGTH.shape, k_BKSH.shape[2], _shape(q_BKGTH, v_BKSV, s)
    # sum over keys of p * dp, from the output instead of the scores
    mean_BKGT = jnp.sum(do_BKGTV.astype(jnp.float32) * o_BKGTV.astype(jnp.float32), axis=-1)
    mean_BKG1T = (mean_BKGT - dlse_BKGT)[..., None, :]
    arrays_B1T = _tokens(arrays, shape)
    q_BKGTH, do_BKGTV = (_pad(x, shape.queries, 3) for x in (q_BKGTH, do_BKGTV))
    k_BKSH, v_BKSV = (_pad(x, shape.keys, 2) for x in (k_BKSH, v_BKSV))
    lse_BKG1T, mean_BKG1T = (_pad(x, shape.queries, 4) for x in (lse_BKG1T, mean_BKG1T))
    last = shape.keys // s.kv_block
    per_chunk = min(s.chunk // s.kv_block, max(_most_visits(B) // (shape.queries // s.q_block), 1))
    dq_BKGTH = jnp.zeros(q_BKGTH.shape, dtype if per_chunk >= last else jnp.float32)
    pairs = candidates(static.pattern, shape.queries, shape.keys, s.q_block, s.kv_block)
    dk, dv = [], []
    for start in range(0, last, per_chunk):
        blocks = range(start, min(start + per_chunk, last))
        dq_BKGTH, dk_BKXSH, dv_BKXSV = backward_of_chunk(
            _visits(static, arrays_B1T, s, *_of_keys(*pairs, blocks)),
            arrays_B1T,
            q_BKGTH,
            k_BKSH,
            v_BKSV,
            do_BKGTV,
            lse_BKG1T,
            mean_BKG1T,
            dq_BKGTH,
            visited=static.pattern.visited(shape.queries, shape.keys),
            blocks=blocks,
            scale=static.scale,
            exponent=static.scale * math.log2(math.e),
            pattern=static.pattern,
            sizes=s,
            parts=block_sizes.parts(static.chip, G),
            vmem=CHIPS[static.chip].limit(s.vmem(shape)),
            interpret=static.interpret,
        )
        dk.append((dk_BKXSH.sum(axis=2) * static.scale).astype(dtype))
        dv.append(dv_BKXSV.sum(axis=2).astype(dtype))
    dk_BKSH, dv_BKSV = jnp.concatenate(dk, axis=2), jnp.concatenate(dv, axis=2)
    return dq_BKGTH[..., :T, :].astype(dtype), dk_BKSH[:, :, :S], dv_BKSV[:, :, :S], None


_attention.defvjp(_forward, _backward)
