"""Muon: momentum whose matrices are replaced by their polar factors.

The update of a matrix W with gradient G (Step-3.5-Flash, arXiv 2602.10604):

    M <- momentum * M + G,   N = G + momentum * M            (Nesterov)
    W <- W - rate * (0.2 * sqrt(max(rows, columns)) * polar(N) + weight_decay * W)

polar(N) = U V^T of N = U S V^T, by six Polar-Express iterations (arXiv 2505.16932). The factor 0.2
gives the update the root mean square of AdamW's, so both share rate and decay (arXiv 2502.16982).

Shape suffixes: B stacked matrices (layers, experts), R rows, C columns.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

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

    The matrix view is ``ParamSpec.matrix_shape``. On a mesh the stack of matrices is dealt out to
    all devices, each of which orthogonalises whole ones (the idea of ZeRO-1): the result does not
    depend on how the parameter is sharded. What travels is in ``dtype``.

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
        x = _scaled(update, tuple(range(len(batch), update.ndim)), dtype)

        def polar(x):
            return _iterate(x.reshape(-1, rows, columns)).reshape(x.shape)

        if sharding is not None and sharding.mesh.size > 1 and spec.stacked:
            x = _dealt_out(polar, spec, sharding)(x)
        else:  # a matrix that is not stacked keeps its layout: its products are split instead
            x = polar(x)
        return x.astype(jnp.float32) * (0.2 * math.sqrt(max(rows, columns)))

    def update_fn(updates, state, params=None):
        del params
        is_leaf = lambda x: isinstance(x, optax.MaskedNode) or is_spec(x)  # noqa: E731
        return jax.tree.map(leaf, updates, specs, is_leaf=is_leaf), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def _dealt_out(f, spec: ParamSpec, sharding: Sharding):
    """``f`` of a stack of whole matrices, (any number, ...) to the same shape, as a function of the
    parameter in its own layout.

    A device has pieces of many matrices and gets a few whole ones, by an all-to-all for every cut
    axis of the matrix. The stack is filled up with zeros, which ``f`` shall leave alone, to a
    multiple of the devices: to split it over those that divide it only would gather the rest, which
    for 42 layers on 256 devices is everything. Devices that hold the same pieces share the stack.
    """
    mesh = sharding.mesh
    entries = [
        () if e is None else (e,) if isinstance(e, str) else tuple(e)
        for e in sharding.spec(spec.axes, spec.shape)
    ]
    cut = [(dim, axes) for dim, axes in enumerate(entries[spec.stacked :], 1) if axes]
    named = {axis for axes in entries for axis in axes}
    alike = tuple(a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in named)
    ways = math.prod(mesh.shape[a] for _, axes in [*cut, (0, alike)] for a in axes)

    def local(x):
        whole = x.reshape(-1, *x.shape[spec.stacked :])
        count = whole.shape[0]
        whole = jnp.pad(whole, [(0, -count % ways), *[(0, 0)] * (whole.ndim - 1)])
        for dim, axes in cut:
            whole = jax.lax.all_to_all(whole, axes, 0, dim, tiled=True)
        if alike:
            mine = whole.shape[0] // math.prod(mesh.shape[a] for a in alike)
            first = jax.lax.axis_index(alike) * mine
            whole = f(jax.lax.dynamic_slice_in_dim(whole, first, mine))
            whole = jax.lax.all_gather(whole, alike, tiled=True)
        else:
            whole = f(whole)
        for dim, axes in reversed(cut):
            whole = jax.lax.all_to_all(whole, axes, dim, 0, tiled=True)
        return whole[:count].reshape(x.shape)

    layout = PartitionSpec(*(axes or None for axes in entries))
    return jax.shard_map(local, mesh=mesh, in_specs=layout, out_specs=layout, check_vma=False)


def scale_by_muon(
    specs, momentum: float, dtype, sharding: Sharding | None = None
) -> optax.GradientTransformation:
    """Nesterov momentum followed by :func:`orthogonalize`; state is one float32 tree."""
    return optax.chain(
        optax.trace(momentum, nesterov=True, accumulator_dtype=jnp.float32),
        orthogonalize(specs, dtype, sharding),
    )
