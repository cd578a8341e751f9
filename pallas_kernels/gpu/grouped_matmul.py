"""Grouped matmul for Hopper (sm_90a): rows sorted by group, each group with its own matrix.

Both kernels are products in tiles (``tile_matmul``).

``rows_by_matrices``: tiles of rows lie on a fixed raster, and a tile that holds a border between
groups is multiplied once for each of its groups; the results are chosen row by row when they are
written. So no two blocks write the same row, and whatever other rows hold reaches none.

``matrices_of_rows``: a tile is summed over the rows of its group; where a step holds rows of other
groups, they are cleared in shared memory.

No atomics and a fixed order of the sums: the same bits in every run.

Shape suffixes: M rows, E groups, D width of a row, F width of a result; I tiles of rows, C = E + 1
borders of groups; within a kernel r the 64 rows of a warpgroup, f the columns of a tile.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import rules
from pallas_kernels.gpu import attention_tiles as tiles
from pallas_kernels.gpu.attention_tiles import ROWS
from pallas_kernels.gpu.common import check_device, vary_as
from pallas_kernels.gpu.tile_matmul import STEP, TILE, Plan, halves, row_rf

ALIGNED = 8  # rows of a swizzled tile


def _visits(sizes_E, rows: int):
    """Which groups have rows in which tile, int32.

    Returns:
      group_E: the groups that have rows, in order, then the empty ones.
      border_C: first row of each of them; the last is the number of rows in use.
      first_I, count_I: each tile's groups, as a place in ``group_E`` and a number from there on.
    """
    group_E = jnp.argsort(sizes_E == 0, stable=True).astype(jnp.int32)
    stop_E = jnp.cumsum(sizes_E[group_E], dtype=jnp.int32)
    border_C = jnp.append(jnp.int32(0), stop_E)
    base_I = jnp.arange(pl.cdiv(rows, TILE), dtype=jnp.int32)[:, None] * TILE
    first_I = jnp.sum(stop_E <= base_I, axis=1, dtype=jnp.int32)
    starts_E = border_C[:-1]
    begun_IE = (starts_E < base_I + TILE) & (starts_E < stop_E)
    return group_E, border_C, first_I, jnp.sum(begun_IE, axis=1, dtype=jnp.int32) - first_I


def rows_by_matrices(x_MD, w_EDF, sizes_E, *, transposed: bool = False, interpret=None):
    """Each row times its group's matrix, or, ``transposed``, the matrix (E, F, D) transposed.

    A tile that holds many small groups is multiplied by one block, group after group.

    Args:
      x_MD: rows sorted by group, bfloat16; D and F multiples of 128.
      w_EDF: bfloat16; (E, F, D) if ``transposed``.
      sizes_E: int32 rows of each group.
      interpret: ``plgpu.InterpretGPUParams()`` to run on a CPU.

    Returns:
      (M, F) bfloat16, accumulated in float32; zeros past the groups.
    """
    M, F = x_MD.shape[0], w_EDF.shape[1 if transposed else 2]
    plan = Plan.of(pl.cdiv(M, TILE), F)
    w_slot = (plan.f, STEP) if transposed else (STEP, plan.f)
    y_MF = plan.kernel(
        functools.partial(_rows_block, plan=plan, transposed=transposed),
        jax.ShapeDtypeStruct((M, F), x_MD.dtype),
        tiles.smem(2, ROWS, plan.f),
        (ROWS, STEP),
        w_slot,
        "grouped_matmul_rows",
        interpret,
    )(x_MD, w_EDF, *_visits(sizes_E, M))
    return vary_as(y_MF, x_MD)


def _rows_block(
    x_ref, w_ref, group_ref, border_ref, first_ref, count_ref, y_ref, y_smem,
    x_smem, w_smem, operands, *, plan: Plan, transposed: bool,
):  # fmt: skip
    steps = x_ref.shape[1] // STEP

    def produce():
        def tile(i, column, step):
            columns = pl.ds(column, plan.f)

            def visit(n, step):
                matrix = w_ref.at[group_ref[first_ref[i] + n]]

                @pl.loop(0, steps)
                def _(k):
                    part = pl.ds(k * STEP, STEP)
                    w = matrix.at[columns, part] if transposed else matrix.at[part, columns]
                    x = [x_ref.at[pl.ds(row, ROWS), part] for row in halves(i * TILE)]
                    operands.fill(step + k, x, w)

                return step + steps

            return lax.fori_loop(0, count_ref[i], visit, step)

        operands.drain(plan.walk(tile, jnp.int32(0)))

    def multiply():
        wg = lax.axis_index("wg")

        def left(slot):
            return x_smem.at[wg, slot]

        def right(slot):
            return w_smem.at[slot].transpose((1, 0)) if transposed else w_smem.at[slot]

        def tile(i, column, step):
            base = i * TILE + wg * ROWS

            def visit(n, step):
                c = first_ref[i] + n
                start, stop = border_ref[c] - base, border_ref[c + 1] - base
                mine = (start < ROWS) & (stop > 0)

                @pl.when(mine)
                def _():
                    def product(acc_ref):
                        operands.add_products(acc_ref, step, steps, left, right)
                        return acc_ref[...].astype(y_smem.dtype)

                    y_rf = pl.run_scoped(product, plgpu.ACC((ROWS, plan.f), jnp.float32))
                    _write_own_rows(y_smem.at[wg], y_rf, start, stop)

                pl.when(~mine)(lambda: operands.skip(step, steps))
                return step + steps

            step = lax.fori_loop(0, count_ref[i], visit, step)
            used = border_ref[border_ref.shape[0] - 1] - base

            @pl.when(used < ROWS)
            def _():
                zeros_rf = tiles.zeros(ROWS, plan.f).astype(y_smem.dtype)
                _write_own_rows(y_smem.at[wg], zeros_rf, used, ROWS)

            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                y_smem.at[wg], y_ref.at[pl.ds(base, ROWS), pl.ds(column, plan.f)]
            )
            return step

        plan.walk(tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    tiles.split_registers(produce, multiply)


def _write_own_rows(out_smem, y_rf, start, stop) -> None:
    """``out_smem[start:stop] = y_rf[start:stop]``, once what was there before has been copied."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    whole = (start <= 0) & (stop >= ROWS)

    @pl.when(whole)
    def _():
        out_smem[...] = y_rf

    @pl.when(~whole)
    def _():
        index_rf = row_rf(y_rf.shape)
        old_rf = plgpu.load(out_smem, layout=plgpu.Layout.WGMMA)
        out_smem[...] = jnp.where((index_rf >= start) & (index_rf < stop), y_rf, old_rf)


def matrices_of_rows(x_MD, dy_MF, sizes_E, *, interpret=None):
    """For every group the sum of outer products of its rows: (E, D, F) bfloat16.

    Args:
      x_MD, dy_MF: rows sorted by group, bfloat16; D and F multiples of 128.
      sizes_E: int32 rows of each group; one without rows gets zeros.
      interpret: ``plgpu.InterpretGPUParams()`` to run on a CPU.
    """
    D, F, E = x_MD.shape[1], dy_MF.shape[1], len(sizes_E)
    plan = Plan.of(E * (D // TILE), F)
    border_C = jnp.append(jnp.int32(0), jnp.cumsum(sizes_E, dtype=jnp.int32))
    dw_EDF = plan.kernel(
        functools.partial(_matrices_block, plan=plan),
        jax.ShapeDtypeStruct((E, D, F), x_MD.dtype),
        tiles.smem(2, ROWS, plan.f),
        (STEP, ROWS),
        (STEP, plan.f),
        "grouped_matmul_matrices",
        interpret,
        plgpu.Barrier(num_arrivals=2),
    )(x_MD, dy_MF, border_C)
    return vary_as(dw_EDF, x_MD)


def _matrices_block(
    x_ref, dy_ref, border_ref, dw_ref, dw_smem, cleared, x_smem, dy_smem, operands, *, plan: Plan
):
    cut = dw_ref.shape[1] // TILE  # tiles of a group along D

    def place(i):
        """Group, first of the 128 rows of its matrix, and the steps of the group."""
        e, d = lax.div(i, jnp.int32(cut)), lax.rem(i, jnp.int32(cut)) * TILE
        return e, d, _Steps.of(border_ref[e], border_ref[e + 1])

    def produce():
        def tile(i, column, step):
            _, d, steps = place(i)

            @pl.loop(0, steps.count)
            def _(k):
                rows = pl.ds(pl.multiple_of(steps.row(k), ALIGNED), STEP)
                x = [x_ref.at[rows, pl.ds(half, ROWS)] for half in halves(d)]
                operands.fill(step + k, x, dy_ref.at[rows, pl.ds(column, plan.f)])

            return step + steps.count

        operands.drain(plan.walk(tile, jnp.int32(0)))

    def multiply():
        wg = lax.axis_index("wg")
        half_of_f = pl.ds(pl.multiple_of(wg * (plan.f // 2), plan.f // 2), plan.f // 2)

        def left(slot):
            return x_smem.at[wg, slot].transpose((1, 0))

        def tile(i, column, step):
            e, d, steps = place(i)

            def product(acc_ref):
                @pl.loop(0, steps.edges)
                def _(k):
                    slot = operands.wait(step + k)
                    _clear(x_smem.at[wg, slot], *steps.own(k))
                    _clear(dy_smem.at[slot, :, half_of_f], *steps.own(k))
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(cleared)
                    plgpu.barrier_wait(cleared)
                    plgpu.wgmma(acc_ref, left(slot), dy_smem.at[slot])
                    plgpu.wgmma_wait(0)
                    operands.release(step + k)

                inner = steps.count - steps.edges
                operands.add_products(
                    acc_ref, step + steps.edges, inner, left, lambda slot: dy_smem.at[slot]
                )
                return acc_ref[...].astype(dw_smem.dtype)

            dw_rf = pl.run_scoped(product, plgpu.ACC((ROWS, plan.f), jnp.float32))
            _write_own_rows(dw_smem.at[wg], dw_rf, 0, ROWS)
            plgpu.commit_smem()
            rows = pl.ds(d + wg * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(dw_smem.at[wg], dw_ref.at[e, rows, pl.ds(column, plan.f)])
            return step + steps.count

        plan.walk(tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    tiles.split_registers(produce, multiply)


class _Steps(NamedTuple):
    """The rows of a group in steps of 64; those that hold rows of other groups come first.

    Attributes:
      start, stop: rows of the group.
      begin: first row of all; TMA fills tiles of 8 rows from multiples of 8.
      count: steps.
      edges: how many of them hold other rows.
    """

    start: jax.Array
    stop: jax.Array
    begin: jax.Array
    count: jax.Array
    edges: jax.Array

    @classmethod
    def of(cls, start, stop) -> _Steps:
        begin = lax.div(start, jnp.int32(ALIGNED)) * ALIGNED
        count = jnp.where(stop > start, lax.div(stop - begin + STEP - 1, jnp.int32(STEP)), 0)
        tail = jnp.where(lax.rem(stop - begin, jnp.int32(STEP)) > 0, 1, 0)
        edges = jnp.minimum(jnp.where(start > begin, 2, tail), count)
        return cls(start, stop, begin, count, edges)

    def row(self, k):
        """First row of step ``k``: the last rows, then the others from the first on."""
        return self.begin + jnp.where(k == 0, self.count - 1, k - 1) * STEP

    def own(self, k):
        """The group's rows within step ``k``: the first, and the one after the last."""
        return self.start - self.row(k), self.stop - self.row(k)


def _clear(ref, start, stop) -> None:
    """Zeros in the rows outside: what they hold may be NaN."""
    a_rf = plgpu.load(ref, layout=plgpu.Layout.WGMMA)
    index_rf = row_rf(a_rf.shape)
    own_rf = (index_rf >= start) & (index_rf < stop)
    ref[...] = jnp.where(own_rf, a_rf, jnp.zeros_like(a_rf))


def check(x_MD, w_EDF, sizes_E) -> None:
    """Raises ValueError for shapes and dtypes that :func:`grouped_matmul` does not support."""
    rules.check_grouped_matmul("GPU kernel", x_MD, w_EDF, sizes_E, ("bfloat16",))
    D, F = w_EDF.shape[1:]
    if D % TILE or F % TILE:
        raise ValueError(f"widths must be multiples of {TILE}, got {D} and {F}")


def grouped_matmul(x_MD, w_EDF, sizes_E, *, device=None, interpret=None):
    """:func:`rows_by_matrices` with gradients for the rows and the matrices.

    Args:
      x_MD: rows sorted by group, bfloat16.
      w_EDF: one bfloat16 matrix per group; D and F multiples of 128.
      sizes_E: int32 rows of each group, in order; zero is allowed. Rows past their sum give zeros.
      device: one of those compiled for; None for the default.
      interpret: ``plgpu.InterpretGPUParams()`` to run on a CPU.

    Returns:
      (M, F) bfloat16.

    Raises:
      ValueError: a shape, dtype or platform that the kernels do not support.
    """
    check(x_MD, w_EDF, sizes_E)
    check_device("grouped matmul", device, interpret)
    kernels = (
        functools.partial(k, interpret=interpret) for k in (rows_by_matrices, matrices_of_rows)
    )
    return rules.grouped_matmul(*kernels, x_MD, w_EDF, sizes_E)
