"""The TPU kernel of the cross-entropy in interpret mode, and compiled for four chips."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.tpu import aot
from pallas_kernels.tpu import cross_entropy as kernel
from step_jax.core.sharding import MeshConfig, Sharding, make_mesh
from step_jax.ops import cross_entropy as ops
from tests.ops.test_cross_entropy import Z, assert_close, full_logits, gradients, problem

#: the kernel interpreted on this machine
interpreted = functools.partial(ops.cross_entropy, z_loss=Z, implementation="pallas_tpu_interpret")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "B,T,D,V",
    [
        (3, 16, 12, 41),  # one block, of a size that no tile divides
        (2, 600, 16, 700),  # several blocks of either, the last ones cut
        (1, 40, 16, 640),  # whole lanes, so the matrix is read as (D, V); the second block is cut
        (1, 16, 8192, 256),  # the width in two chunks
        (1, 16, 8192, 200),  # the same, and the matrix read as (V, D)
    ],
)
def test_equals_full_logits(B, T, D, V):
    """Loss, its parts, and the gradients of hidden states, head and weights."""
    x, w, targets, weights = problem(B, T, D, V)
    args = x, w / np.float32(D**0.5), targets, weights
    got = jax.jit(gradients(interpreted))(*args)
    assert_close(got, jax.jit(gradients(full_logits))(*args), 1e-6)


def test_bfloat16_has_a_float32_gradient_of_the_head():
    x, w, targets, weights = problem(2, 64, 32, 200)
    x = jnp.asarray(x, jnp.bfloat16)
    got = jax.jit(gradients(interpreted))(x, w, targets, weights)
    assert got[1][0].dtype == jnp.bfloat16 and got[1][1].dtype == jnp.float32
    low = w.astype(jnp.bfloat16).astype(np.float32)
    expected = jax.jit(gradients(full_logits))(x.astype(jnp.float32), low, targets, weights)
    assert_close(got, expected, 1e-2)  # the gradient of the logits is rounded to 8 bits


def test_large_logits_stay_finite():
    x, w, targets, weights = problem(1, 16, 12, 300)
    args = 1e3 * x, w, targets, weights
    got = jax.jit(gradients(interpreted))(*args)
    assert_close(got, jax.jit(gradients(full_logits))(*args), 1e-5)


def test_equals_one_device_on_a_mesh(monkeypatch):
    """Tokens over data and context; the head's gradient is added up over both."""
    # interpreted kernels fail the check of what varies; compiled ones pass it (below)
    monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))
    sharding = Sharding(make_mesh(MeshConfig(data=2, context=2), jax.devices()[:4]))
    args = problem(2, 32, 12, 41)
    f = functools.partial(interpreted, sharding=sharding)
    got = jax.jit(gradients(f))(*args)
    assert_close(got, jax.jit(gradients(full_logits))(*args), 1e-6)


def test_what_is_not_supported_is_refused(monkeypatch):
    args = problem(2, 32, 12, 42)
    sharding = Sharding(make_mesh(MeshConfig(tensor=2), jax.devices()[:2]))
    with pytest.raises(ValueError, match="tensor axis"):
        interpreted(*args, sharding=sharding)
    wide = jax.ShapeDtypeStruct((16, 2**20), jnp.float32)
    with pytest.raises(ValueError, match="width 1048576 do not fit .* of a v5p's 62914560"):
        log_likelihood = functools.partial(kernel.log_likelihood, chip="v5p")
        jax.eval_shape(log_likelihood, wide, jnp.zeros((2**20, 1)), jnp.zeros(16, int))
    x_ND, w_DV, target_N, weight_N = (jnp.zeros(s) for s in ((4, 16), (16, 9), (4,), (4,)))
    targets = target_N.astype(jnp.int32)
    for arrays, message in (
        ((x_ND, w_DV, targets[:3], weight_N), "expected hidden states"),
        ((x_ND, w_DV[:8], targets, weight_N), "expected hidden states"),
        ((x_ND.astype(jnp.float16), w_DV, targets, weight_N), "supports bfloat16 or float32"),
        ((x_ND, w_DV, target_N, weight_N), "targets must be int32, got float32"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel.cross_entropy(*arrays, z_loss=Z, chip="v5p")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="pallas_tpu .* needs a TPU, and this is compiled for cpu"):
        ops.cross_entropy(*args, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="pallas_gpu .* needs a Hopper GPU"):
        ops.cross_entropy(*args, implementation="pallas_gpu")
    with pytest.raises(ValueError, match="there are: auto, chunked, pallas_tpu, pallas_gpu"):
        ops.cross_entropy(*args, implementation="full")


@pytest.mark.aot
def test_compiles_on_a_mesh(topology):
    """With the check of what varies over the mesh; the head's gradient crosses it once."""
    B, T, D, V = 2, 2048, 1024, 32768
    shapes = ((B, T, D), jnp.bfloat16), ((D, V), jnp.float32), ((B, T), jnp.int32)
    tokens = P("data", "context")
    mesh = make_mesh(MeshConfig(data=2, context=2), topology("v5p:2x2x1").devices)
    args = [
        jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(
            (*shapes, ((B, T), jnp.float32)), (tokens, P(), tokens, tokens), strict=True
        )
    ]
    loss = functools.partial(
        ops.cross_entropy, implementation="pallas_tpu", sharding=Sharding(mesh)
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        done = jax.jit(gradients(loss)).lower(*args).compile()
    assert done.cost_analysis()["flops"] == pytest.approx(10 * B * T * D * V / 4, rel=2e-2)


@pytest.mark.aot
@pytest.mark.parametrize(
    "chip,N,D,V",
    [*((chip, 16384, 7168, 128815) for chip in aot.TOPOLOGIES), ("v6e", 16384, 4096, 131072)],
)
def test_compiles_for(chip, N, D, V, topology):
    """Temporaries beside the head's copy in bfloat16: at most 1/50 of the float32 logits."""
    with aot.arrays(chip) as array:
        x_ND, w_DV = array("bfloat16", N, D), array("float32", D, V)
        step = jax.jit(gradients(lambda *a: kernel.cross_entropy(*a, Z, chip=chip)))
        done = step.lower(x_ND, w_DV, array("int32", N), array("float32", N)).compile()
    temporary = done.memory_analysis().temp_size_in_bytes
    print(f"{chip}: {temporary / 1e9:.2f} GB, float32 logits {4e-9 * N * V:.2f} GB")
    assert temporary <= 2 * D * V + 4 * N * V / 50
    assert done.cost_analysis()["flops"] == pytest.approx(10 * N * D * V, rel=1e-2)
