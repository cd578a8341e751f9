"""The TPU decode kernel, interpreted, against float64 NumPy; what it reads."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import decode_plan
from pallas_kernels.decode_call import DecodeCall
from pallas_kernels.tpu import decode as kernel
from tests.pallas_kernels.decode_oracle import THETA, Case, attention, decoded, frequency_F, paged

FLOAT32 = 2e-5  # of numbers around 1; angles of a few thousand radians are float32


def run(case: Case, page: int | None = None, window: int | None = None, **kwargs):
    """(result of the kernel, of the oracle) as float64."""
    decode = jax.jit(functools.partial(kernel.decode, interpret=True, **kwargs))
    return decoded(decode, case, page=page, window=window)


CASES = {
    "mfa": (Case((1300, 0, 1, 513), 1400, width=256), {}),
    "gqa": (Case((300, 7, 0), 333, heads=8, kv_heads=2), {}),
    "three queries a key": (Case((90, 40), 96, heads=9, kv_heads=3), {}),
    "key reuse": (Case((1300, 0, 512), 1536, width=256, reuse=True), {}),
    "ring": (Case((700, 3000, 64), 600), {}),
    "ring of reused keys": (Case((1700, 3000, 64), 1100, reuse=True), {}),
    "window of a long cache": (Case((1500, 100, 900), 1536), {"window": 200}),
    "window as ring": (Case((5000, 100), 192, heads=8, kv_heads=4), {"window": 192}),
    "four tokens": (Case((1200, 2, 700), 1300, tokens=4, reuse=True), {}),
    "four tokens, window": (Case((1200, 2, 700), 1300, tokens=4, kv_heads=2), {"window": 30}),
    "two cores": (Case((1500, 0, 20, 700), 1536, reuse=True), {"splits": 2}),
    "more cores than work": (Case((3, 0), 64), {"splits": 4}),
    "nothing at all": (Case((0, 0), 64), {}),
    "small pages": (Case((500, 0, 31, 512), 512), {"page": 16}),
    "small pages of reused keys": (Case((500, 0, 31), 512, reuse=True), {"page": 16}),
    "large pages, several heads": (
        Case((1500, 0, 31), 2048, heads=8, kv_heads=4),
        {"page": 512, "window": 700},
    ),
}


EVERY_TIME = ("mfa", "gqa", "key reuse", "ring", "window as ring", "nothing at all", "small pages")


@pytest.mark.parametrize(
    "name",
    [n if n in EVERY_TIME else pytest.param(n, marks=pytest.mark.slow) for n in CASES],
)
def test_equals_the_oracle(name):
    case, kwargs = CASES[name]
    got, expected = run(case, **kwargs)
    np.testing.assert_allclose(got, expected, atol=FLOAT32)
    empty = np.asarray(case.lengths) == 0
    assert not got[empty].any()


@pytest.mark.thorough
@pytest.mark.parametrize("reuse", [False, True])
def test_bfloat16(reuse):
    got, expected = run(Case((700, 3), 768, heads=8, reuse=reuse, dtype=ml_dtypes.bfloat16))
    np.testing.assert_allclose(got, expected, atol=1e-2)


@pytest.mark.thorough
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("page", [None, 64])
def test_float8_cache_with_scales(reuse, page):
    """Exact but for the products' rounding: the oracle reads the same float8 numbers."""
    case = Case((700, 3, 90), 768, heads=8, kv_heads=2, reuse=reuse)
    q, k, v, positions, lengths = case.arrays()
    k_scale, v_scale = np.float32([0.03, 0.5]), np.float32([2.0, 0.25])
    k, v = (None if c is None else (8 * c).astype(ml_dtypes.float8_e4m3fn) for c in (k, v))
    frequency = frequency_F(THETA, case.width) if reuse else None
    caches, table = paged((k, v), page) if page else ((k, v), None)
    call = DecodeCall(
        q,
        *caches,
        positions,
        lengths,
        scale=0.1,
        frequency_F=None if frequency is None else jnp.asarray(frequency),
        k_scale=k_scale,
        v_scale=k_scale if reuse else v_scale,
        page_table_BM=table,
    )
    got = kernel.decode(call, interpret=True)
    k64 = k.astype(np.float64) * k_scale[:, None]
    v64 = None if reuse else v.astype(np.float64) * v_scale[:, None]
    expected = attention(q, k64, v64, positions, lengths, 0.1, theta=THETA if reuse else None)
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.thorough
def test_a_slice_of_the_query_heads():
    """A device of a tensor axis wider than the key heads holds all keys and some queries."""
    case = Case((90, 40), 96, heads=8, kv_heads=2)
    q, *rest = case.arrays()

    def decode(q, first=None):
        call = DecodeCall(q, *rest, scale=0.1, heads_per_key=4, first_head=first)
        return kernel.decode(call, interpret=True)

    whole, of_slice = decode(q), jax.jit(decode)
    for first in (0, 3, 5):
        part = of_slice(q[:, :, first : first + 3], jnp.int32(first))
        np.testing.assert_allclose(part, whole[:, :, first : first + 3], atol=1e-6)


def test_lengths_are_not_compiled_in():
    case = Case((64, 3), 128, reuse=True)
    q, k, v, _, _ = case.arrays()
    traces = []

    @jax.jit
    def decode(q, k, positions, lengths):
        traces.append(1)
        frequency = jnp.asarray(frequency_F(THETA, 128))
        arrays = q, k, v, positions, lengths
        call = DecodeCall(*arrays, scale=0.1, frequency_F=frequency)
        return kernel.decode(call, interpret=True)

    for lengths in ((1, 2), (128, 0), (4000, 77)):
        lengths = np.asarray(lengths, np.int32)
        positions = lengths[:, None] - 1
        got = decode(q, k, positions, lengths)
        expected = attention(q, k, None, positions, lengths, 0.1, theta=THETA)
        np.testing.assert_allclose(got, expected, atol=2e-4)  # 4000 radians in float32
    assert len(traces) == 1


@pytest.mark.slow
@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=3),
    slots=st.integers(1, 300),
    window=st.none() | st.integers(1, 300),
    kv_heads=st.sampled_from((1, 2)),
    reuse=st.booleans(),
    splits=st.sampled_from((1, 2)),
)
def test_any_lengths_slots_and_windows(lengths, slots, window, kv_heads, reuse, splits):
    case = Case(tuple(lengths), slots, kv_heads=kv_heads, reuse=reuse)
    got, expected = run(case, window=window, splits=splits)
    np.testing.assert_allclose(got, expected, atol=FLOAT32)


# --- what is read ------------------------------------------------------------------------------


def slots_read(lengths, slots, block, window=None):
    """Slots copied from each cached array."""
    lengths_B = jnp.asarray(lengths, jnp.int32)
    plan = decode_plan.make_plan(lengths_B[:, None] - 1, lengths_B, slots, block, window)
    return int(plan.start_B1[-1]) * block


@pytest.mark.thorough
@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=5),
    laps=st.integers(1, 8),
    window=st.none() | st.integers(1, 2000),
)
def test_work_follows_the_true_lengths(lengths, laps, window):
    block = 64
    slots = laps * block
    seen = [min(n, slots, n if window is None else window) for n in lengths]
    read = slots_read(lengths, slots, block, window)
    # a block at either end of a row may be read for a single position
    assert sum(seen) <= read <= sum(n + 2 * (block - 1) for n in seen if n)


def test_every_block_is_read_in_order_and_once():
    lengths_B = jnp.asarray([700, 0, 65, 300], jnp.int32)
    plan = decode_plan.make_plan(lengths_B[:, None] - 1, lengths_B, 256, 64, None)
    total = int(plan.start_B1[-1])
    row_I = np.asarray(plan.row_I)[:total]
    number_I = np.asarray(plan.first_B)[row_I] + np.arange(total) - np.asarray(plan.start_B1)[row_I]
    # row 0 holds 444..699, which starts and ends inside block 6 + 4k: that block is read twice
    expected = [(0, n) for n in range(6, 11)] + [(2, 0), (2, 1)] + [(3, n) for n in range(0, 5)]
    assert list(zip(row_I, number_I, strict=True)) == expected


def pallas_call(reuse: bool, dtype=jnp.bfloat16, B=16, S=32_768, N=64, H=256):
    """(cost told to the compiler, how many operands are caches, bytes of queries and output)."""
    q = jax.ShapeDtypeStruct((B, 1, N, H), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((B, S, 1, H), dtype)
    frequency = jnp.asarray(frequency_F(THETA, H)) if reuse else None
    ints = jax.ShapeDtypeStruct((B, 1), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32)
    values = None if reuse else cache
    call = DecodeCall(q, cache, values, *ints, scale=1.0, frequency_F=frequency)
    jaxpr = jax.make_jaxpr(kernel.decode)(call)
    (equation,) = [e for e in jaxpr.eqns if e.primitive.name == "pallas_call"]
    caches = [v for v in equation.invars if v.aval.shape == (B, S, H)]
    return equation.params["cost_estimate"], len(caches), 4 * B * N * H


def test_key_reuse_reads_half():
    """One array of width C instead of two: 512 bytes a token and layer instead of 1024 at C 256.

    Each operand is copied once per item of the list, and the list is the same.
    """
    tokens = 16 * 32_768
    (mfa, arrays, others), (reused, one, _) = pallas_call(reuse=False), pallas_call(reuse=True)
    assert (arrays, one) == (2, 1)
    assert (mfa.bytes_accessed - others) / tokens == 1024
    assert (reused.bytes_accessed - others) / tokens == 512
    assert mfa.flops == reused.flops
    float8, _, _ = pallas_call(reuse=True, dtype=jnp.float8_e4m3fn)
    assert (float8.bytes_accessed - others) / tokens == 256


def test_copies_end_with_the_rows():
    lengths = (4000, 1, 0, 900)
    block = kernel.tiling(4096, 1, 256, jnp.bfloat16).block
    assert slots_read(lengths, 4096, block) == (4 + 1 + 0 + 1) * 1024
