"""Grouped matmul and cross-entropy around the kernels of any platform: arguments and gradients.

Shape suffixes: M rows, E groups, D width of a row, F width of a result; N tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def precision(a, b) -> jax.lax.Precision | None:
    """Of a product: float32 factors are multiplied as what they are. Left to itself, a TPU rounds
    them to bfloat16 (``HIGHEST`` takes six passes instead of one) and an NVIDIA GPU to TF32."""
    return jax.lax.Precision.HIGHEST if a.dtype == b.dtype == jnp.float32 else None


def dot(a, b, a_axis: int, b_axis: int):
    """The product of two matrices over an axis of each, float32."""
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision(a, b), preferred_element_type=jnp.float32
    )


def check_operands(x_MD, w_EDF, sizes_E) -> None:
    """Raises ValueError unless the arguments of a grouped matmul fit each other."""
    if x_MD.ndim != 2 or w_EDF.ndim != 3 or sizes_E.shape != w_EDF.shape[:1]:
        raise ValueError(
            "expected rows (M, D), matrices (E, D, F) and sizes (E,), got "
            f"{x_MD.shape}, {w_EDF.shape} and {sizes_E.shape}"
        )
    if x_MD.shape[1] != w_EDF.shape[1] or x_MD.dtype != w_EDF.dtype:
        raise ValueError(
            f"rows {x_MD.dtype}{x_MD.shape} do not fit matrices {w_EDF.dtype}{w_EDF.shape}"
        )
    if sizes_E.dtype != jnp.int32:
        raise ValueError(f"sizes must be int32, got {sizes_E.dtype}")


def check_grouped_matmul(kernel: str, x_MD, w_EDF, sizes_E, dtypes: tuple[str, ...]) -> None:
    """Raises ValueError unless the arguments fit each other and are of one of ``dtypes``."""
    check_operands(x_MD, w_EDF, sizes_E)
    if 0 in (*x_MD.shape, *w_EDF.shape):
        raise ValueError(f"of rows {x_MD.shape} and matrices {w_EDF.shape} there are none")
    if x_MD.dtype.name not in dtypes:
        raise ValueError(
            f"rows and matrices are {x_MD.dtype}; the {kernel} supports, of both, "
            + " or ".join(dtypes)
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def grouped_matmul(rows_by_matrices: Callable, matrices_of_rows: Callable, x_MD, w_EDF, sizes_E):
    """``rows_by_matrices(x_MD, w_EDF, sizes_E)``, differentiable in the rows and the matrices."""
    return rows_by_matrices(x_MD, w_EDF, sizes_E)


def _grouped_matmul_forward(rows_by_matrices, matrices_of_rows, x_MD, w_EDF, sizes_E):
    return rows_by_matrices(x_MD, w_EDF, sizes_E), (x_MD, w_EDF, sizes_E)


def _grouped_matmul_backward(rows_by_matrices, matrices_of_rows, residuals, dy_MF):
    x_MD, w_EDF, sizes_E = residuals
    dw_EDF = matrices_of_rows(x_MD, dy_MF, sizes_E)
    # the rows are done with before their gradient, as large, is made: the compiler would keep both
    dy_MF, dw_EDF = jax.lax.optimization_barrier((dy_MF, dw_EDF))
    return rows_by_matrices(dy_MF, w_EDF, sizes_E, transposed=True), dw_EDF, None


grouped_matmul.defvjp(_grouped_matmul_forward, _grouped_matmul_backward)


def check_cross_entropy(
    kernel: str, x_ND, w_DV, target_N, weight_N, dtypes: tuple[str, ...]
) -> None:
    """Raises ValueError unless the arguments fit each other; ``dtypes`` are those of ``x_ND``."""
    shapes = x_ND.shape, w_DV.shape, target_N.shape, weight_N.shape
    N, V = x_ND.shape[:1], w_DV.shape[-1:]
    if shapes != (N + w_DV.shape[:1], x_ND.shape[-1:] + V, N, N) or 0 in x_ND.shape + V:
        raise ValueError(
            "expected hidden states (N, D), a projection (D, V), targets and weights (N,), got "
            f"{shapes[0]}, {shapes[1]}, {shapes[2]} and {shapes[3]}"
        )
    if x_ND.dtype.name not in dtypes:
        raise ValueError(
            f"hidden states are {x_ND.dtype}; the {kernel} supports {' or '.join(dtypes)}"
        )
    if target_N.dtype != jnp.int32:
        raise ValueError(f"targets must be int32, got {target_N.dtype}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 6))
def cross_entropy(
    log_likelihood: Callable, gradients: Callable, x_ND, w_DV, target_N, weight_N, z_loss: float
):
    """Weighted sum of ``-log p(target) + z_loss * logsumexp^2``, the products in ``x_ND.dtype``.

    Args:
      log_likelihood: (x_ND, w_DV, target_N) -> float32 (logsumexp_N, -log p_N).
      gradients: (x_ND, w_DV, target_N, lse_N, p_N, hot_N) -> (dx_ND, dw_DV) where the gradient of
        a token's logits is ``p * softmax - hot * onehot``.

    Returns:
      (total, nll_N) float32; no gradient flows through ``nll_N``.
    """
    return _forward(log_likelihood, gradients, x_ND, w_DV, target_N, weight_N, z_loss)[0]


def _forward(log_likelihood, gradients, x_ND, w_DV, target_N, weight_N, z_loss):
    lse_N, nll_N = log_likelihood(x_ND, w_DV.astype(x_ND.dtype), target_N)
    cost_N = nll_N + z_loss * jnp.square(lse_N)
    return (jnp.sum(weight_N * cost_N), nll_N), (x_ND, w_DV, target_N, weight_N, lse_N, cost_N)


def _backward(log_likelihood, gradients, z_loss, residuals, cotangents):
    x_ND, w_DV, target_N, weight_N, lse_N, cost_N = residuals
    hot_N = cotangents[0] * weight_N
    p_N = hot_N * (1.0 + 2.0 * z_loss * lse_N)
    dx_ND, dw_DV = gradients(x_ND, w_DV.astype(x_ND.dtype), target_N, lse_N, p_N, hot_N)
    return dx_ND, dw_DV.astype(w_DV.dtype), None, cotangents[0] * cost_N


cross_entropy.defvjp(_forward, _backward)
