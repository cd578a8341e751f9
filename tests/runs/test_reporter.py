"""What a run records and shows: kill, resume, full disk, slow sinks, terminals."""

import contextlib
import io
import json
import math
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from step_jax.core.config import parse_config
from step_jax.core.errors import ConfigError, RestartRequested
from step_jax.runs import sinks as sink_lib
from step_jax.runs.console import Shown, cells, duration, format_value, si
from step_jax.runs.history import outcome
from step_jax.runs.metrics_log import MetricsLog, read_metrics, work_unit
from step_jax.runs.reporter import LoggingConfig, Reporter, environment
from step_jax.runs.run_directory import RunDirectory
from step_jax.runs.sinks import AsyncSink

QUIET = LoggingConfig(sinks=())
REAL = Path(__file__).parent / "real"


def steps(path):
    return [(r["step"], r["loss"]) for r in read_metrics(path) if r["event"] == "step"]


@pytest.fixture
def run(tmp_path):
    with RunDirectory(tmp_path / "run") as run:
        yield run


def test_records_and_plain_output(run):
    out = io.StringIO()
    config = LoggingConfig(every=10, sinks=())
    with Reporter(run, config, total_steps=25, stream=out) as reporter:
        reporter.header({"parameters": Shown(1234567, "1.2 million"), "devices": "1 x cpu"})
        for step in range(1, 26):
            metrics = {"loss": np.float32(1 / step), "tokens_per_s": 52_345.0, "norm/a": 1.0}
            reporter.step(step, metrics)
        reporter.evaluation(25, {"loss": 0.5})
        reporter.event("something happened")
        reporter.summary({"status": "done", "run_s": 65.0})
    assert steps(run.path) == [(s, float(np.float32(1 / s))) for s in range(1, 26)]
    events = [r["event"] for r in read_metrics(run.path) if r["event"] != "step"]
    assert events == ["header", "eval", "note", "summary", "end"]
    header = read_metrics(run.path)[0]
    assert header["values"] == {"parameters": 1234567, "devices": "1 x cpu"}  # a number to compare
    assert header["shown"] == {"parameters": "1.2 million"}
    lines = out.getvalue().splitlines()
    assert lines[:3] == ["run", "  parameters  1.2 million", "  devices     1 x cpu"]
    progress = [line.split("  ")[0] for line in lines if line.startswith("step ")]
    assert progress == ["step 1/25", "step 10/25", "step 20/25", "step 25/25"]
    assert "loss 0.1  tokens/s 52.3k  left " in out.getvalue() and "norm/a" not in out.getvalue()
    assert lines[-2:] == ["  status  done", "  run_s   1m05s"]
    log = run.log.read_text()
    assert "something happened" in log and "step 20/25" in log and "parameters: 1.2 million" in log


def test_resume_gives_each_step_once(run):
    log = MetricsLog(run.metrics)
    for step in range(1, 8):
        log.append("step", step, {"loss": float(step)})
    log.append("note", 7, {"text": "x"})
    log.close()
    with open(run.metrics, "a") as file:
        file.write('{"event": "step", "step": 8, "lo')  # torn by the kill
    with Reporter(run, QUIET, stream=io.StringIO()) as reporter:
        reporter.resumed(4)
        for step in range(5, 8):
            reporter.step(step, {"loss": float(step)})
    assert steps(run.path) == [(s, float(s)) for s in range(1, 8)]
    (resumed,) = [r for r in read_metrics(run.path) if r["event"] == "resumed"]
    assert (resumed["step"], resumed["dropped"]) == (4, 5)
    assert all(json.loads(line) for line in run.metrics.read_text().splitlines())


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "done", ""),
        (RestartRequested("stopped after step 3"), "stopped", "stopped after step 3"),
        (KeyboardInterrupt(), "interrupted", ""),
        (ValueError("no"), "failed", "ValueError: no"),
    ],
)
def test_how_a_run_is_left_is_recorded(run, error, status, reason):
    with contextlib.suppress(RestartRequested, KeyboardInterrupt, ValueError):
        with Reporter(run, QUIET, stream=io.StringIO()) as reporter:
            reporter.header({"parameters": 5})
            reporter.step(3, {"loss": 1.0})
            if error is not None:
                raise error
    end = read_metrics(run.path)[-1]
    assert (end["event"], end["step"], end["status"], end["reason"]) == ("end", 3, status, reason)


def test_a_start_that_is_refused_leaves_the_account_of_the_run_alone(run):
    with Reporter(run, QUIET, stream=io.StringIO()) as reporter:
        reporter.header({"parameters": 5})
        reporter.step(1, {"loss": 1.0})
        reporter.summary({"status": "done"})
    with contextlib.suppress(ConfigError), Reporter(run, QUIET, stream=io.StringIO()) as reporter:
        reporter.event("reading the data")
        raise ConfigError("another rate")
    assert outcome(read_metrics(run.path), running=False).status == "done"


def test_what_was_done_twice_is_told_once_as_it_was_done_last(run):
    log = MetricsLog(run.metrics)
    for loss in (1.0, 2.0):  # a kill came between the first and the next checkpoint
        log.append("step", 7, {"loss": loss})
        log.append("eval", 7, {"name": "heldout", "loss": 10 * loss})
        log.append("eval", 7, {"name": "final", "loss": 20 * loss})
        log.append("summary", 7, {"values": {"loss": loss}})
    log.close()
    told = [(r["event"], r.get("name"), r.get("loss")) for r in read_metrics(run.path)]
    assert told == [
        ("step", None, 2.0),
        ("eval", "heldout", 20.0),
        ("eval", "final", 40.0),
        ("summary", None, None),
    ]


def test_work_is_counted_in_the_unit_of_the_loop(run):
    with Reporter(run, QUIET, stream=io.StringIO()) as reporter:
        reporter.step(1, {"loss": 1.0, "images": 64000, "images_per_s": 32.0})
    records = read_metrics(run.path)
    assert work_unit(records) == "images" and work_unit([]) is None
    assert cells(records[0])["images"] == "64k"
    for name, unit in (("quick", "tokens"), ("rl", "tokens")):
        assert work_unit(read_metrics(REAL / name)) == unit


def test_torn_line_without_resume_does_not_swallow_the_next(run):
    run.metrics.write_text('{"event": "step", "st')
    log = MetricsLog(run.metrics)
    log.append("step", 1, {"loss": 1.0})
    log.close()
    assert steps(run.path) == [(1, 1.0)]


def test_non_finite_values_are_valid_json_and_come_back(run):
    log = MetricsLog(run.metrics)
    log.append("step", 1, {"loss": math.nan, "a": -math.inf})
    log.close()
    strict = json.loads(run.metrics.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (strict["loss"], strict["a"]) == ("nan", "-inf")
    (record,) = read_metrics(run.path)
    assert math.isnan(record["loss"]) and record["a"] == -math.inf


def test_full_disk_costs_records_and_not_the_run(run):
    full = types.SimpleNamespace(metrics="/dev/full")
    log = MetricsLog(full.metrics)
    log.append("step", 1, {"loss": 1.0})
    log.append("step", 2, {"loss": 1.0})
    out = io.StringIO()
    reporter = Reporter(run, QUIET, stream=out)
    reporter._metrics = log
    reporter.step(3, {"loss": 1.0})
    reporter.close()
    assert "3 records could not be written" in out.getvalue()


def test_records_that_a_full_disk_did_not_take_are_written_once_there_is_space(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "st')  # torn by a kill
    log = MetricsLog(path)
    log._file = open("/dev/full", "wb", buffering=0)
    log._torn = True
    for step in (1, 2):
        log.append("step", step, {"loss": 1.0})
    log._file.close()
    log._file = None
    log.append("step", 3, {"loss": 1.0})
    log.close()
    assert log.dropped == 0
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_what_a_full_disk_took_of_a_record_is_cut_off_again_each_time(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append("step", 1, {"loss": 1.0})
    file = log._file

    class AlmostFull:
        """Takes a part of what is written, three times."""

        def __init__(self):
            self.left = 3

        def write(self, data):
            self.left -= 1
            return file.write(data[: 40 + 20 * self.left] if self.left >= 0 else data)

        def __getattr__(self, name):
            return getattr(file, name)

    log._file = AlmostFull()
    for step in (2, 3, 4, 5):
        log.append("step", step, {"loss": 1.0})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_tensorboard(run):
    with Reporter(run, LoggingConfig(), stream=io.StringIO()) as reporter:
        assert not run.tensorboard.exists()  # nothing before the first record
        reporter.step(1, {"loss": 2.5})
        reporter.evaluation(1, {"loss": 3.5}, name="held-out")
    (file,) = run.tensorboard.iterdir()
    assert b"loss" in file.read_bytes() and b"held-out/loss" in file.read_bytes()


def test_a_full_disk_ends_tensorboards_file_and_neither_the_run_nor_its_exit(tmp_path):
    code = f"""
from tensorboardX import record_writer
from step_jax.runs.reporter import LoggingConfig, Reporter
from step_jax.runs.run_directory import RunDirectory
record_writer.open_file = lambda path: open("/dev/full", "wb")
with RunDirectory({str(tmp_path / "run")!r}) as run, Reporter(run, LoggingConfig()) as reporter:
    for step in range(2000):
        reporter.step(step, {{f"name{{n}}": 1.0 for n in range(20)}})
print("left")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.endswith("left\n"), done.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "metrics sink tensorboard gave up: OSError: [Errno 28]" in log


def test_slow_sink_drops_and_does_not_block():
    release, written, errors = threading.Event(), [], []

    class Slow:
        def write(self, step, metrics):
            release.wait()
            written.append(step)

        def close(self):
            written.append("closed")

    sink = AsyncSink("slow", Slow, on_error=errors.append, size=5, close_seconds=5)
    start = time.perf_counter()
    for step in range(100):
        sink.write(step, {"loss": 1.0})
    assert time.perf_counter() - start < 1
    assert 94 <= sink.dropped <= 95  # five wait, one may be in hand
    release.set()
    sink.close()
    assert written[-1] == "closed" and len(written) - 1 == 100 - sink.dropped and not errors


def test_dead_sink_is_given_up_once_and_hanging_one_is_left():
    errors = []

    def fail():
        raise ConnectionError("no route")

    dead = AsyncSink("dead", fail, on_error=errors.append)
    for step in range(50):
        dead.write(step, {})
        time.sleep(0.001)
    dead.close()
    assert errors == ["metrics sink dead gave up: ConnectionError: no route"]
    hanging = AsyncSink("hang", lambda: time.sleep(30), on_error=errors.append, close_seconds=0.1)
    hanging.write(1, {})
    start = time.perf_counter()
    hanging.close()
    assert time.perf_counter() - start < 2 and "did not finish in 0.1 s" in errors[-1]


class Service:
    """A metrics service that remembers what it is told, as a server does between two processes.

    Its methods have the names and the meaning that wandb, trackio and mlflow give them; all three
    were also run with the real packages.
    """

    def __init__(self):
        self.runs: dict[str, dict] = {}
        self.entities = types.SimpleNamespace(
            Param=lambda key, value: (key, value),
            Metric=lambda key, value, timestamp, step: (key, value, step),
        )

    def init(self, *, project, name, config=None, id=None, resume, dir=None):
        assert resume == "allow"
        key = id or name
        run = self.runs.setdefault(key, {"configs": [config] if config else [], "points": []})
        update = run["configs"].append
        log = lambda values, step: run["points"].extend((k, step) for k in values)  # noqa: E731
        return types.SimpleNamespace(
            resumed=bool(run["points"]),
            config=types.SimpleNamespace(update=update),
            log=log,
            finish=lambda: None,
        )

    def set_experiment(self, name):
        pass

    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id=name)

    def search_runs(self, experiment_names, filter_string, output_format):
        found = [key for key, run in self.runs.items() if f"'{run['tag']}'" in filter_string]
        return [types.SimpleNamespace(info=types.SimpleNamespace(run_id=key)) for key in found]

    def MlflowClient(self):
        return self

    def create_run(self, experiment_id, tags, run_name):
        key = f"run-{len(self.runs)}"
        self.runs[key] = {"tag": tags["step_jax.run"], "configs": [], "points": []}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=key))

    def update_run(self, run_id, status):
        assert run_id in self.runs

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100
        if params:
            self.runs[run_id]["configs"].append(dict(params))
        self.runs[run_id]["points"] += [(key, step) for key, _, step in metrics]

    def set_terminated(self, run_id):
        pass


def start_twice(path, sink, config):
    """A run that is killed after step 7, whose last checkpoint was of step 4."""
    for first, last in ((1, 7), (5, 9)):
        with RunDirectory(path) as run:
            logging, out = LoggingConfig(sinks=(sink,)), io.StringIO()
            with Reporter(run, logging, stream=out, resolved_config=config) as reporter:
                if first > 1:
                    reporter.resumed(first - 1)
                for step in range(first, last + 1):
                    reporter.step(step, {"loss": float(step)})
                    if step % 2 == 0:
                        reporter.evaluation(step, {"loss": 0.5}, "heldout")
        assert "gave up" not in run.log.read_text()


@pytest.mark.parametrize("sink", ["wandb", "trackio", "mlflow"])
def test_a_resumed_run_is_one_run_in_every_service_with_each_point_once(
    tmp_path, monkeypatch, sink
):
    service = Service()
    monkeypatch.setitem(sys.modules, sink, service)
    monkeypatch.setattr(sink_lib.importlib.util, "find_spec", lambda name: True)
    config = {"a": {"b": 1}, "many": list(range(150))}
    start_twice(tmp_path / "seed_0", sink, config)
    (run,) = service.runs.values()
    expected = [("loss", s) for s in range(1, 10)] + [("heldout/loss", s) for s in (2, 4, 6, 8)]
    assert sorted(run["points"]) == sorted(expected)
    if sink == "mlflow":  # whose servers take 100 at once
        told = dict(item for part in run["configs"] for item in part.items())
        assert told["a.b"] == "1" and told["many.149"] == "149" and len(told) == 151
    else:
        assert run["configs"] == [config]
    # a directory of the same name elsewhere is another run, and one that was moved the same
    start_twice(tmp_path / "other" / "seed_0", sink, config)
    assert len(service.runs) == 2
    (tmp_path / "seed_0").rename(tmp_path / "moved")
    with RunDirectory(tmp_path / "moved") as moved:
        with Reporter(moved, LoggingConfig(sinks=(sink,)), stream=io.StringIO()) as reporter:
            reporter.resumed(9)
            reporter.step(10, {"loss": 1.0})
    assert len(service.runs) == 2


def test_a_resumed_run_has_each_step_once_in_tensorboard(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    start_twice(tmp_path / "run", "tensorboard", {})
    points: dict[str, list[int]] = {}
    for path in sorted((tmp_path / "run" / "tensorboard").iterdir()):
        data, i = path.read_bytes(), 0
        while i < len(data):  # length, its checksum, the event, its checksum
            size = int.from_bytes(data[i : i + 8], "little")
            event = Event.FromString(data[i + 12 : i + 12 + size])
            i += size + 16
            if event.HasField("session_log"):  # what TensorBoard then forgets
                for name in points:
                    points[name] = [s for s in points[name] if s < event.step]
            for value in event.summary.value:
                points.setdefault(value.tag, []).append(event.step)
    assert points == {"loss": list(range(1, 10)), "heldout/loss": [2, 4, 6, 8]}


def test_missing_sink_package_is_a_configuration_error(monkeypatch):
    monkeypatch.setattr(sink_lib.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'wandb' needs .*: pip install wandb$"):
        parse_config(LoggingConfig, "sinks: [wandb]")
    with pytest.raises(ConfigError, match="expected 'tensorboard' or 'wandb'"):
        parse_config(LoggingConfig, "sinks: [wandbb]")


def test_only_the_primary_process_reports(tmp_path):
    with RunDirectory(tmp_path / "run", primary=False) as run:
        out = io.StringIO()
        with Reporter(run, LoggingConfig(), stream=out) as reporter:
            reporter.header({"a": 1})
            reporter.resumed(3)
            reporter.step(4, {"loss": 1.0})
            reporter.evaluation(4, {"loss": 1.0})
            reporter.event("x")
            reporter.summary({"a": 1})
    assert out.getvalue() == "" and not run.path.exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_output(run, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    with Reporter(run, LoggingConfig(every=5, sinks=()), total_steps=10, stream=out) as reporter:
        reporter.header({"parameters": 5})
        for step in range(1, 11):
            reporter.step(step, {"loss": 1.0})
        reporter.event("[not markup]")
        reporter.summary({"status": "done"})
    text = out.getvalue()
    assert "╭" in text and "step 5/10" in text and "[not markup]" in text and "done" in text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("loss", 2.34567, "2.346"),
        ("lr", 3e-4, "3.000e-04"),
        ("lr", 0.0, "0"),
        ("loss", math.nan, "nan"),
        ("mfu", 0.4123, "41.2%"),
        ("tokens_per_s", 1_234_567.0, "1.23M"),
        ("step_s", 0.0123, "12.3ms"),
        ("memory bytes", 2_500_000_000, "2.5GB"),
        ("tokens", 1234567, "1,234,567"),
        ("ok", True, "True"),
    ],
)
def test_values_for_people(name, value, text):
    assert format_value(name, value) == text


def test_units():
    assert [si(x) for x in (0, 1, 999, 999.9, 1e3, 1e6, -2.5e9)] == [
        *("0", "1", "999", "1k", "1k", "1M", "-2.5G"),
    ]
    assert [duration(x) for x in (0, 2e-5, 0.5, 59.9, 60, 3599.6, 7260)] == [
        *("0s", "20us", "500ms", "59.9s", "1m00s", "1h00m", "2h01m"),
    ]


def test_environment_names_versions():
    assert {"host", "python", "jax"} <= environment().keys()


def test_reporting_a_step_is_cheap(run):
    """Host time of a step: a tenth of the millisecond that dispatch may take, on a busy machine."""
    metrics = {f"m{i}": float(i) for i in range(10)}
    with Reporter(run, LoggingConfig(every=1000, sinks=()), stream=io.StringIO()) as reporter:
        start = time.process_time()
        for step in range(1, 501):
            reporter.step(step, metrics)
        seconds = (time.process_time() - start) / 500
    assert seconds < 5e-4, f"{seconds * 1e6:.0f} us"
