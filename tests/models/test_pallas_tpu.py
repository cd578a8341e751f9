"""The TPU attention kernels inside a model: interpreted on meshes, and compiled for real chips."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.models.layers.attention import MFA, MHA
from tests.models import small

LAYERS = (MFA(4, 64, window=100), MHA(4, 64, kv_heads=2))


@functools.cache
def one_device():
    c = small.decoder(*LAYERS, repeat=1)
    p, batch = small.params(c), small.packed_batch(rows=4, length=256)
    return c, p, batch, small.run(small.loss_and_gradient(c, attention="xla"), p, batch)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "context": 2, "tensor": 2},
        pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"context": 2, "tensor": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_computes_what_xla_computes_on_one_device(mesh):
    c, p, batch, (loss, gradient) = one_device()
    compiled, args = small.compile_on(
        small.on_mesh(**mesh), c, p, batch, attention="pallas_tpu_interpret"
    )
    mesh_loss, mesh_gradient = compiled(*args)
    assert abs(mesh_loss - loss) <= 1e-5 * abs(loss)
    error, leaf = small.worst_leaf(jax.device_get(mesh_gradient), gradient)
    assert error <= 1e-5, leaf
    assert all(np.any(g) for g in jax.tree.leaves(gradient))


def test_the_ring_refuses_a_kernel():
    c, p, batch, _ = one_device()
    with pytest.raises(ValueError, match="ring attention is not computed by pallas_tpu"):
        mesh = small.on_mesh(ring=True, context=2, data=4)
        small.compile_on(mesh, c, p, batch, attention="pallas_tpu_interpret")


@pytest.mark.aot
def test_auto_compiles_for_a_topology_that_is_not_here(topology):
    """Forward and backward kernels, in ``shard_map`` over every kind of mesh axis."""
    sharding = Sharding.build(MeshConfig(fsdp=-1, context=2, tensor=2), topology("v6e:4x2").devices)
    c = small.decoder(MFA(4, 128), width=256, repeat=2)
    p, batch = small.abstract(c, sharding, 1024)
    step = small.loss_and_gradient(c, sharding, dtype="bfloat16")
    text = jax.jit(step).lower(p, batch).compile().as_text()
    assert "attention_forward" in text and "attention_backward" in text
