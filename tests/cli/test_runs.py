"""``step-jax runs``: facts from records and configurations."""

import io
import json
import shutil
from pathlib import Path

import pytest

from step_jax.cli import main as cli
from step_jax.cli.runs import config_differences, find_runs, summarise
from step_jax.runs.metrics_log import MetricsLog
from step_jax.runs.reporter import LoggingConfig, Reporter
from step_jax.runs.run_directory import RunDirectory

REAL = Path(__file__).parents[1] / "runs" / "real"


def make(path, *, lr, steps=10, finish=True):
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"optimizer: {{peak_lr: {lr}, kind: adamw}}\nseed: 0\n")
    log = MetricsLog(path / "metrics.jsonl")
    log.append("header", 0, {"values": {"parameters": 2_000_000}})
    for step in range(1, steps + 1):
        pace = 1.0 if step == 1 else 50_000.0
        log.append("step", step, {"loss": 5 - step / 10, "tokens": step * 64, "tokens_per_s": pace})
    log.append("eval", steps, {"name": "held-out", "loss": 4.5, "bits_per_byte": 2.25})
    if finish:
        log.append("summary", steps, {"values": {"status": "done"}})
    log.close()
    return path


def real(tmp_path, *names):
    """Copies of real runs, under ``tmp_path / "real"``."""
    for name in names:
        shutil.copytree(REAL / name, tmp_path / "real" / name)
    return tmp_path / "real"


def test_the_table_of_real_runs_of_unlike_loops(tmp_path, capsys):
    path = real(tmp_path, "quick", "toy_flow", "rl")
    assert cli.main(["runs", str(path)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    assert lines["quick"].split()[:11] == [
        *("quick", "done", "1,000", "1.02M", "tokens", "1.84M"),
        *("4.3676", "-", "4.3379", "1.7425", "-"),
    ]
    assert lines["toy_flow"].split()[:6] == ["toy_flow", "done", "1,200", "76.8k", "clips", "303k"]
    assert lines["rl"].split()[5:11] == ["572k", "0.0020", "0.8281", "-", "-", "0.9729"]
    assert "run.directory" not in "".join(lines.values())  # they differ in it always
    assert " more" in "".join(lines.values())  # what all differ in would fill pages


def test_what_differs_is_told(tmp_path, capsys):
    make(tmp_path / "a" / "one", lr=1)
    make(tmp_path / "a" / "two", lr=2, finish=False)
    assert cli.main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    first, second = [line for line in out.splitlines() if " one " in line or " two " in line]
    assert first.split() == [
        *("one", "done", "10", "640", "tokens", "2M", "4.0000", "4.5000", "2.2500", "50k/s"),
        "optimizer.peak_lr=1",
    ]
    assert second.split()[1] == "killed" and "optimizer.peak_lr=2" in second
    assert "seed" not in out  # what is equal is not told


def test_json_and_picture(tmp_path, capsys):
    path = real(tmp_path, "quick")
    picture = tmp_path / "out" / "both.png"
    assert cli.main(["runs", str(path), "--json", "--plot", str(picture)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["status"] == "done" and row["config"] == {}
    assert (row["params"], row["trained"], row["unit"]) == (1_844_352, 1_024_000, "tokens")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_failed_run_says_why_and_a_loss_that_is_no_number_is_json(tmp_path, capsys):
    path = real(tmp_path, "quick") / "quick"
    log = MetricsLog(path / "metrics.jsonl")
    log.append("step", 1001, {"loss": float("nan")})
    log.append("end", 1001, {"status": "failed", "reason": "DivergedError: 6 steps"})
    log.close()
    assert cli.main(["runs", str(path), "--json"]) == 0
    text = capsys.readouterr().out
    (row,) = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert (row["status"], row["reason"]) == ("failed", "DivergedError: 6 steps")
    assert row["loss"] == "nan"
    assert cli.main(["runs", str(path)]) == 0
    assert "DivergedError: 6 steps" in capsys.readouterr().out


def test_images_are_counted_as_images(tmp_path, capsys):
    with RunDirectory(tmp_path / "run") as run:
        with Reporter(run, LoggingConfig(sinks=()), stream=io.StringIO()) as reporter:
            reporter.header({"parameters": 215_168})
            for step in (1, 2):
                reporter.step(step, {"loss": 1.0, "images": 640 * step, "images_per_s": 2300.0})
    assert cli.main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1.28k images" in out and "2.3k/s" in out and "tokens" not in out and " done " in out


def test_status_running_and_after_resume(tmp_path):
    path = make(tmp_path / "one", lr=1)
    with RunDirectory(path):
        log = MetricsLog(path / "metrics.jsonl")
        log.resume(5)
        log.close()
        assert summarise(path)["status"] == "running"
        assert summarise(path)["steps"] == 5
    assert summarise(path)["status"] == "killed"  # the lock is free and nobody said why


def test_run_without_steps(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    assert cli.main(["runs", str(tmp_path / "empty")]) == 0
    assert "empty" in capsys.readouterr().out
    assert cli.main(["runs", str(tmp_path / "empty"), "--plot", str(tmp_path / "x.png")]) == 78


@pytest.mark.parametrize("argv", [["nope"], [], ["--plto", "x"]])
def test_bad_input(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["runs", *argv]) == 78
    assert "Traceback" not in capsys.readouterr().err


def test_directory_without_runs(tmp_path, capsys):
    assert cli.main(["runs", str(tmp_path)]) == 78
    assert "no run (a directory with metrics.jsonl)" in capsys.readouterr().err


def test_each_run_once(tmp_path):
    one = make(tmp_path / "one", lr=1)
    assert find_runs([one, tmp_path, one]) == [one]


def test_config_differences():
    found = config_differences([{"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}])
    assert found == [{"b": "2"}, {"b": "3", "c": "4"}]
