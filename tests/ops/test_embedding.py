"""Embedding lookup: gradients of a table that is cut over the devices are those of a whole one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.ops.embedding import embed

MESHES = [
    {"fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"pipeline": 2, "context": 4},
]


def problem():
    rng = np.random.default_rng(0)
    table_VD = jnp.asarray(rng.normal(size=(24, 16)), jnp.float32)
    tokens_BT = jnp.asarray(rng.integers(0, 24, size=(16, 8)).clip(3), jnp.int32)  # 3 often
    g_BTD = jnp.asarray(rng.normal(size=(16, 8, 16)), jnp.float32)
    return table_VD, tokens_BT, g_BTD


@pytest.mark.thorough
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_cut_table_is_as_a_whole_one(axes):
    table_VD, tokens_BT, g_BTD = problem()
    sharding = Sharding.build(MeshConfig(**axes), jax.devices()[:8])

    def both(table_VD, sharding):
        y_BTD, pull = jax.vjp(lambda t: embed(t, tokens_BT, sharding), table_VD)
        return y_BTD, pull(g_BTD)[0]

    stored = jax.device_put(table_VD, sharding.named(("vocab", "embed"), table_VD.shape))
    y_BTD, dt_VD = jax.jit(both, static_argnums=1)(stored, sharding)
    np.testing.assert_array_equal(y_BTD, table_VD[tokens_BT])
    assert dt_VD.sharding.is_equivalent_to(stored.sharding, 2)
    expected_VD = np.zeros(table_VD.shape, np.float64)
    np.add.at(expected_VD, np.asarray(tokens_BT), np.asarray(g_BTD, np.float64))
    np.testing.assert_allclose(dt_VD, expected_VD, atol=2e-5)
    np.testing.assert_allclose(both(table_VD, None)[1], expected_VD, atol=2e-5)


def test_gradients_of_a_frequent_token_are_not_lost_in_bfloat16():
    """4,096 ones: a sum in bfloat16 would stay at 256."""
    tokens_BT = jnp.zeros((4, 1024), jnp.int32)
    table_VD = jnp.zeros((2, 4), jnp.bfloat16)
    dt_VD = jax.grad(lambda t: embed(t, tokens_BT, None).astype(jnp.float32).sum())(table_VD)
    assert dt_VD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(dt_VD, np.float32), [[4096] * 4, [0] * 4])
