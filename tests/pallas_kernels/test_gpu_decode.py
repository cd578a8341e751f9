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


def test_quick():
    got, expected = run(Case((130, 0, 1), 140))
    np.testing.assert_allclose(got, expected, atol=BFLOAT16)
