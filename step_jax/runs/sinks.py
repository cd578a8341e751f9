"""Where metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, Trackio, MLflow.

A sink lives in a thread of its own behind a bounded queue: a slow or dead service costs records,
never a training step. What a sink imports is imported in that thread, on the first record.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from step_jax.core.errors import ConfigError
from step_jax.runs.history import flat_configuration

SinkName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
_PACKAGES = {"tensorboard": "tensorboardX"}
_QUEUE_SIZE = 1000
_CLOSE_SECONDS = 10.0


@dataclass(frozen=True)
class RunInfo:
    """What a service wants to know about a run.

    identity: see :class:`~step_jax.runs.run_directory.RunDirectory`. Every sink goes on in the run
      of this identity, so that a resumed run is one curve.
    config: given to a service once, when it first hears of the run.
    resumed_after: the step behind which a run with records goes on; None for a new one.
    """

    path: Path
    identity: str
    project: str
    config: Mapping[str, Any]
    resumed_after: int | None = None


class Sink(Protocol):
    """To add a service: a class with this constructor and these two methods, and a line below.

    rewinds: whether it forgets what came after ``resumed_after``. The others keep the first account
      of a step, and are not given a second one.
    """

    rewinds: ClassVar[bool]

    def __init__(self, run: RunInfo): ...

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files, written in the sink's own thread.

    tensorboardX's ``SummaryWriter`` has a thread besides, which a full disk ends; what is written
    then waits for it, and so does the end of the process, for ever.
    """

    rewinds: ClassVar[bool] = True
    _FLUSH_S = 10.0

    def __init__(self, run: RunInfo):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        folder = run.path / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        # Its own names tell files of one second apart by this alone.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._flushed = 0.0
        if run.resumed_after is not None:  # what TensorBoard forgets from this step on
            log = SessionLog(status=SessionLog.START)
            self._add(run.resumed_after + 1, session_log=log)

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(step=step, wall_time=time.time(), **content))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._add(step, summary=self._scalar(name, value))
        if time.monotonic() - self._flushed > self._FLUSH_S:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


class WandB:
    rewinds: ClassVar[bool] = False

    def __init__(self, run: RunInfo):
        import wandb

        self.run = wandb.init(
            project=run.project,
            name=run.path.resolve().name,
            id=run.identity,
            resume="allow",
            dir=str(run.path),
        )
        if not self.run.resumed:
            self.run.config.update(dict(run.config))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    rewinds: ClassVar[bool] = False

    def __init__(self, run: RunInfo):
        import trackio

        self.run = trackio.init(
            project=run.project,
            name=run.identity,
            config=dict(run.config),
            resume="allow",
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    rewinds: ClassVar[bool] = False
    _PARAMS = 100  # that a server takes at once

    def __init__(self, run: RunInfo):
        import mlflow

        mlflow.set_experiment(run.project)
        self.client, tag = mlflow.MlflowClient(), "step_jax.run"
        found = mlflow.search_runs(
            experiment_names=[run.project],
            filter_string=f"tags.`{tag}` = '{run.identity}'",
            output_format="list",
        )
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        experiment = mlflow.get_experiment_by_name(run.project)
        created = self.client.create_run(
            experiment.experiment_id, tags={tag: run.identity}, run_name=run.path.resolve().name
        )
        self.id = created.info.run_id
        config = flat_configuration(json.dumps(run.config))  # JSON is YAML
        params = [mlflow.entities.Param(k, v) for k, v in config.items()]
        for i in range(0, len(params), self._PARAMS):
            self.client.log_batch(self.id, params=params[i : i + self._PARAMS])

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        import mlflow

        now = int(time.time() * 1000)
        numbers = [mlflow.entities.Metric(k, v, now, step) for k, v in metrics.items()]
        self.client.log_batch(self.id, metrics=numbers)

    def close(self) -> None:
        self.client.set_terminated(self.id)


SINKS: dict[str, type[Sink]] = {
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
