"""Attention of new tokens over a cache that holds them, with exchangeable implementations.

Shape suffixes: B rows (sequences), T new tokens of a row, N query heads, K key/value heads, H head
width, S slots of a row, L pages of a pool, M pages of a row, F rotated pairs of coordinates.

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
from step_jax.ops.rope import rotate


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
    automatic={"tpu": ("pallas_tpu",), "gpu": ("pallas_gpu",)},
)
resolve = OPERATION.resolve


def kernel(attention: str, problem: Problem, device: jax.Device) -> str | None:
    """The kernel that ``Execution.attention`` means for one decoding step.

    None if it is an implementation of attention that takes keys as read from the cache, or if
    ``auto`` finds no kernel.

    Raises:
      ConfigError: a kernel is named that does not exist or cannot do this; says why.
    """
    entry = ops_attention.IMPLEMENTATIONS.get(attention)
    if entry is not None and not entry.kernel:
        return None
    name = resolve(attention, problem, device)
    return name if IMPLEMENTATIONS[name].kernel else None


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
