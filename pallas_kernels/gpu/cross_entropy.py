"""Projection to a vocabulary and cross-entropy for Hopper (sm_90a), without the whole logits.

Both kernels are products in tiles (``tile_matmul``) that treat a tile of logits in registers:

``log_likelihood`` leaves of each tile, per token, the maximum, the sum of exponentials and the
logit of the target, 12 bytes for up to 256 logits, which are put together afterwards in a fixed
order.

``gradients`` makes the logits again from the saved log-sum-exp (the recomputation of arXiv
2205.14135) and writes their gradient, in bfloat16, for a part of the vocabulary at a time; two
dense products make of it that part's share of the gradients. The sum over the vocabulary cannot
stay on chip: 128 tokens of width 7168 are 3.7 MB in float32. 8 N D V operations in all, where a
program that keeps logits needs 6. No atomics.

Shape suffixes: N tokens, D width, V vocabulary, J its tiles, v the vocabulary of one part; within
a kernel r the 64 tokens of a warpgroup, f the vocabulary of a tile.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import rules
from pallas_kernels.gpu import attention_tiles as tiles
from pallas_kernels.gpu.attention_tiles import LOG2E, ROWS
from pallas_kernels.gpu.common import check_device, vary_as
from pallas_kernels.gpu.tile_matmul import STEP, TILE, Plan, halves

PART = 16384  # vocabulary whose gradient of the logits exists at a time
MAXIMUM, SUM, HIT = range(3)  # what is left of a tile


def _logit_tiles(x_ref, w_ref, x_smem, w_smem, operands, plan: Plan, finish) -> None:
    """``finish(logits_rf, first token, first word)`` for every tile of logits, 64 rows each."""
    steps = x_ref.shape[1] // STEP

    def produce():
        def tile(i, column, step):
            @pl.loop(0, steps)
            def _(k):
                part = pl.ds(k * STEP, STEP)
                x = [x_ref.at[pl.ds(row, ROWS), part] for row in halves(i * TILE)]
                operands.fill(step + k, x, w_ref.at[part, pl.ds(column, plan.f)])

            return step + steps

        operands.drain(plan.walk(tile, jnp.int32(0)))

    def multiply():
        wg = lax.axis_index("wg")

        def tile(i, column, step):
            def product(acc_ref):
                operands.add_products(
                    acc_ref, step, steps, lambda slot: x_smem.at[wg, slot], lambda s: w_smem.at[s]
                )
                return acc_ref[...]

            logits_rf = pl.run_scoped(product, plgpu.ACC((ROWS, plan.f), jnp.float32))
            finish(logits_rf, i * TILE + wg * ROWS, column)
            return step + steps

        plan.walk(tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    tiles.split_registers(produce, multiply)


def _is_target(target_ref, rows, column, shape):
    """Where the target of each token is, in a tile whose first word is ``column``."""
    place_r = tiles.per_row(target_ref.at[rows]) - column
    return tiles.iota(shape, 1) == tiles.along(place_r, shape, 0)


def _statistics(x_ND, w_DV, target_N, interpret):
    """float32 (J, 3, N) of every tile: maximum, sum of exp(logit - maximum), target's logit or 0.

    N is the length of ``target_N``, a multiple of 128; ``x_ND`` may be shorter.
    """
    D, V = w_DV.shape
    plan = Plan.of(len(target_N) // TILE, V)

    def block(x_ref, w_ref, target_ref, out_ref, out_smem, x_smem, w_smem, operands):
        mine = out_smem.at[lax.axis_index("wg")]

        def finish(logits_rf, row, column):
            rows = pl.ds(row, ROWS)
            max_r = logits_rf.max(axis=1)
            hot_rf = _is_target(target_ref, rows, column, logits_rf.shape)
            hit_r = jnp.where(hot_rf, logits_rf, 0.0).sum(axis=1)
            over_rf = logits_rf - tiles.along(max_r, logits_rf.shape, 0)
            sum_r = jnp.exp2(over_rf * LOG2E).sum(axis=1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for kind, value_r in ((MAXIMUM, max_r), (SUM, sum_r), (HIT, hit_r)):
                mine[kind] = value_r
            plgpu.commit_smem()
            j = lax.div(column, jnp.int32(plan.f))
            for kind in (MAXIMUM, SUM, HIT):
                plgpu.copy_smem_to_gmem(mine.at[kind], out_ref.at[j, kind, rows])

        _logit_tiles(x_ref, w_ref, x_smem, w_smem, operands, plan, finish)

    return plan.kernel(
        block,
        jax.ShapeDtypeStruct((V // plan.f, 3, len(target_N)), jnp.float32),
        plgpu.SMEM((2, 3, ROWS), jnp.float32),
        (ROWS, STEP),
        (STEP, plan.f),
        "cross_entropy_statistics",
        interpret,
    )(x_ND, w_DV, target_N)


def _logits_gradient(x_ND, w_Dv, target_N, lse_N, p_N, hot_N, interpret):
    """``p * softmax - hot * onehot``, bfloat16; columns (multiples of 128 long) as above."""
    plan = Plan.of(len(target_N) // TILE, w_Dv.shape[1])

    def block(
        x_ref, w_ref, target_ref, lse_ref, p_ref, hot_ref, out_ref, out_smem, x_smem, w_smem,
        operands,
    ):  # fmt: skip
        mine = out_smem.at[lax.axis_index("wg")]

        def finish(logits_rf, row, column):
            shape, rows = logits_rf.shape, pl.ds(row, ROWS)
            lse_r = tiles.per_row(lse_ref.at[rows])
            softmax_rf = jnp.exp2((logits_rf - tiles.along(lse_r, shape, 0)) * LOG2E)
            d_rf = softmax_rf * tiles.along(tiles.per_row(p_ref.at[rows]), shape, 0)
            hot_r = tiles.per_row(hot_ref.at[rows])
            hot_rf = _is_target(target_ref, rows, column, shape)
            d_rf -= jnp.where(hot_rf, tiles.along(hot_r, shape, 0), 0.0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            mine[...] = d_rf.astype(mine.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out_ref.at[rows, pl.ds(column, plan.f)])

        _logit_tiles(x_ref, w_ref, x_smem, w_smem, operands, plan, finish)

    return plan.kernel(
        block,
        jax.ShapeDtypeStruct((len(x_ND), w_Dv.shape[1]), x_ND.dtype),
        tiles.smem(2, ROWS, plan.f),
        (ROWS, STEP),
        (STEP, plan.f),
        "cross_entropy_logits_gradient",
        interpret,
    )(x_ND, w_Dv, target_N, lse_N, p_N, hot_N)


def _padded(columns, N: int):
    """Columns of whole tiles of tokens; x itself is not copied, TMA reads zeros past its end."""
    return [jnp.pad(c, (0, -N % TILE)) for c in columns]


def log_likelihood(x_ND, w_DV, target_N, *, interpret=None):
    """(logsumexp_N of the logits, negative log-likelihood_N of the targets), float32.

    Args:
      x_ND: bfloat16 hidden states; D a multiple of 64.
      w_DV: bfloat16 projection; V a multiple of 128.
      target_N: int32.
      interpret: ``plgpu.InterpretGPUParams()`` to run on a CPU.
    """
    N = len(x_ND)
    of_tiles_J3N = _statistics(x_ND, w_DV, *_padded([target_N], N), interpret)[:, :, :N]
    of_tiles_J3N = vary_as(of_tiles_J3N, x_ND)
    max_N = of_tiles_J3N[:, MAXIMUM].max(axis=0)
    sum_JN = of_tiles_J3N[:, SUM] * jnp.exp(of_tiles_J3N[:, MAXIMUM] - max_N)
    lse_N = max_N + jnp.log(sum_JN.sum(axis=0))
    return lse_N, lse_N - of_tiles_J3N[:, HIT].sum(axis=0)


def gradients(x_ND, w_DV, target_N, lse_N, p_N, hot_N, *, interpret=None):
    """Gradients (dx_ND, dw_DV) where that of a token's logits is ``p * softmax - hot * onehot``.

    Args:
      x_ND, w_DV, target_N, interpret: as :func:`log_likelihood`.
      lse_N, p_N, hot_N: float32.

    Returns:
      dx_ND in the dtype of ``x_ND``, dw_DV in float32.
    """
    N, V = len(x_ND), w_DV.shape[1]
    v = max(n for n in range(TILE, min(PART, V) + 1, TILE) if V % n == 0)
    target_N, *columns = _padded([target_N, lse_N, p_N, hot_N], N)

    def part(carry, c):
        dx_ND, dw_DV = carry
        w_Dv = lax.dynamic_slice_in_dim(w_DV, c * v, v, axis=1)
        d_Nv = _logits_gradient(x_ND, w_Dv, target_N - c * v, *columns, interpret)
        d_Nv = vary_as(d_Nv, x_ND)
        dx_ND += rules.dot(d_Nv, w_Dv, 1, 1)
        dw_DV = lax.dynamic_update_slice_in_dim(dw_DV, rules.dot(x_ND, d_Nv, 0, 0), c * v, axis=1)
        return (dx_ND, dw_DV), None

    zeros = [vary_as(jnp.zeros(a.shape, jnp.float32), x_ND) for a in (x_ND, w_DV)]
    (dx_ND, dw_DV), _ = lax.scan(part, tuple(zeros), jnp.arange(V // v, dtype=jnp.int32))
    return dx_ND.astype(x_ND.dtype), dw_DV


def cross_entropy(x_ND, w_DV, target_N, weight_N, z_loss: float, *, device=None, interpret=None):
    """Weighted sum of ``-log p(target) + z_loss * logsumexp^2``.

    Args:
      x_ND: bfloat16 hidden states; D a multiple of 64.
      w_DV: the projection in any dtype, multiplied in bfloat16; V a multiple of 128.
      target_N: int32.
      weight_N: float32; may be negative and is differentiable.
      device: one of those compiled for; None for the default.
      interpret: ``plgpu.InterpretGPUParams()`` to run on a CPU.

    Returns:
      (total, nll_N) float32; no gradient flows through ``nll_N``.

    Raises:
      ValueError: a shape, dtype or platform that the kernels do not support.
    """
    rules.check_cross_entropy("GPU kernel", x_ND, w_DV, target_N, weight_N, ("bfloat16",))
    D, V = w_DV.shape
    if D % STEP or V % TILE:
        raise ValueError(
            f"the width must be a multiple of {STEP} and the vocabulary of {TILE}, got {D} and {V}"
        )
    check_device("cross-entropy", device, interpret)
    kernels = (functools.partial(k, interpret=interpret) for k in (log_likelihood, gradients))
    return rules.cross_entropy(*kernels, x_ND, w_DV, target_N, weight_N, z_loss)
