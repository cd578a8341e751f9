"""The Hopper grouped matmul in the interpreter against a float64 definition."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.gpu import grouped_matmul as kernel
from pallas_kernels.gpu import tile_matmul
from step_jax.ops import grouped_matmul as ops
from tests.devices import HOPPER
from tests.ops.test_grouped_matmul import assert_near, definition, inputs, value_and_gradients
from tests.pallas_kernels.test_gpu_attention import interpreted

EPSILON = 2**-8  # of bfloat16; a result is rounded once, by half of it at most
grouped_matmul = functools.partial(kernel.grouped_matmul, interpret=plgpu.InterpretGPUParams())


@functools.cache
def function():
    return functools.partial(value_and_gradients, grouped_matmul)


def check(sizes, rows, D=128, F=128, fill=None):
    """Results and gradients; ``fill`` is what the rows of no group hold."""
    x, w, sizes_E, cotangent = inputs(sizes, rows, dtype=jnp.bfloat16, D=D, F=F)
    expected = definition(x, w, sizes_E, cotangent)
    used = sum(sizes)
    if fill is not None:
        x[used:], cotangent[used:] = fill, fill
    got = interpreted(function(), x, w, sizes_E, cotangent)
    assert [a.dtype for a in got] == [jnp.bfloat16] * 3
    assert_near(got, expected, EPSILON / 2)
    y, dx, dw = (np.asarray(a, np.float32) for a in got)
    assert not np.any(y[used:]) and not np.any(dx[used:])
    assert not np.any(dw[sizes_E == 0])
    return got


@pytest.mark.slow
def test_ragged_and_empty_groups_with_rows_left_over():
    check([0, 70, 0, 3, 55, 0], 200, fill=np.nan)


@pytest.mark.slow
def test_groups_that_begin_and_end_anywhere_in_a_step():
    check([1, 8, 7, 112, 64], 192)


@pytest.mark.thorough
@pytest.mark.parametrize("sizes", [[0, 0], [0, 128]])
def test_all_rows_in_one_group_or_none(sizes):
    check(sizes, 128)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [2, 4])
def test_few_blocks_walk_many_tiles_in_pairs(blocks, monkeypatch):
    """Clusters of two blocks, slots that come round, results that follow each other."""
    monkeypatch.setattr(tile_matmul, "BLOCKS", blocks)
    function.cache_clear()
    check([300, 0, 5, 90, 61], 500, D=256, F=512, fill=np.inf)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(384, 128), (128, 768)])
def test_tiles_of_128_and_256_columns_without_pairs(widths):
    check([100, 28, 0, 70], 200, D=widths[0], F=widths[1])


@pytest.mark.slow
def test_one_row():
    check([0, 1, 0], 1)


@pytest.mark.slow
def test_same_bits_in_every_run():
    first, second = (check([40, 90, 0, 62], 192) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_visits_list_the_groups_of_each_tile():
    sizes_E = np.array([0, 100, 0, 60, 1, 0, 139], np.int32)
    group_E, border_C, first_I, count_I = map(np.asarray, kernel._visits(jnp.asarray(sizes_E), 512))
    group_M = np.repeat(np.arange(7), sizes_E)
    assert border_C[-1] == 300
    for i in range(4):
        own = np.unique(group_M[i * 128 : (i + 1) * 128])
        assert np.array_equal(group_E[first_I[i] : first_I[i] + count_I[i]], own)


def test_traces_inside_a_shard_map():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",), axis_types=(AxisType.Auto,))
    x, w, sizes, cotangent = inputs([20, 44], 128, dtype=jnp.bfloat16, D=128, F=128)
    op = functools.partial(ops.grouped_matmul, implementation="pallas_gpu", device=HOPPER)
    f = jax.shard_map(
        functools.partial(value_and_gradients, op),
        mesh=mesh,
        in_specs=(P("x"), P(), P(), P("x")),
        out_specs=(P("x"), P("x"), P()),
    )
    shapes = [a.shape for a in jax.eval_shape(f, x, w, sizes, cotangent)]
    assert shapes == [(128, 128), x.shape, w.shape]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"D": 64}, "multiples of 128"),
        ({"F": 200}, "multiples of 128"),
        ({"dtype": np.float32}, "float32; the GPU kernel supports, of both, bfloat16"),
        ({"rows": 0, "sizes": [0]}, "there are none"),
        ({}, "grouped matmul cannot run: it needs a Hopper GPU"),
    ],
)
def test_refuses_what_it_does_not_support(change, message):
    arguments = {"sizes": [3], "rows": 8, "D": 128, "F": 128, "dtype": jnp.bfloat16} | change
    x, w, sizes, _ = inputs(**arguments)
    with pytest.raises(ValueError, match=message):
        kernel.grouped_matmul(x, w, sizes)
