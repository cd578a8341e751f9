"""The TPU decode kernel compiles for every chip, in the VMEM and memory that it should take."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.decode_call import DecodeCall
from pallas_kernels.tpu import decode as kernel
from pallas_kernels.tpu.aot import TOPOLOGIES, arrays
from tests.pallas_kernels.decode_oracle import frequency_F

pytestmark = pytest.mark.aot

B, S = 16, 8192
#: (query heads, key heads, width, cache dtype, keys reused, new tokens, page, splits)
SHAPES = {
    "mfa": (64, 1, 256, "bfloat16", False, 1, None, 1),
    "mfa_kr": (64, 1, 256, "bfloat16", True, 1, None, 1),
    "mfa_kr paper heads": (26, 1, 256, "bfloat16", True, 1, None, 1),
    "mfa float8": (64, 1, 256, "float8_e4m3fn", False, 1, None, 1),
    "mfa_kr float8 pages": (64, 1, 256, "float8_e4m3fn", True, 1, 256, 1),
    "mfa small pages": (64, 1, 256, "bfloat16", False, 1, 32, 1),
    "mfa_kr four tokens two cores": (64, 1, 256, "bfloat16", True, 4, None, 2),
    "gqa": (64, 8, 128, "bfloat16", False, 1, None, 1),
}


def compiled(chip: str, shape: str, B: int = B, S: int = S):
    """One step of decoding, of ``B`` rows with ``S`` slots of the cache each."""
    N, K, H, dtype, reuse, T, page, splits = SHAPES[shape]
    pages = None if page is None else S // page
    cache_shape = (B, S, K, H) if page is None else (B * pages, page, K, H)

    frequency = jnp.asarray(frequency_F(10_000.0, H)) if reuse else None
    with arrays(chip) as array:
        cache = array(dtype, *cache_shape)
        call = DecodeCall(
            array("bfloat16", B, T, N, H),
            cache,
            None if reuse else cache,
            array("int32", B, T),
            array("int32", B),
            scale=H**-0.5,
            page_table_BM=None if page is None else array("int32", B, pages),
        )

        def step(call):
            call = dataclasses.replace(call, frequency_F=frequency)
            return kernel.decode(call, splits=splits)

        return jax.jit(step).lower(call).compile()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles_without_copies_of_the_cache(chip, shape, topology, record_property):
    """In 16 MiB of VMEM, the kernel's own limit; and what is kept beside the arguments is small."""
    memory = compiled(chip, shape).memory_analysis()
    record_property("temporary_bytes", memory.temp_size_in_bytes)
    N, _, H, _, _, T, _, splits = SHAPES[shape]
    partial_results = 0 if splits == 1 else splits * B * T * N * (H + kernel.LANES) * 4
    assert memory.temp_size_in_bytes < (1 << 20) + partial_results
