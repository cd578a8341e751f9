"""Routing and experts against their definitions, and every way of sharding against one device.

Shape suffixes: B rows, T tokens, D model width, F hidden width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_jax.core.errors import ConfigError
from step_jax.core.spec import count
from step_jax.models.context import Context
from step_jax.models.layers.initialisation import Fixed
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.models.tokens import Tokens
from step_jax.models.trunk import routing_of
from step_jax.ops import grouped_matmul
from tests.models import small

ROUTER = Router(
    2, score="sigmoid", scale=2.0, bias=True, bias_rate=1e-3, balance_loss=0.1, group_loss=0.1,
    loss_groups=4, z_loss=1e-2,
)  # fmt: skip
MIXTURE = MoE((Experts(8, 16),), ROUTER, shared=16, common=8, clamp=2.0, shared_clamp=3.0)
UNLIKE = replace(MIXTURE, experts=(Experts(8, 16), Experts(4, 24)))


def decoder(moe: MoE = MIXTURE, repeat=2, dense=1) -> Decoder:
    moe.validate()
    before = Group(1, (Block(small.KINDS["mfa"], SwiGLU(48)),))
    mixed = Group(repeat, (Block(small.KINDS["gqa"], moe),))
    return Decoder(small.WIDTH, (before,) * dense + (mixed,), small.VOCAB, init=Fixed(0.1))


def context(batch, **changes) -> Context:
    return Context(Tokens.packed(batch), execution=small.execution(), **changes)


# --- definitions ---------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swiglu(x, gate, up, down, clamp):
    gate, up = x @ gate, x @ up
    gate *= sigmoid(gate)
    if clamp is not None:
        gate, up = np.minimum(gate, clamp), np.clip(up, -clamp, clamp)
    return (gate * up) @ down


def oracle(c: MoE, p, x_ND):
    """Token by token, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    r, E = c.router, c.total
    weights = [
        (e.gate_EDF[i], e.up_EDF[i], e.down_EFD[i])
        for e in p.experts
        for i in range(len(e.gate_EDF))
    ]
    out = []
    for x in x_ND:
        logits = x @ p.router_DE
        score = sigmoid(logits) if r.score == "sigmoid" else np.exp(logits - logits.max())
        if r.score == "softmax":
            score /= score.sum()
        choice = score + (0 if p.bias_E is None else p.bias_E)
        groups = choice.reshape(r.groups, -1)
        best = np.sort(groups, 1)[:, -2:].sum(1)
        kept = np.argsort(-best, kind="stable")[: r.top_groups]
        closed = np.setdiff1d(np.arange(r.groups), kept)
        groups[closed] = -np.inf
        chosen = np.argsort(-groups.reshape(E), kind="stable")[: r.top_k]
        w = score[chosen]
        if r.normalise:
            w = w / w.sum()
        w = w * r.scale
        y = sum(wi * swiglu(x, *weights[e], c.clamp) for wi, e in zip(w, chosen, strict=True))
        for part, clamp, factor in ((p.common, c.clamp, w.sum()), (p.shared, c.shared_clamp, 1.0)):
            if part is not None:
                y = y + factor * swiglu(x, part.gate_DF, part.up_DF, part.down_FD, clamp)
        out.append(y)
    return np.stack(out)


ROUTERS = {
    "softmax": Router(3, normalise=False),
    "softmax_normalised": Router(2),
    "sigmoid_bias": Router(3, score="sigmoid", bias=True, scale=3.0),
    "limited_groups": Router(2, score="sigmoid", bias=True, groups=4, top_groups=2),
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("experts", [(Experts(8, 16),), (Experts(8, 16), Experts(4, 24))])
def test_layer_is_its_definition(router, experts):
    c = MoE(experts, ROUTERS[router], shared=12, common=8, clamp=1.0, shared_clamp=2.0)
    c.validate()
    p = small.map_specs(
        lambda s: np.random.default_rng(s.size).standard_normal(s.shape).astype(np.float32) * 0.5,
        c.specs(small.WIDTH, Fixed(0.1)),
    )
    x_BTD = np.random.default_rng(0).standard_normal((2, 7, small.WIDTH)).astype(np.float32)
    ctx = Context(Tokens.in_order(2, 7), execution=small.execution())
    y_BTD, stats = small.run(lambda p, x: c.apply(p, x, ctx), p, x_BTD)
    expected = oracle(c, p, x_BTD.reshape(14, -1)).reshape(y_BTD.shape)
    np.testing.assert_allclose(y_BTD, expected, rtol=2e-5, atol=2e-5)
    assert stats.load_E.sum() == 14 * c.router.top_k and stats.tokens == 14
    assert 0 < stats.confidence / 14 <= 1 and not stats.dropped_E.any()


@pytest.mark.thorough
def test_padding_goes_nowhere_and_counts_nowhere():
    c, batch = MIXTURE, small.packed_batch()
    p = small.map_specs(lambda s: np.full(s.shape, 0.1, np.float32), c.specs(small.WIDTH, Fixed(1)))
    x_BTD = np.random.default_rng(0).standard_normal((8, 16, small.WIDTH)).astype(np.float32)
    other_BTD = np.where((batch["segments"] > 0)[..., None], x_BTD, 9.0).astype(np.float32)
    f = jax.jit(lambda x: c.apply(p, x, context(batch)))
    (y, stats), (other, other_stats) = f(x_BTD), f(other_BTD)
    text = batch["segments"] > 0
    assert not text.all() and stats.tokens == text.sum()
    np.testing.assert_array_equal(y[text], other[text])
    jax.tree.map(np.testing.assert_array_equal, stats, other_stats)


@pytest.mark.thorough
def test_balance_losses_of_an_even_and_a_skewed_load():
    c = Router(1, balance_loss=1.0, normalise=False)
    even_BTD, everyone = 50.0 * jnp.eye(4)[None], jnp.ones((1, 4), bool)
    routing = c.apply(jnp.eye(4), None, even_BTD, everyone)
    assert float(c.loss(routing)) == pytest.approx(1.0)  # E * E * (1/E * 1/E)
    skewed = c.apply(jnp.eye(4), None, even_BTD.at[:].set(even_BTD[:, :1]), everyone)
    assert float(c.loss(skewed)) == pytest.approx(4.0)  # E * 1 * 1
    groups = replace(c, balance_loss=0.0, group_loss=1.0, loss_groups=2)
    in_group = groups.apply(jnp.eye(4), None, even_BTD[:, jnp.array([0, 1, 0, 1])], everyone)
    assert float(groups.loss(in_group)) == pytest.approx(2.0)  # one of two groups takes all


@pytest.mark.thorough
def test_z_loss_is_the_squared_log_partition_and_has_its_gradient():
    c = Router(1, z_loss=1.0, normalise=False)

    def loss(size):
        routing = c.apply(size * jnp.eye(4), None, jnp.eye(4)[None], jnp.ones((1, 4), bool))
        return c.loss(routing)

    value, slope = jax.value_and_grad(loss)(50.0)
    assert float(value) == pytest.approx(2500.0, rel=1e-3)  # log-partition 50, squared
    assert float(slope) == pytest.approx(100.0, rel=1e-3)


@pytest.mark.slow
def test_frozen_router_learns_nothing():
    c = decoder(replace(MIXTURE, router=replace(ROUTER, frozen=True)), repeat=1)
    p, batch = small.params(c), small.packed_batch()
    _, gradient = small.run(small.loss_and_gradient(c), p, batch)
    mlp = gradient.groups[1][0].mlp
    assert not np.any(mlp.router_DE) and not np.any(mlp.bias_E)
    assert np.any(mlp.experts[0].gate_EDF)
    specs = c.specs().groups[1][0].mlp
    assert not specs.router_DE.trainable and not specs.bias_E.trainable


# --- sharding ------------------------------------------------------------------------------------

PAIRS = {
    "expert4_fsdp2": {"expert": 4, "fsdp": 2},
    "expert4_tensor2": {"expert": 4, "tensor": 2},
    "expert4_context2": {"expert": 4, "context": 2},
    "expert2_data4": {"expert": 2, "data": 4},
    "fsdp4_tensor2": {"fsdp": 4, "tensor": 2},
    "fsdp2_context4": {"fsdp": 2, "context": 4},
    "tensor2_context4": {"tensor": 2, "context": 4},
    "expert2_fsdp2_tensor2": {"expert": 2, "fsdp": 2, "tensor": 2},
}


def equal_on_mesh(axes, moe: MoE, dense=1):
    c, batch = decoder(moe, dense=dense), small.packed_batch()
    p = small.params(c)
    loss, gradient = small.run(small.loss_and_gradient(c), p, batch)
    f, args = small.compile_on(small.on_mesh(**axes), c, p, batch)
    mesh_loss, mesh_gradient = f(*args)
    assert abs(mesh_loss - loss) <= 1e-5 * abs(loss)
    error, leaf = small.worst_leaf(mesh_gradient, gradient)
    assert error <= 1e-5, leaf


@pytest.mark.thorough
def test_experts_fsdp_tensor_equal_one_device():
    """Without the layer before them: ``slow`` has it, and test_parallel_equality.py its like."""
    c = replace(UNLIKE, exchange="gather", capacity=0.75)
    equal_on_mesh(PAIRS["expert2_fsdp2_tensor2"], c, dense=0)


@pytest.mark.slow
def test_experts_and_context_equal_one_device():
    c = replace(MIXTURE, exchange="ragged", capacity=0.75)
    equal_on_mesh(PAIRS["expert4_context2"], c, dense=0)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [None, 0.75])
@pytest.mark.parametrize("exchange", ["gather", "ragged"])
@pytest.mark.parametrize("mesh", PAIRS)
def test_every_pair_equals_one_device(mesh, exchange, capacity):
    equal_on_mesh(PAIRS[mesh], replace(UNLIKE, exchange=exchange, capacity=capacity))


FOUR_WAY = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=16"
from tests.models.test_moe import MIXTURE, equal_on_mesh
equal_on_mesh({"expert": 2, "fsdp": 2, "tensor": 2, "context": 2}, MIXTURE)
"""


@pytest.mark.slow
def test_four_ways_at_once_equal_one_device():
    """Every axis split in two: sixteen devices, so a process of its own."""
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", FOUR_WAY], check=True)


@pytest.mark.slow
def test_any_load_is_exact_on_one_compiled_program():
    """All tokens to one expert, and experts left empty: the same program, nothing dropped."""
    router = replace(ROUTER, top_k=1)
    moe = replace(MIXTURE, exchange="ragged", router=router)
    c, batch = decoder(moe, repeat=1), small.packed_batch()
    p = small.params(c)
    one_device = jax.jit(small.loss_and_gradient(c), compiler_options=small.FAST_COMPILE)
    f, args = small.compile_on(small.on_mesh(expert=4, fsdp=2), c, p, batch)
    for favoured in (None, [5], [0, 6]):  # a bias of a thousand decides alone
        bias = p.groups[1][0].mlp.bias_E.copy()
        if favoured is not None:
            bias[:] = 0.0
            bias[:, favoured] = 1000.0
        mlp = p.groups[1][0].mlp.replace(bias_E=bias)
        block = p.groups[1][0].replace(mlp=mlp)
        q = p.replace(groups=(p.groups[0], (block,)))
        loss, gradient = one_device(q, batch)
        layout = jax.tree.map(lambda a: a.sharding, args[0])
        mesh_loss, mesh_gradient = f(jax.device_put(q, layout), args[1])
        assert abs(mesh_loss - loss) <= 1e-5 * abs(loss)
        error, leaf = small.worst_leaf(mesh_gradient, gradient)
        assert error <= 1e-5, leaf
        if favoured is not None:  # the experts nobody visits learn nothing
            alive = np.abs(np.asarray(gradient.groups[1][0].mlp.experts[0].gate_EDF)).sum((0, 2, 3))
            assert np.all(alive[favoured] > 0) and np.count_nonzero(alive) == len(favoured)


@pytest.mark.thorough
def test_routing_is_exported_and_replayed():
    c, batch = decoder(), small.packed_batch()
    p = small.params(c)

    def hidden(p, routing):
        ctx = context(batch, record_routing=True)
        x_BTD, _, stats = c.hidden(p, batch["tokens"], ctx, routing=routing)
        return x_BTD, routing_of(stats)

    x_BTD, routing = small.run(lambda p: hidden(p, None), p)
    assert routing[0] == (None,) and routing[1][0].shape == (2, 8, 16, 2)
    replay = jax.jit(hidden, compiler_options=small.FAST_COMPILE)
    np.testing.assert_allclose(replay(p, routing)[0], x_BTD, rtol=1e-5, atol=1e-5)
    moved = jax.tree.map(lambda a: a * 1.5 if a.ndim == 3 else -a, p)  # other weights...
    jax.tree.map(np.testing.assert_array_equal, replay(moved, routing)[1], routing)  # ...same


# --- tables and errors ---------------------------------------------------------------------------


def test_active_parameters():
    c = MoE((Experts(8, 16),), Router(2), shared=16)
    specs, D = c.specs(small.WIDTH, Fixed(0.1)), small.WIDTH
    expert = 3 * D * 16
    assert count(specs) == 9 * expert + D * 8
    assert count(specs, active=True) == 3 * expert + D * 8


def test_the_configuration_names_the_grouped_matmul(monkeypatch):
    c, used = replace(MIXTURE, router=ROUTERS["softmax"]), []
    p = small.map_specs(lambda s: np.ones(s.shape, np.float32), c.specs(small.WIDTH, Fixed(0.1)))
    x_BTD = np.ones((1, 3, small.WIDTH), np.float32)
    for name in ("reference", "tiles"):
        entry = grouped_matmul.IMPLEMENTATIONS[name]

        def record(*args, name=name, compute=entry.compute):
            used.append(name)
            return compute(*args)

        recorded = replace(entry, compute=record)
        monkeypatch.setitem(grouped_matmul.IMPLEMENTATIONS, name, recorded)

    def apply(name):
        ctx = Context(Tokens.in_order(1, 3), execution=small.execution(grouped_matmul=name))
        return jax.eval_shape(lambda x: c.apply(p, x, ctx)[0], x_BTD)

    for name, expected in (("auto", "tiles"), ("reference", "reference"), ("tiles", "tiles")):
        used.clear()
        apply(name)
        assert used == [expected] * 3
    for name, reason in (("pallas_gpu", "needs a Hopper GPU"), ("pallas_tpu", "needs a TPU")):
        with pytest.raises(ConfigError, match=f"grouped matmul {name} cannot do this: it {reason}"):
            apply(name)


@pytest.mark.parametrize(
    "bad,message",
    [
        (lambda: replace(MIXTURE, router=Router(9)), "top_k is 9, but there are 8 experts"),
        (lambda: replace(MIXTURE, experts=()), "needs experts"),
        (lambda: replace(MIXTURE, capacity=0.0), "capacity is 0.0"),
        (lambda: replace(MIXTURE, router=Router(2, groups=3)), "groups 3 does not divide 8"),
        (lambda: replace(MIXTURE, router=Router(3, groups=4)), "more than the experts of 1 groups"),
        (lambda: replace(MIXTURE, router=Router(2, bias_rate=1e-3)), "needs bias"),
    ],
)
def test_bad_mixtures_are_refused(bad, message):
    with pytest.raises(ConfigError, match=message):
        bad().validate()


def test_expert_shards_that_do_not_divide():
    assert sorted(UNLIKE.shard_order(4)) == list(range(12))
    with pytest.raises(ConfigError, match="8 experts on parallel.expert 16 shards leave more sh"):
        MIXTURE.shard_order(16)
    with pytest.raises(ConfigError, match="4 experts on parallel.expert 8"):
        UNLIKE.shard_order(8)


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_shard_order_gives_every_shard_its_part(shards, small_, large):
    c = MoE((Experts(shards * small_, 4), Experts(shards * large, 8)), Router(1))
    places = c.shard_order(shards)
    assert sorted(places) == list(range(c.total))
    size = c.total // shards
    hidden = np.repeat([4, 8], [shards * small_, shards * large])[np.argsort(places)]
    for shard in hidden.reshape(shards, size):
        assert shard.tolist() == [4] * small_ + [8] * large
