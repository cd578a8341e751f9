"""Attention of new tokens over a cache that holds them, with exchangeable implementations.

Shape suffixes: B rows (sequences), T new tokens of a row, N query heads, K key/value heads, H head
width, S slots of a row, L pages of a pool, M pages of a row, F rotated pairs of coordinates.

Position p of a row lives in slot ``p % S``: a cache no shorter than the text is an array, a shorter
one a ring of the newest S positions. Nothing but the lengths needs to be stored.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import decode as gpu_decode
from pallas_kernels.tpu import decode as tpu_decode
from step_jax.core import hardware
from step_jax.core.errors import ConfigError
from step_jax.ops import attention as ops_attention
from step_jax.ops import kernels
from step_jax.ops.rope import rotate

#: TensorCores that one JAX device has, where it has several (``core.hardware``).
CORES = {"v4": 2, "v5p": 2}


def slot_positions_BS(lengths_B, slots: int):
    """Position held by every slot of a cache of ``lengths_B`` tokens; negative if it holds none."""
    last_B1, slot_1S = lengths_B[:, None] - 1, jnp.arange(slots, dtype=jnp.int32)[None]
    return last_B1 - (last_B1 - slot_1S) % slots


def reference(
    q_BTNH,
    k_cache,
    v_cache,
    positions_BT,
    lengths_B,
    *,
    device=None,
    scale: float,
    window: int | None = None,
    frequency_F=None,
    k_scale=None,
    v_scale=None,
    page_table_BM=None,
    layer=None,
    first_head=0,
    heads_per_key: int | None = None,
):
    """All slots of all rows at once, in float32: the definition the kernels are compared with."""

    def dense(cache, factor):
        cache = (cache if layer is None else cache[layer]).astype(jnp.float32)
        if page_table_BM is not None:
            cache = cache[page_table_BM].reshape(q_BTNH.shape[0], -1, *cache.shape[2:])
        return cache if factor is None else cache * jnp.asarray(factor, jnp.float32)[..., None]

    k_BSKH = dense(k_cache, k_scale)
    v_BSKH = dense(k_cache if v_cache is None else v_cache, v_scale)
    kv_positions_BS = slot_positions_BS(lengths_B, k_BSKH.shape[1])
    if frequency_F is not None:
        k_BSKH = rotate(k_BSKH, kv_positions_BS, frequency_F)
    if heads_per_key is not None:
        head_N = (first_head + jnp.arange(q_BTNH.shape[2])) // heads_per_key
        k_BSKH, v_BSKH = k_BSKH[:, :, head_N], v_BSKH[:, :, head_N]
    mask = ops_attention.Mask(positions_BT, kv_positions_BS, window=window)
    o_BTNH = ops_attention.attention(
        q_BTNH.astype(jnp.float32), k_BSKH, v_BSKH, mask, scale=scale, implementation="reference"
    )
    return o_BTNH.astype(q_BTNH.dtype)


def _pallas_tpu(*args, device, interpret=False, **kwargs):
    chip = hardware.detect(device)
    splits = CORES.get(chip.name, 1) if chip is not None else 1
    return tpu_decode.decode(*args, splits=splits, interpret=interpret, **kwargs)


def _pallas_tpu_interpret(*args, **kwargs):
    """The TPU kernel run by JAX's interpreter, for tests on machines without one."""
    return _pallas_tpu(*args, interpret=True, **kwargs)


def _pallas_gpu(*args, device, **kwargs):
    return gpu_decode.decode(*args, device=device, **kwargs)


IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference,
    "pallas_gpu": _pallas_gpu,
    "pallas_tpu": _pallas_tpu,
    "pallas_tpu_interpret": _pallas_tpu_interpret,
}


def kernel(implementation: str, device: jax.Device, q_BTNH, k_cache, v_cache, frequency_F, alibi):
    """The kernel that ``Execution.attention`` means for one decoding step, None for no kernel.

    ``auto`` is the kernel of the device's platform where it supports the call. A kernel that is
    named and cannot be had is an error.

    Raises:
      ValueError: what the named kernel lacks, and what it supports (a ConfigError where it is the
        device or the kind of model).
    """
    if implementation == "auto":
        own = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(device.platform)
        if own is None:
            return None
        try:
            return kernel(own, device, q_BTNH, k_cache, v_cache, frequency_F, alibi)
        except ValueError:
            return None
    if implementation not in ("pallas_tpu", "pallas_tpu_interpret", "pallas_gpu"):
        return None
    reason = kernels.unsupported(implementation, device)
    if reason is None and alibi is not None:
        reason = "it adds no ALiBi bias"
    if reason is not None:
        raise ConfigError(f"decode attention {implementation} cannot do this: {reason}; use auto")
    check = gpu_decode.check if implementation == "pallas_gpu" else tpu_decode.check
    check(q_BTNH, k_cache, v_cache, frequency_F)
    return implementation


def decode_attention(
    q_BTNH, k_cache, v_cache, positions_BT, lengths_B, *, implementation: str, device=None, **kwargs
):
    """Softmax attention of T new tokens of each row over a cache that already holds them.

    Args:
      q_BTNH: rotated queries, bfloat16 or float32.
      k_cache, v_cache: (B, S, K, H), or (L, page, K, H) with a page table. ``v_cache`` None: the
        values are the keys as cached (before rotation).
      positions_BT: int32 positions of the queries; a negative one sees nothing.
      lengths_B: int32 tokens in the cache, those of this call included.
      implementation: a key of ``IMPLEMENTATIONS``.
      device: one of those it runs on; None for this process's first.
      kwargs: scale, window, frequency_F, k_scale, v_scale, page_table_BM, layer, first_head and
        heads_per_key, as in ``pallas_kernels.decode_arguments``.

    Returns:
      (B, T, N, H) in the dtype of the queries; zeros where a query sees nothing.

    Raises:
      ValueError: an implementation that does not exist, or what it does not support.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"no decode attention {implementation!r}; there are: " + ", ".join(IMPLEMENTATIONS)
        )
    device = jax.local_devices()[0] if device is None else device
    return IMPLEMENTATIONS[implementation](
        q_BTNH, k_cache, v_cache, positions_BT, lengths_B, device=device, **kwargs
    )
