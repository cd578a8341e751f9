"""The Hopper kernels compiled for sm_90a without a GPU: no spills, no serialised wgmma."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.aot
@pytest.mark.parametrize(("word", "kernels"), [("d256", 9), ("4096x1536", 3), ("4096x131072", 2)])
def test_kernels_keep_the_rules_of_the_assembler(word, kernels):
    """Attention of width 256, the grouped matmul, the cross-entropy."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc")
    command = [sys.executable, "benchmarks/gpu_compile.py", word]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(word) == kernels
