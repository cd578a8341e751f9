"""The chunked loss against full logits differentiated by JAX."""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding, make_mesh
from step_jax.ops import cross_entropy as ops
from step_jax.ops.cross_entropy import cross_entropy
from tests.devices import AMPERE, BLACKWELL, CPU, HOPPER, TPU
from tests.models.small import FAST_COMPILE, run

Z = 3e-2


def full_logits(x, w, targets, weights, z_loss=Z):
    """(total, nll) with every logit in memory at once."""
    logits = x.astype(jnp.float32) @ w.astype(jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    nll = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * (nll + z_loss * lse**2)), nll


def problem(B=3, T=16, D=12, V=41):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((B, T, D)), rng.standard_normal((D, V))
    weights = rng.standard_normal((B, T))  # negative as a policy gradient's are, some zero
    weights[0, 3:9] = 0.0
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    return x.astype(np.float32), w.astype(np.float32), targets, weights.astype(np.float32)


def gradients(f):
    return jax.value_and_grad(f, argnums=(0, 1, 3), has_aux=True)


def assert_close(got, expected, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("chunks,T", [(1, 16), (2, 16), (8, 16), (8, 15), (99, 7)])
def test_equals_full_logits_for_any_number_of_chunks(chunks, T):
    """Loss, its parts, and the gradients of hidden states, head and weights; T=15 gets 5 chunks."""
    args = problem(T=T)
    got = run(gradients(lambda *a: cross_entropy(*a, z_loss=Z, chunks=chunks)), *args)
    assert_close(got, run(gradients(full_logits), *args), 1e-6)


def test_the_gradient_follows_a_factor_on_the_loss_and_ignores_the_parts():
    args = problem()

    def scaled(*a):
        total, nll = cross_entropy(*a, z_loss=Z, chunks=4)
        return -2.5 * total + jnp.sum(nll)  # nll is for reporting: no gradient by contract

    got = run(jax.grad(scaled, argnums=(0, 1, 3)), *args)
    expected = run(jax.grad(lambda *a: -2.5 * full_logits(*a)[0], argnums=(0, 1, 3)), *args)
    assert_close(got, expected, 1e-6)


def test_without_differentiation_it_is_the_same_loss():
    args = problem()
    got = run(lambda *a: cross_entropy(*a, z_loss=Z, chunks=2), *args)
    assert_close(got, run(full_logits, *args), 1e-6)


def test_bfloat16_states_and_head():
    x, w, targets, weights = problem()
    low = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    got = run(gradients(lambda *a: cross_entropy(*a, z_loss=Z, chunks=4)), *low, targets, weights)
    assert [g.dtype for g in got[1]] == [jnp.bfloat16, jnp.bfloat16, np.float32]
    assert_close(got, run(gradients(full_logits), x, w, targets, weights), 2e-2)


def temporary_bytes(f, V, T=64, D=16, dtype=jnp.bfloat16):
    shapes = ((1, T, D), dtype), ((D, V), dtype), ((1, T), jnp.int32), ((1, T), jnp.float32)
    args = [jax.ShapeDtypeStruct(*s) for s in shapes]
    compiled = jax.jit(gradients(f)).lower(*args).compile(compiler_options=FAST_COMPILE)
    return compiled.memory_analysis().temp_size_in_bytes


def test_chunks_need_less_than_a_quarter_of_the_memory_of_full_logits():
    chunked = temporary_bytes(lambda *a: cross_entropy(*a, z_loss=Z, chunks=16), V=4096)
    assert chunked <= temporary_bytes(full_logits, V=4096) / 4


def test_a_mesh_that_does_not_divide_the_batch_is_an_error():
    sharding = Sharding(make_mesh(MeshConfig(data=2, context=4)))
    x, w, targets, weights = problem(B=3)
    with pytest.raises(ValueError, match="2 x 4 pieces .* does not divide 3 x 16"):
        cross_entropy(x, w, targets, weights, sharding=sharding)


def test_auto_is_chunked_everywhere_and_a_kernel_is_asked_for_by_name():
    whole, cut = ops.Problem(), ops.Problem(vocabulary_pieces=2)
    assert set(typing.get_args(ops.Implementation)) == {"auto", *ops.IMPLEMENTATIONS}
    for problem in (whole, cut):
        found = {ops.resolve("auto", problem, d) for d in (None, CPU, TPU, HOPPER, BLACKWELL)}
        assert found == {"chunked"}
    assert ops.resolve("pallas_tpu", whole, TPU) == "pallas_tpu"
    assert ops.resolve("pallas_gpu", whole, HOPPER) == "pallas_gpu"
    for name, problem, device, reason in (
        ("pallas_gpu", whole, BLACKWELL, "Hopper GPU .* compiled for gpu 10.0"),
        ("pallas_gpu", whole, AMPERE, "Hopper GPU .* compiled for gpu 8.0"),
        ("pallas_tpu", whole, HOPPER, "needs a TPU, and this is compiled for gpu"),
        ("pallas_tpu", cut, TPU, "vocabulary, which is cut into 2 pieces over the tensor axis"),
        ("pallas_gpu", cut, HOPPER, "vocabulary, which is cut into 2 pieces over the tensor axis"),
    ):
        with pytest.raises(ConfigError, match=f"cross-entropy {name} cannot do this: .*{reason}"):
            ops.resolve(name, problem, device)
