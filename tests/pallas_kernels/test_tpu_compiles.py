"""The TPU attention kernels compiled by Mosaic for every chip, and their block sizes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pallas_kernels.tpu import block_sizes, schedule
from pallas_kernels.tpu.attention import attention
from pallas_kernels.tpu.block_sizes import BackwardSizes, ForwardSizes, Shape
from pallas_kernels.tpu.tune_block_sizes import useful
from pallas_kernels.tpu.visits import Pattern, candidates

STEP3 = Shape(64, 32768, 32768, 256, 256, itemsize=2)


@pytest.mark.parametrize("kind", list(block_sizes.CHIPS))
@pytest.mark.parametrize(
    "shape",
    [
        STEP3,
        Shape(26, 5000, 5000, 256, 256, itemsize=2),
        Shape(1, 1, 70_000, 64, 128, itemsize=2),
        Shape(8, 4096, 4096, 192, 128, itemsize=4),
    ],
    ids=str,
)
def test_the_table_fits_every_shape(kind, shape):
    for s in block_sizes.fit(kind, shape):
        padded = block_sizes.padded(shape, s)
        assert padded.queries % s.q_block == 0 and padded.keys % s.kv_block == 0
        # less than a lane tile of padding a block
        assert padded.queries - shape.queries < 128 * (padded.queries // s.q_block)
        assert s.vmem(padded) <= block_sizes.CHIPS[kind].vmem_limit


GOOD = (ForwardSizes(1, 512, 512, 512), BackwardSizes(1, 512, 512, 4096))


@pytest.mark.parametrize(
    "change,reason",
    [
        (
            {"forward": {"q_block": 16384, "kv_block": 16384, "kv_inner": 16384}},
            "MiB of vector mem",
        ),
        (
            {"backward": {"chunk": 65536}},
            "backward: .*needs about .* MiB .* may use 60 MiB of a TPU7x",
        ),
        ({"forward": {"q_block": 100}}, "multiples of 128"),
        ({"forward": {"heads": 3}}, "3 heads at a time do not divide 64"),
        ({"forward": {"kv_inner": 384}}, "kv_inner"),
        ({"backward": {"chunk": 700}}, "whole blocks of keys"),
    ],
)
def test_sizes_that_do_not_fit_say_which_limit_they_break(change, reason):
    forward, backward = GOOD
    block_sizes.check("TPU7x", STEP3, GOOD)
    sizes = (
        dataclasses.replace(forward, **change.get("forward", {})),
        dataclasses.replace(backward, **change.get("backward", {})),
    )
    with pytest.raises(ValueError, match=reason):
        block_sizes.check("TPU7x", STEP3, sizes)


@pytest.mark.parametrize(
    "width,dtype,chip,reason",
    [
        (100, np.float32, "TPU7x", "widths 100 .*64, 128, 192, 256"),
        (128, np.float16, "TPU7x", "float16 is neither bfloat16 nor float32"),
        (128, np.float32, "TPU v4", "'TPU v4' is none of TPU v5 lite"),
    ],
)
def test_what_is_not_supported_is_named(width, dtype, chip, reason):
    q, k = np.zeros((1, 1, 2, 8, width), dtype), np.zeros((1, 1, 8, width), dtype)
    positions = np.zeros((1, 8), np.int32)
    with pytest.raises(ValueError, match=reason):
        attention(q, k, k, positions, positions, pattern=Pattern(), scale=1.0, chip=chip)


def test_blocks_beyond_the_diagonal_and_the_window_are_no_candidates():
    q_C, kv_C = candidates(Pattern(window=200, in_order=True), 1024, 1024, 128, 128)
    assert set(zip(q_C, kv_C, strict=True)) == {
        (q, kv) for q in range(8) for kv in range(8) if 0 <= q - kv <= 2
    }
    assert len(candidates(Pattern(in_order=False), 1024, 1024, 128, 128)[0]) == 64
    assert useful(128, 128) > useful(1024, 1024) > 0.85


def test_a_utilisation_table_is_read():
    names = "MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
    idle, busy = "0 0 0 0 0 0 0 0 0 0 2", "2 0 0 1 0 1 1 1 1 1 0"
    rows = [idle, busy, "1 0 0 3 0 0 0 0 0 0 0", idle, busy, "1 0 0 4 0 0 0 0 0 0 0"]
    text = "\n".join(["== CAPACITY:", names, "2 2 2 4 2 1 3 3 2 2 2", "== UTILIZATION:", *rows])
    s = schedule.read(text)
    assert (s.matrix, s.vector, s.power) == (3 / 4, 4 / 8, 1 / 2)
    assert (s.bundles, s.moves, s.total) == (2, 2, 6)


@pytest.mark.aot
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chip", list(schedule.TOPOLOGIES))
def test_compiles_in_the_vector_memory_it_says(chip, packed, topology, record_property):
    """The estimate of each kernel's VMEM is the limit it is compiled under."""
    kind = schedule.TOPOLOGIES[chip][1]
    shape = {"heads": 26 if packed else 64, "tokens": 3000 if packed else 4096, "width": 256}
    compiled = schedule.compile_attention(chip, **shape, packed=packed)
    sizes = block_sizes.fit(kind, Shape(shape["heads"], *(shape["tokens"],) * 2, 256, 256, 2))
    for name, s in zip(("forward", "backward"), sizes, strict=True):
        record_property(
            f"{name} VMEM bytes", s.vmem(Shape(1, *(shape["tokens"],) * 2, 256, 256, 2))
        )
    used = schedule.temporaries(compiled, **shape)
    record_property("temporaries over queries", used)
    assert used <= 4.5


@pytest.mark.aot
def test_64_heads_of_32k_tokens_fit_a_v6e(topology, record_property):
    shape = {"heads": 64, "tokens": 32768, "width": 256}
    used = schedule.temporaries(schedule.compile_attention("v6e", **shape), **shape)
    record_property("temporaries over queries", used)
    assert used <= 4.5
