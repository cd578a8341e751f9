"""The Hopper cross-entropy in the interpreter against whole logits in float64."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import common, tile_matmul
from pallas_kernels.gpu import cross_entropy as kernel
from step_jax.core.sharding import MeshConfig, Sharding, make_mesh
from step_jax.ops import cross_entropy as ops
from tests.pallas_kernels.test_gpu_attention import interpreted

Z = 0.01
HALF_ULP = 2**-9  # largest relative rounding to bfloat16
cross_entropy = functools.partial(
    kernel.cross_entropy, z_loss=Z, interpret=plgpu.InterpretGPUParams()
)


def problem(N, D, V, seed=0, scale=1.0):
    """x bfloat16, w float32 (of bfloat16 values), targets, weights of both signs and zero."""
    rng = np.random.default_rng(seed)
    x = (scale * rng.standard_normal((N, D))).astype(jnp.bfloat16)
    w = (rng.standard_normal((D, V)) / D**0.5).astype(jnp.bfloat16).astype(np.float32)
    target = rng.integers(0, V, N).astype(np.int32)
    target[:2] = 0, V - 1
    weight = rng.standard_normal(N).astype(np.float32)
    weight[N // 2] = 0.0
    return x, w, target, weight


def gradients(loss, x, w, target, weight):
    """(total, nll, dx, dw, dweight)."""

    def total(x, w, weight):
        return loss(x, w, target, weight)

    (value, nll), slopes = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(x, w, weight)
    return value, nll, *slopes


def definition(x, w, target, weight):
    """Float64: (total, nll, dx, dw, dweight)."""
    x, w, weight = (np.asarray(a, np.float64) for a in (x, w, weight))
    logits = x @ w
    top = logits.max(1)
    lse = top + np.log(np.exp(logits - top[:, None]).sum(1))
    nll = lse - logits[np.arange(len(x)), target]
    cost = nll + Z * lse**2
    d = np.exp(logits - lse[:, None]) * (1 + 2 * Z * lse)[:, None]
    d[np.arange(len(x)), target] -= 1
    d *= weight[:, None]
    return weight @ cost, nll, d @ w.T, x.T @ d, cost


def check(N, D, V, **options):
    arrays = problem(N, D, V, **options)
    got = interpreted(functools.partial(gradients, cross_entropy), *arrays)
    expected = definition(*arrays)
    # sums are in float32; the gradient of the logits is rounded to bfloat16, then dx once more
    bounds = (1e-5, 1e-5, 2 * HALF_ULP, HALF_ULP, 1e-5)
    names = ("total", "nll", "dx", "dw", "dweight")
    for name, a, b, bound in zip(names, got, expected, bounds, strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert error < bound, f"{name}: {error:.1e}"
    assert got[2].dtype == jnp.bfloat16 and got[3].dtype == jnp.float32
    return got


@pytest.mark.thorough
def test_loss_and_gradients_with_tokens_that_fill_no_tile():
    check(40, 64, 384)


@pytest.mark.thorough
def test_large_logits_stay_finite():
    check(20, 64, 128, scale=300.0)


@pytest.mark.slow
def test_clusters_and_parts_of_the_vocabulary(monkeypatch):
    """Two tiles of tokens, pairs of tiles of 256 words, two parts, few blocks for all."""
    monkeypatch.setattr(kernel, "PART", 512)
    monkeypatch.setattr(tile_matmul, "BLOCKS", 2)
    check(200, 128, 1024)


@pytest.mark.slow
def test_same_bits_in_every_run():
    first, second = (check(130, 64, 256) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_traces_on_a_mesh(monkeypatch):
    """With the check of what varies over the mesh."""
    monkeypatch.setattr(common, "unsupported", lambda device: None)
    sharding = Sharding(make_mesh(MeshConfig(data=2, context=2), jax.devices()[:4]))
    x, w, target, weight = problem(512, 64, 256)
    arrays = x.reshape(2, 256, 64), w, target.reshape(2, 256), weight.reshape(2, 256)
    loss = functools.partial(
        ops.cross_entropy, z_loss=Z, implementation="pallas_gpu", sharding=sharding
    )
    got = jax.eval_shape(functools.partial(gradients, loss), *arrays)
    shapes = [a.shape for a in got]
    assert shapes == [(), (2, 256), (2, 256, 64), (64, 256), (2, 256)]


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((8, 48, 128), jnp.bfloat16, "width must be a multiple of 64"),
        ((8, 64, 200), jnp.bfloat16, "vocabulary of 128"),
        ((8, 64, 128), jnp.float32, "are float32; the GPU kernel supports bfloat16"),
        ((8, 64, 128), jnp.bfloat16, "cross-entropy cannot run: it needs a Hopper GPU"),
    ],
)
def test_refuses_what_it_does_not_support(shape, dtype, message):
    x, *others = problem(*shape)
    with pytest.raises(ValueError, match=message):
        kernel.cross_entropy(x.astype(dtype), *others, z_loss=Z)


def test_refuses_targets_of_other_tokens():
    x, w, target, weight = problem(8, 64, 128)
    with pytest.raises(ValueError, match="expected hidden states"):
        kernel.cross_entropy(x, w, target[:-1], weight, z_loss=Z)
