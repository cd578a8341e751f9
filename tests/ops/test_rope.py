"""Rotary embedding against complex multiplication, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.ops import rope

B, T, N, H = 2, 7, 3, 12


def as_complex(x_BTNH, positions_BT, frequency_F):
    """Pairs (i, i + F) as complex numbers, times exp(i position frequency)."""
    F = len(frequency_F)
    turn_BT1F = jnp.exp(1j * positions_BT[..., None, None] * frequency_F)
    z = (x_BTNH[..., :F] + 1j * x_BTNH[..., F : 2 * F]) * turn_BT1F
    return jnp.concatenate([z.real, z.imag, x_BTNH[..., 2 * F :]], axis=-1)


@pytest.mark.thorough
@pytest.mark.parametrize("pairs", [6, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-7)])
def test_values_and_gradients(pairs, dtype, tolerance):
    rng = np.random.default_rng(0)
    x_BTNH, dy_BTNH = (jnp.asarray(rng.standard_normal((B, T, N, H)), dtype) for _ in range(2))
    positions_BT = jnp.asarray(rng.integers(0, 500, (B, T)), jnp.int32)
    frequency_F = rope.frequencies_F(100.0, pairs)

    def value_and_gradient(f, x_BTNH, dy_BTNH):
        y_BTNH, back = jax.vjp(lambda x: f(x, positions_BT, frequency_F), x_BTNH)
        return y_BTNH, *back(dy_BTNH)

    expected = value_and_gradient(as_complex, *(a.astype(jnp.float32) for a in (x_BTNH, dy_BTNH)))
    for got, want in zip(value_and_gradient(rope.rotate, x_BTNH, dy_BTNH), expected, strict=True):
        assert got.dtype == dtype
        error = np.abs(got.astype(jnp.float32) - want)
        assert error.max() <= tolerance * np.abs(want).max()
