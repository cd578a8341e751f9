"""Grouped matmuls against a float64 definition, at any sizes of the groups."""

from __future__ import annotations

import functools
import typing
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from step_jax.core.errors import ConfigError
from step_jax.ops import grouped_matmul as ops
from tests.devices import BLACKWELL, CPU, HOPPER, TPU

D, F = 8, 12


ANYWHERE = [name for name, entry in ops.IMPLEMENTATIONS.items() if not entry.kernel]


def definition(x, w, sizes, cotangent):
    """Float64, group by group: (y, dx, dw)."""
    x, w, cotangent = (np.asarray(a, np.float64) for a in (x, w, cotangent))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], dx[rows] = x[rows] @ w[e], cotangent[rows] @ w[e].T
        dw[e] = x[rows].T @ cotangent[rows]
        start += size
    return y, dx, dw


def value_and_gradients(f, x, w, sizes, cotangent):
    y, pull = jax.vjp(lambda x, w: f(x, w, sizes), x, w)
    return y, *pull(cotangent)


@functools.cache
def compiled(implementation):
    f = functools.partial(ops.grouped_matmul, implementation=implementation)
    return jax.jit(functools.partial(value_and_gradients, f))


def inputs(sizes, rows, seed=0, dtype=np.float32, D=D, F=F):
    rng = np.random.default_rng(seed)
    shapes = (rows, D), (len(sizes), D, F), (rows, F)
    x, w, cotangent = (rng.standard_normal(s).astype(dtype) for s in shapes)
    return x, w, np.asarray(sizes, np.int32), cotangent


def assert_near(got, expected, bound):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        error = np.linalg.norm(np.asarray(a, np.float64) - b)
        assert error <= bound * max(np.linalg.norm(b), 1.0)


ROWS, GROUPS = 1200, 5  # two tiles of 512 rows, some of 128 and some of 32


@pytest.mark.thorough
@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])
@example([0, 0, 0, 0, 0], 0)
@example([0, 0, ROWS, 0, 0], 0)
@example([ROWS, 0, 0, 0, 0], 0)
@example([1, 1, 1, 1, ROWS - 4], 0)
@example([512, 128, 32, 511, 17], 0)
@example([33, 0, 1024, 0, 1], 0)
@given(
    st.lists(st.integers(0, ROWS // GROUPS) | st.integers(0, ROWS), min_size=5, max_size=5).filter(
        lambda s: sum(s) <= ROWS
    ),
    st.integers(0, 2**31),
)
def test_tiles_and_reference_equal_the_definition(sizes, seed):
    arrays = inputs(sizes, ROWS, seed)
    expected = definition(*arrays)
    for name in ("tiles", "reference"):
        got = compiled(name)(*arrays)
        assert_near(got, expected, 1e-6)
        assert not np.any(got[0][sum(sizes) :]) and not np.any(got[1][sum(sizes) :])


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 127, 513])
def test_fewer_rows_than_a_tile(rows):
    for sizes in ([rows, 0], [rows // 2, rows - rows // 2], [0, rows // 3]):
        arrays = inputs(sizes, rows)
        assert_near(compiled("tiles")(*arrays), definition(*arrays), 1e-6)


def test_ragged_dot_equals_the_definition():
    for sizes in ([0, 30, 0, 7], [20, 0, 0, 0], [0, 0, 0, 0]):
        arrays = inputs(sizes, 40)
        assert_near(compiled("ragged_dot")(*arrays), definition(*arrays), 1e-6)


def test_bfloat16_is_accumulated_in_float32():
    arrays = inputs([700, 0, 324], 1024, dtype=jnp.bfloat16)
    got = compiled("tiles")(*arrays)
    assert [a.dtype for a in got] == [jnp.bfloat16] * 3
    assert_near(got, definition(*arrays), 4e-3)  # the rounding of the results: 8 bits


@pytest.mark.parametrize("name", ANYWHERE)
def test_rows_of_no_group_may_hold_anything(name):
    x, w, sizes, cotangent = inputs([3, 0, 2], 40)
    expected = definition(x, w, sizes, cotangent)
    x[5:], cotangent[5:] = np.nan, np.nan
    assert_near(compiled(name)(x, w, sizes, cotangent), expected, 1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", ANYWHERE)
def test_inside_shard_map_checkpoint_and_scan(name, check):
    """Two layers in a checkpointed scan; every device has its own rows and sizes, all matrices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sizes = np.asarray([[40, 0, 3], [0, 5, 30]], np.int32)
    x, w, _, cotangent = inputs(sizes[0], 96, D=D, F=D)
    w_LEDF = np.stack([w, 0.5 * w])

    def layers(x, w_LEDF, sizes):
        @jax.checkpoint
        def layer(x, w):
            return ops.grouped_matmul(x, w, sizes.reshape(3), implementation=name), None

        return jax.lax.scan(layer, x, w_LEDF)[0]

    f = jax.shard_map(
        layers, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P("data"),
        check_vma=check,
    )  # fmt: skip
    got = jax.jit(functools.partial(value_and_gradients, f))(x, w_LEDF, sizes, cotangent)
    y, dx, dw = [], [], []
    for i in range(2):
        rows = slice(48 * i, 48 * i + 48)
        middle, *_ = definition(x[rows], w_LEDF[0], sizes[i], cotangent[rows])
        out, dmiddle, dw1 = definition(middle, w_LEDF[1], sizes[i], cotangent[rows])
        _, dx0, dw0 = definition(x[rows], w_LEDF[0], sizes[i], dmiddle)
        y, dx, dw = [*y, out], [*dx, dx0], [*dw, np.stack([dw0, dw1])]
    assert_near(got, (np.concatenate(y), np.concatenate(dx), dw[0] + dw[1]), 2e-6)


FITS = ops.Problem.of(rows=4096, groups=8, width=512, result=1024, dtype="bfloat16")


def test_auto_follows_the_platform_compiled_for():
    for problem in (FITS, None):
        assert ops.resolve("auto", problem) == "tiles"  # the tests' backend
        assert {ops.resolve("auto", problem, d) for d in (CPU, HOPPER, BLACKWELL)} == {"tiles"}
        assert ops.resolve("auto", problem, TPU) == "pallas_tpu"
        assert ops.resolve("reference", problem, TPU) == "reference"
        assert ops.resolve("pallas_gpu", problem, HOPPER) == "pallas_gpu"
        with pytest.raises(ConfigError, match="pallas_gpu .*for gpu 10.0; use auto"):
            ops.resolve("pallas_gpu", problem, BLACKWELL)


@pytest.mark.parametrize(
    "width,result",
    [
        (2**20, 128),  # the product does not fit
        (128, 2**20),  # the rows' gradient
    ],
)
def test_auto_on_a_tpu_takes_tiles_for_widths_that_the_kernel_cannot_hold(width, result):
    problem = ops.Problem.of(4096, 8, width, result, "bfloat16")
    assert ops.resolve("auto", problem, TPU) == "tiles"
    with pytest.raises(ConfigError, match="pallas_tpu cannot do this: .* do not fit .*; use auto"):
        ops.resolve("pallas_tpu", problem, TPU)
    y_MF = jax.eval_shape(functools.partial(ops.grouped_matmul, device=TPU), *problem)
    assert y_MF.shape == (4096, result)


@pytest.mark.parametrize("kind", ["TPU v5e", "TPU v5p", "TPU v6e", "TPU7x"])
@pytest.mark.parametrize("width,result", [(2880, 2880), (2880, 5760), (4096, 14336), (2040, 8200)])
def test_widths_that_128_does_not_divide_are_no_reason_for_tiles(kind, width, result):
    """2880 is gpt-oss's."""
    device = SimpleNamespace(platform="tpu", device_kind=kind)
    for widths in ((width, result), (result, width)):
        problem = ops.Problem.of(8192, 32, *widths, "bfloat16")
        assert ops.resolve("auto", problem, device) == "pallas_tpu"


def test_every_implementation_can_be_configured():
    assert set(typing.get_args(ops.Implementation)) == {"auto", *ops.IMPLEMENTATIONS}


def test_what_does_not_fit_is_refused():
    x, w, sizes, _ = inputs([2, 3], 8)
    with pytest.raises(
        ValueError, match="there are: auto, reference, tiles, ragged_dot, pallas_tpu, pallas_gpu"
    ):
        ops.grouped_matmul(x, w, sizes, implementation="dense")
    with pytest.raises(ValueError, match="pallas_tpu .* needs a TPU, and this is compiled for cpu"):
        ops.grouped_matmul(x, w, sizes, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="pallas_gpu .* needs a Hopper GPU"):
        ops.grouped_matmul(x, w, sizes, implementation="pallas_gpu")
    with pytest.raises(ValueError, match="float32; the GPU kernel supports, of both, bfloat16"):
        ops.grouped_matmul(x, w, sizes, implementation="pallas_gpu", device=HOPPER)
    narrow = (a.astype(jnp.bfloat16) for a in (x, w))
    with pytest.raises(ValueError, match="multiples of 128"):
        ops.grouped_matmul(*narrow, sizes, implementation="pallas_gpu", device=HOPPER)
    with pytest.raises(ValueError, match=r"sizes \(E,\)"):
        ops.grouped_matmul(x, w, sizes[:1])
    with pytest.raises(ValueError, match="do not fit"):
        ops.grouped_matmul(x[:, :4], w, sizes)
    with pytest.raises(ValueError, match="do not fit"):
        ops.grouped_matmul(x.astype(jnp.bfloat16), w, sizes)
    with pytest.raises(ValueError, match="int32"):
        ops.grouped_matmul(x, w, sizes.astype(np.int64))
