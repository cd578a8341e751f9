"""Softmax attention as a named operation with exchangeable implementations.

Shape suffixes: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K query heads
of one key head, H width of queries and keys, V width of values.

Masks are descriptions, never arrays: every implementation builds the part it needs from positions
and segments. A row that may see nothing returns zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

NEGATIVE = -1e30  # finite, so that a fully masked row has no NaN on its way to zero


@struct.dataclass
class Mask:
    """Which keys a query may see.

    Attributes:
      q_positions_BT, kv_positions_BS: int32 positions in the document; a negative one is an empty
        slot, seen by nobody.
      q_segments_BT, kv_segments_BS: int32 documents of a packed row (0 is padding); None when the
        row is one document.
      causal: keys at later positions are hidden.
      window: a query sees itself and the ``window - 1`` positions before it; None for all.
      in_order: queries and keys are the same tokens in the same order, so that with ``causal`` a
        key at a later index is hidden whatever its position (lets implementations skip blocks).
    """

    q_positions_BT: jax.Array
    kv_positions_BS: jax.Array
    q_segments_BT: jax.Array | None = None
    kv_segments_BS: jax.Array | None = None
    causal: bool = struct.field(pytree_node=False, default=True)
    window: int | None = struct.field(pytree_node=False, default=None)
    in_order: bool = struct.field(pytree_node=False, default=False)

    def rows(self, start: int, stop: int, keys: int) -> Mask:
        """The mask of queries ``start:stop`` over the first ``keys`` keys."""
        return self.replace(
            q_positions_BT=self.q_positions_BT[:, start:stop],
            kv_positions_BS=self.kv_positions_BS[:, :keys],
            q_segments_BT=None if self.q_segments_BT is None else self.q_segments_BT[:, start:stop],
            kv_segments_BS=None if self.kv_segments_BS is None else self.kv_segments_BS[:, :keys],
        )

    def distance_BTS(self):
        return self.q_positions_BT[:, :, None] - self.kv_positions_BS[:, None, :]

    def allowed_BTS(self):
        """The dense boolean mask (used block by block)."""
        distance_BTS = self.distance_BTS()
        allowed_BTS = jnp.broadcast_to(self.kv_positions_BS[:, None, :] >= 0, distance_BTS.shape)
        if self.causal:
            allowed_BTS &= distance_BTS >= 0
        if self.window is not None:
            allowed_BTS &= distance_BTS < self.window
        if self.q_segments_BT is not None:
            q_BT1, kv_B1S = self.q_segments_BT[:, :, None], self.kv_segments_BS[:, None, :]
            allowed_BTS &= (q_BT1 == kv_B1S) & (kv_B1S > 0)
        return allowed_BTS


def alibi_slopes_N(heads: int):
    """Slopes of ALiBi (arXiv 2108.12409, section 3), float32 (N,); any number of heads."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return jnp.asarray(slopes + between, jnp.float32)


def _scores_BKTGS(q_BTKGH, k_BSKH, mask: Mask, scale: float, alibi: str | None):
    s_BKTGS = jnp.einsum("BTKGH,BSKH->BKTGS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    s_BKTGS *= scale
    if alibi is not None:
        kv_heads, groups = q_BTKGH.shape[2:4]
        distance_BTS = jnp.maximum(mask.distance_BTS(), 0).astype(jnp.float32)
        if alibi == "sqrt":
            distance_BTS = jnp.sqrt(distance_BTS)
        slopes_KG = alibi_slopes_N(kv_heads * groups).reshape(kv_heads, groups)
        s_BKTGS -= slopes_KG[None, :, None, :, None] * distance_BTS[:, None, :, None, :]
    return jnp.where(mask.allowed_BTS()[:, None, :, None, :], s_BKTGS, NEGATIVE)


def _block(q_BTKGH, k_BSKH, v_BSKV, mask, scale, alibi):
    """Unnormalised attention: (output_BTKGV, row maximum_BKTG, row sum_BKTG), all float32."""
    s_BKTGS = _scores_BKTGS(q_BTKGH, k_BSKH, mask, scale, alibi)
    max_BKTG = jax.lax.stop_gradient(jnp.max(s_BKTGS, axis=-1))
    p_BKTGS = jnp.where(s_BKTGS > 0.5 * NEGATIVE, jnp.exp(s_BKTGS - max_BKTG[..., None]), 0.0)
    o_BTKGV = jnp.einsum(
        "BKTGS,BSKV->BTKGV",
        p_BKTGS.astype(v_BSKV.dtype),
        v_BSKV,
        preferred_element_type=jnp.float32,
    )
    return o_BTKGV, max_BKTG, jnp.sum(p_BKTGS, axis=-1)


def _rows_first(x_BKTG):
    return jnp.moveaxis(x_BKTG, 1, 2)[..., None]  # BTKG1, beside an output


def _normalise(o_BTKGV, sum_BKTG):
    sum_BTKG1 = _rows_first(sum_BKTG)
    return o_BTKGV / jnp.where(sum_BTKG1 == 0.0, 1.0, sum_BTKG1)


def reference(q_BTKGH, k_BSKH, v_BSKV, mask, scale, alibi):
    """All scores at once, in float32: the definition the others are compared with."""
    q_BTKGH, k_BSKH, v_BSKV = (x.astype(jnp.float32) for x in (q_BTKGH, k_BSKH, v_BSKV))
    o_BTKGV, _, sum_BKTG = _block(q_BTKGH, k_BSKH, v_BSKV, mask, scale, alibi)
    return _normalise(o_BTKGV, sum_BKTG)


def xla(q_BTKGH, k_BSKH, v_BSKV, mask, scale, alibi):
    """Blocks of queries, each rematerialised: no score outlives its block.

    In-order causal attention reads only the keys up to its own block's end, which saves up to half
    of the work; the number of blocks is bounded so that compile time is too.
    """
    T = q_BTKGH.shape[1]
    blocks = next(n for n in (8, 4, 2, 1) if T % n == 0 and (T // n >= 64 or n == 1))
    if blocks == 1:
        o_BTKGV, _, sum_BKTG = _block(q_BTKGH, k_BSKH, v_BSKV, mask, scale, alibi)
        return _normalise(o_BTKGV, sum_BKTG)
    size, out = T // blocks, []
    for i in range(blocks):
        keys = (i + 1) * size if mask.causal and mask.in_order else k_BSKH.shape[1]

        @functools.partial(jax.checkpoint, static_argnums=(4, 5))
        def block(q_BTKGH, k_BSKH, v_BSKV, mask, scale, alibi):
            o_BTKGV, _, sum_BKTG = _block(q_BTKGH, k_BSKH, v_BSKV, mask, scale, alibi)
            return _normalise(o_BTKGV, sum_BKTG)

        rows = mask.rows(i * size, (i + 1) * size, keys)
        q_BtKGH = q_BTKGH[:, i * size : (i + 1) * size]
        out.append(block(q_BtKGH, k_BSKH[:, :keys], v_BSKV[:, :keys], rows, scale, alibi))
    return jnp.concatenate(out, axis=1)


def ring(q_BTKGH, k_BSKH, v_BSKV, mask, scale, alibi, axis: str):
    """Inside ``shard_map``: keys and values travel around the mesh axis ``axis``.

    Every device ends with its own queries' attention over the keys of all (online softmax, arXiv
    2310.01889). Memory holds one remote piece at a time; its scores are recomputed backwards.
    """
    n = jax.lax.axis_size(axis)
    to_next = [(i, (i + 1) % n) for i in range(n)]

    @jax.checkpoint
    def merge(carry, q_BTKGH, k_BSKH, v_BSKV, mask):
        o_BTKGV, max_BKTG, sum_BKTG = carry
        po_BTKGV, pmax_BKTG, psum_BKTG = _block(q_BTKGH, k_BSKH, v_BSKV, mask, scale, alibi)
        new_BKTG = jnp.maximum(max_BKTG, pmax_BKTG)
        old_BKTG, add_BKTG = jnp.exp(max_BKTG - new_BKTG), jnp.exp(pmax_BKTG - new_BKTG)
        o_BTKGV = o_BTKGV * _rows_first(old_BKTG) + po_BTKGV * _rows_first(add_BKTG)
        return o_BTKGV, new_BKTG, sum_BKTG * old_BKTG + psum_BKTG * add_BKTG

    def step(carry, _):
        accumulated, k_BSKH, v_BSKV, positions_BS, segments_BS = carry
        here = mask.replace(kv_positions_BS=positions_BS, kv_segments_BS=segments_BS)
        accumulated = merge(accumulated, q_BTKGH, k_BSKH, v_BSKV, here)
        moved = jax.lax.ppermute((k_BSKH, v_BSKV, positions_BS, segments_BS), axis, to_next)
        return (accumulated, *moved), None

    B, T, K, G, _ = q_BTKGH.shape
    # derived from q so that they vary over the mesh as the loop's results do
    zero_BTKG1 = jnp.zeros_like(q_BTKGH[..., :1], jnp.float32) * 0.0 + 0.0 * q_BTKGH[..., :1]
    zero_BKTG = jnp.moveaxis(zero_BTKG1[..., 0], 2, 1).astype(jnp.float32)
    o_BTKGV = jnp.broadcast_to(zero_BTKG1.astype(jnp.float32), (B, T, K, G, v_BSKV.shape[-1]))
    start = (o_BTKGV, zero_BKTG + NEGATIVE, zero_BKTG)
    carry = (start, k_BSKH, v_BSKV, mask.kv_positions_BS, mask.kv_segments_BS)
    ((o_BTKGV, _, sum_BKTG), *_), _ = jax.lax.scan(step, carry, length=n)
    return _normalise(o_BTKGV, sum_BKTG)


IMPLEMENTATIONS: dict[str, Callable] = {"reference": reference, "xla": xla}
Implementation = Literal["auto", "reference", "xla"]


def resolve(implementation: str) -> str:
    """The implementation that ``auto`` stands for on this backend (the run header prints it)."""
    if implementation == "auto":
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"no attention implementation {implementation!r}; there are: auto, "
            + ", ".join(IMPLEMENTATIONS)
        )
    return implementation


def attention(
    q_BTNH,
    k_BSKH,
    v_BSKV,
    mask: Mask,
    *,
    scale: float,
    alibi: Literal["linear", "sqrt"] | None = None,
    implementation: str = "auto",
):
    """Softmax attention of N query heads on K shared key/value heads.

    Args:
      q_BTNH, k_BSKH, v_BSKV: of one dtype; K divides N.
      mask: what each query may see.
      scale: multiplies the scores.
      alibi: bias ``-slope * distance`` (Press et al.) or ``-slope * sqrt(distance)`` (Step-1).
      implementation: a key of ``IMPLEMENTATIONS`` or ``auto``.

    Returns:
      (B, T, N, V) in ``q_BTNH.dtype``. Scores and softmax are float32.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    if N % K:
        raise ValueError(f"{N} query heads are not a multiple of {K} key/value heads")
    compute = IMPLEMENTATIONS[resolve(implementation)]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    o_BTKGV = compute(q_BTKGH, k_BSKH, v_BSKV, mask, scale, alibi)
    return o_BTKGV.reshape(B, T, N, v_BSKV.shape[-1]).astype(q_BTNH.dtype)
