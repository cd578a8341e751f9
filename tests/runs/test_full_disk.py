"""A whole run on a disk that fills up: it ends with its code, and goes on in the same bits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from step_jax.core.errors import ExitCode
from tests.trainers.loops import steps

ROOT = Path(__file__).parents[2]
STEPS = 90
RECIPE = f"""
base: {ROOT}/configs/toys/pretrain.yaml
run: {{directory: run, checkpoint: {{every_steps: 10}}}}
model:
  width: 32
  layers:
    - repeat: 1
      blocks:
        - attention: {{kind: mha, heads: 2, kv_heads: 1, head_dim: 16}}
          mlp: {{kind: swiglu, hidden: 32}}
training: {{steps: {STEPS}}}
data: {{path: {ROOT}/step_jax/core, vocab_size: 512, sequence_length: 64, cache_dir: {{cache}}}}
"""

pytestmark = pytest.mark.system


@pytest.fixture
def disk(tmp_path):
    """A file system of 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"may not mount a tmpfs: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def start(tmp_path: Path, run: Path) -> subprocess.Popen:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("{cache}", str(tmp_path / "cache")))
    return subprocess.Popen(
        [sys.executable, "-m", "step_jax", "pretrain", str(recipe), "--run.directory", str(run)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )  # fmt: skip


def ended(run: subprocess.Popen, code: int, seconds: float) -> str:
    try:
        output, _ = run.communicate(timeout=seconds)
    finally:
        run.kill()
    assert run.returncode == code, output
    return output


@pytest.mark.parametrize("left", [0, 8192])
def test_a_run_whose_disk_fills_up_ends_with_its_code_and_goes_on_once_there_is_space(
    tmp_path, disk, left
):
    ended(start(tmp_path, tmp_path / "whole"), 0, 600)
    run, filler = start(tmp_path, disk / "run"), disk / "filler"
    while "step 20 saved" not in (line := run.stdout.readline()):
        assert line, "it ended before the disk was full"
    with open(filler, "wb", buffering=0) as file:
        while (free := shutil.disk_usage(disk).free) > left:
            file.write(bytes(min(1 << 20, free - left)))
    full = time.monotonic()
    output = ended(run, ExitCode.DISK_FULL, 120)
    print(f"ended {time.monotonic() - full:.1f} s after the disk was full")
    assert "MB free and the state needs" in output and "free some space" in output
    filler.unlink()
    assert "resumed after step" in ended(start(tmp_path, disk / "run"), 0, 600)
    assert steps(disk / "run") == steps(tmp_path / "whole")
    assert [record["step"] for record in steps(disk / "run")] == list(range(1, STEPS + 1))
