"""Where metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, Trackio, MLflow.

A sink lives in a thread of its own behind a bounded queue: a slow or dead service costs records,
never a training step. What a sink imports is imported in that thread, on the first record.
"""

from __future__ import annotations

import hashlib
import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from step_jax.core.errors import ConfigError

SinkName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
_PACKAGES = {"tensorboard": "tensorboardX"}
_QUEUE_SIZE = 1000
_CLOSE_SECONDS = 10.0


@dataclass(frozen=True)
class RunInfo:
    """What a service wants to know about a run."""

    path: Path
    project: str
    config: Mapping[str, Any]

    @property
    def identity(self) -> str:
        """The same for every start of a run, so that a resumed run goes on in one curve."""
        return hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]


class Sink(Protocol):
    """To add a service: a class with this constructor and these two methods, and a line below."""

    def __init__(self, run: RunInfo): ...

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, run: RunInfo):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(run.path / "tensorboard"), flush_secs=10)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    def __init__(self, run: RunInfo):
        import wandb

        self.run = wandb.init(
            project=run.project,
            name=run.path.name,
            id=run.identity,
            resume="allow",
            dir=str(run.path),
            config=dict(run.config),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    def __init__(self, run: RunInfo):
        import trackio

        self.module = trackio
        trackio.init(
            project=run.project, name=run.path.name, config=dict(run.config), resume="allow"
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


class MLflow:
    def __init__(self, run: RunInfo):
        import mlflow

        self.module = mlflow
        mlflow.set_experiment(run.project)
        mlflow.start_run(run_name=run.path.name, tags={"step_jax.run": run.identity})

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.module.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        self.module.end_run()


SINKS: dict[str, Callable[[RunInfo], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def check_installed(names: tuple[str, ...]) -> None:
    """Raise ConfigError for a sink whose package is missing."""
    for name in names:
        if importlib.util.find_spec(_PACKAGES.get(name, name)) is None:
            raise ConfigError(
                f"the metrics sink '{name}' needs a package that is not installed: "
                f"pip install {_PACKAGES.get(name, name)}"
            )


class AsyncSink:
    """Runs a sink in a thread. ``write`` returns at once; a full queue drops the record."""

    def __init__(
        self,
        name: str,
        factory: Callable[[], Sink],
        *,
        on_error: Callable[[str], None],
        size: int = _QUEUE_SIZE,
        close_seconds: float = _CLOSE_SECONDS,
    ):
        """
        Args:
          name: for messages.
          factory: makes the sink; called in the thread.
          on_error: called once, with a message, when the sink failed and is given up.
          size: records that may wait.
          close_seconds: how long :meth:`close` waits for the records that are left.
        """
        self.name = name
        self.dropped = 0
        self._factory = factory
        self._on_error = on_error
        self._close_seconds = close_seconds
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(size)
        self._thread: threading.Thread | None = None
        self._failed = False

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, name=f"sink-{self.name}", daemon=True
            )
            self._thread.start()
        try:
            if self._failed:
                raise queue.Full
            self._queue.put_nowait((step, dict(metrics)))
        except queue.Full:
            self.dropped += 1

    def _work(self) -> None:
        try:
            sink = self._factory()
            while (record := self._queue.get()) is not None:
                sink.write(*record)
            sink.close()
        except Exception as error:  # a service may raise anything; the run must not care
            self._failed = True
            self._on_error(f"metrics sink {self.name} gave up: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Let the sink finish, for a limited time."""
        if self._thread is None:
            return
        deadline = time.monotonic() + self._close_seconds
        while not self._failed:
            try:
                self._queue.put(None, timeout=max(0.0, min(0.2, deadline - time.monotonic())))
                break
            except queue.Full:
                if time.monotonic() > deadline:
                    break
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._on_error(f"metrics sink {self.name} did not finish in {self._close_seconds:g} s")
        self._thread = None
