"""``step-jax runs``: facts from records and configurations."""

import json

import pytest

from step_jax.cli import main as cli
from step_jax.cli.runs import config_differences, find_runs, summarise
from step_jax.runs.metrics_log import MetricsLog
from step_jax.runs.run_directory import RunDirectory


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


def test_table(tmp_path, capsys):
    make(tmp_path / "a" / "one", lr=1)
    make(tmp_path / "a" / "two", lr=2, finish=False)
    assert cli.main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    first, second = [line for line in out.splitlines() if " one " in line or " two " in line]
    assert first.split() == [
        *("one", "done", "10", "640", "2M", "4.0000", "4.5000", "2.2500", "50k"),
        "optimizer.peak_lr=1",
    ]
    assert second.split()[1] == "stopped" and "optimizer.peak_lr=2" in second
    assert "seed" not in out  # what is equal is not told


def test_json_and_picture(tmp_path, capsys):
    make(tmp_path / "one", lr=1)
    picture = tmp_path / "out" / "both.png"
    assert cli.main(["runs", str(tmp_path / "one"), "--json", "--plot", str(picture)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["loss"], row["bpb"], row["config"]) == (4.0, 2.25, "")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_status_running_and_after_resume(tmp_path):
    path = make(tmp_path / "one", lr=1)
    with RunDirectory(path):
        log = MetricsLog(path / "metrics.jsonl")
        log.resume(5)
        log.close()
        assert summarise(path)["status"] == "running"
        assert summarise(path)["steps"] == 5
    assert summarise(path)["status"] == "stopped"


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
