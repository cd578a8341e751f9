"""The shared train step: accumulation, clipping, precision, EMA, guard, donation, sharding."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding, make_mesh
from step_jax.core.spec import ZEROS, Normal, ParamSpec
from step_jax.data.schema import schema_like
from step_jax.training.learner import Learning
from step_jax.training.optimizers.build import Optimizer, make_optimizer
from step_jax.training.optimizers.config import AdamW, Muon
from step_jax.training.schedules import Constant
from step_jax.training.state import TrainState, abstract_state, init_state, state_shardings
from step_jax.training.step import DivergedError, LossOutput, Part, check_skipped, make_train_step

ROWS, WIDTH, HIDDEN = 16, 8, 16
SPECS = {
    "up": ParamSpec((WIDTH, HIDDEN), ("embed", "mlp"), Normal(0.3)),
    "down": ParamSpec((HIDDEN, WIDTH), ("mlp", "embed"), Normal(0.3)),
    "scale": ParamSpec((WIDTH,), ("embed",), Normal(0.3), "vector"),
}


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    params = spec_lib.map_specs(
        lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32), SPECS
    )
    batch = {
        "x": rng.standard_normal((ROWS, WIDTH)).astype(np.float32),
        "y": rng.standard_normal((ROWS, WIDTH)).astype(np.float32),
        "weight": rng.integers(0, 4, ROWS).astype(np.float32),
    }
    return params, batch


def loss_fn(params, batch, key):
    dtype = params["up"].dtype
    hidden = jnp.tanh(batch["x"].astype(dtype) @ params["up"])
    y = (hidden @ params["down"]) * params["scale"]
    error = jnp.mean(jnp.square(y.astype(jnp.float32) - batch["y"]), axis=-1)
    part = Part(jnp.sum(error * batch["weight"]), jnp.sum(batch["weight"]))
    heavy = (batch["weight"] > 1).astype(jnp.float32)
    return LossOutput({"error": part}, {"heavy": (jnp.sum(error * heavy), jnp.sum(heavy))})


def one_part(total, metrics=None):
    return LossOutput({"only": Part(total, jnp.float32(1))}, metrics or {})


ONE = {"w": ParamSpec((2,), (None,), ZEROS, role="vector")}


def sgd(rate=1.0, specs=None):
    """The direction is the gradient itself, so that a step shows what reached the optimizer."""
    return Optimizer(optax.identity(), lambda step: jnp.float32(rate), rate, specs or SPECS)


def learnings(optimizer, average=None, specs=None):
    specs = specs or optimizer.specs
    return {"model": Learning(specs, specs, optimizer, average)}


def start(params, optimizer, average=None) -> TrainState:
    return init_state({"model": params}, learnings(optimizer, average))


def train_step(loss, optimizer, average=None, **options):
    """The step of a single learner; every array of the batch has its rows first."""

    def run(state, batch):
        arrays = jax.tree.map(jnp.asarray, batch)
        axes = {name: ("batch", *(None,) * (a.ndim - 1)) for name, a in arrays.items()}
        step = make_train_step(
            lambda params, rows, key: loss(params["model"], rows, key),
            learnings(optimizer, average),
            schema_like(arrays, axes),
            **options,
        )
        return step(state, arrays)

    return run


def params_of(state: TrainState):
    return state.learners["model"].params


def adamw():
    return make_optimizer(AdamW(1e-2, Constant()), SPECS, total_steps=10)


def equal(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), a, b)


@pytest.mark.parametrize("accumulation", [2, 16])
def test_accumulation_equals_the_large_batch(accumulation):
    params, batch = arrays()

    def gradient(n):
        step = train_step(loss_fn, sgd(), accumulation=n, compute_dtype=jnp.float32)
        state, metrics = jax.jit(step)(start(params, sgd()), batch)
        return jax.tree.map(jnp.subtract, params, params_of(state)), metrics

    (expected, expected_metrics), (found, metrics) = gradient(1), gradient(accumulation)
    equal(found, expected, atol=1e-6)
    equal(metrics, expected_metrics, rtol=1e-6)
    # ... which is the gradient of the weighted mean.
    mean = jax.grad(lambda p: loss_fn(p, batch, None).parts["error"].value())(params)
    equal(expected, mean, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_part_alone_counts_with_its_coefficient(accumulation):
    params, batch = arrays()

    def half(params, batch, key):
        out = loss_fn(params, batch, key)
        part = dataclasses.replace(out.parts["error"], coefficient=0.5)
        return dataclasses.replace(out, parts={"error": part})

    whole, told = train_step(loss_fn, sgd(1.0), accumulation=accumulation)(
        start(params, sgd(1.0)), batch
    )
    halved, half_told = train_step(half, sgd(2.0), accumulation=accumulation)(
        start(params, sgd(2.0)), batch
    )
    assert float(half_told["loss"]) == pytest.approx(0.5 * float(told["loss"]), rel=1e-6)
    equal(params_of(halved), params_of(whole), rtol=1e-5, atol=1e-6)


def test_accumulation_takes_rows_modulo():
    seen = []
    batch = {"row": np.arange(6, dtype=np.float32)}

    def record(params, rows, key):
        jax.debug.callback(lambda r: seen.append(sorted(r.tolist())), rows["row"])
        return one_part(jnp.sum(params["w"]) * jnp.sum(rows["row"]))

    step = train_step(record, sgd(specs=ONE), accumulation=3)
    jax.block_until_ready(jax.jit(step)(start({"w": jnp.ones(2)}, sgd(specs=ONE)), batch))
    jax.effects_barrier()
    assert sorted(seen) == [[0, 3], [1, 4], [2, 5]]


def test_accumulation_moves_no_rows_between_devices():
    sharding = Sharding(make_mesh(MeshConfig(data=8)))
    params, _ = arrays()
    step = train_step(loss_fn, sgd(), accumulation=2, compute_dtype=jnp.float32)
    _, batch = arrays()
    batch = jax.device_put(batch, sharding.named(("batch",), (ROWS,)))
    state = jax.device_put(start(params, sgd()), sharding.replicated())
    text = jax.jit(step).lower(state, batch).compile().as_text()
    assert re.search(r"= .* all-reduce\(", text)  # the gradients
    assert not re.search(r"= .* (all-gather|all-to-all|collective-permute)\(", text)


def test_rows_that_do_not_divide():
    params, batch = arrays()
    step = train_step(loss_fn, sgd(), accumulation=3)
    with pytest.raises(
        ConfigError, match=r"16 rows \(weight\) cannot be split into 3 microbatches"
    ):
        step(start(params, sgd()), batch)


def test_clipping_by_the_global_norm():
    params, batch = arrays()
    state = start(params, sgd())
    free, metrics = train_step(loss_fn, sgd(), compute_dtype=jnp.float32)(state, batch)
    gradient = jax.tree.map(jnp.subtract, params, params_of(free))
    flat = np.concatenate([np.ravel(g).astype(np.float64) for g in jax.tree.leaves(gradient)])
    norm = np.linalg.norm(flat)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    for limit in (norm / 10, norm * 10):
        optimizer = dataclasses.replace(sgd(), clip_norm=float(limit))
        step = train_step(loss_fn, optimizer, compute_dtype=jnp.float32)
        clipped, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        found = jax.tree.map(jnp.subtract, params, params_of(clipped))
        scale = min(1.0, limit / norm)
        equal(found, optax.tree.scale(scale, gradient), atol=1e-6)


def test_compute_dtype_and_master():
    params, batch = arrays()
    seen = []

    def spy(params, rows, key):
        seen.append({p.dtype.name for p in jax.tree.leaves(params)})
        return loss_fn(params, rows, key)

    # Updates far below bfloat16's resolution of the parameters must not be lost.
    optimizer = sgd(1e-5)
    state, metrics = train_step(spy, optimizer)(start(params, optimizer), batch)
    assert seen == [{"bfloat16"}]
    assert {p.dtype.name for p in jax.tree.leaves(params_of(state))} == {"float32"}
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), params_of(state), params)
    assert all(jax.tree.leaves(moved))
    exact = train_step(loss_fn, optimizer, compute_dtype=jnp.float32)
    _, exact_metrics = exact(start(params, optimizer), batch)
    np.testing.assert_allclose(metrics["loss"], exact_metrics["loss"], rtol=2e-2)
    assert metrics["loss"] != exact_metrics["loss"]


def test_metrics():
    params, batch = arrays()
    optimizer = make_optimizer(AdamW(1e-2, Constant(4)), SPECS, total_steps=10)
    step = jax.jit(train_step(loss_fn, optimizer, compute_dtype=jnp.float32))
    state, metrics = step(start(params, optimizer), batch)
    out = loss_fn(params, batch, None)
    norm = np.sqrt(sum(np.sum(np.square(p, dtype=np.float64)) for p in params.values()))
    expected = {
        "loss": out.parts["error"].value(),
        "loss_weight": out.parts["error"].weight,
        "heavy": out.metrics["heavy"][0] / out.metrics["heavy"][1],
        "param_norm": norm,
        "lr": 1e-2 / 4,
        "skipped": 0,
        "skipped_total": 0,
    }
    assert set(metrics) == {*expected, "grad_norm"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(step(state, batch)[1]["lr"], 2e-2 / 4, rtol=1e-6)


def test_metric_names_of_the_step_are_taken():
    def clash(params, rows, key):
        return loss_fn(params, rows, key).replace(metrics={"lr": (jnp.float32(1), jnp.float32(1))})

    params, batch = arrays()
    with pytest.raises(ValueError, match="these names itself: lr"):
        train_step(clash, sgd())(start(params, sgd()), batch)


def test_the_average_is_warm_from_the_start():
    """Update n forgets at most what (1 + n) / (10 + n) says: after three steps 0.1 % is left."""
    params, batch = arrays()
    optimizer = adamw()
    step = jax.jit(train_step(loss_fn, optimizer, 0.5))
    state, average = start(params, optimizer, 0.5), params
    for decay in (1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5):
        state, _ = step(state, batch)
        average = jax.tree.map(
            lambda e, p, d=decay: d * np.float64(e) + (1 - d) * p, average, params_of(state)
        )
    equal(state.learners["model"].average, average, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "accumulation"), [("loss", 1), ("gradient", 2), ("weight", 1)])
def test_non_finite_steps_change_nothing_but_counters(kind, accumulation):
    def loss(params, rows, key):
        out = loss_fn(params, rows, key)
        if kind != "gradient":
            return out
        # sqrt has the finite value 0 at 0, and no slope there.
        root = jnp.sqrt(jnp.sum(jnp.square(params["up"])) * jnp.min(rows["alive"]))
        part = out.parts["error"]
        return out.replace(parts={"error": part.replace(total=part.total + root)})

    good = arrays()[1] | {"alive": np.ones(ROWS, np.float32)}
    bad = jax.tree.map(np.copy, good)
    if kind == "loss":
        bad["y"][3] = np.inf
    elif kind == "weight":
        bad["weight"][:] = 0
    else:
        bad["alive"][3] = 0

    optimizer = adamw()
    step = jax.jit(train_step(loss, optimizer, accumulation=accumulation, average=0.9))
    state, _ = step(start(arrays()[0], optimizer, 0.9), good)
    before = state
    for n in (1, 2):
        state, metrics = step(state, bad)
        assert bool(np.isfinite(metrics["loss"])) == (kind == "gradient")
        assert not np.isfinite(metrics["grad_norm"])
        assert (metrics["skipped"], metrics["skipped_total"]) == (n, n)
    assert state.step == before.step + 2
    bits(state.learners, before.learners)
    state, metrics = step(state, good)
    assert (metrics["skipped"], metrics["skipped_total"]) == (0, 2)
    assert np.any(np.asarray(params_of(state)["up"]) != params_of(before)["up"])


def test_budget_of_skipped_steps():
    check_skipped(3, budget=3, step=7)
    with pytest.raises(DivergedError, match=r"last 4 steps up to step 8 \(allowed in a row: 3\)"):
        check_skipped(4, budget=3, step=8)


def test_donation_and_bitwise_replay():
    optimizer = adamw()
    step = jax.jit(
        train_step(loss_fn, optimizer, accumulation=2, average=0.9),
        donate_argnums=0,
    )

    def run():
        params, batch = arrays()
        state = start(params, optimizer, 0.9)
        leaves = jax.tree.leaves(state)
        assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)
        for _ in range(3):
            old = state
            state, metrics = step(state, batch)
            assert all(x.is_deleted() for x in jax.tree.leaves(old.learners))
        return jax.tree.map(np.asarray, (state, metrics))

    bits(run(), run())


def test_keys_differ_by_step_and_microbatch_and_repeat():
    def noisy(params, rows, key):
        draw = jax.random.uniform(key)
        return one_part(jnp.sum(params["w"]), {"draw": (draw, jnp.float32(1))})

    def draws(seed, accumulation):
        step = jax.jit(train_step(noisy, sgd(0.0, ONE), accumulation=accumulation, seed=seed))
        state, found = start({"w": jnp.ones(2)}, sgd(0.0, ONE)), []
        for _ in range(2):
            state, metrics = step(state, {"x": np.zeros(4)})
            found.append(float(metrics["draw"]))
        return found

    (a0, a1), (b0, b1) = draws(0, 1), draws(0, 2)
    assert len({a0, a1, b0, b1}) == 4  # b is the mean over two keys, the first of which is a's
    assert draws(0, 1) == [a0, a1]
    assert draws(1, 1) != [a0, a1]


@pytest.mark.parametrize(
    "config", [AdamW(1e-2, Constant()), Muon(1e-2, Constant())], ids=["adamw", "muon"]
)
def test_a_mesh_gives_the_step_of_one_device(config):
    def run(sharding, accumulation):
        params, batch = arrays()
        optimizer = make_optimizer(config, SPECS, total_steps=3, sharding=sharding)
        optimizer = dataclasses.replace(optimizer, clip_norm=0.5)
        state = start(params, optimizer, 0.9)
        rows, shardings = batch, None
        if sharding is not None:
            shardings = state_shardings(state, learnings(optimizer, 0.9), sharding)
            state = jax.device_put(state, shardings)
            rows = jax.device_put(batch, sharding.named(("batch",), (ROWS,)))
        step = train_step(
            loss_fn,
            optimizer,
            0.9,
            accumulation=accumulation,
            compute_dtype=jnp.float32,
            shardings=shardings,
        )
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        for _ in range(2):
            state, metrics = step(state, rows)
        return state, metrics, optimizer

    expected, expected_metrics, _ = run(None, 1)
    sharding = Sharding(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    found, metrics, optimizer = run(sharding, 2)
    equal(found, expected, atol=2e-5)
    equal(metrics, expected_metrics, rtol=1e-5)
    abstract = abstract_state(learnings(optimizer, 0.9), sharding)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, abstract)


def test_bad_options():
    with pytest.raises(ConfigError, match="at least 1"):
        train_step(loss_fn, sgd(), accumulation=0)(start(arrays()[0], sgd()), arrays()[1])
    with pytest.raises(ConfigError, match="EMA decay is 1.0"):
        learnings(sgd(), 1.0)
