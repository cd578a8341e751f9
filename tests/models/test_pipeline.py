"""Pipelines against no pipeline: loss, every gradient and the experts' statistics, in float32."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.models import pipeline
from step_jax.models.context import Context, Execution
from step_jax.models.layers.attention import MHA
from step_jax.models.layers.initialisation import Fixed
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import MTP, Block, Decoder, Group
from step_jax.models.tokens import Tokens
from step_jax.models.video.dit import Rows, VideoDiT
from step_jax.models.video.text_inputs import States
from step_jax.training.losses.text import packed_text_loss
from tests.models import small

ROUTER = Router(
    2, score="sigmoid", bias=True, bias_rate=1e-3, balance_loss=0.1, group_loss=0.1, loss_groups=4,
    z_loss=1e-2,
)  # fmt: skip
MIXTURE = MoE((Experts(8, 16),), ROUTER, shared=16, capacity=0.75)
ATTENTION = small.KINDS["gqa"]
DENSE = small.decoder("gqa", repeat=8)
MIXED = Decoder(
    small.WIDTH, (Group(4, (Block(ATTENTION, MIXTURE),)),), small.VOCAB, init=Fixed(0.1)
)
#: a leading group that no pipeline divides, and a head beyond the pipeline
UNEVEN = replace(
    MIXED,
    layers=(Group(1, (Block(small.KINDS["mfa"], SwiGLU(48)),)), *MIXED.layers),
    mtp=MTP(1, Block(ATTENTION, small.MLP)),
)
MODELS = {"dense": DENSE, "mixed": MIXED, "uneven": UNEVEN}

CASES = {
    "stages2_rounds2_fsdp": ({"pipeline": 2, "pipeline_rounds": 2, "fsdp": 4}, {"remat": "full"}),
    "stages4_rounds1_expert": ({"pipeline": 4, "expert": 2}, {}),
    "stages2_rounds1_tensor": ({"pipeline": 2, "tensor": 4}, {"remat": "dots"}),
    "stages2_rounds2_expert": ({"pipeline": 2, "pipeline_rounds": 2, "expert": 4}, {}),
    "stages4_rounds1_context": ({"pipeline": 4, "context": 2}, {"remat": "full"}),
    "stages4_rounds1_ring": ({"pipeline": 4, "context": 2, "ring": True}, {}),
    "stages2_rounds1_fsdp_unrolled": ({"pipeline": 2, "fsdp": 4}, {"scan": False}),
    "stages2_rounds1_few": ({"pipeline": 2, "data": 4, "pipeline_microbatches": 2}, {}),
    "stages4_rounds2_tensor": ({"pipeline": 4, "pipeline_rounds": 2, "tensor": 2}, {}),
}
FAST = [("mixed", "stages4_rounds1_expert")]
SLOW = [("dense", case) for case in CASES] + [
    ("mixed", "stages2_rounds2_expert"),
    ("mixed", "stages2_rounds2_fsdp"),
    ("mixed", "stages2_rounds1_tensor"),
    ("mixed", "stages4_rounds1_context"),
    ("uneven", "stages2_rounds2_expert"),
    ("uneven", "stages4_rounds1_expert"),
]


def on(**axes) -> Sharding:
    return Sharding.build(MeshConfig(**axes))


def loss(c: Decoder, sharding: Sharding | None, **changes):
    """(params, batch) -> ((loss, ExpertStats), gradient)."""

    text_loss = packed_text_loss(c, small.execution(**changes), sharding, 1e-2)

    def f(p, batch):
        out = text_loss(p, batch)
        return small.summed(out), out.sums

    return jax.value_and_grad(f, has_aux=True)


@functools.cache
def problem(model: str):
    c = MODELS[model]
    return c, small.params(c), small.packed_batch(rows=16, length=8)


@functools.cache
def one_device(model: str):
    c, p, batch = problem(model)
    return small.run(loss(c, None), p, batch)


def placed(sharding: Sharding, c: Decoder, p, batch):
    rows = {k: jax.device_put(v, sharding.named(("batch", "sequence"), v.shape))
            for k, v in batch.items()}  # fmt: skip
    return jax.device_put(p, sharding.params(c.specs())), rows


def check(model: str, case: str):
    axes, changes = CASES[case]
    sharding = on(**axes)
    c, p, batch = problem(model)
    (mesh_loss, mesh_stats), mesh_gradient = small.run(
        loss(c, sharding, **changes), *placed(sharding, c, p, batch)
    )
    (one_loss, stats), gradient = one_device(model)
    assert abs(mesh_loss - one_loss) <= 1e-5 * abs(one_loss)
    assert all(np.any(g) for g in jax.tree.leaves(gradient)), "a dead gradient compares nothing"
    error, leaf = small.worst_leaf(mesh_gradient, gradient)
    assert error <= 1e-5, leaf
    assert len(mesh_stats) == (0 if model == "dense" else 1)
    if stats:
        assert np.all(stats[0].dropped_E.sum(1) > 10)
        error, leaf = small.worst_leaf(mesh_stats, stats)
        assert error <= 1e-5, leaf


@pytest.mark.thorough
@pytest.mark.parametrize("model,case", FAST)
def test_equals_no_pipeline(model, case):
    check(model, case)


@pytest.mark.slow
@pytest.mark.parametrize("model,case", SLOW)
def test_every_composition_equals_no_pipeline(model, case):
    check(model, case)


# --- schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("P,V,M", [(2, 1, 2), (2, 2, 4), (4, 1, 8), (4, 3, 8), (3, 2, 6)])
def test_every_stage_follows_its_predecessor_by_one_step(P, V, M):
    done = {}
    for t in range(pipeline.steps(P, V, M)):
        for p in range(P):
            busy, m, v = pipeline.work_at(t, p, P, V, M)
            if busy:
                assert (m, v, p) not in done
                done[m, v, p] = t
    assert len(done) == M * V * P
    for (m, v, p), t in done.items():
        before = (m, v, p - 1) if p else (m, v - 1, P - 1) if v else None
        assert before is None or done[before] == t - 1
    idle = P * pipeline.steps(P, V, M) - len(done)
    assert pipeline.bubble_fraction(P, V, M) == idle / (P * pipeline.steps(P, V, M))


def test_bubble_shrinks_with_rounds_and_microbatches():
    assert pipeline.bubble_fraction(1, 1, 1) == 0
    assert pipeline.bubble_fraction(4, 1, 4) == 3 / 7
    assert pipeline.bubble_fraction(4, 2, 16) == 3 / 35


@pytest.mark.parametrize("P,V", [(2, 2), (2, 4), (4, 2), (8, 6), (4, 4)])
def test_layers_change_place(P, V):
    sharding = on(pipeline=P, pipeline_rounds=V, fsdp=-1)
    w = np.arange(P * V * 2 * 3).reshape(P * V * 2, 3)
    layout = sharding.named(("layers", None), w.shape)
    assert layout.spec == PartitionSpec("pipeline", None)
    out = jax.jit(lambda w: pipeline.by_stage(sharding, w))(jax.device_put(w, layout))
    np.testing.assert_array_equal(out, w.reshape(V, P, 2, 3).swapaxes(0, 1))
    assert {s.data.shape for s in out.addressable_shards} == {(1, V, 2, 3)}


def test_idle_steps_keep_only_what_a_stage_was_handed():
    """With remat, one microbatch's hidden states per step and device outlive the forward loop."""
    sharding = on(pipeline=2, pipeline_rounds=2, fsdp=4)
    c, p, batch = problem("dense")

    def f(p, batch):
        ctx = Context(Tokens.packed(batch), sharding=sharding,
                      execution=small.execution(remat="full"))  # fmt: skip
        return c.hidden(p, batch["tokens"], ctx)[0].sum()

    kept = jax.eval_shape(lambda p, b: jax.vjp(lambda p: f(p, b), p)[1], p, batch)
    steps = pipeline.steps(2, 2, 4)
    shapes = [a.shape for a in jax.tree.leaves(kept)]
    assert [s for s in shapes if s[0:1] == (steps,) and s[-1] == small.WIDTH] == [
        (steps, 2, 4, 8, small.WIDTH)
    ]
    layers = [s for s in shapes if s[-2:] == (small.WIDTH, 48)]
    assert len(layers) == 2, "each weight is kept once, as the stages use it"


# --- what is not pipelined -----------------------------------------------------------------------


@pytest.mark.thorough
def test_cached_and_recorded_calls_run_without_the_pipeline():
    sharding = on(pipeline=2, fsdp=4)
    c, p, batch = problem("mixed")

    def f(sharding):
        def cached(p, batch):
            tokens, execution = Tokens(batch["positions"]), small.execution()
            ctx = Context(tokens, sharding=sharding, execution=execution,
                          fresh=True, record_routing=True)  # fmt: skip
            cache = c.init_cache(16, 8, jnp.float32)
            x_BTD, cache, stats = c.hidden(p, batch["tokens"], ctx, cache)
            return x_BTD, cache, stats

        return cached

    batch = {
        "tokens": batch["tokens"],
        "positions": np.broadcast_to(np.arange(8, dtype=np.int32), (16, 8)),
    }
    expected = small.run(f(None), p, batch)
    got = small.run(f(sharding), *placed(sharding, c, p, batch))
    error, leaf = small.worst_leaf(got, expected)
    assert error <= 1e-5, leaf


def test_layers_outside_are_whole_and_those_inside_are_split():
    p = on(pipeline=4, expert=2).params(UNEVEN.specs())
    assert p.groups[0][0].mlp.gate_DF.spec == PartitionSpec(None, "expert", None)
    assert p.groups[1][0].attention.query_DNH.spec[0] == "pipeline"


@pytest.mark.thorough
def test_a_condition_travels_with_its_rows():
    c = VideoDiT(32, 2, MHA(4, 8, position=None), SwiGLU(48), 2, text=(States("llm", 8, 3),))
    p, rng = small.params(c), np.random.default_rng(0)
    x_BTP = rng.standard_normal((8, 4, 2)).astype(np.float32)
    text_BGSE = rng.standard_normal((8, 1, 3, 8)).astype(np.float32)
    place_BTA, lengths_BG = np.zeros((8, 4, 3), np.int32), 1 + np.arange(8)[:, None] % 3
    rows = Rows(place_BTA, text=(text_BGSE,), lengths=(lengths_BG,))
    arguments = p, x_BTP, rng.random((8, 1)).astype(np.float32), rows
    execution = Execution(dtype="float32")

    def f(sharding):
        return lambda p, x, t, r: c.apply(p, x, t, r, execution, sharding)

    got = small.run(f(on(pipeline=2, data=4)), *arguments)
    np.testing.assert_allclose(got, small.run(f(None), *arguments), rtol=1e-5, atol=1e-5)


# --- bad input -----------------------------------------------------------------------------------


def test_microbatches():
    assert pipeline.microbatches(64, on(pipeline=2, fsdp=4)) == 8
    assert pipeline.microbatches(24, on(pipeline=2, fsdp=4)) == 6
    assert pipeline.microbatches(64, on(pipeline=2, pipeline_microbatches=16, fsdp=4)) == 16
    with pytest.raises(ConfigError, match=r"32 rows .* 16 microbatches.*that fit: \[2, 4, 8\]"):
        pipeline.microbatches(32, on(pipeline=2, pipeline_microbatches=16, fsdp=4))
    with pytest.raises(ConfigError, match="12 rows .* make the rows a multiple of 8"):
        pipeline.microbatches(12, on(pipeline=2, fsdp=4))


def test_the_largest_group_must_divide():
    sharding = on(pipeline=4, pipeline_rounds=2, fsdp=2)
    pipeline.check(8, sharding)
    with pytest.raises(ConfigError, match=r"repeat 12.*pipeline_rounds \[1, 3\].*\[1, 2, 3, 6\]"):
        pipeline.check(12, sharding)
    with pytest.raises(ConfigError, match=r"repeat 9.*of no size.*of no size"):
        pipeline.check(9, sharding)
    pipeline.check(9, on(fsdp=8))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"pipeline_rounds": 2}, "need parallel.pipeline"),
        ({"pipeline": 2, "pipeline_rounds": 0}, "pipeline_rounds is 0"),
        ({"pipeline": 2, "pipeline_microbatches": 3}, "no multiple of the 2 stages"),
    ],
)
def test_meshes_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        MeshConfig(**changes).validate()
