"""Sums of gradients over a mesh: right, in the parameter's layout, and folded where it pays."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core.fsdp import add_up, fold, gathered
from step_jax.core.sharding import MeshConfig, Sharding

MESHES = [
    {"fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 2, "expert": 4},
    {"fsdp": 4, "context": 2},
    {"data": 2, "context": 2, "tensor": 2},
    {"pipeline": 2, "fsdp": 2, "tensor": 2},
]


def on(**axes) -> Sharding:
    return Sharding.build(MeshConfig(**axes), jax.devices()[:8])


@pytest.mark.thorough
@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("logical", [("embed", "mlp"), ("mlp", "embed")], ids=str)
def test_gradients_are_the_sum_in_the_layout_of_the_parameter(axes, logical):
    sharding, rng = on(**axes), np.random.default_rng(1)
    R, C = sharding.ways("batch"), sharding.ways("sequence")
    parts_RC = jnp.asarray(rng.integers(-9, 9, size=(R, C, 16, 16)), jnp.float32)
    stored = sharding.named(logical, (16, 16))
    total = jax.jit(lambda p: add_up(p, logical, sharding))(parts_RC)
    np.testing.assert_array_equal(total, parts_RC.sum((0, 1)))
    assert total.sharding.is_equivalent_to(stored, 2)

    x_NI = jnp.asarray(rng.integers(-9, 9, size=(16, 16)), jnp.float32)
    dy_NO = jnp.asarray(rng.integers(-9, 9, size=(16, 16)), jnp.float32)

    @jax.jit
    def gradient(w_IO, x_NI, dy_NO):
        x_NI, dy_NO = (sharding.constrain(a, "batch", None) for a in (x_NI, dy_NO))
        return jax.grad(lambda w: jnp.sum((x_NI @ gathered(w, logical, sharding)) * dy_NO))(w_IO)

    dw_IO = gradient(jax.device_put(jnp.zeros((16, 16)), stored), x_NI, dy_NO)
    np.testing.assert_array_equal(dw_IO, x_NI.T @ dy_NO)
    assert dw_IO.sharding.is_equivalent_to(stored, 2)


@dataclass
class Device:
    coords: tuple[int, ...]
    core_on_chip: int = 0
    platform: str = "tpu"
    slice_index: int = 0


def torus(*shape, cores=1):
    places = itertools.product(*map(range, shape))
    return [Device(p, core) for p in places for core in range(cores)]


@pytest.mark.parametrize(
    ("devices", "everywhere", "inner"),
    [
        (torus(4, 4, 4), 64, 4),  # the whole mesh
        (torus(16, 16, 1), 256, 16),
        (torus(4, 4, 4), 128, 4),  # three dimensions of a larger one
        (torus(8, 8, 1), 256, 1),  # a plane of a larger one
        (torus(8, 1, 1), 8, 1),  # one ring
        (torus(4, 4, 4, cores=2), 128, 2),  # the cores of a chip are nearest
        (torus(1, 1, 2), 2, 1),
    ],
)
def test_where_an_axis_is_folded(devices, everywhere, inner):
    assert fold(devices, everywhere) == inner


def test_gpus_and_several_slices_are_not_folded():
    assert fold([Device((0, 0, i), platform="gpu") for i in range(8)], 8) == 1
    other = [Device(d.coords, slice_index=1) for d in torus(4, 4, 4)]
    assert fold(torus(4, 4, 4) + other, 128) == 1
