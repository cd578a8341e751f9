"""Several learners, losses of several parts, and nothing kept for what is frozen."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding, make_mesh
from step_jax.core.spec import Normal, ParamSpec
from step_jax.data.schema import Field
from step_jax.training.learner import Learning, LoRA, tables, view
from step_jax.training.optimizers.build import Optimizer, make_optimizer
from step_jax.training.optimizers.config import AdamW, Muon
from step_jax.training.program import Program, Work
from step_jax.training.schedules import Constant
from step_jax.training.state import init_state
from step_jax.training.step import LossOutput, Part, make_train_step

ROWS, WIDTH = 16, 8
INIT = Normal(0.3)
POLICY = {
    "layer": {"w": ParamSpec((WIDTH, WIDTH), ("embed", "mlp"), INIT)},
    "out": ParamSpec((WIDTH, WIDTH), ("mlp", "embed"), INIT),
}
CRITIC = {"w": ParamSpec((WIDTH, 1), ("embed", None), INIT)}
SCHEMA = {
    "x": Field(("batch", None), (ROWS, WIDTH)),
    "few": Field(("batch",), (ROWS,)),
    "many": Field(("batch",), (ROWS,)),
}


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((ROWS, WIDTH)).astype(np.float32),
        # weights unlike in every microbatch
        "few": (np.arange(ROWS) % 5 == 0).astype(np.float32),
        "many": rng.integers(0, 5, ROWS).astype(np.float32),
    }


def arrays(specs, seed=0):
    rng = np.random.default_rng(seed)
    return spec_lib.map_specs(
        lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32), specs
    )


def sgd(specs, rate=1.0):
    return Optimizer(optax.identity(), lambda step: jnp.float32(rate), rate, specs)


def learnings(policy=POLICY):
    specs = {"policy": policy, "critic": CRITIC}
    return {n: Learning(s, s, sgd(spec_lib.trained(s))) for n, s in specs.items()}


def errors(params, rows):
    """(policy's error by row, critic's error by row, hidden units (B, D))."""
    hidden_BD = jnp.tanh(rows["x"] @ params["policy"]["layer"]["w"])
    y_BD = hidden_BD @ params["policy"]["out"]
    value_B = (rows["x"] @ params["critic"]["w"])[:, 0]
    target_B = jax.lax.stop_gradient(jnp.mean(y_BD, -1))
    return jnp.mean(jnp.square(y_BD - 1), -1), jnp.square(value_B - target_B), hidden_BD


def balance(sums):
    """No sum over rows: the product of two."""
    return {"balance": jnp.sum(sums["load"] * sums["mass"]) / jnp.square(sums["rows"])}


def loss(params, rows, key):
    policy_B, critic_B, hidden_BD = errors(params, rows)
    parts = {
        "policy": Part(jnp.sum(policy_B * rows["many"]), jnp.sum(rows["many"])),
        "critic": Part(jnp.sum(critic_B * rows["few"]), jnp.sum(rows["few"]), 0.5),
    }
    sums = {
        "load": jax.lax.stop_gradient(jnp.sum(hidden_BD > 0, 0).astype(jnp.float32)),
        "mass": jnp.sum(hidden_BD, 0),
        "rows": jnp.float32(len(hidden_BD)),
    }
    return LossOutput(parts, {}, sums, balance)


def definition(params, rows):
    """The whole loss in one expression."""
    policy_B, critic_B, hidden_BD = errors(params, rows)
    load = jax.lax.stop_gradient(jnp.mean(hidden_BD > 0, 0))
    return (
        jnp.average(policy_B, weights=rows["many"])
        + 0.5 * jnp.average(critic_B, weights=rows["few"])
        + jnp.sum(load * jnp.mean(hidden_BD, 0))
    )


def after(accumulation=1, sharding=None, how=None, rows=None):
    """(gradients that reached the learners, metrics) of one step at rate 1."""
    how = how or learnings()
    params = {"policy": arrays(POLICY), "critic": arrays(CRITIC, 1)}
    step = make_train_step(loss, how, SCHEMA, accumulation=accumulation, compute_dtype=jnp.float32)
    rows = batch() if rows is None else rows
    state = init_state(params, how)
    if sharding is not None:
        rows = jax.device_put(rows, sharding.named(("batch",), (ROWS,)))
        state = jax.device_put(state, sharding.replicated())
    new, metrics = jax.jit(step)(state, rows)
    moved = {n: jax.tree.map(jnp.subtract, params[n], new.learners[n].params) for n in how}
    return moved, metrics


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_each_part_is_divided_by_its_own_weight_over_the_whole_batch(accumulation):
    params = {"policy": arrays(POLICY), "critic": arrays(CRITIC, 1)}
    value, expected = jax.value_and_grad(definition)(params, batch())
    found, metrics = after(accumulation)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    parts = [metrics[f"loss/{name}"] for name in ("policy", "critic", "balance")]
    np.testing.assert_allclose(sum(parts), value, rtol=1e-6)
    assert metrics["loss_weight/critic"] == batch()["few"].sum()
    for name in ("policy", "critic"):
        norm = optax.tree.norm(expected[name])
        np.testing.assert_allclose(metrics[f"grad_norm/{name}"], norm, rtol=1e-5)


def test_devices_change_nothing():
    expected, expected_metrics = after()
    found, metrics = after(2, Sharding(make_mesh(MeshConfig(data=8))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, expected_metrics
    )


def test_the_first_of_two_sweeps_computes_weights_alone():
    """Without ``joint`` the compiler drops the model from the sweep: as many products as before."""

    def products(loss_fn):
        how = learnings()
        params = {"policy": arrays(POLICY), "critic": arrays(CRITIC, 1)}
        step = make_train_step(loss_fn, how, SCHEMA, accumulation=2, compute_dtype=jnp.float32)
        lowered = jax.jit(step).lower(init_state(params, how), batch())
        return lowered.compile().as_text().count(" dot(")

    def parts(params, rows, key):
        return LossOutput(loss(params, rows, key).parts)

    def single(params, rows, key):
        policy, critic = loss(params, rows, key).parts.values()
        return LossOutput({"all": Part(policy.total + critic.total, policy.weight)})

    assert products(parts) == products(single)


def test_a_part_without_weight_counts_nothing_and_a_batch_without_any_is_skipped():
    rows = batch()
    some = rows | {"few": np.zeros(ROWS, np.float32)}
    found, metrics = after(rows=some)
    assert metrics["loss/critic"] == 0 and metrics["skipped"] == 0
    assert not np.any(found["critic"]["w"]) and np.any(found["policy"]["out"])
    _, metrics = after(rows=some | {"many": np.zeros(ROWS, np.float32)})
    assert metrics["skipped"] == 1


def test_what_is_not_finite_in_one_learner_leaves_all_as_they_are():
    rows = batch()
    rows["x"][0] = np.nan
    found, metrics = after(rows=rows)
    assert metrics["skipped"] == 1 and not any(np.any(a) for a in jax.tree.leaves(found))


def test_frozen_parameters_have_no_gradient_no_moments_and_no_average():
    model_specs, specs = tables(POLICY, freeze=["layer"])
    optimizer = make_optimizer(AdamW(1e-2, Constant()), specs, total_steps=3)
    how = {"policy": Learning(model_specs, specs, optimizer, 0.9)} | {
        "critic": learnings()["critic"]
    }
    params = {"policy": arrays(POLICY), "critic": arrays(CRITIC, 1)}
    state = init_state(params, how)
    held = state.learners["policy"]
    sizes = [a.size for a in jax.tree.leaves((held.opt_state, held.average)) if a.ndim]
    assert sizes == [WIDTH * WIDTH] * 3  # two moments and the average of `out` alone
    step = make_train_step(loss, how, SCHEMA, compute_dtype=jnp.float32)
    new, _ = jax.jit(step)(state, batch())
    old, learned = params["policy"], new.learners["policy"].params
    np.testing.assert_array_equal(learned["layer"]["w"], old["layer"]["w"])
    assert np.all(learned["out"] != old["out"])
    best = how["policy"].best(new.learners["policy"])
    np.testing.assert_array_equal(best["layer"]["w"], old["layer"]["w"])
    np.testing.assert_allclose(best["out"], 0.1 * old["out"] + 0.9 * learned["out"], rtol=1e-6)


def test_adapters_learn_beside_a_frozen_model():
    lora = LoRA(rank=2, alpha=4.0, targets=("*/w",))
    model_specs, specs = tables(POLICY, lora=lora)
    optimizer = make_optimizer(AdamW(1e-2, Constant()), specs, total_steps=3)
    how = learnings() | {"policy": Learning(model_specs, specs, optimizer, None, lora)}
    base = arrays(POLICY)
    stored = how["policy"].stored(base, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, view(model_specs, stored, lora), base)  # B is 0
    state = init_state({"policy": stored, "critic": arrays(CRITIC, 1)}, how)
    moments = [a.size for a in jax.tree.leaves(state.learners["policy"].opt_state) if a.ndim]
    assert sum(moments) == 2 * 2 * (WIDTH * 2)
    step = jax.jit(make_train_step(loss, how, SCHEMA, accumulation=2, compute_dtype=jnp.float32))
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss/policy"]))
    assert losses[2] < losses[0]
    kept = state.learners["policy"].params
    jax.tree.map(np.testing.assert_array_equal, kept.base, base)
    merged = view(model_specs, kept, lora)
    update = 2.0 * np.asarray(kept.down_SIR["layer/w"]) @ np.asarray(kept.up_SRO["layer/w"])
    np.testing.assert_allclose(merged["layer"]["w"] - base["layer"]["w"], update, atol=1e-6)
    np.testing.assert_array_equal(merged["out"], base["out"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ["layre"]}, "no parameter is named 'layre'; there are: layer/w, out"),
        ({"freeze": ["*"]}, "leaves nothing to train"),
        ({"lora": LoRA(2, targets=("nothing/*",))}, "no parameter is named"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        tables(POLICY, **options)


def test_a_program_starts_from_given_parameters_and_draws_the_rest():
    class Model:
        def initialise(self, key):
            return spec_lib.init(POLICY, key)

    sharding = Sharding(make_mesh(MeshConfig(), jax.devices()[:1]))
    how = {"policy": learnings()["policy"]}

    def own(params, rows, key):
        policy_B = jnp.mean(jnp.square(rows["x"] @ params["policy"]["out"]), -1)
        return LossOutput({"policy": Part(jnp.sum(policy_B), jnp.float32(ROWS))})

    program = Program.build(
        own, {"policy": Model()}, how, SCHEMA, sharding,
        total_steps=3, work=Work(ROWS, "rows"), seed=0,
    )  # fmt: skip
    fresh = program.initial_state(jax.random.key(0)).learners["policy"].params
    given = {"layer": {"w": jnp.ones((WIDTH, WIDTH))}, "out": None}
    mixed = program.initial_state(jax.random.key(0), {"policy": given}).learners["policy"].params
    np.testing.assert_array_equal(mixed["layer"]["w"], 1)
    np.testing.assert_array_equal(mixed["out"], fresh["out"])
    state, metrics = program.compile()(program.initial_state(jax.random.key(0)), batch())
    assert metrics["loss"] > 0 and int(state.step) == 1


@pytest.mark.parametrize(
    "optimizer,mesh",
    [
        (AdamW, {}),
        pytest.param(Muon, {"fsdp": 4, "tensor": 2}, marks=pytest.mark.thorough),
        pytest.param(AdamW, {"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_moments_in_the_hosts_memory_change_no_bit(optimizer, mesh):
    sharding = Sharding(make_mesh(MeshConfig(**mesh), jax.devices()[: 8 if mesh else 1]))

    def trained(offload: bool):
        config = optimizer(learning_rate=0.1, schedule=Constant(), offload=offload)
        specs = {"policy": POLICY, "critic": CRITIC}
        how = {
            name: Learning(s, s, make_optimizer(config, s, total_steps=3, sharding=sharding))
            for name, s in specs.items()
        }
        models = {name: SimpleNamespace(initialise=partial(spec_lib.init, s))
                  for name, s in specs.items()}  # fmt: skip
        program = Program.build(loss, models, how, SCHEMA, sharding,
                                total_steps=3, work=Work(ROWS, "rows"), seed=0)  # fmt: skip
        state, step = program.initial_state(jax.random.key(0)), program.compile()
        for i in range(3):
            state, _ = step(state, batch(i))
        return state

    there, here = trained(True), trained(False)
    jax.tree.map(np.testing.assert_array_equal, there, here)
    kinds = {
        (a.ndim > 0, a.sharding.memory_kind)
        for learner in there.learners.values()
        for a in jax.tree.leaves(learner.opt_state)
    }
    assert kinds == {(True, "pinned_host"), (False, "device")}
    others = (here, [learner.params for learner in there.learners.values()])
    assert {a.sharding.memory_kind for a in jax.tree.leaves(others)} == {"device"}
