"""The Hopper kernels compiled for sm_90a without a GPU: no spills, no serialised wgmma."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.hopper
@pytest.mark.parametrize(
    ("words", "functions"),
    [
        (("forward d256", "dq d256", "dk_dv d256"), 9),
        (("decode mfa d256",), 8),
        (("4096x1536",), 3),
        (("4096x131072",), 2),
    ],
    ids=["attention", "decode", "grouped_matmul", "cross_entropy"],
)
def test_kernels_keep_the_rules_of_the_assembler(words, functions):
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.fail("needs NVIDIA's compilers: pip install '.[hopper]', or make test-hopper")
    command = [sys.executable, "benchmarks/gpu_compile.py", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # a function may have several kernels: a row of the table for each
    shape = words[0].split()[-1]
    names = {line[:34].strip() for line in done.stdout.splitlines() if shape in line}
    assert len(names) == functions
