"""What every training loop does around its steps: a run directory, reports, checkpoints, the end.

A loop owns its data, model and step and reads top to bottom; it opens a :class:`Session`, asks it
for the state to start from, and tells it about every finished step. Nothing here knows what is
being trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import numpy as np

from step_jax.checkpoint import CheckpointConfig, Checkpointer
from step_jax.checkpoint.artifact import Description, has_steps, open_run
from step_jax.core import checks, distributed, kept_programs, rng
from step_jax.core.config import config_hash, to_plain
from step_jax.core.errors import CheckpointError, ConfigError, ExitCode, RestartRequested
from step_jax.core.sharding import Sharding
from step_jax.core.storage import Objects, is_url
from step_jax.runs.exit_timer import rank_name
from step_jax.runs.history import Branch, check_rates, continue_configuration
from step_jax.runs.metrics_log import read_metrics
from step_jax.runs.preemption import StopSignal
from step_jax.runs.profiling import ProfileConfig, ProfilerWindow
from step_jax.runs.reporter import LoggingConfig, Reporter, environment
from step_jax.runs.run_directory import RunDirectory
from step_jax.runs.stalls import StallNotice
from step_jax.runs.watchdog import HangWatchdog
from step_jax.training.program import Program, Work
from step_jax.training.state import TrainState
from step_jax.training.step import check_skipped

#: how long what is no step may take before it counts as a hang: tokenising a corpus, and an
#: evaluation with what is compiled for it
_PREPARATION_S, _ASIDE_S = 86400.0, 3600.0


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it starts.

    directory: everything the run writes, a folder or ``gs://``, ``s3://``; starting it again there
      goes on after its last checkpoint.
    branch_from: RUN or RUN@STEP: a new run goes on from the whole state of that one (parameters,
      averages, optimizer, place in the data), and may have another length or learning rate.
    seed: of parameters, data order and every random choice.
    max_skipped: non-finite steps in a row that are survived by skipping them.
    """

    directory: str
    branch_from: str | None = None
    seed: int = 0
    max_skipped: int = 5
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()

    def validate(self):
        if self.max_skipped < 0:
            raise ConfigError(f"max_skipped is {self.max_skipped}; it must be 0 or more")
        checks.seed(self.seed)
        if is_url(self.directory):
            Objects.at(self.directory)


class Processor(Protocol):
    """What turns a user's input into a model's: a tokenizer, a front end of pictures or sound."""

    def save(self, folder: Any) -> None:
        """Writes it whole into a folder of the run directory."""


class Session:
    """One run, open: use it in a ``with`` statement.

    Every process of the run opens one and makes the same calls. Leaving the block waits for the
    checkpoint under way; leaving it by SIGTERM (:class:`RestartRequested`) has saved the last step.

    Attributes:
      sharding: mesh and rules of the run.
      directory: the run directory.
      reporter: says and records things.
      program: what it runs, once it is started.
      carried: what the host carried (see ``finished``) at the step that it goes on from.
    """

    def __init__(self, config: Any):
        """``config`` is the loop's whole configuration; its parts ``run`` and ``parallel`` act."""
        self.opened = time.perf_counter()
        self._config, self._run = config, config.run
        self._stack = ExitStack()
        self._pending: tuple[int, Any, float, Work] | None = None
        self._leave = False
        self._finished = 0
        self._reported = 0  # the step whose metrics were read last
        self._branch: Branch | None = None
        self._meta: dict[str, Any] = {}
        self.carried: Mapping[str, np.ndarray] = {}
        self._values: dict[str, float] = {}  # of the step reported last
        #: (step, metrics) -> what to say about a finished step besides its numbers
        self.watch: Callable[[int, Mapping[str, float]], Iterable[str]] = lambda step, metrics: ()

    def __enter__(self) -> Session:
        try:
            self._open()
        except BaseException as error:
            self._raise_cause(error)
            raise
        return self

    def _open(self):
        parallel = self._config.parallel
        with ExitStack() as stack:
            # First of all: joining waits for others, and so may whatever comes after.
            self._stop = stack.enter_context(StopSignal(joined=False))
            distributed.join(parallel.multihost)
            self.sharding = Sharding.build(parallel)
            stack.enter_context(kept_programs.kept(self.sharding.mesh))
            self._stop.join()
            self.primary = jax.process_index() == 0
            self.directory = stack.enter_context(
                RunDirectory(self._run.directory, primary=self.primary, on_lost=self._stop.fail)
            )
            self._again = self.directory.metrics.exists()
            self.reporter = stack.enter_context(
                Reporter(
                    self.directory,
                    self._run.logging,
                    resolved_config=to_plain(self._config),
                )
            )
            self._stop.tell(self.reporter.event)
            stack.callback(self._stop.tell, None)
            name = rank_name(jax.process_index(), jax.process_count())
            self._watchdog = stack.enter_context(HangWatchdog(name=name))
            self._watchdog.allow(_PREPARATION_S, "its preparation")
            self._stalls = stack.enter_context(StallNotice(self._watchdog))
            self._checkpointer = stack.enter_context(
                Checkpointer(
                    self.directory.checkpoints,
                    self._run.checkpoint,
                    self.reporter.event,
                    self.directory.keep,
                )
            )
            self._profiler = ProfilerWindow(self._run.profile, self.directory.profile)
            stack.callback(self._profiler.close)
            stack.enter_context(self._profiler.asked_by_signal())
            self._stack = stack.pop_all()

    def __exit__(self, kind, error, trace):
        self._watchdog.allow(distributed.TIMEOUT_S, "its last save")
        self._stack.__exit__(kind, self._cause(error) or error, trace)
        self._raise_cause(error)

    def _cause(self, error: BaseException | None) -> BaseException | None:
        """What it is that came out of the block as ``error``."""
        stop = self._stop
        return stop.failure or (error and stop.raised) or distributed.peer_lost(error)

    def _raise_cause(self, error: BaseException | None):
        cause = self._cause(error)
        if cause is not None and cause is not error:
            raise cause from error

    # --- before the first step -----------------------------------------------------------------

    @property
    def goes_on_from(self) -> str | None:
        """The artifact that this run's steps go on from, ``RUN`` or ``RUN@STEP``: the run itself,
        else the one that it is a branch of, else None."""
        if has_steps(self.directory.name):
            return self.directory.name
        return self._run.branch_from

    def start(
        self,
        program: Program,
        given: Mapping[str, Any] | None = None,
        check: Callable[[dict[str, Any], int], None] = lambda meta, step: None,
    ) -> tuple[TrainState, int]:
        """The newest verified checkpoint of the run directory (of a new branch: the step that it
        leaves from), or a fresh state.

        Args:
          given: of a fresh state, by learner: parameters that are trained already.
          check: called with the checkpoint's ``meta`` and step before anything is restored; raises
            if this run does not continue that one (loop and seed are compared anyway, and, unless
            it is a branch, the learning rate that the last finished step had).

        Returns:
          (state, number of finished steps)
        """
        self.program, self.total_steps = program, program.total_steps
        self.reporter.total_steps = program.total_steps
        checkpoints, step = self._checkpointer, self._checkpointer.latest()
        if step is None and (steps := checkpoints.steps()):
            raise CheckpointError(
                f"the checkpoints in {self.directory.checkpoints} (steps {steps}) are all "
                "damaged: move them away to start afresh"
            )
        if step is None and self._run.branch_from:
            _, checkpoints, step = open_run(self._run.branch_from)
            self._branch = Branch(self._run.branch_from, checkpoints.meta(step)["config"])
        if step is None:
            key = rng.fold(self._run.seed, 0, "parameters")
            return program.initial_state(key, given), 0
        meta = checkpoints.meta(step)
        if (loop := meta["artifact"]["loop"]) != self._config.loop:
            raise CheckpointError(
                f"step {step} was made by the loop {loop}, not {self._config.loop}"
            )
        if (seed := meta["config"]["run"]["seed"]) != self._run.seed:
            raise CheckpointError(f"run.seed was {seed} and is {self._run.seed}: set it back")
        check(meta, step)
        if self._branch is None:
            check_rates(program.learnings, meta["rates"], step, self.directory.name)
        state, _ = checkpoints.restore(step, program.state_like)
        self.carried = checkpoints.carried(step)
        self._finished = step
        return state, step

    def describe(
        self,
        config: Any,
        artifact: Description,
        processor: Mapping[str, Processor],
        header: Mapping[str, Any],
        *,
        units: Mapping[str, str] | None = None,
        meta: Mapping[str, Any] | None = None,
    ):
        """Fixes what the run is, once it is known to be able to go on, and shows the header.

        Args:
          config: the resolved configuration, written to the run directory and every checkpoint.
          artifact: what every checkpoint is, for whoever loads it.
          processor: what the artifact names, kept with the run.
          header: what to show.
          units: metric -> what it is measured in (``nats per token``), for pictures.
          meta: JSON-able facts that a resumed run must agree with (see ``start``).

        Raises:
          ConfigError: the finished steps were made with other settings.
        """
        if self._run.branch_from:
            artifact = replace(artifact, origin=f"all of {self._run.branch_from}")
        self._meta = {
            "config": to_plain(config),
            "config_hash": config_hash(config),
            "artifact": artifact.plain(),
            **(meta or {}),
        }
        changed = continue_configuration(
            self.directory, config, self._finished, self.program.total_steps, self._branch
        )
        if self._again:
            self.reporter.resumed(self._finished)
        if self.primary:
            for name, part in processor.items():
                part.save(self.directory.path / name)
        devices = self.sharding.mesh.devices.flat
        sizes = [f"{axis} {n}" for axis, n in self.sharding.mesh.shape.items() if n > 1]
        self.reporter.header(
            {
                **environment(),
                "devices": f"{len(devices)} x {devices[0].device_kind}",
                "mesh": " x ".join(sizes) or "one device",
                "processes": jax.process_count(),
                **header,
            },
            units=units,
        )
        if self._branch:
            self.reporter.event(f"a branch of {self._branch.name} after step {self._finished}")
        for text in changed:
            self.reporter.event(text)
        self._watchdog.start()
        self._clock = time.perf_counter()

    def recorded(self, step: int, name: str) -> bool:
        """Whether an evaluation of this name was made after ``step`` steps, by this process's or
        an earlier one's records."""
        records = read_metrics(self.directory.metrics)
        return any((r["event"], r["step"], r.get("name")) == ("eval", step, name) for r in records)

    # --- every step ----------------------------------------------------------------------------

    def before(self, step: int):
        """Call before the step with this 0-based number is dispatched.

        Raises:
          RestartRequested, KeyboardInterrupt: SIGTERM, SIGINT came; the state is saved.
        """
        if self._leave:
            self._watchdog.allow(distributed.TIMEOUT_S, "its last save")
            self._checkpointer.wait()
            if self._stop.exit_code == ExitCode.INTERRUPTED:
                raise KeyboardInterrupt
            raise RestartRequested(f"stopped after step {step}: start the same command to go on")
        self._profiler.before_step(step)

    def finished(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, Any],
        data_wait: float = 0.0,
        carried: Callable[[], Mapping[str, np.ndarray]] = dict,
        work: Work | None = None,
    ):
        """Call with every step's results, computed or still being computed.

        Reports the step before this one, so that the device never waits for the host; saves when a
        checkpoint is due, or a stop was asked for: the next step is then not begun.

        Args:
          step: steps finished, this one included.
          data_wait: seconds the host waited for this step's data.
          carried: what the host must have to go on after this step and no function of the step
            gives (rollouts), as arrays of any shapes; asked for when a checkpoint is saved.
          work: of this step, where steps are not alike; None for the program's.

        Raises:
          DivergedError: too many non-finite steps in a row.
        """
        self.flush()
        self._pending = (step, metrics, data_wait, work or self.program.work)
        self._stalls.begun = step
        if self._profiler.after_step(step - 1, metrics):
            self.reporter.event(
                f"profile of {self._run.profile.steps} steps written to {self.directory.profile}"
            )
        stop = self._stop.requested(step)
        if stop or self._checkpointer.due(step) or step == self.total_steps:
            with self.aside():
                rates = {k: v for k, v in self._values.items() if k.partition("/")[0] == "lr"}
                meta = self._meta | {"rates": rates}
                self._checkpointer.save(step, state, meta, carried())
        self._leave = stop and step < self.total_steps

    def flush(self):
        """Waits for the step last given to ``finished`` and reports it."""
        if self._pending is None:
            return
        step, metrics, data_wait, work = self._pending
        self._pending = None
        self._values = values = {k: v.item() for k, v in jax.device_get(dict(metrics)).items()}
        self._reported = step
        self._progress()
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        peak = work.peak_flops(self.sharding)
        done = step * work.count if work.done is None else work.done
        rates = {work.unit: done, "step_s": seconds}
        rates[f"{work.unit}_per_s"] = work.count / seconds
        rates["data_wait_s"] = data_wait
        if work.flops and peak:
            rates["mfu"] = work.flops / seconds / peak
        self.reporter.step(step, values | rates)
        for text in self.watch(step, values):
            self.reporter.event(text)
        check_skipped(values.get("skipped", 0), self._run.max_skipped, step)

    @contextmanager
    def aside(self):
        """For work between two steps (an evaluation): it does not count as a step's time."""
        self.flush()
        self._watchdog.allow(_ASIDE_S)
        yield
        self._progress()
        self._clock = time.perf_counter()

    def _progress(self):
        self._watchdog.beat()
        if self._reported == self.total_steps:  # what is left are evaluations, samples, pictures
            self._watchdog.allow(_ASIDE_S)
