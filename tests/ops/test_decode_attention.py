"""The reference of decode attention against float64 NumPy, and the choice of an implementation."""

from __future__ import annotations

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from step_jax.core.errors import ConfigError
from step_jax.ops import decode_attention as ops
from step_jax.ops.rope import frequencies_F
from tests.devices import AMPERE, BLACKWELL, CPU, HOPPER, TPU
from tests.pallas_kernels.decode_oracle import Case, attention, paged


@pytest.mark.thorough
@pytest.mark.parametrize(
    "case, window, page",
    [
        (Case((70, 0, 9), 64, heads=4, kv_heads=2, width=16), None, None),
        (Case((70, 3, 9), 64, width=16, reuse=True, tokens=2), 20, None),
        (Case((61, 0, 9), 64, width=16, reuse=True), None, 8),
    ],
)
def test_reference(case, window, page):
    q, k, v, positions, lengths = case.arrays()
    theta = 10_000.0 if case.reuse else None
    caches, table = paged((k, v), page) if page else ((k, v), None)
    call = ops.DecodeCall(
        q,
        *caches,
        positions,
        lengths,
        scale=0.2,
        window=window,
        frequency_F=frequencies_F(theta, case.width // 2) if theta else None,
        page_table_BM=table,
    )
    got = ops.decode_attention(call, implementation="reference")
    expected = attention(q, k, v, positions, lengths, 0.2, window, theta)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_reference_scales_and_slices():
    q, k, v, positions, lengths = Case((30, 9), 32, heads=4, kv_heads=2, width=16).arrays()
    scales = {"k_scale": np.float32([0.5, 2.0]), "v_scale": 3.0}
    arrays = q[:, :, 1:], k, v, positions, lengths
    call = ops.DecodeCall(*arrays, scale=0.2, first_head=1, heads_per_key=2, **scales)
    got = ops.decode_attention(call, implementation="reference")
    expected = attention(q, k * scales["k_scale"][:, None], 3.0 * v, positions, lengths, 0.2)
    np.testing.assert_allclose(got, expected[:, :, 1:], atol=5e-6)


@pytest.mark.parametrize("heads, kv_heads", [(6, 1), (4, 2)])
@pytest.mark.parametrize("reuse", [False, True])
def test_blocks_are_the_reference(heads, kv_heads, reuse):
    """Lengths around the ends of blocks; of the last two a part is there a second time."""
    case = Case(
        (2500, 1024, 1025, 0, 3), 2500, heads=heads, kv_heads=kv_heads, width=16, reuse=reuse
    )
    q, k, v, positions, lengths = case.arrays()
    more = {"frequency_F": frequencies_F(1e4, 8)} if reuse else {}
    call = ops.DecodeCall(q, k, v, positions, lengths, scale=0.2, **more)
    expected = ops.decode_attention(call, implementation="reference")
    found = jax.jit(lambda call: ops.decode_attention(call, implementation="blocks"))(call)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert not np.asarray(found)[3].any()
    # one layer of a stack, and a device's slice of the heads
    stack = [None if a is None else np.stack([np.full_like(a, 9.0), a]) for a in (k, v)]
    some = dataclasses.replace(
        call, q_BTNH=q[:, :, 1:], k_cache=stack[0], v_cache=stack[1], layer=np.int32(1),
        first_head=np.int32(1), heads_per_key=heads // kv_heads,
    )  # fmt: skip
    part = ops.decode_attention(some, implementation="blocks")
    np.testing.assert_allclose(part, expected[:, :, 1:], atol=2e-6)


def test_blocks_of_a_ring_are_the_reference():
    """Texts longer than the cache, of which the newest positions are left."""
    arrays = Case((2600, 7000, 12), 2500, width=16).arrays()
    call = ops.DecodeCall(*arrays, scale=0.2)
    found, expected = (
        ops.decode_attention(call, implementation=name) for name in ("blocks", "reference")
    )
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_row_by_blocks_knows_neither_its_company_nor_the_length_of_its_cache():
    def alone(lengths, slots, row):
        case = Case(lengths, slots, heads=4, width=16)
        q, k, v, positions, lengths_B = case.arrays()
        rng = np.random.default_rng(1)  # the same row everywhere
        q[row], k[row, :1500], v[row, :1500] = (
            rng.normal(size=a.shape).astype(np.float32) for a in (q[0], k[0, :1500], v[0, :1500])
        )
        call = ops.DecodeCall(q, k, v, positions, lengths_B, scale=0.2)
        return np.asarray(ops.decode_attention(call, implementation="blocks"))[row]

    first = alone((1500, 20), 2100, 0)
    np.testing.assert_array_equal(first, alone((1500, 4000), 4000, 0))
    np.testing.assert_array_equal(first, alone((7, 1500), 2048, 1))


def test_auto_is_the_kernel_where_it_can_be():
    def choose(implementation, device, width=128, alibi=False, slots=64):
        case = Case((3,), slots, width=width, dtype=ml_dtypes.bfloat16)
        problem = ops.Problem(ops.DecodeCall(*case.arrays(), scale=1.0), alibi)
        return ops.in_place(implementation, problem, device)

    assert choose("auto", CPU) is None
    assert choose("auto", CPU, slots=5000) == "blocks"
    assert choose("auto", AMPERE, slots=5000) is None
    assert choose("auto", CPU, slots=5000, alibi=True) is None
    assert choose("xla", CPU, slots=5000) is None
    assert choose("auto", TPU) == "pallas_tpu"
    assert choose("auto", TPU, width=64) is None
    assert choose("auto", TPU, alibi=True) is None
    assert choose("xla", TPU) is None
    assert choose("pallas_tpu", TPU) == "pallas_tpu"
    assert choose("auto", HOPPER) == choose("pallas_gpu", HOPPER) == "pallas_gpu"
    assert choose("auto", HOPPER, slots=32) is None
    assert choose("auto", AMPERE) is None
    assert choose("auto", BLACKWELL) is None
    for device, found in ((AMPERE, "gpu 8.0"), (BLACKWELL, "gpu 10.0"), (CPU, "cpu")):
        with pytest.raises(ConfigError, match=f"capability 9.0.*compiled for {found}; use auto"):
            choose("pallas_gpu", device)
    with pytest.raises(ValueError, match="no ALiBi"):
        choose("pallas_gpu", HOPPER, alibi=True)


def test_bad_calls_say_what_there_is():
    arrays = Case((3,), 8, width=16).arrays()
    call = ops.DecodeCall(*arrays, scale=1.0)
    names = "auto, reference, blocks, pallas_gpu, pallas_tpu, pallas_tpu_interpret"
    with pytest.raises(ConfigError, match=f"no decode attention 'cudnn'; there are: {names}"):
        ops.decode_attention(call, implementation="cudnn")
    with pytest.raises(ConfigError, match="no decode attention 'cudnn'"):
        ops.in_place("cudnn", ops.Problem(call), CPU)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        ops.decode_attention(ops.DecodeCall(*arrays, scale=1.0, window=0))


def test_auto_decodes_anywhere():
    arrays = Case((3,), 8, width=16).arrays()
    got = ops.decode_attention(ops.DecodeCall(*arrays, scale=0.2))
    np.testing.assert_allclose(got, attention(*arrays, 0.2), atol=2e-6)


@pytest.mark.parametrize(
    ("tokens", "page", "message"),
    [
        (1, 16, "128 rows of 129 blocks and 2048 pages take .* of scalar memory"),
        (64, 256, "64 tokens of 64 heads .* on-chip memory"),
    ],
)
def test_auto_takes_no_kernel_for_what_does_not_fit_a_tpu(tokens, page, message):
    """128 rows of 32k tokens in pages of 16; 64 tokens a row. On eight devices the rows fit."""
    rows, pages = 128, 32768 // page
    queries = jax.ShapeDtypeStruct((rows, tokens, 64, 256), "bfloat16")
    pool = jax.ShapeDtypeStruct((rows * pages, page, 1, 256), "bfloat16")
    integers = [jax.ShapeDtypeStruct(s, "int32") for s in ((rows, tokens), (rows,), (rows, pages))]
    call = ops.DecodeCall(queries, pool, pool, *integers[:2], scale=1.0, page_table_BM=integers[2])
    assert ops.resolve("auto", ops.Problem(call), TPU) == "reference"
    with pytest.raises(ConfigError, match=message):
        ops.resolve("pallas_tpu", ops.Problem(call), TPU)
    on_eight = ops.resolve("auto", ops.Problem(call, batch_pieces=8), TPU)
    assert on_eight == ("pallas_tpu" if tokens == 1 else "reference")
