"""The polar factor against float64 NumPy: the singular values, and the recurrence itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.training.optimizers.muon import polar_factor
from tests.training.polar_oracle import numpy_polar


def with_singular_values(s, rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((rows, len(s))))[0]
    v = np.linalg.qr(rng.standard_normal((columns, len(s))))[0]
    return u @ np.diag(s) @ v.T


def singular_values(x):
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(32, 32), (24, 80), (80, 24), (1, 16), (16, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float16", 3e-3)])
def test_equals_the_recurrence_in_float64(shape, dtype, tolerance):
    g = np.random.default_rng(1).standard_normal(shape)
    result = polar_factor(jnp.asarray(g, jnp.float32), jnp.dtype(dtype))
    assert result.dtype == dtype
    np.testing.assert_allclose(result, numpy_polar(g), atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("float32", 0.997, 1.002), ("float16", 0.995, 1.004)]
)
@pytest.mark.parametrize("condition", [1.0, 30.0, 300.0])
def test_singular_values_near_one(condition, dtype, low, high):
    # The smallest is above 1e-3 of the Frobenius norm, where the polynomial's band begins.
    s = np.geomspace(1.0, 1 / condition, 24)
    g = with_singular_values(s, 24, 60)
    out = polar_factor(jnp.asarray(g, jnp.float32), jnp.dtype(dtype))
    found = singular_values(out)
    assert low < found.min() and found.max() < high
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    np.testing.assert_allclose(out, u @ vt, atol=1 - low)


def test_ill_conditioned_values_grow_but_never_overshoot():
    s = np.geomspace(1.0, 1e-6, 24)
    g = with_singular_values(s, 24, 60)
    out = polar_factor(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(out, numpy_polar(g), atol=5e-4)
    # In float16 what lies below its resolution is noise, but noise of bounded size.
    assert singular_values(polar_factor(jnp.asarray(g, jnp.float32), jnp.float16)).max() < 1.01


def test_stack_equals_each_matrix_alone():
    g = np.random.default_rng(2).standard_normal((2, 3, 12, 20)).astype(np.float32)
    together = polar_factor(jnp.asarray(g))
    for i in np.ndindex(2, 3):
        np.testing.assert_allclose(together[i], polar_factor(jnp.asarray(g[i])), atol=1e-6)


def test_does_not_depend_on_the_scale():
    g = np.random.default_rng(3).standard_normal((16, 16)).astype(np.float32)
    for scale in (1e-30, 1e-8, 1e30):
        scaled = polar_factor(jnp.asarray(g * np.float32(scale)), jnp.float16)
        np.testing.assert_allclose(scaled, polar_factor(jnp.asarray(g), jnp.float16), atol=5e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_zero_and_rank_one(dtype):
    assert not np.any(polar_factor(jnp.zeros((2, 8, 4)), jnp.dtype(dtype)))
    g = np.outer(np.arange(1.0, 9.0), np.ones(5))
    np.testing.assert_allclose(
        polar_factor(jnp.asarray(g, jnp.float32), jnp.dtype(dtype)),
        g / np.linalg.norm(g),
        atol=3e-3,
    )


def test_gram_matrix_is_the_small_one():
    for shape in ((8, 64), (64, 8)):
        jaxpr = str(jax.make_jaxpr(polar_factor)(jnp.zeros(shape)))
        assert "f32[8,8]" in jaxpr and "f32[64,64]" not in jaxpr
