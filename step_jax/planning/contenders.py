"""Other computations of what a kernel here computes, to be timed beside it.

Shape suffixes: B batch, T tokens, N query heads, K key/value heads, H width of a head; M rows, E
groups, D width of a row, F width of a result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from step_jax.ops.selfcheck import Attention, Case, GroupedMatmul

#: Block of the kernels that come with JAX; their own default, 128, is many times slower.
_BLOCK = 512


def contenders(case: Case, device: jax.Device) -> dict[str, Callable[..., dict[str, Any]]]:
    """Name -> inputs of the case -> results: all other implementations, and JAX's own kernels.

    Definitions that exist to be compared with (``reference``) and interpreted kernels are left out,
    and so is what the device cannot do.
    """
    found = {}
    for name, entry in case.operation.implementations.items():
        defines = name == "reference" and case.operation.fallback != name
        if not (entry.kernel or defines or name == case.implementation):
            found[name] = case.results(name, device)
    if device.platform == "tpu" and case.implementation == "pallas_tpu":
        if isinstance(case, Attention) and case.rows == case.context == 1:
            found["splash attention of JAX"] = splash(case)
        if isinstance(case, GroupedMatmul) and case.even:
            found["megablox of JAX"] = megablox()
    return found


def splash(case: Attention) -> Callable[..., dict[str, Any]]:
    """Splash attention of one document a row, with blocks of ``_BLOCK`` and one backward kernel."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N, K = case.tokens, case.heads, case.kv_heads
    block = min(_BLOCK, T)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
    )
    mask: Any = masks.CausalMask((T, T))
    if case.window:
        mask = masks.LocalMask((T, T), (case.window - 1, 0), 0)
    several = masks.MultiHeadMask([mask] * (N // K))
    attend = kernel.make_splash_mqa(several, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def run(q_BTNH, k_BTKH, v_BTKH, do_BTNH, _):
        def forward(q_BTNH, k_BTKH, v_BTKH):
            q_BKGTH = (q_BTNH * case.scale).reshape(*q_BTNH.shape[:2], K, N // K, -1)
            q_BKGTH = q_BKGTH.transpose(0, 2, 3, 1, 4)
            keys, values = (x.swapaxes(1, 2) for x in (k_BTKH, v_BTKH))
            o_BKGTH = jax.vmap(jax.vmap(attend))(q_BKGTH, keys, values)
            return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(do_BTNH.shape)

        o, back = jax.vjp(forward, q_BTNH, k_BTKH, v_BTKH)
        return dict(zip(("o", "dq", "dk", "dv"), (o, *back(do_BTNH)), strict=True))

    return run


def megablox() -> Callable[..., dict[str, Any]]:
    """The grouped matmul that comes with JAX."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    def run(x_MD, w_EDF, sizes_E, dy_MF):
        tiles = tuple(min(_BLOCK, n) for n in (len(x_MD), *w_EDF.shape[1:]))

        def forward(x_MD, w_EDF):
            return gmm(x_MD, w_EDF, sizes_E, jnp.float32, tiles).astype(x_MD.dtype)

        y_MF, back = jax.vjp(forward, x_MD, w_EDF)
        return dict(zip(("y", "dx", "dw"), (y_MF, *back(dy_MF)), strict=True))

    return run
