"""The kill -9 driver on a toy loop that resumes, and on one that resumes wrongly."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chaos.py"

# No JAX here: the driver is tested, not the training. State is committed by an atomic rename.
TOY = """
import json, os, sys, time
directory, error = sys.argv[1], float(sys.argv[2])
os.makedirs(directory, exist_ok=True)
saved = os.path.join(directory, "state")
step, x = json.load(open(saved)) if os.path.exists(saved) else (0, 1.0)
if step:
    x += error
with open(os.path.join(directory, "metrics.jsonl"), "a") as log:
    while step < 60:
        step, x = step + 1, x * 0.99 + 0.1 / (step + 1)
        print(json.dumps({"step": step, "loss": x}), file=log, flush=True)
        if step % 5 == 0:
            with open(saved + ".tmp", "w") as f:
                json.dump((step, x), f)
            os.rename(saved + ".tmp", saved)
        time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def driver():
    spec = importlib.util.spec_from_file_location("chaos", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("error", "equal"), [("0.0", True), ("1e-15", False)])
def test_driver_accepts_exact_resume_only(driver, tmp_path, capsys, error, equal):
    command = [sys.executable, "-c", TOY, "{run_dir}", error]
    assert driver.chaos(command, tmp_path, 1, kills=6, per_run=3, seed=0) is equal
    assert "6 kills of 1 process(es)" in capsys.readouterr().out


def test_driver_starts_and_kills_all_processes(driver, tmp_path):
    toy = TOY.replace("sys.argv[1]", "os.path.join(sys.argv[1], sys.argv[3])")
    command = [sys.executable, "-c", toy, "{run_dir}", "0.0", "p{process}"]
    command[2] += (
        "if sys.argv[3] == 'p0': os.link(log.name, os.path.join(sys.argv[1], 'metrics.jsonl'))"
    )
    assert driver.chaos(command, tmp_path, 2, kills=2, per_run=2, seed=1)


def test_failing_command_is_reported(driver, tmp_path):
    with pytest.raises(SystemExit, match="no such luck"):
        driver.chaos([sys.executable, "-c", "exit('no such luck')"], tmp_path, 1, 1, 1, 0)
