"""What the decode kernels of both platforms refuse, in the same words."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.decode_call import DecodeCall
from pallas_kernels.gpu import decode as gpu
from pallas_kernels.tpu import decode as tpu
from tests.devices import BLACKWELL, HOPPER
from tests.pallas_kernels.decode_oracle import Case, paged

BFLOAT16 = ml_dtypes.bfloat16
KERNELS = {
    "TPU": functools.partial(tpu.decode, interpret=True),
    "GPU": functools.partial(gpu.decode, device=HOPPER),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def refused(kernel: str, message: str, arrays, splits: int = 1, **options):
    with pytest.raises(ValueError, match=message):
        KERNELS[kernel](DecodeCall(*arrays, scale=1.0, **options), splits=splits)


@pytest.mark.parametrize(
    ("kernel", "message", "changes"),
    [
        ("TPU", "head width 64; .* multiples of 128", {"width": 64}),
        ("GPU", "head width 64; .*128, 256", {"width": 64}),
        ("TPU", "queries are float16; .* bfloat16, float32", {"dtype": np.float16}),
        ("GPU", "queries are float32; .* supports bfloat16", {"dtype": np.float32}),
        ("TPU", "6 query heads are not a multiple of 4", {"heads": 6, "kv_heads": 4}),
        ("GPU", "6 query heads are not a multiple of 4", {"heads": 6, "kv_heads": 4}),
        ("GPU", "32 slots; .* 64 at least", {"slots": 32}),
        ("TPU", "at least .* bytes of on-chip memory .* fewer tokens a call", {"tokens": 4096}),
    ],
)
def test_shapes_and_dtypes(kernel, message, changes):
    options = {"slots": 64, "dtype": BFLOAT16} | changes
    refused(kernel, message, Case((3,), **options).arrays())


@pytest.mark.parametrize(
    ("kernel", "dtype", "size", "message"),
    [
        ("TPU", BFLOAT16, 8, "must be a multiple of 16 for a bfloat16 cache"),
        ("TPU", ml_dtypes.float8_e4m3fn, 16, "must be a multiple of 32 for a float8_e4m3fn cache"),
        ("GPU", BFLOAT16, 24, "pages of 24 slots; .* 8, 16, 32 and multiples of 64"),
    ],
)
def test_pages(kernel, dtype, size, message):
    q, k, v, positions, lengths = Case((3,), 96, dtype=BFLOAT16).arrays()
    pool, table = paged((k.astype(dtype), v.astype(dtype)), size)
    refused(kernel, message, (q, *pool, positions, lengths), page_table_BM=table)


@every_kernel
def test_caches_of_another_kind(kernel):
    q, k, v, positions, lengths = Case((3,), 96, dtype=BFLOAT16).arrays()
    rest = positions, lengths
    integers = k.astype(np.int8), v.astype(np.int8)
    refused(kernel, "cache is int8; .* float8_e4m3fn", (q, *integers, *rest))
    refused(kernel, "one width for all", (q, k, v[..., :64], *rest))
    refused(kernel, "must agree", (q, k, v.astype(ml_dtypes.float8_e4m3fn), *rest))
    refused(kernel, "expected queries", (q[0], k, v, *rest))
    refused(kernel, "nothing to decode", (q, k[:, :0], v[:, :0], *rest))
    refused(
        kernel, "2, 96, .* of other rows", (q, *(np.tile(c, (2, 1, 1, 1)) for c in (k, v)), *rest)
    )


@every_kernel
def test_arguments_that_do_not_fit(kernel):
    arrays = Case((3, 5), 128, dtype=BFLOAT16).arrays()
    q, k, v, positions, lengths = arrays
    whole = jnp.ones(32)
    refused(kernel, "whole width", (q, k, None, positions, lengths), frequency_F=whole)
    refused(kernel, r"take positions \(2, 1\)", (q, k, v, positions[:, :0], lengths))
    refused(kernel, r"lengths \(2,\)", (q, k, v, positions, lengths[:1]))
    refused(kernel, "are int32, got int16", (q, k, v, positions.astype(np.int16), lengths))
    for options, message in (
        ({"window": 0}, "window must be at least 1"),
        ({"splits": 0}, "splits must be at least 1"),
        ({"heads_per_key": 0}, "heads_per_key must be at least 1"),
        ({"layer": 0}, "with `layer` has 5 axes"),
        ({"k_scale": np.ones(3, np.float32)}, r"scalar or \(1,\), got \(3,\)"),
        ({"page_table_BM": np.zeros((1, 2), np.int32)}, r"a page table \(2, M\), got \(1, 2\)"),
    ):
        refused(kernel, message, arrays, **options)
    refused(kernel, "without `layer` has 4 axes", (q, k[None], v[None], positions, lengths))


def test_devices():
    arrays = Case((3,), 64, dtype=BFLOAT16).arrays()
    for device, found in ((BLACKWELL, "gpu 10.0"), (None, "cpu")):
        with pytest.raises(ValueError, match=f"needs a Hopper GPU .* compiled for {found}"):
            gpu.decode(DecodeCall(*arrays, scale=1.0), device=device)
