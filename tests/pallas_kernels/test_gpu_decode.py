"""The Hopper decode kernel in the interpreter against float64 NumPy."""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import decode_plan
from pallas_kernels.decode_call import DecodeCall
from pallas_kernels.gpu import decode as kernel
from tests.pallas_kernels.decode_oracle import THETA, Case, attention, decoded, frequency_F, rotated
from tests.pallas_kernels.test_gpu_attention import interpreted

# Values around 1: weights, rotated keys and the result are each rounded to bfloat16.
BFLOAT16 = 1e-2


def run(case: Case, page: int | None = None, float8: bool = False, window=None, **kwargs):
    """(result of the kernel, of the oracle) as float64."""
    case.dtype = ml_dtypes.bfloat16
    static = {"splits": 2, "interpret": plgpu.InterpretGPUParams()} | kwargs

    def decode(call):
        kernel_of = functools.partial(kernel.decode, **static)
        return interpreted(kernel_of, jax.tree.map(jnp.asarray, call))

    cache_dtype = ml_dtypes.float8_e4m3fn if float8 else None
    return decoded(decode, case, page=page, cache_dtype=cache_dtype, window=window)


CASES = {
    "mfa": (Case((130, 0, 1), 140), {}),
    "mfa, width 256": (Case((130, 65), 192, width=256), {}),
    "gqa": (Case((100, 7, 0), 133, heads=8, kv_heads=2), {}),
    "key reuse": (Case((130, 0, 64), 192, reuse=True), {}),
    "key reuse, width 256": (Case((200, 1), 200, width=256, reuse=True), {"splits": 3}),
    "ring": (Case((170, 1000, 64), 150), {}),
    "ring of reused keys": (Case((270, 1000), 140, reuse=True), {}),
    "window of a long cache": (Case((250, 60), 256), {"window": 70}),
    "window as ring": (Case((500, 30), 96, heads=4, kv_heads=2), {"window": 96}),
    "four tokens, window": (Case((200, 2), 210, tokens=4, kv_heads=2), {"window": 30}),
    "more rows than a tile": (Case((70,), 80, tokens=3, heads=24), {}),
    "more blocks than work": (Case((3, 0), 64), {"splits": 4}),
    "nothing at all": (Case((0, 0), 64), {}),
    "small pages": (Case((150, 0, 31), 160), {"page": 16}),
    "small pages of reused keys": (Case((150, 31), 160, reuse=True), {"page": 8}),
    "large pages": (Case((250, 31), 256, heads=4, kv_heads=2), {"page": 128, "window": 100}),
    "float8": (Case((130, 3), 140, kv_heads=2), {"float8": True}),
    "float8 reused": (Case((130, 3), 140, reuse=True), {"float8": True}),
    "float8 reused, width 256": (Case((70,), 140, width=256, reuse=True), {"float8": True}),
}
QUICK = ("mfa", "key reuse")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_equals_the_oracle(name):
    case, kwargs = CASES[name]
    got, expected = run(case, **kwargs)
    np.testing.assert_allclose(got, expected, atol=BFLOAT16)
    empty = np.asarray(case.lengths) == 0
    assert not got[empty].any()


@pytest.mark.slow
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("float8", [False, True])
def test_no_races_and_no_reads_of_what_was_never_written(reuse, float8):
    """Every ring is filled anew, and the queries' matrix by a second row."""
    case = Case((330, 64), 330, reuse=reuse)
    interpret = plgpu.InterpretGPUParams(detect_races=True)  # raises
    got, expected = run(case, float8=float8, splits=1, interpret=interpret)
    np.testing.assert_allclose(got, expected, atol=BFLOAT16)


@pytest.mark.slow
def test_a_layer_of_a_stack_with_scales_and_a_slice_of_the_heads():
    """A device of a tensor axis wider than the key heads holds all keys and some queries."""
    case = Case((90, 40), 96, heads=6, kv_heads=3, dtype=ml_dtypes.bfloat16)
    q, k, v, positions, lengths = case.arrays()
    k_scale, v_scale = np.float32([0.5, 2.0, 1.0]), np.float32([0.5, 0.25, 1.0])
    stack = [np.stack([0 * c, c, 0 * c]) for c in (k, v)]

    def decode(q, k, v, positions, lengths, layer, first):
        call = DecodeCall(
            q[:, :, 1:4],
            k,
            v,
            positions,
            lengths,
            scale=0.1,
            k_scale=k_scale,
            v_scale=v_scale,
            layer=layer,
            first_head=first,
            heads_per_key=2,
        )
        return kernel.decode(call, splits=1, interpret=plgpu.InterpretGPUParams())

    got = interpreted(decode, *map(jnp.asarray, (q, *stack, positions, lengths, 1, 1)))
    k64, v64 = (c.astype(np.float64) * s[:, None] for c, s in ((k, k_scale), (v, v_scale)))
    expected = attention(q, k64, v64, positions, lengths, 0.1)[:, :, 1:4]
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=BFLOAT16)


@pytest.mark.slow
def test_rotated_keys_with_values_of_their_own():
    case = Case((130, 3), 140, dtype=ml_dtypes.bfloat16)
    q, k, v, positions, lengths = case.arrays()
    frequency = jnp.asarray(frequency_F(THETA, case.width))
    for cast in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        k, v = k.astype(cast), v.astype(cast)

        def decode(q, k, v, positions, lengths):
            arrays = q, k, v, positions, lengths
            call = DecodeCall(*arrays, scale=0.1, frequency_F=frequency)
            return kernel.decode(call, splits=1, interpret=plgpu.InterpretGPUParams())

        got = interpreted(decode, *map(jnp.asarray, (q, k, v, positions, lengths)))
        positions_BS = np.broadcast_to(np.arange(case.slots), (2, case.slots))
        turned = np.stack(
            [rotated(k[b, :, 0].astype(np.float64), positions_BS[b], THETA) for b in (0, 1)]
        )[:, :, None]
        expected = attention(q, turned, v, positions, lengths, 0.1)
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=BFLOAT16)


@pytest.mark.thorough
def test_partial_results_have_indices_of_their_own():
    """No two pairs of a split and a row that it has tiles of share ``split + row``."""
    lengths_B = jnp.asarray([700, 0, 65, 300, 1, 0], jnp.int32)
    plan = decode_plan.make_plan(lengths_B[:, None] - 1, lengths_B, 256, kernel.TILE, None)
    start = np.asarray(plan.start_B1)
    for splits in (1, 2, 3, 7, 40):
        nowhere = jnp.zeros((6, 1), jnp.int32)
        split_P4, row_B8 = map(np.asarray, kernel._work(plan, splits, nowhere, nowhere))
        pairs = [
            (p, b)
            for p, (begin, end, first, last) in enumerate(split_P4)
            for b in range(first, last + 1)
            if max(begin, start[b]) < min(end, start[b + 1])
        ]
        seen = sorted(p + b for p, b in pairs)
        assert len(set(seen)) == len(seen) and max(seen) <= splits + 6 - 2
        wanted = sorted(i for row in row_B8 for i in range(row[5], row[6]))
        assert wanted == seen
        items = sum(
            min(e, start[b + 1]) - max(s, start[b]) for p, b in pairs for s, e in [split_P4[p, :2]]
        )
        assert items == start[-1]
