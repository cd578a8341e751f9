"""The TPU kernel of the grouped matmul in interpret mode, and compiled for four chips."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from pallas_kernels.tpu import aot, cuts
from pallas_kernels.tpu import grouped_matmul as kernel
from tests.ops.test_grouped_matmul import assert_near, definition, inputs, value_and_gradients

CHIP = "v5p"
interpreted = functools.partial(kernel.grouped_matmul, chip=CHIP, interpret=True)
ROWS = 700  # two blocks, the second in part; parts of 128 rows


@functools.cache
def compiled():
    return jax.jit(functools.partial(value_and_gradients, lambda x, w, s: interpreted(x, w, s)))


@pytest.mark.thorough
@settings(max_examples=3, phases=[Phase.explicit, Phase.generate])
@example([0, 0, 0, 0])
@example([0, ROWS, 0, 0])
@example([512, 0, 1, ROWS - 513])
@example([100, 28, 5, 0])
@given(
    st.lists(st.integers(0, ROWS // 4) | st.integers(0, ROWS), min_size=4, max_size=4).filter(
        lambda s: sum(s) <= ROWS
    )
)
def test_equals_the_definition(sizes):
    arrays = inputs(sizes, ROWS, D=128, F=256)
    got = compiled()(*arrays)
    assert_near(got, definition(*arrays), 1e-6)
    assert not np.any(got[0][sum(sizes) :]) and not np.any(got[1][sum(sizes) :])


@pytest.mark.thorough
@pytest.mark.parametrize("rows", [1, 7, 40, 100])
def test_few_rows_and_odd_widths(rows):
    arrays = inputs([rows // 3, 0, rows // 2], rows, D=24, F=136)
    assert_near(value_and_gradients(interpreted, *arrays), definition(*arrays), 1e-6)


@pytest.mark.parametrize("D,F", [pytest.param(384, 512, marks=pytest.mark.thorough), (320, 200)])
def test_widths_are_cut_into_blocks_and_chunks_and_what_is_left(D, F, monkeypatch):
    """Blocks of 128, which of 320 and 200 reach past the end; the memory there is NaN."""
    monkeypatch.setattr(kernel, "CHUNK", 128 * 128)
    monkeypatch.setattr(kernel, "BLOCKS", ((256, 128),))
    monkeypatch.setattr(kernel, "MATRICES", ((128, 128),))
    assert kernel.blocks_of_rows(CHIP, 600, D, F, 4)[:3] == (256, D, 128)
    assert kernel.blocks_of_matrices(CHIP, 600, D, F, 4)[:3] == (512, 128, 128)
    arrays = inputs([200, 256, 100], 600, D=D, F=F)
    assert_near(value_and_gradients(interpreted, *arrays), definition(*arrays), 1e-6)


@given(st.integers(1, 30_000), st.sampled_from([128, 512, 1024, 2048]), st.sampled_from([1, 2]))
def test_a_cut_of_a_width_wastes_little_and_leaves_no_core_idle(width, most, ways):
    size = cuts.block(width, most, ways)
    assert size == width or size % 128 == 0
    assert 0 < size <= max(most, 128)
    blocks = -(-width // size)
    done = ways * -(-blocks // ways) * cuts.lanes(size)  # by all cores, in the time of the slowest
    assert done <= ways * cuts.lanes(-(-width // ways)) * 1.2 + 128 * ways


def test_widths_of_many_lanes_are_not_cut_into_blocks_of_one():
    """11 and 13 lane tiles have no divisors: 128 at a time left a matrix unit waiting for rows."""
    assert [cuts.block(128 * n, 2048) for n in (11, 13, 22)] == [1408, 1664, 1408]
    assert cuts.block(2880, 2048) == 1536
    assert [cuts.block(n, 2048, ways=2) for n in (768, 1408, 1536, 2880)] == [384, 768, 768, 1536]


@pytest.mark.parametrize("width, most, sizes", [(1280, 1024, [768, 512]), (768, 512, [512, 256]),
                                                (768, 1024, [768]), (200, 128, [200])])  # fmt: skip
def test_chunks_fill_whole_matrix_units(width, most, sizes):
    """Two of 640 would be computed as two of 768 where the units are 256 wide."""
    seen = []
    cuts.chunks(width, most, lambda piece: seen.append(piece.size))
    assert seen == sizes


def test_rows_of_no_group_may_hold_anything():
    x, w, sizes, cotangent = inputs([3, 0, 130], 600, D=128, F=128)
    expected = definition(x, w, sizes, cotangent)
    x[133:], cotangent[133:] = np.nan, np.nan
    assert_near(compiled()(x, w, sizes, cotangent), expected, 1e-6)


@pytest.mark.thorough
def test_bfloat16_is_accumulated_in_float32():
    arrays = inputs([200, 0, 300, 56], 556, dtype=jnp.bfloat16, D=128, F=128)
    got = compiled()(*arrays)
    assert [a.dtype for a in got] == [jnp.bfloat16] * 3
    assert_near(got, definition(*arrays), 4e-3)  # the rounding of the results: 8 bits


def test_blocks_that_do_not_fit_are_refused():
    x, w, sizes, _ = inputs([3], 3, D=8, F=8)
    x = jax.ShapeDtypeStruct((3, 2**20), jnp.float32)
    wide = jax.ShapeDtypeStruct((1, 2**20, 8), jnp.float32)
    with pytest.raises(ValueError, match="do not fit the 48 MiB of a v5p's vector memory"):
        jax.eval_shape(functools.partial(kernel.rows_by_matrices, chip=CHIP), x, wide, sizes)


def test_tables_that_do_not_fit_the_scalar_memory_are_refused():
    x, w, sizes = (
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((2**26, 128), "bfloat16"), ((8, 128, 128), "bfloat16"), ((8,), "int32"))
    )
    with pytest.raises(ValueError, match="8 groups of 67108864 rows .* of scalar memory"):
        kernel.check(x, w, sizes, CHIP)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": np.float16}, "float16; the TPU kernel supports, of both, bfloat16 or float32"),
        ({"rows": 0, "sizes": [0]}, "there are none"),
    ],
)
def test_refuses_what_it_does_not_support(change, message):
    arguments = {"sizes": [3], "rows": 8, "dtype": jnp.bfloat16} | change
    x, w, sizes, _ = inputs(**arguments)
    with pytest.raises(ValueError, match=message):
        kernel.grouped_matmul(x, w, sizes, chip=CHIP)
    with pytest.raises(ValueError, match="sizes must be int32, got int8"):
        kernel.grouped_matmul(*inputs([3], 8)[:2], sizes.astype(np.int8), chip=CHIP)


@pytest.mark.aot
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
@pytest.mark.parametrize(
    "rows,D,F,E,dtype",
    [(16384, 7168, 5120, 16, jnp.bfloat16), (2048, 512, 1024, 8, jnp.float32),
     (1000, 384, 200, 3, jnp.bfloat16), (7, 512, 256, 4, jnp.bfloat16)],
)  # fmt: skip
def test_compiles_for(chip, rows, D, F, E, dtype, topology):
    """Rows and matrices of whole tiles are not copied; the compiler is told the operations."""
    with aot.arrays(chip) as array:
        product = functools.partial(kernel.grouped_matmul, chip=chip)
        f = functools.partial(value_and_gradients, product)
        x_MD, dy_MF = array(dtype, rows, D), array(dtype, rows, F)
        lowered = jax.jit(f).lower(x_MD, array(dtype, E, D, F), array("int32", E), dy_MF)
        done = lowered.compile()
    temporary = done.memory_analysis().temp_size_in_bytes
    print(f"{chip}: {temporary / 1e6:.2f} MB")
    # a width that is no multiple of 128 may be stored in another order, and is then copied
    copied = 0 if F % 128 == 0 else jnp.dtype(dtype).itemsize * (2 * rows * F + 2 * E * D * F)
    assert temporary <= 2**21 + copied
    assert done.cost_analysis()["flops"] == pytest.approx(6 * rows * D * F, rel=1e-3)
