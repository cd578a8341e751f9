"""What a run of the tests says of those that it left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

def test_runs(): pass

@pytest.mark.skip(reason="no such thing here")
def test_skipped(): pass

@pytest.mark.slow
@pytest.mark.parametrize("n", range(3))
def test_slow(n): pass

@pytest.mark.thorough
def test_thorough(): pass
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "workers"])
def test_the_last_lines_name_each_test_that_was_skipped_and_count_the_others(workers, tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", "pyproject.toml"]
    done = subprocess.run(
        [*command, "--rootdir", str(ROOT), *workers, str(tmp_path / "test_it.py")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    skipped, left_out = done.stdout.splitlines()[-2:]
    assert skipped.endswith("::test_skipped: no such thing here")
    assert left_out == "not selected, by marker (pyproject.toml): 3 slow, 1 thorough"
