from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.ops.einsum import einsum
from step_jax.ops.norm import rms_norm


@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
def test_rms_norm_is_its_definition(zero_centred, with_scale):
    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal((2, 5, 7)), rng.standard_normal(7)
    expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 0.01)
    if with_scale:
        expected = expected * (1 + scale if zero_centred else scale)
    got = rms_norm(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(scale, jnp.float32) if with_scale else None,
        0.01,
        zero_centred,
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_computes_in_float32_whatever_comes_in():
    """A sum of squares in bfloat16 or float16 would overflow or lose the small addends."""
    x = jnp.full((1, 4096), 300.0, jnp.float16)  # 300^2 is beyond float16
    y = rms_norm(x, None, 1e-6)
    assert y.dtype == jnp.float16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 1.0)
    assert not np.any(np.asarray(rms_norm(jnp.zeros((2, 3)), None, 1e-6)))


def test_einsum_keeps_the_activation_s_dtype():
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert einsum("BD,DF->BF", x, jnp.ones((3, 4), jnp.float32)).dtype == jnp.bfloat16
