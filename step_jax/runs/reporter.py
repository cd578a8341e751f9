"""The voice and the memory of a run: everything a training loop says goes through one object.

What is shared by all loops is here and nothing of any one of them: a loop names its metrics, and
names decide how they are shown (see :func:`step_jax.runs.console.format_value`).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from step_jax.core.errors import ConfigError
from step_jax.runs import sinks as sink_lib
from step_jax.runs.console import (
    Console,
    Shown,
    cells,
    duration,
    format_value,
    make_console,
    progress_text,
)
from step_jax.runs.history import ending
from step_jax.runs.metrics_log import MetricsLog
from step_jax.runs.run_directory import RunDirectory
from step_jax.runs.sinks import AsyncSink, RunInfo, SinkName


@dataclass(frozen=True)
class LoggingConfig:
    """What is shown and where metrics go. Every step is recorded in ``metrics.jsonl`` in any case.

    every: steps between the progress lines that stay.
    sinks: where metrics go besides ``metrics.jsonl``.
    project: the name that services file the run under.
    """

    every: int = 10
    sinks: tuple[SinkName, ...] = ("tensorboard",)
    project: str = "step-jax"

    def validate(self) -> None:
        if self.every < 1:
            raise ConfigError(f"every={self.every} must be at least 1")
        sink_lib.check_installed(self.sinks)


class Reporter:
    """Prints, logs and stores. Only the primary process does anything; the others may call freely.

    Scalars may be Python numbers or arrays of one element; a device array is waited for.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: LoggingConfig,
        *,
        total_steps: int | None = None,
        resolved_config: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
    ):
        """
        Args:
          run: an open run directory; its ``primary`` decides whether this process reports.
          config: what is shown and where metrics go.
          total_steps: the last step, for the progress bar and the expected end.
          resolved_config: for the sinks, as :func:`step_jax.core.config.to_plain` gives it.
          stream: where to print (default: standard output).
        """
        self.run = run
        self.config = config
        self.total_steps = total_steps
        self.primary = run.primary
        self.last_step = 0
        if not self.primary:
            return
        self._console: Console = make_console(every=config.every, stream=stream)
        self._metrics = MetricsLog(run.metrics)
        self._log_lock = threading.Lock()  # a sink's thread may report its failure
        self._started: tuple[float, int] | None = None
        self._began = False
        self._resolved_config = resolved_config or {}
        self._sinks: list[tuple[AsyncSink, dict[str, int]]] | None = None
        self._after, self._recorded = 0, dict[str, int]()

    def header(
        self,
        values: Mapping[str, Any],
        title: str = "run",
        *,
        units: Mapping[str, str] | None = None,
    ) -> None:
        """Show and store what is known before the first step: versions, mesh, sizes, position.

        Args:
          values: numbers where there are any; one that needs words around it is a
            :class:`~step_jax.runs.console.Shown`.
          title: above the table.
          units: metric -> what it is measured in (``nats per token``); pictures keep metrics of
            unlike units on axes of their own.
        """
        if not self.primary:
            return
        self._began = True
        self._table(title, values)
        record = _recorded(values) | ({"units": dict(units)} if units else {})
        self._record("header", self.last_step, record)

    def resumed(self, step: int) -> None:
        """Go on behind ``step``: records after it are dropped, since those steps run again."""
        self.last_step = step
        if not self.primary:
            return
        self._began = True
        dropped, self._recorded = self._metrics.resume(step)
        self._after = step
        note = f"; {dropped} later records dropped" if dropped else ""
        self._line(f"resumed after step {step}{note}")

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record one finished step. Names with a ``/`` are stored and not shown."""
        self.last_step = step
        if not self.primary:
            return
        numbers = _numbers(metrics)
        self._record("step", step, numbers)
        self._to_sinks("", step, numbers)
        shown = cells(numbers)
        if (left := self._seconds_left(step)) is not None:
            shown["left"] = duration(left)
        self._console.progress(step, self.total_steps, shown)
        if step % self.config.every == 0 or step == self.total_steps:
            self._write_log(progress_text(step, self.total_steps, shown))

    def evaluation(self, step: int, metrics: Mapping[str, Any], name: str = "eval") -> None:
        """Record an evaluation; sinks get the metrics as ``name/metric``."""
        if not self.primary:
            return
        numbers = _numbers(metrics)
        self._record("eval", step, {"name": name, **numbers})
        self._to_sinks(name, step, {f"{name}/{key}": value for key, value in numbers.items()})
        shown = "  ".join(f"{k} {v}" for k, v in cells(numbers).items())
        self._line(f"{name} at step {step}: {shown}")

    def event(self, text: str) -> None:
        """Show, log and record something that happened."""
        if not self.primary:
            return
        self._line(text)
        self._record("note", self.last_step, {"text": text})

    def summary(self, values: Mapping[str, Any], title: str = "summary") -> None:
        """Show and store the outcome. ``status`` in it is what ``step-jax runs`` shows."""
        if not self.primary:
            return
        self._table(title, values)
        self._record("summary", self.last_step, _recorded(values))

    def close(self) -> None:
        """Finish the sinks (for a limited time) and the files."""
        if not self.primary:
            return
        self._console.close()
        for sink, _ in self._sinks or ():
            sink.close()
            if sink.dropped:
                self._line(f"metrics sink {sink.name} lost {sink.dropped} records")
        self._metrics.close()
        if self._metrics.dropped:
            self._line(
                f"{self._metrics.dropped} records could not be written to {self.run.metrics}"
            )

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """Records how the run is left, if it began: a start that was refused changes nothing."""
        if self.primary and self._began:
            status, reason = ending(error)
            self._record("end", self.last_step, {"status": status, "reason": reason})
        self.close()

    def _record(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        if not self.run.lost:  # the log is another process's
            self._metrics.append(event, step, values)

    def _to_sinks(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        """``kind``: see :class:`step_jax.runs.metrics_log.Resumed`. What a sink was given before
        the run went on from an older checkpoint it is not given again."""
        if self._sinks is None:
            self._sinks = [self._open(name) for name in self.config.sinks]
        for sink, known in self._sinks:
            if step > known.get(kind, -1):
                sink.write(step, numbers)

    def _open(self, name: SinkName) -> tuple[AsyncSink, dict[str, int]]:
        """A sink, and the newest step of every kind that it keeps from before."""
        factory, recorded = sink_lib.SINKS[name], self._recorded
        if factory.rewinds:
            recorded = {kind: min(step, self._after) for kind, step in recorded.items()}
        info = RunInfo(
            path=self.run.path,
            identity=self.run.identity.read_text(encoding="utf-8"),
            project=self.config.project,
            config=self._resolved_config,
            resumed_after=self._after if recorded else None,
        )
        return AsyncSink(name, partial(factory, info), on_error=self._write_log), recorded

    def _seconds_left(self, step: int) -> float | None:
        """From the pace since the first reported step, whose own time is mostly compilation."""
        now = time.monotonic()
        if self._started is None:
            self._started = (now, step)
        start_time, start_step = self._started
        if not self.total_steps or step <= start_step:
            return None
        return (now - start_time) / (step - start_step) * (self.total_steps - step)

    def _table(self, title: str, values: Mapping[str, Any]) -> None:
        rows = {name: format_value(name, value) for name, value in values.items()}
        self._console.table(title, rows)
        self._write_log("\n".join([title, *(f"  {k}: {v}" for k, v in rows.items())]))

    def _line(self, text: str) -> None:
        self._console.line(text)
        self._write_log(text)

    def _write_log(self, text: str) -> None:
        if self.run.lost:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            with self._log_lock, open(self.run.log, "a", encoding="utf-8") as file:
                file.write(f"{stamp} {text}\n")
        except OSError:
            self._metrics.dropped += 1  # a full disk does not end a run; close() says so


def _recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they are, and apart from them the words of those that have some."""
    plain = {k: v.value if isinstance(v, Shown) else v for k, v in values.items()}
    shown = {k: v.text for k, v in values.items() if isinstance(v, Shown)}
    return {"values": plain} | ({"shown": shown} if shown else {})


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value if isinstance(value, int | float) else float(value)
        for name, value in metrics.items()
    }


def environment() -> dict[str, str]:
    """Versions, host and source revision, for the header of a run."""
    values = {"host": platform.node(), "python": platform.python_version()}
    for package in ("step-jax", "jax"):
        try:
            values[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    revision = _git_revision(Path(__file__).parent)
    return values | ({"revision": revision} if revision else {})


def _git_revision(directory: Path) -> str | None:
    """Short commit id with ``+`` if tracked files differ, or None outside a checkout."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=5, env={**os.environ, "LC_ALL": "C"}
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
