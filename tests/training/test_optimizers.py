"""AdamW and Muon: groups, decay, momentum, sharding, configuration."""

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
from step_jax.core.spec import Normal, ParamSpec
from step_jax.training import scaling_laws
from step_jax.training.learner import Learning
from step_jax.training.optimizers import muon
from step_jax.training.optimizers.build import decay_mask, group_labels, make_optimizer
from step_jax.training.optimizers.config import AdamW, Muon
from step_jax.training.schedules import Constant
from step_jax.training.state import abstract_state, init_state, state_shardings
from tests.training.polar_oracle import numpy_polar

INIT = Normal(0.1)
SPECS = {
    "embedding": ParamSpec((64, 16), ("vocab", "embed"), INIT, "embedding"),
    "head": ParamSpec((16, 64), ("embed", "vocab"), INIT, "head"),
    "layers": (
        {
            "query": ParamSpec((8, 16, 4, 8), ("layers", "embed", "heads", None), INIT),
            "output": ParamSpec((8, 4, 8, 16), ("layers", "heads", None, "embed"), INIT, fan_in=2),
            "norm": ParamSpec((8, 16), ("layers", "embed"), INIT, "vector"),
        },
        {"up": ParamSpec((3, 16, 32), ("layers", "embed", "mlp"), INIT)},
    ),
}
SCHEDULE = Constant()


def params_of(specs, seed=0):
    rng = np.random.default_rng(seed)
    return spec_lib.map_specs(
        lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape), jnp.float32), specs
    )


def run(optimizer, params, gradients, rate):
    state = optimizer.direction.init(params)
    for g in gradients:
        direction, state = optimizer.direction.update(g, state, params)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
    return params, state


def test_groups_by_role():
    groups = group_labels(SPECS)
    assert groups["embedding"] == groups["head"] == groups["layers"][0]["norm"] == "adamw"
    assert groups["layers"][0]["query"] == groups["layers"][1]["up"] == "muon"
    mask = decay_mask(SPECS)
    assert not mask["layers"][0]["norm"]
    assert mask["embedding"] and mask["head"] and mask["layers"][0]["output"]


def test_state_holds_no_moment_twice():
    params = params_of(SPECS)
    sizes = [x.size for x in jax.tree.leaves(params)]
    for config, moments in ((AdamW(1e-3, SCHEDULE), 2), (Muon(1e-3, SCHEDULE), 1)):
        state = make_optimizer(config, SPECS, total_steps=1).direction.init(params)
        found = [x.size for x in jax.tree.leaves(state) if x.ndim]
        others = sum(
            s.size for s in jax.tree.leaves(SPECS, is_leaf=spec_lib.is_spec) if s.role != "matrix"
        )
        assert sum(found) == moments * sum(sizes) + (others if moments == 1 else 0)
        assert len([x for x in jax.tree.leaves(state) if not x.ndim]) == 1  # one counter


def test_adamw_is_optax_adamw():
    params = params_of(SPECS)
    gradients = [params_of(SPECS, seed) for seed in (1, 2, 3)]
    optimizer = make_optimizer(AdamW(3e-3, SCHEDULE), SPECS, total_steps=3)
    oracle = optax.adamw(3e-3, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=decay_mask(SPECS))
    state, expected = oracle.init(params), params
    for g in gradients:
        updates, state = oracle.update(g, state, expected)
        expected = optax.apply_updates(expected, updates)
    found, _ = run(optimizer, params, gradients, 3e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), found, expected
    )


def test_a_parameter_with_a_rate_of_its_own_moves_by_that_much():
    """Decay included; everything else moves as before."""
    specs = {"slow": ParamSpec((3, 4), (None, None), INIT, rate=0.25)}
    specs["usual"] = dataclasses.replace(specs["slow"], rate=1.0)
    params = {name: jnp.full((3, 4), 0.5) for name in specs}
    gradients = {name: jnp.ones((3, 4)) for name in specs}
    optimizer = make_optimizer(AdamW(1e-3, SCHEDULE), specs, total_steps=1)
    moved, _ = run(optimizer, params, [gradients], rate=1.0)
    step = {name: params[name] - moved[name] for name in specs}
    np.testing.assert_allclose(step["usual"], 1 + 0.1 * 0.5, rtol=1e-5)
    np.testing.assert_allclose(step["slow"], 0.25 * step["usual"], rtol=1e-5)


def test_first_moment_dtype():
    optimizer = make_optimizer(AdamW(1e-3, SCHEDULE, mu_dtype="bfloat16"), SPECS, total_steps=1)
    found = {x.dtype.name for x in jax.tree.leaves(optimizer.direction.init(params_of(SPECS)))}
    assert found == {"bfloat16", "float32", "int32"}


def test_muon_is_the_papers_update():
    config = Muon(2e-2, SCHEDULE, weight_decay=0.3, momentum=0.9, polar_dtype="float32")
    params = params_of(SPECS)
    gradients = [params_of(SPECS, seed) for seed in (1, 2, 3)]
    found, _ = run(make_optimizer(config, SPECS, total_steps=3), params, gradients, 2e-2)

    def expected(pick, spec):
        batch, rows, columns = spec.matrix_shape
        view = lambda tree: np.asarray(pick(tree), np.float64).reshape(-1, rows, columns)  # noqa: E731
        w, m = view(params), 0.0
        for g in map(view, gradients):
            m = 0.9 * m + g
            polar = np.stack([numpy_polar(x) for x in g + 0.9 * m])
            w = w - 2e-2 * (0.2 * np.sqrt(max(rows, columns)) * polar + 0.3 * w)
        return w.reshape(spec.shape)

    picks = [
        lambda t: t["layers"][0]["query"],
        lambda t: t["layers"][0]["output"],
        lambda t: t["layers"][1]["up"],
    ]
    assert picks[0](SPECS).matrix_shape == ((8,), 16, 32)
    assert picks[1](SPECS).matrix_shape == ((8,), 32, 16)
    for pick in picks:
        np.testing.assert_allclose(pick(found), expected(pick, pick(SPECS)), atol=3e-6)

    # Everything else moves as under AdamW with the same constants.
    adamw = AdamW(2e-2, SCHEDULE, weight_decay=0.3, beta1=0.95)
    other, _ = run(make_optimizer(adamw, SPECS, total_steps=3), params, gradients, 2e-2)
    for pick in (lambda t: t["embedding"], lambda t: t["head"], lambda t: t["layers"][0]["norm"]):
        np.testing.assert_allclose(pick(found), pick(other), rtol=1e-6)


def test_update_has_the_size_of_adamws():
    specs = {"w": ParamSpec((48, 48), (None, None), INIT)}
    optimizer = make_optimizer(Muon(1e-3, SCHEDULE, weight_decay=0.0), specs, total_steps=1)
    params = params_of(specs)
    direction, _ = optimizer.direction.update(params, optimizer.direction.init(params), params)
    assert np.sqrt(np.mean(np.square(direction["w"]))) == pytest.approx(0.2, rel=0.01)


MESHES = {
    "fsdp8": MeshConfig(fsdp=8),
    "data2-fsdp2-tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
    "data2-tensor4": MeshConfig(data=2, tensor=4),
}


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", MESHES)
def test_muon_on_a_mesh_is_the_update_of_one_device(mesh):
    sharding = Sharding(make_mesh(MESHES[mesh]))
    config = Muon(1e-2, SCHEDULE, polar_dtype="float32")
    params, gradient = params_of(SPECS), params_of(SPECS, 1)

    def update(optimizer, params, gradient):
        state = optimizer.direction.init(params)
        return optimizer.direction.update(gradient, state, params)

    alone = make_optimizer(config, SPECS, total_steps=1)
    expected, _ = jax.jit(lambda p, g: update(alone, p, g))(params, gradient)
    split = make_optimizer(config, SPECS, total_steps=1, sharding=sharding)
    shardings = sharding.params(SPECS)
    found, state = jax.jit(lambda p, g: update(split, p, g))(
        jax.device_put(params, shardings), jax.device_put(gradient, shardings)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)
    query = found["layers"][0]["query"]
    assert query.sharding.is_equivalent_to(shardings["layers"][0]["query"], query.ndim)


@pytest.mark.parametrize(
    ("layers", "mesh", "devices"),
    [
        (16, MeshConfig(data=2, fsdp=4), ("data", "fsdp")),
        (4, MeshConfig(data=2, fsdp=4), ("fsdp",)),
        (6, MeshConfig(data=2, fsdp=4), ("data",)),
        (4, MeshConfig(fsdp=4, tensor=2), ("fsdp",)),
        (3, MeshConfig(data=2, fsdp=4), None),
    ],
)
def test_matrices_are_split_over_the_devices_that_divide_them(layers, mesh, devices):
    spec = ParamSpec((layers, 16, 32), ("layers", "embed", "mlp"), INIT)
    sharding = Sharding(make_mesh(mesh))
    layouts = muon._layouts(spec, sharding)
    if devices is None:
        assert layouts == []
    else:
        assert layouts[0].is_equivalent_to(sharding.named(spec.axes, spec.shape), 3)
        assert layouts[-1].spec == jax.sharding.PartitionSpec(devices, None, None)


def test_stacked_experts_stay_where_they_are():
    spec = ParamSpec((4, 8, 16, 32), ("layers", "experts", "embed", "mlp"), INIT)
    sharding = Sharding(make_mesh(MeshConfig(expert=2, fsdp=2, tensor=2)))
    last = muon._layouts(spec, sharding)[-1]
    assert last.spec == jax.sharding.PartitionSpec(("fsdp", "tensor"), ("expert",), None, None)


def test_each_device_orthogonalises_whole_matrices():
    specs = {"w": ParamSpec((8, 16, 32), ("layers", "embed", "mlp"), INIT)}
    sharding = Sharding(make_mesh(MeshConfig(fsdp=4, tensor=2)))
    optimizer = make_optimizer(Muon(1e-2, SCHEDULE), specs, total_steps=1, sharding=sharding)
    abstract = spec_lib.abstract(specs, sharding.params(specs))
    state = jax.eval_shape(optimizer.direction.init, abstract)
    text = jax.jit(optimizer.direction.update).lower(abstract, state, abstract).compile().as_text()
    assert "f32[16,16]" in text  # one whole Gram matrix a device
    # Two moves there and two back, and nothing inside the iteration or gathered.
    assert len(re.findall(r"= .* all-to-all\(", text)) == 4
    assert " all-gather(" not in text and " collective-permute(" not in text


@pytest.mark.parametrize(
    "config", [AdamW(1e-3, SCHEDULE), Muon(1e-3, SCHEDULE)], ids=["adamw", "muon"]
)
def test_state_follows_the_parameters(config):
    sharding = Sharding(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    optimizer = make_optimizer(config, SPECS, total_steps=1, sharding=sharding)
    learnings = {"model": Learning(SPECS, SPECS, optimizer, 0.9)}
    abstract = abstract_state(learnings, sharding)
    shardings = state_shardings(abstract, learnings, sharding)
    make = jax.jit(lambda p: init_state({"model": p}, learnings), out_shardings=shardings)
    state = make(params_of(SPECS))
    jax.tree.map(
        lambda x, a: (
            (x.shape, x.dtype, x.sharding) == (a.shape, a.dtype, a.sharding) or pytest.fail()
        ),
        state,
        abstract,
    )
    query = sharding.params(SPECS)["layers"][0]["query"]
    moments = [
        a.sharding
        for path, a in jax.tree.leaves_with_path(abstract.learners["model"].opt_state)
        if spec_lib.path_name(path).endswith("layers/0/query")
    ]
    assert moments == [query] * (2 if config.kind == "adamw" else 1)
    assert not query.is_fully_replicated


def test_unknown_optimizer_array_has_no_guessed_sharding():
    sharding = Sharding(make_mesh(MeshConfig(fsdp=8)))
    optimizer = make_optimizer(AdamW(1e-3, SCHEDULE), SPECS, total_steps=1)
    factored = optax.GradientTransformation(lambda p: {"rows": jnp.zeros(7)}, None)
    with pytest.raises(ValueError, match=r"rows of shape \(7,\) belongs to no parameter"):
        optimizer = dataclasses.replace(optimizer, direction=factored)
        abstract_state({"model": Learning(SPECS, SPECS, optimizer)}, sharding)


def test_step_law():
    optimizer = make_optimizer(AdamW(schedule=SCHEDULE), SPECS, total_steps=10, tokens=1e6)
    matrices = 8 * 16 * 32 * 2 + 3 * 16 * 32
    assert optimizer.peak == scaling_laws.step_law_learning_rate(matrices, 1e6)
    assert float(optimizer.rate(0)) == pytest.approx(optimizer.peak)
    assert any("extrapolated" in note for note in optimizer.notes)
    notes = make_optimizer(Muon(schedule=SCHEDULE), SPECS, total_steps=10, tokens=1e6).notes
    assert "Step Law was fitted with AdamW, not muon" in notes
    assert "muon polar_dtype: float32 (auto on cpu)" in notes
    with pytest.raises(ValueError, match="number of training tokens"):
        make_optimizer(AdamW(), SPECS, total_steps=10_000)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdamW(learning_rate=-1.0), "learning_rate is -1.0"),
        (AdamW(learning_rate="steplaw"), "learning_rate is 'steplaw'"),
        (AdamW(beta2=1.0), "beta2 is 1.0"),
        (AdamW(weight_decay=-0.1), "weight_decay"),
        (AdamW(eps=0.0), "eps"),
        (Muon(clip_norm=0.0), "clip_norm is 0.0"),
        (Muon(momentum=1.0), "momentum is 1.0"),
        (Muon(polar_dtype="bfloat16"), "polar_dtype is 'bfloat16'"),
    ],
)
def test_bad_configuration(config, message):
    with pytest.raises(ConfigError, match=message):
        config.validate()
