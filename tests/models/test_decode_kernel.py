"""Decoding steps by the (interpreted) TPU kernel are those of plain XLA, on one device and a mesh.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from step_jax.core.sharding import AXES, Sharding
from step_jax.models.context import Context
from step_jax.models.layers.attention import MFA, MHA
from step_jax.models.layers.positions import Alibi
from step_jax.models.tokens import Tokens
from tests.models import small

KINDS = {
    "gqa_window": MHA(4, 128, kv_heads=2, window=5),
    "mfa": MFA(4, 128),
    "mfa_gated_key": MFA(4, 128, value="gated_key"),
    "mfa_gated_key_window": MFA(4, 128, value="gated_key", window=5),
    "mfa_key": MFA(4, 128, value="key", position=None),
}
PROMPTS = np.asarray([7, 3, 9, 1], np.int32)
STEPS = 3


@functools.cache
def steps(kind, implementation, sharding=None, cache_dtype=jnp.float32):
    """Outputs of the stack for ``STEPS`` single tokens after unequal prompts; row 1 has ended."""
    c = small.decoder(kind)
    tokens_BT = np.random.default_rng(0).integers(0, c.vocab, (4, 9 + STEPS)).astype(np.int32)

    def hidden(p, tokens_BT, positions_BT, cache, attention="xla", fresh=False):
        execution = small.execution(attention=attention)
        ctx = Context(Tokens(positions_BT), fresh=fresh, execution=execution, sharding=sharding)
        return c.hidden(p, tokens_BT, ctx, cache)

    def decode(p, tokens_BT):
        index_1T = jnp.arange(9, dtype=jnp.int32)[None]
        positions_BT = jnp.where(index_1T < PROMPTS[:, None], index_1T, -1)
        cache = c.init_cache(4, 16, cache_dtype)
        _, cache, _ = hidden(p, tokens_BT[:, :9], positions_BT, cache, fresh=True)

        def step(cache, token_B):
            positions_B1 = jnp.where(jnp.arange(4) == 1, -1, cache.lengths_B)[:, None]
            x_B1D, cache, _ = hidden(p, token_B[:, None], positions_B1, cache, implementation)
            return cache, x_B1D[:, 0]

        return jax.lax.scan(step, cache, tokens_BT[:, 9:].T)[1]

    p = small.params(c)
    if sharding is not None:
        p = jax.device_put(p, sharding.params(c.specs()))
    return small.run(decode, p, tokens_BT)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "kind",
    [
        k if k in ("mfa", "mfa_gated_key_window") else pytest.param(k, marks=pytest.mark.slow)
        for k in KINDS
    ],
)
def test_equals_plain_attention(kind):
    expected = steps(KINDS[kind], "xla")
    got = steps(KINDS[kind], "pallas_tpu_interpret")
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)
    assert np.abs(expected).max() > 0.1


@pytest.mark.thorough
@pytest.mark.parametrize(
    "kind, axes",
    [
        # two key heads on four devices: each holds both and one query head
        pytest.param("gqa_window", {"data": 2, "tensor": 4}, marks=pytest.mark.slow),
        ("mfa_gated_key", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ],
)
def test_on_a_mesh(kind, axes):
    expected = steps(KINDS[kind], "xla")
    got = steps(KINDS[kind], "pallas_tpu_interpret", small.on_mesh(**axes))
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.thorough
def test_float8_cache():
    """Both read the same float8 numbers, the kernel without a copy in the compute dtype."""
    kind, dtype = KINDS["mfa_gated_key"], jnp.float8_e4m3fn
    expected = steps(kind, "xla", cache_dtype=dtype)
    got = steps(kind, "pallas_tpu_interpret", cache_dtype=dtype)
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)
    assert np.abs(expected - steps(kind, "xla")).max() > 1e-4  # it was float8 that was read


@pytest.mark.parametrize(
    "kind, implementation, message",
    [
        (KINDS["mfa"], "pallas_tpu", "needs a TPU, and this is compiled for cpu"),
        (MFA(4, 8), "pallas_tpu_interpret", "head width 8; .* multiples of 128"),
        (replace(KINDS["mfa"], position=Alibi()), "pallas_tpu_interpret", "no ALiBi"),
    ],
)
def test_what_a_named_kernel_lacks_is_an_error(kind, implementation, message):
    with pytest.raises(ValueError, match=message):
        steps(kind, implementation)


@pytest.mark.aot
@pytest.mark.parametrize(
    "value, attention, kernels",
    # without the kernel key reuse keeps rotated keys, so it has no such bound
    [("projected", "auto", 1), ("gated_key", "auto", 1), ("projected", "xla", 0)],
)
def test_a_step_copies_no_cache(value, attention, kernels, monkeypatch):
    """One token on a v6e: the caches of all layers stay where they are, and the kernel is used."""
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2")
    mesh = Mesh(np.array(topology.devices[:1]).reshape((1,) * len(AXES)), AXES)
    c = small.decoder(MFA(64, 256, value=value), repeat=4)

    def step(p, token_B1, position_B1, cache):
        execution = small.execution(attention=attention, dtype="bfloat16")
        ctx = Context(Tokens(position_B1), execution=execution, sharding=Sharding(mesh))
        return c.hidden(p, token_B1, ctx, cache)[:2]

    def placed(tree):
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
        )

    p = jax.tree.map(lambda a: a.astype(jnp.bfloat16), small.params(c))
    cache = jax.eval_shape(lambda: c.init_cache(16, 4096))
    ints = jax.ShapeDtypeStruct((16, 1), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(step, donate_argnums=3).lower(*placed((p, ints, ints, cache)))
    compiled = lowered.compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    cached = sum(a.size * 2 for a in jax.tree.leaves(cache.layers))
    assert temporary < cached / 50
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels
