"""Multi-matrix factorisation attention (one key/value head, many query heads) on Hopper GPUs.

Shape suffixes: B batch, T queries, S keys, N query heads, H head width, G groups of heads.

Source of the model: Hu et al., "Multi-matrix Factorization Attention", 2024. The kernels are in
``attention_forward`` and ``attention_backward``.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.gpu import attention_backward as backward
from pallas_kernels.gpu.attention_forward import forward
from pallas_kernels.gpu.attention_tiles import ROWS, Mask
from pallas_kernels.gpu.common import check_device

TILE = 2 * ROWS
WIDTHS = (64, 128, 192, 256)
SM_COUNT = 132  # of an H100 or H200 SXM; only the number of head groups follows from it


def mfa_attention(
    q_BTNH,
    k_BSH,
    v_BSH,
    *,
    scale: float,
    causal=True,
    window=None,
    segments_BT=None,
    positions_BT=None,
    device=None,
    interpret=None,
):
    """Softmax attention of N query heads on one key/value head, differentiable.

    The gradients have the same bits in every run: no atomics, sums in a fixed order.

    Args:
      q_BTNH: bfloat16 queries; T a multiple of 128, H 64, 128, 192 or 256.
      k_BSH, v_BSH: bfloat16 keys and values; S a multiple of 128, equal to T if ``causal``.
      scale: factor of the scores, often ``H ** -0.5``.
      causal: query t sees keys up to t.
      window: a query sees itself and the ``window - 1`` keys before it; None for all. Needs
        ``causal``.
      segments_BT: int32 documents of a packed row; a query sees only its own document, which is
        the unbroken run of one number around it (a number that comes back later is another
        document). None for one document. Needs ``causal``.
      positions_BT: int32, rising within a document, by which a window is measured; None where each
        token is one position after the last.
      device: one of those compiled for; None for the default.
      interpret: ``plgpu.InterpretGPUParams()`` to run on a CPU.

    Returns:
      o_BTNH bfloat16.

    Raises:
      ValueError: a shape, dtype, mask or platform that the kernels do not support.
    """
    _check(q_BTNH, k_BSH, v_BSH, causal, window, segments_BT, positions_BT)
    check_device("attention", device, interpret)
    mask = Mask(causal=causal, bounded=window is not None or segments_BT is not None)
    first_BT, last_BS = (
        bounds(q_BTNH.shape[:2], window, segments_BT, positions_BT) if mask.bounded else (None,) * 2
    )
    return _attention(q_BTNH, k_BSH, v_BSH, first_BT, last_BS, float(scale), mask, interpret)


def bounds(shape, window: int | None, segments_BT, positions_BT=None):
    """First key of each query and last query of each key, int32 (B, T), non-decreasing."""
    B, T = shape
    index_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    first_BT, last_BT = jnp.zeros_like(index_BT), jnp.full_like(index_BT, T - 1)
    if segments_BT is not None:
        new_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
        edge_B1 = jnp.ones((B, 1), bool)
        starts_BT = jnp.concatenate([edge_B1, new_BT], axis=1)
        ends_BT = jnp.concatenate([new_BT, edge_B1], axis=1)
        first_BT = lax.cummax(jnp.where(starts_BT, index_BT, 0), axis=1)
        last_BT = lax.cummin(jnp.where(ends_BT, index_BT, T - 1), axis=1, reverse=True)
    if window is not None:
        near = index_BT - (window - 1), index_BT + (window - 1)
        if positions_BT is not None:
            near = _within(window, segments_BT, positions_BT)
        first_BT, last_BT = jnp.maximum(first_BT, near[0]), jnp.minimum(last_BT, near[1])
    return first_BT, last_BT


def _within(window: int, segments_BT, positions_BT):
    """First and last token of the row that is fewer than ``window`` positions from each token."""
    # the documents laid out one after the other, each a window from the last
    step_BT = jnp.maximum(jnp.diff(positions_BT, axis=1), 0)
    if segments_BT is not None:
        step_BT = jnp.where(segments_BT[:, 1:] == segments_BT[:, :-1], step_BT, window)
    place_BT = jnp.pad(jnp.cumsum(step_BT, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    search = jax.vmap(jnp.searchsorted, in_axes=(0, 0))
    first_BT = search(place_BT, place_BT - (window - 1))
    # the first token that is too far, less one
    return first_BT, search(place_BT, place_BT + window) - 1


def head_groups(heads: int, blocks: int) -> int:
    """Groups of heads whose key gradients are summed apart: the fewest that give every
    multiprocessor four blocks, or one head each. ``blocks`` is their number for one group."""
    divisors = [g for g in range(1, heads + 1) if heads % g == 0]
    return next((g for g in divisors if g * blocks >= 4 * SM_COUNT), heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q_BTNH, k_BSH, v_BSH, first_BT, last_BS, scale, mask, interpret):
    return forward(q_BTNH, k_BSH, v_BSH, first_BT, scale=scale, mask=mask, interpret=interpret)[0]


def _attention_fwd(q_BTNH, k_BSH, v_BSH, first_BT, last_BS, scale, mask, interpret):
    o_BTNH, lse_BNT = forward(
        q_BTNH, k_BSH, v_BSH, first_BT, scale=scale, mask=mask, interpret=interpret
    )
    o_BTNH, lse_BNT = checkpoint_name((o_BTNH, lse_BNT), "attention")
    return o_BTNH, (q_BTNH, k_BSH, v_BSH, first_BT, last_BS, o_BTNH, lse_BNT)


def _attention_bwd(scale, mask, interpret, saved, do_BTNH):
    q_BTNH, k_BSH, v_BSH, first_BT, last_BS, o_BTNH, lse_BNT = saved
    B, S, _ = k_BSH.shape
    delta_BNT = jnp.einsum("btnh,btnh->bnt", o_BTNH, do_BTNH, preferred_element_type=jnp.float32)
    inputs = (q_BTNH, k_BSH, v_BSH, do_BTNH.astype(q_BTNH.dtype), lse_BNT, delta_BNT)
    shared = {"scale": scale, "mask": mask, "interpret": interpret}
    dq_BTNH = backward.dq(*inputs, first_BT, **shared)
    groups = head_groups(q_BTNH.shape[2], B * S // ROWS)
    dk_GBSH, dv_GBSH = backward.dk_dv(*inputs, last_BS, groups=groups, **shared)
    dk_BSH = dk_GBSH.sum(0).astype(k_BSH.dtype)
    dv_BSH = dv_GBSH.sum(0).astype(v_BSH.dtype)
    return dq_BTNH, dk_BSH, dv_BSH, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _check(q_BTNH, k_BSH, v_BSH, causal, window, segments_BT, positions_BT) -> None:
    """Refuses what the kernels do not support."""
    if q_BTNH.ndim != 4 or k_BSH.ndim != 3:
        raise ValueError(
            "expected queries (B, T, N, H) and keys (B, S, H),"
            f" got {q_BTNH.shape} and {k_BSH.shape}"
        )
    B, T, _, H = q_BTNH.shape
    S = k_BSH.shape[1]
    if k_BSH.shape != (B, S, H) or v_BSH.shape != (B, S, H):
        raise ValueError(
            f"keys and values must be ({B}, S, {H}), got {k_BSH.shape} and {v_BSH.shape}"
        )
    if H not in WIDTHS:
        raise ValueError(f"head width {H} is not supported, only {WIDTHS}")
    if T % TILE or S % TILE or not T or not S:
        raise ValueError(f"lengths must be multiples of {TILE}, got {T} queries and {S} keys")
    dtypes = {x.dtype for x in (q_BTNH, k_BSH, v_BSH)}
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        raise ValueError(f"only bfloat16 is supported, got {sorted(map(str, dtypes))}")
    if causal and T != S:
        raise ValueError(f"a causal mask needs as many keys as queries, got {S} and {T}")
    if not causal and (window is not None or segments_BT is not None):
        raise ValueError("a window or segments need causal=True")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    for name, array in (("segments", segments_BT), ("positions", positions_BT)):
        if array is not None and array.shape != (B, T):
            raise ValueError(f"{name} must be ({B}, {T}), got {array.shape}")
