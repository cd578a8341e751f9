"""Grouped matmul for TPUs: rows sorted by group, each group with its own matrix.

Shape suffixes: M rows, E groups, D width of a row, F width of a result; R, d, f the same in one
block; V visits (one block of rows on behalf of one group), C = E + 1 with the rows of no group.

Blocks of rows lie on a fixed raster, so a block at a border is visited once for each of its
groups. Visits are counted at run time and passed ahead of the kernel (scalar prefetch), and the
grid has as many as are needed. A visit that does not own its whole block multiplies only those
parts of ``PART`` rows in which it has some, so that a border costs a part and not a block.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import rules
from pallas_kernels.tpu import chips
from pallas_kernels.tpu.chips import CHIPS, MIB
from pallas_kernels.tpu.cuts import block as cut
from pallas_kernels.tpu.cuts import chunks, lanes

BLOCK_ROWS = 512
REGISTER_ROWS = 16  # of bfloat16; float32 has 8
PART = 128
CHUNK = 2**20  # elements of a matrix in one product: what is compiled is a product of one chunk
# Rows of a block and the most of a result's width, the preferred first.
BLOCKS = ((512, 2048), (512, 1024), (512, 512), (256, 512), (256, 256), (256, 128), (128, 128))
#: Bytes that the compiler adds for each number of a float32 operand, of which it makes pieces of
#: bfloat16: 2.4 to 7.9 in thirteen kernels that asked for more than they had been given.
PIECES = 8
# The most of a matrix's two widths.
MATRICES = ((1024, 2048), (1024, 1024), (512, 512), (256, 256), (128, 128))


def _visits(sizes_E, rows: int, block: int, every_group: bool):
    """(number of visits, (group_V, block_V, border_C)) of blocks of rows, in order of the rows.

    The rows past the groups are group E. ``every_group`` visits a group without rows once, so
    that its result is written, and leaves out group E.
    """
    E = len(sizes_E)
    used = jnp.sum(sizes_E)
    sizes_C = jnp.append(sizes_E, 0 if every_group else rows - used).astype(jnp.int32)
    stop_C = jnp.cumsum(sizes_C, dtype=jnp.int32)
    start_C = stop_C - sizes_C
    first_C = start_C // block
    count_C = jnp.where(sizes_C > 0, (stop_C - 1) // block - first_C + 1, 0)
    if every_group:
        count_C = jnp.maximum(count_C, 1).at[E].set(0)
    most = pl.cdiv(rows, block) + E
    group_V = jnp.repeat(jnp.arange(E + 1, dtype=jnp.int32), count_C, total_repeat_length=most)
    before_C = jnp.cumsum(count_C, dtype=jnp.int32) - count_C
    block_V = first_C[group_V] + jnp.arange(most, dtype=jnp.int32) - before_C[group_V]
    # a group without rows at the very end would begin past the last block
    block_V = jnp.clip(block_V, 0, pl.cdiv(rows, block) - 1)
    return jnp.sum(count_C), (group_V, block_V, jnp.append(0, stop_C).astype(jnp.int32))


def _own(group_V, block_V, border_C, v, block: int):
    """(first, last + 1) of the visit's rows inside its block."""
    first = block_V[v] * block
    start, stop = border_C[group_V[v]], border_C[group_V[v] + 1]
    return jnp.clip(start - first, 0, block), jnp.clip(stop - first, 0, block)


def _parts(lo, hi, block: int, body):
    """``body(rows of a part, own_R1)`` for the parts in which ``lo <= row < hi`` somewhere."""
    part = PART if block % PART == 0 else block

    @pl.loop(lo // part, pl.cdiv(hi, part))
    def _(i):
        begin = pl.multiple_of(i * part, part)
        row_R1 = begin + jax.lax.broadcasted_iota(jnp.int32, (part, 1), 0)
        body(pl.ds(begin, part), (row_R1 >= lo) & (row_R1 < hi))


def _rows_kernel(group_V, block_V, border_C, x_RD, w_Df, y_Rf, sum_Rf, *, transposed: bool):
    v, block = pl.program_id(1), x_RD.shape[0]
    lo, hi = _own(group_V, block_V, border_C, v, block)
    grouped = group_V[v] < border_C.shape[0] - 2
    whole = hi - lo == block

    def product(rows):
        sum_Rf[rows] = jnp.zeros_like(sum_Rf[rows])

        def add(k):
            w = w_Df[:, k] if transposed else w_Df[k]
            sum_Rf[rows] += rules.dot(x_RD[rows, k], w, 1, 1 if transposed else 0)

        chunks(x_RD.shape[1], CHUNK // y_Rf.shape[1], add)
        return sum_Rf[rows].astype(y_Rf.dtype)

    @pl.when(whole & grouped)
    def _():
        y_Rf[...] = product(pl.ds(0, block))

    @pl.when(whole & ~grouped)
    def _():
        y_Rf[...] = jnp.zeros_like(y_Rf)

    @pl.when(~whole & grouped)
    def _():
        def part(rows, own_R1):
            y_Rf[rows] = jnp.where(own_R1, product(rows), y_Rf[rows])

        _parts(lo, hi, block, part)

    @pl.when(~whole & ~grouped)
    def _():
        def part(rows, own_R1):
            y_Rf[rows] = jnp.where(own_R1, jnp.zeros_like(y_Rf[rows]), y_Rf[rows])

        _parts(lo, hi, block, part)


def _matrices_kernel(group_V, block_V, border_C, x_Rd, dy_Rf, dw_df, sum_df):
    v, block = pl.program_id(2), x_Rd.shape[0]
    lo, hi = _own(group_V, block_V, border_C, v, block)
    last = pl.num_programs(2) - 1
    begins = (v == 0) | (group_V[jnp.maximum(v - 1, 0)] != group_V[v])
    ends = (v == last) | (group_V[jnp.minimum(v + 1, last)] != group_V[v])

    @pl.when(begins)
    def _():
        sum_df[...] = jnp.zeros_like(sum_df)

    def add(rows, keep):
        def chunk(k):
            sum_df[:, k] += rules.dot(keep(x_Rd[rows]), keep(dy_Rf[rows, k]), 0, 0)

        chunks(dy_Rf.shape[1], CHUNK // x_Rd.shape[1], chunk)

    @pl.when(hi - lo == block)
    def _():
        add(pl.ds(0, block), lambda a: a)

    @pl.when(hi - lo < block)
    def _():
        # masked on both sides: what another group's rows hold may be NaN
        _parts(
            lo, hi, block,
            lambda rows, own_R1: add(rows, lambda a: jnp.where(own_R1, a, jnp.zeros_like(a))),
        )  # fmt: skip

    @pl.when(ends)
    def _():
        dw_df[...] = sum_df[...].astype(dw_df.dtype)


def _rows_of_block(rows: int, most: int) -> int:
    """Few rows are one block of whole registers, which reaches past them."""
    return min(most, pl.cdiv(rows, REGISTER_ROWS) * REGISTER_ROWS)


class Blocks(NamedTuple):
    """Of the three kernels' operands; the last block of a width may reach past it.

    R: rows. d, f: widths. vmem: bytes that the compiler may use for them.
    """

    R: int
    d: int
    f: int
    vmem: int


def _fitting(chip: str, name: str, options, need) -> Blocks:
    """The first (R, d, f) whose ``need`` of bytes the chip has."""
    for R, d, f in options:
        if need(R, d, f) <= CHIPS[chip].budget:
            return Blocks(R, d, f, CHIPS[chip].limit(need(R, d, f)))
    raise ValueError(
        f"{name}: blocks of {need(R, d, f) / MIB:.0f} MiB do not fit the "
        f"{CHIPS[chip].budget / MIB:.0f} MiB of a {chip}'s vector memory (VMEM) that they may have"
    )


def blocks_of_rows(chip: str, rows: int, D: int, F: int, bytes_each: int) -> Blocks:
    """(R, D, f) such that double-buffered (R, D), (D, f), (R, f) and a float32 (R, f) fit.

    Of float32 operands also their pieces.

    Raises:
      ValueError: none fits.
    """

    def need(R, D, f):
        D, f = lanes(D), lanes(f)
        pieces = PIECES * (bytes_each == 4) * (R * D + D * f)
        return 2 * bytes_each * (R * D + D * f + R * f) + 4 * R * f + pieces

    cores = CHIPS[chip].cores
    options = ((_rows_of_block(rows, R), D, cut(F, most, cores)) for R, most in BLOCKS)
    return _fitting(chip, f"grouped matmul of ({rows}, {D}) by ({D}, {F})", options, need)


def blocks_of_matrices(chip: str, rows: int, D: int, F: int, bytes_each: int) -> Blocks:
    """(R, d, f) such that double-buffered (R, d), (R, f), (d, f) and a float32 (d, f) fit.

    Of float32 operands also their pieces.

    Raises:
      ValueError: none fits.
    """

    def need(R, d, f):
        d, f = lanes(d), lanes(f)
        pieces = PIECES * (bytes_each == 4) * (R * d + R * f)
        return 2 * bytes_each * (R * d + R * f + d * f) + 4 * d * f + pieces

    R, cores = _rows_of_block(rows, BLOCK_ROWS), CHIPS[chip].cores
    options = ((R, cut(D, d, cores), cut(F, f)) for d, f in MATRICES)
    return _fitting(chip, f"grouped matmul gradient ({D}, {F})", options, need)


def _call(kernel, name, *, out_shape, visits, arrays, flops, semantics, vmem, interpret, **grid):
    """One kernel whose last grid dimension counts visits."""
    count, tables = visits
    spec = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=len(tables), **grid)
    moved = sum(a.size * a.dtype.itemsize for a in (*arrays, out_shape))
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
        name=name,
    )(*tables, *arrays)


def _shape(shape, dtype, *like):
    """An output that varies over the axes of an enclosing shard_map as its inputs do."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like[0]).manual_axis_type)


def rows_by_matrices(
    x_MD, w_EDF, sizes_E, *, chip: str, load: int | None = None, transposed=False, interpret=False
):
    """Each row times its group's matrix, or, ``transposed``, the matrix (E, F, D) transposed.

    Args:
      x_MD: rows sorted by group, bfloat16 or float32.
      w_EDF: of the rows' dtype; (E, F, D) if ``transposed``.
      sizes_E: int32 rows of each group.
      chip: what is compiled for, a key of ``chips.CHIPS``.
      load: rows in groups that the declared cost counts on, M by default.

    Returns:
      (M, F) in the rows' dtype, accumulated in float32; zeros past the groups.

    Raises:
      ValueError: widths whose blocks do not fit the on-chip memory.
    """
    (M, D), E, F = x_MD.shape, w_EDF.shape[0], w_EDF.shape[1 if transposed else 2]
    R, _, f, vmem = blocks_of_rows(chip, M, D, F, x_MD.dtype.itemsize)
    visits = _visits(sizes_E, M, R, every_group=False)

    def w_index(j, v, group_V, block_V, border_C):
        e = jnp.minimum(group_V[v], E - 1)
        return (e, j, 0) if transposed else (e, 0, j)

    def x_index(j, v, group_V, block_V, border_C):  # the rows of no group need not be read
        return jnp.minimum(block_V[v], jnp.maximum(border_C[E] - 1, 0) // R), 0

    return _call(
        functools.partial(_rows_kernel, transposed=transposed),
        "grouped_matmul_transposed" if transposed else "grouped_matmul",
        out_shape=_shape((M, F), x_MD.dtype, x_MD),
        visits=visits,
        arrays=(x_MD, w_EDF),
        flops=2 * (load or M) * D * F,
        semantics=("parallel", "arbitrary"),
        vmem=vmem,
        interpret=interpret,
        grid=(pl.cdiv(F, f), visits[0]),
        in_specs=[
            pl.BlockSpec((R, D), x_index),
            pl.BlockSpec((None, f, D) if transposed else (None, D, f), w_index),
        ],
        out_specs=pl.BlockSpec((R, f), lambda j, v, g, block_V, b: (block_V[v], j)),
        scratch_shapes=[pltpu.VMEM((R, f), jnp.float32)],
    )


def matrices_of_rows(x_MD, dy_MF, sizes_E, *, chip: str, load: int | None = None, interpret=False):
    """For every group the sum of outer products of its rows: (E, D, F) in the rows' dtype.

    Args:
      x_MD, dy_MF: rows sorted by group, of one dtype, bfloat16 or float32.
      sizes_E: int32 rows of each group; one without rows gets zeros.
      chip, load: see :func:`rows_by_matrices`.

    Raises:
      ValueError: widths whose blocks do not fit the on-chip memory.
    """
    (M, D), F, E = x_MD.shape, dy_MF.shape[1], len(sizes_E)
    R, d, f, vmem = blocks_of_matrices(chip, M, D, F, x_MD.dtype.itemsize)
    visits = _visits(sizes_E, M, R, every_group=True)
    return _call(
        _matrices_kernel,
        "grouped_matmul_matrices",
        out_shape=_shape((E, D, F), x_MD.dtype, x_MD),
        visits=visits,
        arrays=(x_MD, dy_MF),
        flops=2 * (load or M) * D * F,
        semantics=("parallel", "parallel", "arbitrary"),
        vmem=vmem,
        interpret=interpret,
        grid=(pl.cdiv(D, d), pl.cdiv(F, f), visits[0]),
        in_specs=[
            pl.BlockSpec((R, d), lambda i, j, v, g, block_V, b: (block_V[v], i)),
            pl.BlockSpec((R, f), lambda i, j, v, g, block_V, b: (block_V[v], j)),
        ],
        out_specs=pl.BlockSpec(
            (None, d, f), lambda i, j, v, group_V, block_V, b: (group_V[v], i, j)
        ),
        scratch_shapes=[pltpu.VMEM((d, f), jnp.float32)],
    )


def check(x_MD, w_EDF, sizes_E, chip: str) -> None:
    """Raises ValueError for what :func:`grouped_matmul` or its gradients do not support.

    Only shapes and dtypes are looked at.
    """
    rules.check_grouped_matmul("TPU kernel", x_MD, w_EDF, sizes_E, ("bfloat16", "float32"))
    if reason := chips.unsupported(chip):
        raise ValueError(f"TPU grouped matmul: {reason}")
    (M, D), (E, _, F), size = x_MD.shape, w_EDF.shape, x_MD.dtype.itemsize
    blocks = (
        blocks_of_rows(chip, M, D, F, size),
        blocks_of_rows(chip, M, F, D, size),
        blocks_of_matrices(chip, M, D, F, size),
    )
    for R, *_ in blocks:
        need = 4 * (2 * (pl.cdiv(M, R) + E) + E + 2)  # of what ``_visits`` makes
        if need > chips.TABLES:
            raise ValueError(
                f"TPU grouped matmul: {E} groups of {M} rows in blocks of {R} take {need} bytes of "
                f"scalar memory, and a kernel has {chips.TABLES}: pass fewer rows a call"
            )


def grouped_matmul(
    x_MD, w_EDF, sizes_E, *, chip: str, load: int | None = None, interpret: bool = False
):
    """:func:`rows_by_matrices` with gradients for the rows and the matrices.

    Args:
      x_MD: rows sorted by group, bfloat16 or float32.
      w_EDF: one matrix per group, in the rows' dtype.
      sizes_E: int32 rows of each group, in order; zero is allowed. Rows past their sum give zeros.
      chip, load: see :func:`rows_by_matrices`.

    Returns:
      (M, F) in the rows' dtype.

    Raises:
      ValueError: a chip, shape or dtype that the kernels do not support, or widths whose blocks,
        those of the gradients included, do not fit the on-chip memory.
    """
    check(x_MD, w_EDF, sizes_E, chip)
    options = {"chip": chip, "load": load, "interpret": interpret}
    kernels = (functools.partial(k, **options) for k in (rows_by_matrices, matrices_of_rows))
    return rules.grouped_matmul(*kernels, x_MD, w_EDF, sizes_E)
