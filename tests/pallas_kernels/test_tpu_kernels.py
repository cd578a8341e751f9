"""Every TPU kernel is compiled by Mosaic for every chip, small and in every run of the tests.

Sizes, memory and operations of real shapes are in the tests marked ``aot``, and
``benchmarks/kernel_shapes.py`` compiles awkward and random ones.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pallas_kernels.tpu import aot
from tests.pallas_kernels import test_decode_aot

#: a file with ``pallas_call`` -> what compiles all its kernels for a chip, and their names
KERNELS = {
    "attention_call": (
        lambda chip: aot.compile_attention(chip, heads=2, tokens=128, width=128),
        {"attention_forward", "attention_backward"},
    ),
    "cross_entropy": (
        lambda chip: aot.compile_cross_entropy(chip, tokens=256, width=128, vocabulary=512),
        {"cross_entropy", "cross_entropy_tokens", "cross_entropy_matrix"},
    ),
    "decode": (
        lambda chip: test_decode_aot.compiled(chip, "mfa", B=1, S=256),
        {"decode_attention"},
    ),
    "grouped_matmul": (
        lambda chip: aot.compile_grouped_matmul(chip, rows=128, width=128, result=320, groups=2),
        {"grouped_matmul", "grouped_matmul_transposed", "grouped_matmul_matrices"},
    ),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_compiles(chip, kernel, topology):
    compile_for, names = KERNELS[kernel]
    text = compile_for(chip).as_text()
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert {name for name in names if any(f"{name}" in line for line in calls)} == names
    assert len(calls) == len(names)


def test_a_block_of_keys_of_no_whole_pieces_fits_the_vector_memory(topology):
    """769 tokens are a block of 896, which in pieces of 128 took more than its limit."""
    aot.compile_attention("v5p", heads=2, tokens=769, width=128, backward=False)


def test_no_kernel_is_left_out():
    """A file that calls Pallas is named above, and so is every name that it gives a kernel."""
    files = {f.stem: f.read_text() for f in Path(aot.__file__).parent.glob("*.py")}
    calling = {name for name, text in files.items() if re.search(r"\bpallas_call\(", text)}
    assert calling - {"poison"} == set(KERNELS)  # which only fills memory, see tests/ops
