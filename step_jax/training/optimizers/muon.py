"""Muon: momentum whose matrices are replaced by their polar factors.

The update of a matrix W with gradient G (Step-3.5-Flash, arXiv 2602.10604):

    M <- momentum * M + G,   N = G + momentum * M            (Nesterov)
    W <- W - rate * (0.2 * sqrt(max(rows, columns)) * polar(N) + weight_decay * W)

polar(N) = U V^T of N = U S V^T, by six Polar-Express iterations (arXiv 2505.16932). The factor 0.2
gives the update the root mean square of AdamW's, so both share rate and decay (arXiv 2502.16982).

Shape suffixes: B stacked matrices (layers, experts), R rows, C columns.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from step_jax.core.sharding import Sharding
from step_jax.core.spec import ParamSpec, is_spec

#: (a, b, c) of x <- a x + b (x x^T) x + c (x x^T)^2 x, before the safety factor.
POLAR_EXPRESS = (
    (8.2872, -23.5959, 17.3004),
    (4.1071, -2.9478, 0.5448),
    (3.9487, -2.9089, 0.5518),
    (3.3184, -2.4885, 0.5100),
    (2.3007, -1.6689, 0.4188),
    (1.8913, -1.2680, 0.3768),
)
#: Keeps singular values that rounding pushes above 1 inside the iteration's basin.
SAFETY = 1.01


def polar_factor(x_BRC: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Approximate polar factor of every matrix of a stack, any leading axes.

    In exact arithmetic a singular value of at least 1e-3 of the Frobenius norm comes out between
    0.994 and 1.002; a smaller one is enlarged at most 1828 times. Zeros give zeros.

    Args:
      x_BRC: (..., R, C) of any floating type.
      dtype: of the matrix products' inputs and of the iterates (float16 or float32); products are
        accumulated in float32. float32 products use ``Precision.HIGH`` (three bfloat16 passes on
        TPU, TensorFloat-32 on GPU: never fewer mantissa bits than float16).

    Returns:
      (..., R, C) in ``dtype``.
    """
    return _iterate(_scaled(x_BRC, (-2, -1), dtype))


def _scaled(x, matrix_axes: tuple[int, ...], dtype):
    """``x`` with every matrix divided by 1.01 times its Frobenius norm."""
    x = x.astype(jnp.float32)
    # The result must not depend on the gradient's scale, so its squares may not underflow.
    largest = jnp.max(jnp.abs(x), axis=matrix_axes, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=matrix_axes, keepdims=True))
    return (x / (SAFETY * jnp.where(norm > 0, norm, 1.0))).astype(dtype)


def _iterate(x_BRC):
    """The six iterations on matrices of norm at most 1."""
    if x_BRC.shape[-2] > x_BRC.shape[-1]:  # so that the Gram matrix is the small one
        return _iterate(x_BRC.mT).mT
    dtype = x_BRC.dtype

    def product(equation, a, b):
        return jnp.einsum(
            equation, a, b, precision=jax.lax.Precision.HIGH, preferred_element_type=jnp.float32
        )

    def step(x_BRC, abc):
        a, b, c = abc
        gram_BRR = product("...ik,...jk->...ij", x_BRC, x_BRC)
        half_BRR = gram_BRR.astype(dtype)
        square_BRR = product("...ij,...jk->...ik", half_BRR, half_BRR)
        poly_BRR = (b * gram_BRR + c * square_BRR).astype(dtype)
        y_BRC = a * x_BRC.astype(jnp.float32) + product("...ij,...jk->...ik", poly_BRR, x_BRC)
        return y_BRC.astype(dtype), None

    scale = jnp.asarray([SAFETY, SAFETY**3, SAFETY**5], jnp.float32)
    return jax.lax.scan(step, x_BRC, jnp.asarray(POLAR_EXPRESS, jnp.float32) / scale)[0]


def orthogonalize(specs, dtype, sharding: Sharding | None = None) -> optax.GradientTransformation:
    """Replaces every update of a ``matrix`` spec by 0.2 sqrt(max(R, C)) polar(update).

    The matrix view is ``ParamSpec.matrix_shape``. On a mesh the stack of matrices is split over as
    many devices as divide it, and each orthogonalises whole matrices (the idea of ZeRO-1): the
    result does not depend on how the parameter is sharded. What travels is in ``dtype``.

    Args:
      specs: tree of ParamSpec with the structure of the updates, which may hold
        ``optax.MaskedNode`` for parameters that another transformation takes.
      dtype: see :func:`polar_factor`.
      sharding: the mesh, None for one device.
    """

    def leaf(update, spec: ParamSpec):
        if isinstance(update, optax.MaskedNode):
            return update
        batch, rows, columns = spec.matrix_shape
        layouts = _layouts(spec, sharding)
        x = _scaled(update, tuple(range(len(batch), update.ndim)), dtype)
        for layout in layouts:
            x = jax.lax.with_sharding_constraint(x, layout)
        x = _iterate(x.reshape(*batch, rows, columns)).reshape(spec.shape)
        for layout in reversed(layouts):
            x = jax.lax.with_sharding_constraint(x, layout)
        return x.astype(jnp.float32) * (0.2 * math.sqrt(max(rows, columns)))

    def update_fn(updates, state, params=None):
        del params
        is_leaf = lambda x: isinstance(x, optax.MaskedNode) or is_spec(x)  # noqa: E731
        return jax.tree.map(leaf, updates, specs, is_leaf=is_leaf), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def _layouts(spec: ParamSpec, sharding: Sharding | None) -> list[NamedSharding]:
    """The way from the parameter's own layout to one of whole matrices, one mesh axis at a time.

    The partitioner turns the move of one mesh axis to another array axis into an all-to-all, but
    the move of two at once into a gather of everything.
    """
    if sharding is None or sharding.mesh.size == 1 or not spec.stacked:
        return []  # a matrix that is not stacked keeps its layout: its products are split instead
    entries = [
        () if e is None else (e,) if isinstance(e, str) else tuple(e)
        for e in sharding.spec(spec.axes, spec.shape)
    ]
    taken = [axis for entry in entries[: spec.stacked] for axis in entry]
    free = [a for a in sharding.mesh.axis_names if sharding.mesh.shape[a] > 1 and a not in taken]
    moved = _dividing_axes(spec.shape[0] // sharding.size(*entries[0]), free, sharding)
    if not moved:
        return []
    path: list[list] = [entries]
    for axis in moved:
        first, *rest = ([a for a in entry if a != axis] for entry in path[-1])
        path.append([[*first, axis], *rest])
    # Axes that do not divide the stack repeat the work instead.
    path.append([e if i < spec.stacked else () for i, e in enumerate(path[-1])])
    return [
        NamedSharding(sharding.mesh, PartitionSpec(*(tuple(e) or None for e in p))) for p in path
    ]


def _dividing_axes(size: int, axes: list[str], sharding: Sharding) -> tuple[str, ...]:
    """Those of ``axes`` that divide ``size``, as many devices as possible."""
    subsets = (s for n in range(len(axes) + 1) for s in itertools.combinations(axes, n))
    fitting = (s for s in subsets if size % sharding.size(*s) == 0)
    return max(fitting, key=lambda s: sharding.size(*s))


def scale_by_muon(
    specs, momentum: float, dtype, sharding: Sharding | None = None
) -> optax.GradientTransformation:
    """Nesterov momentum followed by :func:`orthogonalize`; state is one float32 tree."""
    return optax.chain(
        optax.trace(momentum, nesterov=True, accumulator_dtype=jnp.float32),
        orthogonalize(specs, dtype, sharding),
    )
