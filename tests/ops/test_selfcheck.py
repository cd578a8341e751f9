"""The check of kernels finds what is wrong with them, and nothing where nothing is."""

from __future__ import annotations

import functools

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import attention as gpu_attention
from pallas_kernels.gpu import decode as gpu_decode
from pallas_kernels.gpu import grouped_matmul as gpu_grouped_matmul
from pallas_kernels.tpu import aot, block_sizes
from step_jax.ops import decode_attention
from step_jax.ops.selfcheck import (
    Attention,
    CrossEntropy,
    Decode,
    GroupedMatmul,
    judge,
    products,
    verdicts,
)
from tests.devices import HOPPER
from tests.models import small
from tests.ops import faults
from tests.pallas_kernels.test_gpu_attention import interpreted

NAME = "pallas_tpu_interpret"
CASES = {
    "attention": Attention(NAME, 2, 1, 64, 64, 300, window=100, dtype="float32"),
    "grouped matmul": GroupedMatmul(NAME, 4, 128, 128, "float32"),
    "cross-entropy": CrossEntropy(NAME, 64, 700, dtype="float32"),
    "decode": Decode(NAME, 2, 1, 128, 200, window=50, dtype="float32"),
    "decode of reused keys": Decode(NAME, 2, 1, 128, 200, reuse=True, dtype="float32"),
}
FAULTS = {
    "attention": faults.ATTENTION,
    "grouped matmul": faults.GROUPED_MATMUL,
    "cross-entropy": faults.CROSS_ENTROPY,
    "decode": faults.DECODE,
    "decode of reused keys": faults.DECODE_OF_REUSED_KEYS,
}
#: An edge of a mask, NaN from padding; a kernel that is not repeatable has a test of its own.
EVERYDAY = (faults.window_too_long, faults.rows_of_no_group_are_added)


def tier(fault):
    """Attention takes seconds to compile: most of its faults are among the slow tests."""
    if fault in EVERYDAY:
        return ()
    return pytest.mark.slow if fault in faults.ATTENTION[4:] else pytest.mark.thorough


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Blocks of attention so small that a short row has some."""
    blocks = {"rows": 256, "q_block": 128, "kv_block": 128}
    sizes = {"forward": blocks | {"kv_inner": 128}, "backward": blocks | {"chunk": 256}}
    monkeypatch.setitem(block_sizes.table(), "v6e", sizes)


@functools.cache
def expected(kernel: str):
    """(the inputs of its case, what the reference makes of them)."""
    case = CASES[kernel]
    inputs = small.run(case.draw, jax.random.key(0))
    return inputs, small.run(case.reference(), *inputs)


def verdict_of(kernel: str) -> verdicts.Verdict:
    """Of one run; quicker than ``judge``, which compiles all parts anew."""
    case = CASES[kernel]
    inputs, want = expected(kernel)
    got = small.run(case.results(NAME, jax.devices()[0]), *inputs)
    errors, same = verdicts.compared(got, got, want)
    return verdicts.verdict(case, ({k: float(e) for k, e in errors.items()}, bool(same)), "", 0.0)


@pytest.mark.thorough
@pytest.mark.parametrize("kernel", CASES)
def test_a_right_kernel_passes(kernel):
    assert verdict_of(kernel).fault() == ""


@pytest.mark.parametrize(
    "kernel, fault",
    [
        pytest.param(kernel, fault, marks=tier(fault))
        for kernel, some in FAULTS.items()
        for fault in some
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_fault_is_found(kernel, fault, monkeypatch):
    fault(monkeypatch)
    verdict = verdict_of(kernel)
    assert not verdict.passed and verdict.fault(), verdict


def test_two_runs_with_memory_full_of_nan_must_give_the_same_bits(monkeypatch):
    (right,) = judge([CASES["decode"]], jax.devices()[0])
    assert right.passed and right.repeatable and right.error < 1e-6
    faults.not_repeatable(monkeypatch, decode_attention.IMPLEMENTATIONS, NAME)
    (verdict,) = judge([CASES["decode"]], jax.devices()[0])
    assert verdict.error <= verdict.bound and not verdict.passed
    assert verdict.fault().startswith("two runs differ in their bits with 2 heads on 1 of 128")


def test_what_a_kernel_raises_is_its_verdict():
    wide = Decode(NAME, 2, 1, 72, 200, dtype="float32")
    (verdict,) = judge([wide], jax.devices()[0])
    assert not verdict.passed
    assert "multiples of 128" in verdict.fault()


GPU = {
    "attention": Attention("pallas_gpu", 2, 1, 64, 64, 150, window=30),
    "grouped matmul": GroupedMatmul("pallas_gpu", 4, 128, 128),
    "decode": Decode("pallas_gpu", 4, 1, 128, 100, window=50),
}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", GPU)
def test_a_kernel_for_hopper_passes_in_its_interpreter(kernel, monkeypatch):
    """The inputs hold nothing that these kernels do not promise to ignore."""
    interpret = {"interpret": plgpu.InterpretGPUParams()}
    for module, name in (
        (gpu_attention, "mfa_attention"),
        (gpu_grouped_matmul, "grouped_matmul"),
        (gpu_decode, "decode"),
    ):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), **interpret))
    monkeypatch.setattr(products, "_SIZES", (70, 0, 3, 55))
    case = GPU[kernel]
    inputs = small.run(case.draw, jax.random.key(0))
    want = small.run(case.reference(), *inputs)
    got = jax.device_get(interpreted(case.results("pallas_gpu", HOPPER), *inputs))
    errors, same = verdicts.compared(got, got, want)
    found = {name: float(error) for name, error in errors.items()}, bool(same)
    assert verdicts.verdict(case, found, "", 0.0).fault() == ""


@pytest.mark.aot
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_vector_memory_can_be_filled_on_every_chip(chip, topology):
    (device, *_) = topology(aot.TOPOLOGIES[chip]).devices
    assert "fill_vmem" in verdicts._vmem_filler(device).as_text()
