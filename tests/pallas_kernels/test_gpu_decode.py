"""The Hopper decode kernel in the interpreter against float64 NumPy; what it refuses."""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.gpu import decode as kernel
from tests.pallas_kernels.decode_oracle import Case, attention, frequency_F, paged
from tests.pallas_kernels.test_gpu_attention import interpreted

THETA = 10_000.0
# Values around 1: weights, rotated keys and the result are each rounded to bfloat16.
BFLOAT16 = 1e-2


def run(case: Case, page: int | None = None, float8: bool = False, **kwargs):
    """(result of the kernel, of the oracle) as float64."""
    case.dtype = ml_dtypes.bfloat16
    q, k, v, positions, lengths = case.arrays()
    if float8:
        k, v = (None if c is None else c.astype(ml_dtypes.float8_e4m3fn) for c in (k, v))
    theta = THETA if case.reuse else None
    caches, table = (k, v), None
    if page is not None:
        caches, table = paged(caches, page)
    call = functools.partial(
        kernel.decode,
        scale=case.width**-0.5,
        frequency_F=None if theta is None else jnp.asarray(frequency_F(theta, case.width)),
        interpret=plgpu.InterpretGPUParams(),
        **({"splits": 2} | kwargs),
    )

    def decode(q, k, positions, lengths, *rest):
        rest = list(rest)
        v = None if case.reuse else rest.pop(0)
        return call(q, k, v, positions, lengths, page_table_BM=rest[0] if rest else None)

    rest = [jnp.asarray(x) for x in (caches[1], table) if x is not None]
    got = interpreted(decode, *map(jnp.asarray, (q, caches[0], positions, lengths)), *rest)
    assert got.dtype == q.dtype
    expected = attention(q, k, v, positions, lengths, case.width**-0.5, kwargs.get("window"), theta)
    return np.asarray(got, np.float64), expected


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
QUICK = ("mfa", "key reuse", "small pages")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_equals_the_oracle(name):
    case, kwargs = CASES[name]
    got, expected = run(case, **kwargs)
    np.testing.assert_allclose(got, expected, atol=BFLOAT16)
    empty = np.asarray(case.lengths) == 0
    assert not got[empty].any()
