"""Chunked log-probabilities and entropy against full logits differentiated by JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.ops.token_logprobs import token_logprobs
from tests.models.small import FAST_COMPILE, run
from tests.ops.test_cross_entropy import assert_close, problem

TEMPERATURE = 0.7


def full_logits(x, w, targets):
    log = jax.nn.log_softmax((x @ w).astype(jnp.float32) / TEMPERATURE, axis=-1)
    return jnp.take_along_axis(log, targets[..., None], -1)[..., 0], -jnp.sum(
        jnp.exp(log) * log, -1
    )


def judged(f):
    """Both results, and the gradients of a loss that is no linear function of them."""

    def loss(x, w, targets, weights):
        logprobs, entropy = f(x, w, targets)
        ratio = jnp.exp(logprobs + 3.0)
        loss = jnp.sum(jnp.abs(weights) * jnp.clip(ratio, 0.5, 2.0) + 0.1 * entropy**2)
        return loss, (logprobs, entropy)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


@pytest.mark.thorough
@pytest.mark.parametrize("chunks,T", [(1, 16), (8, 15)])
def test_equals_full_logits_with_gradients(chunks, T):
    args = problem(T=T)

    def ours(x, w, targets):
        return token_logprobs(x, w, targets, temperature=TEMPERATURE, chunks=chunks)

    assert_close(run(judged(ours), *args), run(judged(full_logits), *args), 2e-6)


def test_on_a_mesh_it_is_what_one_device_computes():
    args = problem(B=4, T=16, D=16, V=40)
    sharding = Sharding.build(MeshConfig(fsdp=2, context=2, tensor=2))

    def ours(x, w, targets):
        return token_logprobs(x, w, targets, temperature=TEMPERATURE, chunks=2, sharding=sharding)

    axes = ("batch", "sequence", None), ("embed", "vocab"), *(("batch", "sequence"),) * 2
    placed = [
        jax.device_put(a, sharding.named(n, a.shape)) for a, n in zip(args, axes, strict=True)
    ]
    compiled = jax.jit(judged(ours)).lower(*placed).compile(FAST_COMPILE)
    assert_close(compiled(*placed), run(judged(full_logits), *args), 2e-6)


def test_the_full_logits_are_never_in_memory():
    args = problem(B=2, T=64, D=8, V=512)

    def ours(x, w, targets):
        return token_logprobs(x, w, targets, chunks=16)

    compiled = jax.jit(judged(ours)).lower(*args).compile(FAST_COMPILE)
    logits = 2 * 64 * 512 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits
