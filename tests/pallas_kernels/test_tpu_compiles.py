"""The TPU attention kernels compiled by Mosaic for every chip, and their block sizes."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.tpu import aot, block_sizes, schedule, work
from pallas_kernels.tpu.attention import attention
from pallas_kernels.tpu.block_sizes import BackwardSizes, ForwardSizes, Shape
from pallas_kernels.tpu.chips import CHIPS
from pallas_kernels.tpu.visits import Pattern, candidates, plan
from pallas_kernels.tpu.work import Work
from step_jax.core import hardware

STEP3 = Shape(64, 32768, 32768, 256, 256, itemsize=2)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "shape",
    [
        STEP3,
        Shape(26, 5000, 5000, 256, 256, itemsize=2),
        Shape(1, 1, 70_000, 64, 128, itemsize=2),
        Shape(8, 4096, 4096, 192, 128, itemsize=4),
        Shape(64, 8192, 8192, 256, 256, itemsize=4),
    ],
    ids=str,
)
def test_the_table_fits_every_shape(chip, shape):
    for s in block_sizes.fit(chip, shape):
        padded = block_sizes.padded(shape, s)
        assert padded.queries % s.q_block == 0 and padded.keys % s.kv_block == 0
        # less than a lane tile of padding a block
        assert padded.queries - shape.queries < 128 * (padded.queries // s.q_block)
        assert s.vmem(padded) < 0.95 * CHIPS[chip].most


@given(st.sampled_from(list(CHIPS)), st.integers(1, 70_000), st.sampled_from(block_sizes.WIDTHS))
def test_pieces_of_a_block_of_keys_are_no_less_than_half_of_what_they_may_be(chip, tokens, width):
    """A piece of 128 keys where 512 may be had kept four times as many rows of scores alive."""
    s, _ = block_sizes.fit(chip, Shape(4, tokens, tokens, width, width, itemsize=2))
    most = min(block_sizes.table()[chip]["forward"]["kv_inner"], s.kv_block)
    assert most / 2 < s.kv_inner <= most


@pytest.mark.parametrize("chip", CHIPS)
def test_a_compiler_gets_more_memory_than_the_blocks_need_and_less_than_there_is(chip):
    chip, mib = CHIPS[chip], 2**20
    assert chip.limit(mib) == 16 * mib < chip.budget
    assert 1.2 * chip.budget < chip.limit(chip.budget) < chip.vmem


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
            "backward: .*needs about .* MiB .* may have 56 MiB of a tpu7x",
        ),
        ({"forward": {"q_block": 100}}, "multiples of 128"),
        ({"forward": {"heads": 3}}, "3 heads at a time do not divide 64"),
        ({"forward": {"kv_inner": 100}}, "kv_inner .* multiple of 128"),
        ({"backward": {"chunk": 700}}, "whole blocks of keys"),
    ],
)
def test_sizes_that_do_not_fit_say_which_limit_they_break(change, reason):
    forward, backward = GOOD
    block_sizes.check("tpu7x", STEP3, GOOD)
    sizes = (
        dataclasses.replace(forward, **change.get("forward", {})),
        dataclasses.replace(backward, **change.get("backward", {})),
    )
    with pytest.raises(ValueError, match=reason):
        block_sizes.check("tpu7x", STEP3, sizes)


@pytest.mark.parametrize(
    "width,dtype,chip,reason",
    [
        (100, np.float32, "tpu7x", "widths 100 .*64, 128, 192, 256"),
        (128, np.float16, "tpu7x", "float16 is neither bfloat16 nor float32"),
        (128, np.float32, "v4", "'v4' is none of v5e, v5p, v6e, tpu7x"),
    ],
)
def test_what_is_not_supported_is_named(width, dtype, chip, reason):
    q, k = np.zeros((1, 1, 2, 8, width), dtype), np.zeros((1, 1, 8, width), dtype)
    positions = np.zeros((1, 8), np.int32)
    with pytest.raises(ValueError, match=reason):
        attention(q, k, k, positions, positions, pattern=Pattern(), scale=1.0, chip=chip)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": (1, 4, 256, 128)}, "expected queries"),
        ({"k": (1, 1, 256, 64)}, "expected queries"),
        ({"k": (2, 1, 256, 128)}, "expected queries"),
        ({"q": (1, 1, 4, 0, 128)}, "none of them empty"),
        ({"q_positions": (1, 128)}, r"positions and segments of the queries must be \(1, 256\)"),
        ({"kv_positions": (1, 128)}, r"positions and segments of the keys must be \(1, 256\)"),
        ({"q_segments": (1, 256)}, "go together"),
        ({"q": (1, 1, 4, 128, 128), "q_positions": (1, 128)}, "the same tokens, got 128 and 256"),
        ({"window": 0}, "window must be at least 1, got 0"),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(change, reason):
    shapes = {"q": (1, 1, 4, 256, 128), "k": (1, 1, 256, 128), "v": (1, 1, 256, 128)}
    shapes |= {"q_positions": (1, 256), "kv_positions": (1, 256)} | change
    pattern = Pattern(in_order=True, window=shapes.pop("window", None))
    arrays = [np.zeros(s, np.float32 if n in "qkv" else np.int32) for n, s in shapes.items()]
    with pytest.raises(ValueError, match=f"TPU attention: .*{reason}"):
        attention(*arrays, pattern=pattern, scale=1.0, chip="v5p")


def test_blocks_beyond_the_diagonal_and_the_window_are_no_candidates():
    q_C, kv_C = candidates(Pattern(window=200, in_order=True), 1024, 1024, 128, 128)
    assert set(zip(q_C, kv_C, strict=True)) == {
        (q, kv) for q in range(8) for kv in range(8) if 0 <= q - kv <= 2
    }
    assert len(candidates(Pattern(in_order=False), 1024, 1024, 128, 128)[0]) == 64


@pytest.mark.parametrize("window,queries", [(None, 256), (None, 1024), (2048, 1024), (512, 4096)])
def test_a_call_costs_what_the_last_piece_of_a_row_visits(window, queries):
    keys, block = 4096, 64
    pattern = Pattern(window=window)
    pairs = candidates(pattern, queries, keys, block, block)
    last = jnp.arange(keys - queries, keys)[None], jnp.arange(keys)[None]
    one_document = (last[0], jnp.ones_like(last[0]), last[1], jnp.ones_like(last[1]))
    _, visits = plan(pattern, (*pairs, block, block, np.zeros(pairs[0].size, bool)), *one_document)
    edges = 2 if window else 1  # a block at each is computed whole, half of it for nothing
    computed = pattern.visited(queries, keys) + edges * block / 2 / keys
    assert int(visits) == pytest.approx(pairs[0].size * computed, rel=0.07)
    assert Pattern(window=window, in_order=True).visited(queries, keys) == 1


NAMES = "MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
SCALAR, PRODUCT, SPILL = "0 0 0 0 0 0 0 0 0 0 2", "2 0 0 1 0 1 0 0 0 0 0", "1 0 0 3 0 0 1 1 1 1 0"
#: a grid's loop with an idle region, one whose inner loop runs four times, and the masked one
BUNDLES = [
    ("   0   :  { %s0 = smov.u32 0 }", SCALAR),
    (" 0x1 LB: > { %s1 = sadd.s32 1, %s0 }", SCALAR),
    (" 0x2   : > { %3 = sbr.rel (%p1) target = $region28 }", SCALAR),
    (" 0x3   :  {} /* End region 26 */", SCALAR),
    (" 0x4 LB: >> { %v1 = vmatmul }", PRODUCT),
    (" 0x5   : >> { %p2 = scmp.ge.s32.totalorder %s3_1, 4 /* loop exit test */ }", SPILL),
    (" 0x51  : >> { %23 = sbr.rel (!%p2) target = $region30 }", SCALAR),
    (" 0x6   : > { %v2 = vmatmul }", PRODUCT),
    (" 0x7 PF: > { %4 = vmatmul }", PRODUCT),
    (" 0x8   : > { %40 = sbr.rel (!%p37) target = $region181 }", SCALAR),
]


def test_a_schedule_counts_the_loops_of_the_visit_without_a_mask():
    text, rows = zip(*BUNDLES, strict=True)
    table = "\n".join(["== CAPACITY:", NAMES, "2 2 2 4 2 1 3 3 2 2 2", "== UTILIZATION:", *rows])
    memory = [
        "  #allocation2 [shape = 'f32[8,128]', space=vmem, size = 0x1000, scoped, tag = 'a']",
        "  #allocation2 [shape = 'f32[8,128]', space=vmem, size = 0x1000, scoped, tag = 'a']",
        "  #allocation3 [shape = 's32[1]', space=smem, size = 0x4, scoped, tag = 'b']",
        "  #allocation4 [shape = 'f32[8,256]', space=vmem, size = 0x2000, scoped, tag = 'c']",
    ]
    s = schedule.read(table, "\n".join(text), "\n".join(memory))
    # the branch and its empty bundle, four times three bundles, and one
    assert s.bundles == 2 + 4 * 3 + 1 and s.moves == 4 * 2
    assert s.matrix == (4 * 3 + 2) / (15 * 2) and s.vector == (4 * 4 + 1) / (15 * 4)
    assert s.power == 5 / 15 and s.vmem == 0x3000
    # the masked region, and the bundle of a step before the visit's
    assert (s.masked, s.result, s.step) == (1, 2, 0)


def test_a_share_of_the_peak_counts_products_and_not_the_bundles_that_start_them():
    """A v5p multiplies 4 x 128 x 128 a cycle: a visit of 8,192 such cycles in 7,632 bundles."""
    counts = dict.fromkeys(("matrix", "vector", "power", "moves", "vmem", "result", "step"), 0)
    s = schedule.Schedule(**counts, bundles=7632, masked=9000)
    visit = 8192 * 4 * 128**2
    full = Work(useful=20 * visit, visit=visit, whole=20, masked=0, results=0, pieces=2)
    assert full.share("v5p", s) == 1
    assert full.share("v5p", dataclasses.replace(s, bundles=16384)) == 0.5
    # one column for two cores; a masked visit that is half useful; a cost of every step
    assert dataclasses.replace(full, pieces=1).share("v5p", s) == 0.5
    half = Work(useful=visit / 2, visit=visit, whole=0, masked=1, results=0, pieces=2)
    assert half.share("v5p", s) == 4096 / 9000
    assert full.share("v5p", dataclasses.replace(s, step=8192, result=99)) == 0.5


@pytest.mark.parametrize("chip", CHIPS)
def test_products_of_a_cycle_make_the_peak_at_a_clock_that_can_be(chip):
    hertz = hardware.CHIPS[chip].bf16 / (2 * CHIPS[chip].products * CHIPS[chip].cores)
    assert 1.4e9 < hertz < 2.3e9


@pytest.mark.parametrize("chip", CHIPS)
def test_the_work_of_a_row_is_its_unmasked_products(chip):
    tokens, of_128, of_256 = 4096, *(work.attention(chip, 64, 4096, w) for w in (128, 256))
    pairs = tokens * (tokens + 1) // 2
    for kernel, products in (("attention_forward", 2), ("attention_backward", 5)):
        w = of_256[kernel]
        assert w.useful == products * 256 * 64 * pairs
        assert 0.7 < w.useful / (w.visit * (w.whole + w.masked)) < 1
        # a unit of 256 is half empty at width 128
        filled = of_128[kernel].useful / (of_128[kernel].visit * sum(visits(of_128[kernel])))
        assert filled == pytest.approx(
            w.useful / (w.visit * sum(visits(w))) * (0.5 if CHIPS[chip].side == 256 else 1)
        )
    for w in work.grouped_matmul(chip, 131072, 4096, 1536, 128).values():
        assert w.useful == w.visit * w.whole and w.pieces % CHIPS[chip].cores == 0


def visits(w: Work):
    return w.whole, w.masked


def over_queries(compiled, heads: int, tokens: int, width: int) -> float:
    """Bytes of the program's temporaries, in units of the queries'."""
    return aot.temporaries(compiled) / (2 * heads * tokens * width)


@pytest.mark.aot
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chip", list(aot.TOPOLOGIES))
def test_compiles_in_the_vector_memory_it_says(chip, packed, topology, record_property):
    """The estimate of each kernel's VMEM and its slack are the limit it is compiled under."""
    shape = {"heads": 26 if packed else 64, "tokens": 3000 if packed else 4096, "width": 256}
    compiled = aot.compile_attention(chip, **shape, packed=packed)
    sizes = block_sizes.fit(chip, Shape(shape["heads"], *(shape["tokens"],) * 2, 256, 256, 2))
    for name, s in zip(("forward", "backward"), sizes, strict=True):
        record_property(
            f"{name} VMEM bytes", s.vmem(Shape(1, *(shape["tokens"],) * 2, 256, 256, 2))
        )
    used = over_queries(compiled, **shape)
    record_property("temporaries over queries", used)
    assert used <= 4.5


@pytest.mark.aot
def test_64_heads_of_32k_tokens_fit_a_v6e(topology, record_property):
    shape = {"heads": 64, "tokens": 32768, "width": 256}
    used = over_queries(aot.compile_attention("v6e", **shape), **shape)
    record_property("temporaries over queries", used)
    assert used <= 4.5
