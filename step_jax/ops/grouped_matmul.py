"""Matrix products of sorted groups of rows, each with its own matrix (the experts of an MoE).

Shape suffixes: M rows sorted by group, E groups, D width of a row, F width of a result; R rows of
one tile, S tiles of a schedule.

Rows past the sum of the sizes belong to no group: their results and gradients are zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import rules
from step_jax.core.sharding import vary_alike
from step_jax.ops import registry


def group_of_row_M(sizes_E, rows: int):
    """int32 (rows,): each row's group; E for the rows that belong to none."""
    row_M1 = jnp.arange(rows, dtype=jnp.int32)[:, None]
    return jnp.sum(row_M1 >= jnp.cumsum(sizes_E), axis=1, dtype=jnp.int32)


def reference(x_MD, w_EDF, sizes_E):
    """Every row by every matrix, in float32: the definition the others are compared with."""
    x_MD, w_EDF = x_MD.astype(jnp.float32), w_EDF.astype(jnp.float32)
    group_M = group_of_row_M(sizes_E, len(x_MD))
    y_MF = jnp.zeros((len(x_MD), w_EDF.shape[2]), jnp.float32)
    for e, w_DF in enumerate(w_EDF):
        # masked on both sides: what other rows hold, even NaN, reaches neither gradient
        own_M1 = (group_M == e)[:, None]
        own_MD = jnp.where(own_M1, x_MD, 0.0)
        product_MF = jnp.dot(own_MD, w_DF, precision=jax.lax.Precision.HIGHEST)
        y_MF += jnp.where(own_M1, product_MF, 0.0)
    return y_MF


# Full tiles of a size, then what is left of a group in tiles of the next: large products run at the
# speed of dense ones, and a group wastes half a smallest tile on average.
TILE_ROWS = (512, 128, 32)


def _over_groups(sizes_E, carry, body: Callable):
    """``carry = body(carry, group, its first row, its size)`` for the groups that have rows."""
    start_E = jnp.cumsum(sizes_E, dtype=jnp.int32) - sizes_E
    filled_E = jnp.argsort(sizes_E == 0, stable=True)

    def turn(i, carry):
        e = filled_E[i]
        return body(carry, e, start_E[e], sizes_E[e])

    return jax.lax.fori_loop(0, jnp.sum(sizes_E > 0), turn, carry)


def _over_tiles(start, size, rows: int, carry, body: Callable):
    """``carry = body(carry, first row of the tile, own_R1)`` for the tiles of one group.

    A tile may begin before its rows and end after them; ``own_R1`` says which are its own.
    """
    stop = start + size
    for R in TILE_ROWS:
        last = R == TILE_ROWS[-1]
        if R > rows and not last:
            continue
        count = (stop - start + (R - 1) * last) // R

        def turn(i, carry, R=R, start=start):
            begin = start + i * R
            first = jnp.minimum(begin, max(rows - R, 0))
            row_R1 = first + jnp.arange(min(R, rows), dtype=jnp.int32)[:, None]
            return body(carry, first, (row_R1 >= begin) & (row_R1 < jnp.minimum(begin + R, stop)))

        carry = jax.lax.fori_loop(0, count, turn, carry)
        start += count * R
    return carry


def _rows_by_matrices(x_MD, w_EDF, sizes_E, transposed: bool):
    """Each row by its group's matrix, or by that matrix transposed; in the rows' dtype."""
    rows, width = len(x_MD), w_EDF.shape[1 if transposed else 2]

    def group(y_MF, e, start, size):
        w_DF = jax.lax.dynamic_index_in_dim(w_EDF, e, keepdims=False)

        def tile(y_MF, first, own_R1):
            x_RD, old_RF = (_rows(a, first, own_R1) for a in (x_MD, y_MF))
            y_RF = rules.dot(x_RD, w_DF, 1, 1 if transposed else 0).astype(x_MD.dtype)
            y_RF = jnp.where(own_R1, y_RF, old_RF)
            return jax.lax.dynamic_update_slice_in_dim(y_MF, y_RF, first, 0)

        return _over_tiles(start, size, rows, y_MF, tile)

    y_MF, _ = vary_alike(jnp.zeros((rows, width), x_MD.dtype), x_MD)
    return _over_groups(sizes_E, y_MF, group)


def _rows(a_MD, first, own_R1):
    return jax.lax.dynamic_slice_in_dim(a_MD, first, len(own_R1))


@jax.custom_vjp
def _tiles(x_MD, w_EDF, sizes_E):
    return _rows_by_matrices(x_MD, w_EDF, sizes_E, transposed=False)


def _tiles_forward(x_MD, w_EDF, sizes_E):
    return _tiles(x_MD, w_EDF, sizes_E), (x_MD, w_EDF, sizes_E)


def _tiles_backward(residuals, dy_MF):
    x_MD, w_EDF, sizes_E = residuals

    def group(dw_EDF, e, start, size):
        def tile(dw_DF, first, own_R1):
            x_RD, dy_RF = (jnp.where(own_R1, _rows(a, first, own_R1), 0) for a in (x_MD, dy_MF))
            return dw_DF + rules.dot(x_RD, dy_RF, 0, 0)

        dw_DF, _ = vary_alike(jnp.zeros(w_EDF.shape[1:], jnp.float32), x_MD)
        dw_DF = _over_tiles(start, size, len(x_MD), dw_DF, tile).astype(dw_EDF.dtype)
        return jax.lax.dynamic_update_index_in_dim(dw_EDF, dw_DF, e, 0)

    dw_EDF, _ = vary_alike(jnp.zeros(w_EDF.shape, w_EDF.dtype), x_MD)
    dw_EDF = _over_groups(sizes_E, dw_EDF, group)
    dx_MD = _rows_by_matrices(dy_MF, w_EDF, sizes_E, transposed=True)
    return dx_MD, dw_EDF, None


_tiles.defvjp(_tiles_forward, _tiles_backward)


def tiles(x_MD, w_EDF, sizes_E):
    """A loop over tiles of rows that lie in one group: the work follows the sizes at run time.

    The gradients use the same loop, so that neither direction stores anything per group and row.
    """
    # outside the rule for gradients: what is cast here has its gradients added up
    return _tiles(*vary_alike(x_MD, w_EDF, sizes_E))


def pallas_tpu(x_MD, w_EDF, sizes_E, *, device, load: int | None, interpret: bool = False):
    """The kernel of this project for TPUs; it alone tells the compiler a cost, that of ``load``."""
    from pallas_kernels.tpu import grouped_matmul as kernel  # not paid for elsewhere

    x_MD, w_EDF, sizes_E = vary_alike(x_MD, w_EDF, sizes_E)
    device = jax.devices()[0] if device is None else device
    chip = registry.interpreted_chip(device) if interpret else registry.tpu_chip(device)
    return kernel.grouped_matmul(x_MD, w_EDF, sizes_E, chip=chip, load=load, interpret=interpret)


def pallas_gpu(x_MD, w_EDF, sizes_E, *, device, load: int | None):
    """The kernel of this project for Hopper GPUs: bfloat16, widths that are multiples of 128."""
    from pallas_kernels.gpu import grouped_matmul as kernel  # not paid for elsewhere

    x_MD, w_EDF, sizes_E = vary_alike(x_MD, w_EDF, sizes_E)
    return kernel.grouped_matmul(x_MD, w_EDF, sizes_E, device=device)


def ragged_dot(x_MD, w_EDF, sizes_E):
    """The operation of XLA; as fast as the compiler's lowering on a platform is."""
    used_M1 = jnp.arange(len(x_MD), dtype=jnp.int32)[:, None] < jnp.sum(sizes_E)
    y_MF = jax.lax.ragged_dot(
        jnp.where(used_M1, x_MD, 0), w_EDF, sizes_E, preferred_element_type=jnp.float32
    )
    return jnp.where(used_M1, y_MF, 0.0)


class Problem(NamedTuple):
    """What decides whether an implementation can do it: the arrays, or their shapes and dtypes."""

    x_MD: Any
    w_EDF: Any
    sizes_E: Any

    @classmethod
    def of(cls, rows: int, groups: int, width: int, result: int, dtype: str) -> Problem:
        shapes = ((rows, width), dtype), ((groups, width, result), dtype), ((groups,), jnp.int32)
        return cls(*(jax.ShapeDtypeStruct(*s) for s in shapes))


def _pallas_tpu_unsupported(problem: Problem | None, device, interpret: bool = False) -> str | None:
    from pallas_kernels.tpu import grouped_matmul as kernel

    if problem is None:
        return None
    chip = registry.interpreted_chip(device) if interpret else registry.tpu_chip(device)
    return registry.refusal(kernel.check, *problem, chip)


def _pallas_gpu_unsupported(problem: Problem | None, device) -> str | None:
    from pallas_kernels.gpu import grouped_matmul as kernel

    return None if problem is None else registry.refusal(kernel.check, *problem)


#: compute: (x_MD, w_EDF, sizes_E[, device, load: kernels only]) -> y_MF. A problem of None asks
#: about the device alone.
IMPLEMENTATIONS = {
    "reference": registry.Entry(reference),
    "tiles": registry.Entry(tiles),
    "ragged_dot": registry.Entry(ragged_dot),
    "pallas_tpu": registry.kernel(pallas_tpu, registry.needs_tpu, _pallas_tpu_unsupported),
    # asked for by name until it has been measured on a GPU
    "pallas_gpu": registry.kernel(pallas_gpu, registry.needs_hopper, _pallas_gpu_unsupported),
    # by JAX's interpreter, for tests on machines without a TPU
    "pallas_tpu_interpret": registry.Entry(
        functools.partial(pallas_tpu, interpret=True),
        functools.partial(_pallas_tpu_unsupported, interpret=True),
        kernel=True,
    ),
}
Implementation = Literal[
    "auto",
    "reference",
    "tiles",
    "ragged_dot",
    "pallas_tpu",
    "pallas_gpu",
    "pallas_tpu_interpret",
]
OPERATION = registry.Operation(
    "grouped matmul",
    IMPLEMENTATIONS,
    # outside TPUs XLA makes of ragged_dot masked products of all rows with all matrices
    fallback="tiles",
    automatic={"tpu": ("pallas_tpu",)},
)
resolve = OPERATION.resolve


def grouped_matmul(
    x_MD,
    w_EDF,
    sizes_E,
    *,
    implementation: str = "auto",
    device: jax.Device | None = None,
    load: int | None = None,
):
    """The product of each row with the matrix of its group.

    Args:
      x_MD: rows sorted by group.
      w_EDF: one matrix per group, in the rows' dtype.
      sizes_E: int32 rows of each group, in order; zero is allowed. Rows past their sum give zeros.
      implementation: a key of ``IMPLEMENTATIONS`` or ``auto``.
      device: one of those compiled for; None for the default.
      load: how many rows are expected to be in groups, M by default. Only the cost that a kernel
        declares depends on it: the work follows ``sizes_E``.

    Returns:
      (M, F) in ``x_MD.dtype``, accumulated in float32; differentiable in ``x_MD`` and ``w_EDF``.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or see
        ``registry.Operation.resolve``.
    """
    rules.check_operands(x_MD, w_EDF, sizes_E)
    arrays = Problem(x_MD, w_EDF, sizes_E)
    entry = IMPLEMENTATIONS[resolve(implementation, arrays, device)]
    options = {"device": device, "load": load} if entry.kernel else {}
    return entry.compute(*arrays, **options).astype(x_MD.dtype)
