"""Attention of new tokens over a cache that holds them, with exchangeable implementations.

Shape suffixes: B rows (sequences), T new tokens of a row, N query heads, K key/value heads, H head
width, V width of values, S slots of a row, C slots of a block, G query heads of a key head,
L pages of a pool, M pages of a row, F rotated pairs of coordinates.

Position p of a row lives in slot ``p % S``: a cache no shorter than the text is an array, a shorter
one a ring of the newest S positions. Nothing but the lengths needs to be stored.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.decode_call import DecodeCall
from pallas_kernels.gpu import decode as gpu_decode
from pallas_kernels.tpu import decode as tpu_decode
from pallas_kernels.tpu.chips import CHIPS
from step_jax.ops import attention as ops_attention
from step_jax.ops import registry
from step_jax.ops.einsum import product
from step_jax.ops.rope import cos_and_sin, rotate, turned


def slot_positions_BS(lengths_B, slots: int):
    """Position held by every slot of a cache of ``lengths_B`` tokens; negative if it holds none."""
    last_B1, slot_1S = lengths_B[:, None] - 1, jnp.arange(slots, dtype=jnp.int32)[None]
    return last_B1 - (last_B1 - slot_1S) % slots


def reference(call: DecodeCall):
    """All slots of all rows at once, in float32: the definition the kernels are compared with."""
    call.check()
    q_BTNH, layer, table_BM = call.q_BTNH, call.layer, call.page_table_BM

    def dense(cache, scale):
        cache = (cache if layer is None else cache[layer]).astype(jnp.float32)
        if table_BM is not None:
            cache = cache[table_BM].reshape(q_BTNH.shape[0], -1, *cache.shape[2:])
        return cache if scale is None else cache * jnp.asarray(scale, jnp.float32)[..., None]

    k_BSKH = dense(call.k_cache, call.k_scale)
    v_BSKH = dense(call.k_cache if call.v_cache is None else call.v_cache, call.v_scale)
    kv_positions_BS = slot_positions_BS(call.lengths_B, call.slots)
    if call.frequency_F is not None:
        k_BSKH = rotate(k_BSKH, kv_positions_BS, call.frequency_F)
    if call.heads_per_key is not None:
        head_N = call.key_head_N()
        k_BSKH, v_BSKH = k_BSKH[:, :, head_N], v_BSKH[:, :, head_N]
    mask = ops_attention.Mask(call.positions_BT, kv_positions_BS, window=call.window)
    o_BTNH = ops_attention.attention(
        q_BTNH.astype(jnp.float32),
        k_BSKH,
        v_BSKH,
        mask,
        scale=call.scale,
        implementation="reference",
    )
    return o_BTNH.astype(q_BTNH.dtype)


#: Numbers of a row's keys that :func:`blocks` takes at a time, in a core's cache, and the fewest
#: and the most slots.
_NUMBERS, _FEWEST, _MOST = 2**15, 128, 1024


def _block(call: DecodeCall) -> int:
    """Slots that :func:`blocks` takes at a time, whatever the rows are and how long the cache."""
    return max(_FEWEST, min(_MOST, _NUMBERS // (call.kv_heads * call.k_cache.shape[-1])))


def blocks(call: DecodeCall):
    """Blocks of slots in turn, as far as the longest row has come: no row pays for empty slots.

    Unrotated keys are turned by their slots, as the models do: a cache of them without a window is
    no ring.

    A block that a row does not reach leaves its sums as they are to the last bit, so that a row's
    result depends neither on its company nor on the length of the cache.
    """
    q_BTNH, layer, C = call.q_BTNH, call.layer, _block(call)
    B, T, N, H = q_BTNH.shape
    K, S, dtype = call.kv_heads, call.slots, q_BTNH.dtype
    # a slice of the query heads, but all of several key heads
    sliced = K > 1 and call.heads_per_key not in (None, N // K)
    G = 1 if sliced else N // K
    q_BTKGH = q_BTNH.reshape(B, T, N // G, G, H)

    # one key head is an axis that the cache has for this call alone: a loop over another shape
    # than was written makes XLA copy the cache
    caches = [cache[..., 0, :] if K == 1 else cache for cache in call.caches]

    def part(cache, start):
        """(B, C, K, H) of the cache; the last block begins earlier than others would."""
        if layer is None:
            x = jax.lax.dynamic_slice_in_dim(cache, start, C, axis=1)
        else:
            first = (layer, 0, start, *(0,) * (cache.ndim - 3))
            x = jax.lax.dynamic_slice(cache, first, (1, B, C, *cache.shape[3:]))[0]
        x = x.astype(dtype).reshape(B, C, K, -1)
        return x[:, :, call.key_head_N()] if sliced else x

    if call.frequency_F is not None:  # made here, the same for all layers and tokens of a loop
        turns_1S1F = cos_and_sin(jnp.arange(S)[None], call.frequency_F)

    last_B1 = call.lengths_B[:, None] - 1

    def block(n, carry):
        most_BKGT, sum_BKGT, o_BKGTV = carry
        start = jnp.minimum(n * C, S - C)
        slot_C = start + jnp.arange(C, dtype=jnp.int32)
        k_BCKH = part(caches[0], start)
        v_BCKV = part(caches[1], start) if len(caches) == 2 else k_BCKH
        if call.frequency_F is not None:
            turns = (jax.lax.dynamic_slice_in_dim(a, start, C, axis=1) for a in turns_1S1F)
            k_BCKH = turned(k_BCKH, *turns)
        position_BC = last_B1 - (last_B1 - slot_C) % S
        held_BC = (position_BC >= 0) & (slot_C >= n * C)
        held_BTC = held_BC[:, None] & (position_BC[:, None] <= call.positions_BT[..., None])
        s_BKGTC = product("BTKGH,BCKH->BKGTC", q_BTKGH, k_BCKH, jnp.float32) * call.scale
        s_BKGTC = jnp.where(held_BTC[:, None, None], s_BKGTC, -jnp.inf)
        next_BKGT = jnp.maximum(most_BKGT, s_BKGTC.max(-1))
        p_BKGTC = jnp.exp(s_BKGTC - next_BKGT[..., None])
        kept_BKGT = jnp.exp(most_BKGT - next_BKGT)
        sum_BKGT = sum_BKGT * kept_BKGT + p_BKGTC.sum(-1)
        new_BKGTV = product("BKGTC,BCKV->BKGTV", p_BKGTC.astype(dtype), v_BCKV, jnp.float32)
        return next_BKGT, sum_BKGT, o_BKGTV * kept_BKGT[..., None] + new_BKGTV

    shape = (B, N // G, G, T)
    width = call.caches[-1].shape[-1]
    # a finite minimum: rows that see nothing come out zero
    least = jnp.full(shape, jnp.finfo(jnp.float32).min)
    start = least, jnp.zeros(shape), jnp.zeros((*shape, width))
    count = -(-jnp.minimum(jnp.max(call.lengths_B), S) // C)
    _, sum_BKGT, o_BKGTV = jax.lax.fori_loop(0, count, block, start)
    o_BKGTV /= jnp.maximum(sum_BKGT, jnp.finfo(jnp.float32).tiny)[..., None]
    return jnp.moveaxis(o_BKGTV, 3, 1).reshape(B, T, N, width).astype(dtype)


def _no_blocks(problem: Problem) -> str | None:
    """What of a problem :func:`blocks` lacks, or None."""
    call = problem.call
    if problem.alibi:
        return "it adds no ALiBi bias"
    if call.paged or call.window is not None or call.slots < _block(call):
        return f"it takes arrays of at least {_block(call)} slots without a window"
    if call.k_scale is not None or call.v_scale is not None:
        return "it scales no cached numbers"
    return None


def pallas_tpu(call: DecodeCall, device, interpret: bool = False):
    """The kernel of ``pallas_kernels.tpu``, its work cut for the cores of ``device``."""
    chip = CHIPS.get(registry.tpu_chip(device))  # None where it is interpreted
    splits = 1 if chip is None else chip.cores
    return tpu_decode.decode(call, splits=splits, interpret=interpret)


def pallas_gpu(call: DecodeCall, device):
    """The kernel of ``pallas_kernels.gpu``."""
    return gpu_decode.decode(call, device=device)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What decides whether an implementation can do it.

    call: its arrays' shapes and dtypes, and what else it says. alibi: a bias is added.
    batch_pieces: into which the mesh cuts the call's rows.
    """

    call: DecodeCall
    alibi: bool = False
    batch_pieces: int = 1


def _unsupported(check: Callable, problem: Problem, device) -> str | None:
    """Why a kernel, whose ``check`` raises for what it lacks, cannot do this."""
    return "it adds no ALiBi bias" if problem.alibi else registry.refusal(check, problem)


_unsupported_tpu = functools.partial(
    _unsupported, lambda problem: tpu_decode.check(problem.call, pieces=problem.batch_pieces)
)
_unsupported_gpu = functools.partial(_unsupported, lambda problem: gpu_decode.check(problem.call))

#: compute: (call[, device: kernels only]) -> o_BTNH
IMPLEMENTATIONS = {
    "reference": registry.Entry(reference),
    "blocks": registry.Entry(
        blocks,
        lambda problem, device: _no_blocks(problem),
        worthwhile=lambda problem: (
            not _no_blocks(problem) and problem.call.slots > _block(problem.call)
        ),
    ),
    "pallas_gpu": registry.kernel(pallas_gpu, registry.needs_hopper, _unsupported_gpu),
    "pallas_tpu": registry.kernel(pallas_tpu, registry.needs_tpu, _unsupported_tpu),
    # by JAX's interpreter, for tests on machines without a TPU
    "pallas_tpu_interpret": registry.Entry(
        functools.partial(pallas_tpu, interpret=True), _unsupported_tpu, kernel=True
    ),
}
OPERATION = registry.Operation(
    "decode attention",
    IMPLEMENTATIONS,
    fallback="reference",
    # an accelerator would start several programs for every block, and reads all slots sooner
    automatic={"tpu": ("pallas_tpu",), "gpu": ("pallas_gpu",), "cpu": ("blocks",)},
)
resolve = OPERATION.resolve


def in_place(attention: str, problem: Problem, device: jax.Device) -> str | None:
    """What reads a cache where it lies, by ``Execution.attention``, in one decoding step.

    None if it is an implementation of attention that takes keys as read from the cache, or if
    ``auto`` finds nothing better.

    Raises:
      ConfigError: a kernel is named that does not exist or cannot do this; says why.
    """
    entry = ops_attention.IMPLEMENTATIONS.get(attention)
    if entry is not None and not entry.kernel:
        return None
    name = resolve(attention, problem, device)
    return None if name == OPERATION.fallback else name


def decode_attention(
    call: DecodeCall, *, implementation: str = "auto", device: jax.Device | None = None
):
    """Softmax attention of T new tokens of each row over a cache that already holds them.

    Args:
      call: everything that is computed with.
      implementation: a key of ``IMPLEMENTATIONS`` or ``auto``.
      device: one of those compiled for; None for the default.

    Returns:
      (B, T, N, H) in the dtype of the queries; zeros where a query sees nothing.

    Raises:
      ValueError: a call whose parts do not fit each other, or see ``registry.Operation.resolve``.
    """
    device = jax.devices()[0] if device is None else device
    entry = IMPLEMENTATIONS[resolve(implementation, Problem(call), device)]
    return entry.compute(call, device) if entry.kernel else entry.compute(call)
