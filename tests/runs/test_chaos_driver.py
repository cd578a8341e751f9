"""The driver of random faults on a toy loop that resumes, and on ones that do not."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# No JAX here: the driver is tested, not the training. State is committed by an atomic rename.
TOY = """
import json, os, sys, time
directory, error = sys.argv[1], float(sys.argv[2])
os.makedirs(directory, exist_ok=True)
saved = os.path.join(directory, "state")
step, x = json.load(open(saved)) if os.path.exists(saved) else (0, 1.0)
if step:
    x += error
path = os.path.join(directory, "metrics.jsonl")
lines = open(path).read().splitlines()[:step] if step else []
with open(path, "w") as log:
    for line in lines:
        print(line, file=log)
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
def chaos():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        module = importlib.import_module("chaos")
    finally:
        sys.path.remove(str(BENCHMARKS))
    module._small_disk = lambda work: (work, None)
    return module


def soak(chaos, work, error="0.0", toy=TOY, kinds=("crash", "power", "grace"), processes=1):
    case = chaos.Case("toy", (sys.executable, "-c", toy, "{run_dir}", error), processes)
    return chaos.Soak(work, [case], seed=0, per_run=3, kinds=kinds)


@pytest.mark.parametrize(("error", "equal"), [("0.0", True), ("1e-15", False)])
def test_a_run_that_goes_on_in_other_bits_is_not_survived(chaos, tmp_path, capsys, error, equal):
    assert soak(chaos, tmp_path, error).until(5) is equal
    assert (", 0 not survived" in capsys.readouterr().out) is equal


def test_it_goes_on_where_it_was_stopped(chaos, tmp_path):
    soak(chaos, tmp_path).until(1)
    soak(chaos, tmp_path).until(1)
    assert [record["number"] for record in chaos.read_ledger(tmp_path)] == [0]


def test_a_fault_that_needs_a_repair_by_hand_is_not_survived(chaos, tmp_path, capsys):
    gives_up = "import os, sys\nif os.path.exists(sys.argv[1]): exit('no such luck')\n" + TOY
    assert not soak(chaos, tmp_path, toy=gives_up).until(1)
    assert "exit code 1" in capsys.readouterr().out


def test_a_command_that_fails_undisturbed_is_reported(chaos, tmp_path):
    with pytest.raises(SystemExit, match="no such luck"):
        soak(chaos, tmp_path, toy="exit('no such luck')").until(1)


@pytest.mark.parametrize("how", ["flip", "cut", "zero", "delete"])
def test_a_damaged_file_is_another_file(chaos, tmp_path, how):
    path, rng = tmp_path / "file", random.Random(how)
    while True:
        path.write_bytes(bytes(range(1, 100)))
        if chaos.spoil(path, rng) == how:
            break
    assert not path.exists() or path.read_bytes() != bytes(range(1, 100))


def test_a_checkpoint_is_damaged_only_where_another_is_left_whole(chaos, tmp_path):
    rng = random.Random(0)
    for step in ("00000001", "00000002"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        (tmp_path / "checkpoints" / step / "manifest.json").write_text("{}")
    assert "00000002" in chaos.DAMAGES["checkpoint"](tmp_path, tmp_path, rng)
    assert chaos.DAMAGES["checkpoint"](tmp_path, tmp_path, rng) is None


def test_only_what_clocks_measure_is_left_out_of_the_comparison(chaos, tmp_path):
    record = {"event": "step", "step": 1, "loss": 1.0, "step_s": 2.0, "tokens_per_s": 3.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record))
    curve = chaos.read_curve(tmp_path)
    assert set(json.loads(curve["1"])) == {"loss"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record | {"loss": -0.0}) + '\n{"event": "s')
    assert len(chaos.differences(curve, chaos.read_curve(tmp_path))) == 1
