"""Projection to a vocabulary and cross-entropy for TPUs, without logits in HBM.

Shape suffixes: N tokens, D width, V vocabulary; T, v the same in one block, 1 a column of numbers
one per token.

The forward kernel keeps each token's running maximum and sum of exponentials (online softmax) and
the logit of its target while the vocabulary passes by. Gradients make the logits again from the
saved log-sum-exp (the recomputation of arXiv 2205.14135), once for the tokens and once for the
matrix: 10 N D V operations in all, where a program that keeps logits needs 6.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import rules
from pallas_kernels.tpu import chips
from pallas_kernels.tpu.chips import CHIPS
from pallas_kernels.tpu.cuts import chunks

LANES = 128
CHUNK = 4096  # of the width: what is compiled is a product of one chunk
BLOCKS = ((512, 512), (512, 256), (256, 256), (256, 128), (128, 128))  # tokens, words
COLUMNS = 9  # a kernel holds at most, buffers of both of a pair counted


def _each_block(block, width: int, vocabulary: int, body):
    """``body(vocabulary)`` where the block reaches past the vocabulary, else ``body(None)``.

    Only the last block can, and it alone pays for the masks.
    """
    last = vocabulary // width
    if vocabulary % width == 0:
        body(None)
    else:
        pl.when(block != last)(lambda: body(None))
        pl.when(block == last)(lambda: body(vocabulary))


def _of_width(w_Dv, k, by_words: bool):
    """A chunk of the matrix, which is (v, D) if ``by_words``."""
    return w_Dv[:, k] if by_words else w_Dv[k]


def _logits(x_TD, w_Dv, target_T1, logits_Tv, block, end: int | None, by_words: bool):
    """Fills ``logits_Tv``, minus infinity from word ``end`` on; returns where the targets are."""
    logits_Tv[...] = jnp.zeros_like(logits_Tv)

    def add(k):
        w = _of_width(w_Dv, k, by_words)
        logits_Tv[...] += rules.dot(x_TD[:, k], w, 1, 1 if by_words else 0)

    chunks(x_TD.shape[1], CHUNK, add)
    width = logits_Tv.shape[1]
    column_Tv = block * width + jax.lax.broadcasted_iota(jnp.int32, logits_Tv.shape, 1)
    if end is not None:
        logits_Tv[...] = jnp.where(column_Tv < end, logits_Tv[...], -jnp.inf)
    return column_Tv == target_T1[...]


def _forward_kernel(
    x_TD, w_Dv, target_T1, lse_T1, nll_T1, logits_Tv, max_T1, sum_T1, hit_T1,
    *, vocabulary: int, by_words: bool,
):  # fmt: skip
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        max_T1[...] = jnp.full_like(max_T1, -jnp.inf)
        sum_T1[...] = jnp.zeros_like(sum_T1)
        hit_T1[...] = jnp.zeros_like(hit_T1)

    def add(end):
        hot_Tv = _logits(x_TD, w_Dv, target_T1, logits_Tv, j, end, by_words)
        logits = logits_Tv[...]
        old = max_T1[...]
        new = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
        part = jnp.sum(jnp.exp(logits - new), axis=1, keepdims=True)
        sum_T1[...] = sum_T1[...] * jnp.exp(old - new) + part
        hit_T1[...] += jnp.sum(jnp.where(hot_Tv, logits, 0.0), axis=1, keepdims=True)
        max_T1[...] = new

    _each_block(j, logits_Tv.shape[1], vocabulary, add)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        lse_T1[...] = max_T1[...] + jnp.log(sum_T1[...])
        nll_T1[...] = lse_T1[...] - hit_T1[...]


def _dlogits(x_TD, w_Dv, target_T1, lse_T1, p_T1, hot_T1, logits_Tv, block, end, by_words):
    """The gradient of the logits, ``p_T1 * softmax - hot_T1 * (this is the target)``."""
    hot_Tv = _logits(x_TD, w_Dv, target_T1, logits_Tv, block, end, by_words)
    d_Tv = p_T1[...] * jnp.exp(logits_Tv[...] - lse_T1[...])
    return (d_Tv - jnp.where(hot_Tv, hot_T1[...], 0.0)).astype(x_TD.dtype)


def _tokens_kernel(
    x_TD, w_Dv, target_T1, lse_T1, p_T1, hot_T1, dx_TD, logits_Tv, sum_TD,
    *, vocabulary: int, by_words: bool,
):  # fmt: skip
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        sum_TD[...] = jnp.zeros_like(sum_TD)

    def add(end):
        d_Tv = _dlogits(x_TD, w_Dv, target_T1, lse_T1, p_T1, hot_T1, logits_Tv, j, end, by_words)
        axis, v = 0 if by_words else 1, d_Tv.shape[1]
        shape = (v, 1) if by_words else (1, v)
        word = j * v + jax.lax.broadcasted_iota(jnp.int32, shape, axis)

        def chunk(k):
            w = _of_width(w_Dv, k, by_words)
            if end is not None:  # what is read past the vocabulary may be NaN
                w = jnp.where(word < end, w, jnp.zeros_like(w))
            sum_TD[:, k] += rules.dot(d_Tv, w, 1, axis)

        chunks(x_TD.shape[1], CHUNK, chunk)

    _each_block(j, logits_Tv.shape[1], vocabulary, add)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        dx_TD[...] = sum_TD[...].astype(dx_TD.dtype)


def _matrix_kernel(
    x_TD, w_Dv, target_T1, lse_T1, p_T1, hot_T1, dw_Dv, logits_Tv,
    *, vocabulary: int, by_words: bool,
):  # fmt: skip
    @pl.when(pl.program_id(1) == 0)
    def _():
        dw_Dv[...] = jnp.zeros_like(dw_Dv)

    j = pl.program_id(0)

    def add(end):
        d_Tv = _dlogits(x_TD, w_Dv, target_T1, lse_T1, p_T1, hot_T1, logits_Tv, j, end, by_words)

        def chunk(k):
            if by_words:
                dw_Dv[:, k] += rules.dot(d_Tv, x_TD[:, k], 0, 0)
            else:
                dw_Dv[k] += rules.dot(x_TD[:, k], d_Tv, 0, 0)

        chunks(x_TD.shape[1], CHUNK, chunk)

    _each_block(j, logits_Tv.shape[1], vocabulary, add)


def _by_words(V: int) -> bool:
    """Whether the matrix is read and its gradient written as (V, D).

    A width that is no whole number of lanes lies in memory like that: XLA, left to choose, makes
    the other dimension the one of lanes, and an argument (D, V) would cost a copy of the matrix
    and one of its gradient.
    """
    return V % LANES != 0


def _matrix(V: int) -> tuple[str, str]:
    return ("V", "D") if _by_words(V) else ("D", "V")


def _call(
    kernel,
    name,
    x_ND,
    w,
    columns,
    outputs,
    *,
    vocabulary,
    scratch,
    blocks,
    chip,
    interpret,
    matrix_first=False,
):
    """One kernel over blocks of tokens and of the vocabulary, the second of the two inside.

    ``columns`` are arrays (N, 1); ``outputs`` are (shape, dtype) with the names of the dimensions
    in place of sizes; the grid's inner dimension is the one added up.
    """
    (N, D), V, (T, v) = x_ND.shape, vocabulary, blocks
    by_words = _by_words(V)
    whole, cut = {"N": N, "V": V, "D": D, 1: 1}, {"N": T, "V": v, "D": D, 1: 1}
    grid = (pl.cdiv(V, v), N // T) if matrix_first else (N // T, pl.cdiv(V, v))

    def spec(*dimensions):
        def index(*place):
            n, j = place[::-1] if matrix_first else place
            return tuple({"N": n, "V": j}.get(d, 0) for d in dimensions)

        return pl.BlockSpec(tuple(cut[d] for d in dimensions), index)

    products = 1 if len(columns) == 1 else 2  # the logits, and a gradient made from them
    x_reads, w_reads = (grid[0], 1) if matrix_first else (1, grid[0])
    return pl.pallas_call(
        functools.partial(kernel, vocabulary=V, by_words=by_words),
        out_shape=[
            jax.ShapeDtypeStruct(
                tuple(whole[d] for d in dimensions),
                dtype,
                manual_axis_type=jax.typeof(x_ND).manual_axis_type,
            )
            for dimensions, dtype in outputs
        ],
        grid=grid,
        in_specs=[spec("N", "D"), spec(*_matrix(V)), *(spec("N", 1) for _ in columns)],
        out_specs=[spec(*dimensions) for dimensions, _ in outputs],
        scratch_shapes=[pltpu.VMEM(tuple(cut[d] for d in s), jnp.float32) for s in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=CHIPS[chip].most
        ),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * N * D * V,
            transcendentals=N * V,
            bytes_accessed=(x_reads * N * D + w_reads * D * V) * x_ND.dtype.itemsize
            + sum(4 * math.prod(whole[d] for d in dimensions) for dimensions, _ in outputs),
        ),
        interpret=interpret,
        name=name,
    )(x_ND, w, *columns)


def _blocks(chip: str, N: int, D: int, V: int, need, sizes=BLOCKS):
    """(T, v): the first of ``sizes`` with ``need(T, v)`` bytes on chip, and what is made of them.

    Raises:
      ValueError: no blocks fit.
    """
    for T, v in sizes:
        T, v = min(T, pl.cdiv(N, 16) * 16), min(v, V)
        # a column of one number a token takes whole lanes; five arrays of logits live at once
        bytes_needed = need(T, v) + COLUMNS * 4 * LANES * T + 5 * 4 * T * v
        if bytes_needed <= CHIPS[chip].most:
            return T, v
    raise ValueError(
        f"cross-entropy kernel: rows of width {D} do not fit the on-chip memory: the smallest "
        f"blocks, {T} tokens and {v} words, need {bytes_needed} bytes of a {chip}'s "
        f"{CHIPS[chip].most}"
    )


def _padded(x_ND, columns, T: int):
    """Whole blocks of tokens; those added have weight 0."""
    rows = -x_ND.shape[0] % T

    def pad(a):
        return jnp.pad(a, [(0, rows), (0, 0)]) if rows else a

    return pad(x_ND), [pad(c[:, None]) for c in columns]


def log_likelihood(x_ND, w_DV, target_N, *, chip: str, interpret: bool = False):
    """(logsumexp_N of the logits, negative log-likelihood_N of the targets), float32.

    Args:
      x_ND: hidden states, bfloat16 or float32.
      w_DV: the projection, of the same dtype.
      target_N: int32.
      chip: what is compiled for, a key of ``chips.CHIPS``.

    Raises:
      ValueError: a width whose blocks do not fit the on-chip memory.
    """
    (N, D), V, size = x_ND.shape, w_DV.shape[1], x_ND.dtype.itemsize
    # The matrix is read once for every block of tokens. With 512 of them a v6e, which does 560
    # operations a byte, would wait for it.
    sizes = ((1024, 512), *BLOCKS)
    blocks = _blocks(chip, N, D, V, lambda T, v: 2 * size * D * (T + v), sizes)
    x_ND, columns = _padded(x_ND, [target_N], blocks[0])
    w = w_DV.T if _by_words(V) else w_DV
    column = (("N", 1), jnp.float32)
    lse_N1, nll_N1 = _call(
        _forward_kernel, "cross_entropy", x_ND, w, columns, [column, column], vocabulary=V,
        blocks=blocks, scratch=[("N", "V"), ("N", 1), ("N", 1), ("N", 1)], chip=chip,
        interpret=interpret,
    )  # fmt: skip
    return lse_N1[:N, 0], nll_N1[:N, 0]


def gradients(x_ND, w_DV, target_N, lse_N, p_N, hot_N, *, chip: str, interpret: bool = False):
    """Gradients (dx_ND, dw_DV) where that of a token's logits is ``p * softmax - hot * onehot``.

    Args:
      x_ND, w_DV, target_N, chip: as :func:`log_likelihood`.
      lse_N, p_N, hot_N: float32.

    Returns:
      dx_ND in the dtype of ``x_ND``, dw_DV in float32.
    """
    (N, D), V, size = x_ND.shape, w_DV.shape[1], x_ND.dtype.itemsize
    columns = [target_N, lse_N, p_N, hot_N]
    w = w_DV.T if _by_words(V) else w_DV

    def call(kernel, name, output, scratch, need, **order):
        blocks = _blocks(chip, N, D, V, need)
        whole_ND, whole_columns = _padded(x_ND, columns, blocks[0])
        return _call(
            kernel, name, whole_ND, w, whole_columns, [output], vocabulary=V,
            scratch=[("N", "V"), *scratch], blocks=blocks, chip=chip, interpret=interpret, **order,
        )[0]  # fmt: skip

    dx_ND = call(
        _tokens_kernel, "cross_entropy_tokens", (("N", "D"), x_ND.dtype), [("N", "D")],
        lambda T, v: D * (2 * size * (2 * T + v) + 4 * T),
    )  # fmt: skip
    dw = call(
        _matrix_kernel, "cross_entropy_matrix", (_matrix(V), jnp.float32), [],
        lambda T, v: D * (2 * size * (T + v) + 8 * v), matrix_first=True,
    )  # fmt: skip
    return dx_ND[:N], dw.T if _by_words(V) else dw


def cross_entropy(
    x_ND, w_DV, target_N, weight_N, z_loss: float, *, chip: str, interpret: bool = False
):
    """Weighted sum of ``-log p(target) + z_loss * logsumexp^2``.

    Args:
      x_ND: hidden states, bfloat16 or float32.
      w_DV: the projection in any dtype; multiplied in the dtype of ``x_ND``.
      target_N: int32.
      weight_N: float32; may be negative and is differentiable.
      chip: what is compiled for, a key of ``chips.CHIPS``.

    Returns:
      (total, nll_N) float32; no gradient flows through ``nll_N``.

    Raises:
      ValueError: a chip, shape or dtype that the kernels do not support, or a width whose blocks
        do not fit the on-chip memory.
    """
    dtypes = ("bfloat16", "float32")
    rules.check_cross_entropy("TPU kernel", x_ND, w_DV, target_N, weight_N, dtypes)
    if reason := chips.unsupported(chip):
        raise ValueError(f"TPU cross-entropy: {reason}")
    options = {"chip": chip, "interpret": interpret}
    kernels = (functools.partial(k, **options) for k in (log_likelihood, gradients))
    return rules.cross_entropy(*kernels, x_ND, w_DV, target_N, weight_N, z_loss)
