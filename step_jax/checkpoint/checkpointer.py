"""Asynchronous, sharded, verified checkpoints of one run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from step_jax.checkpoint import arrays, manifest
from step_jax.checkpoint.config import CheckpointConfig
from step_jax.checkpoint.errors import (
    CorruptCheckpoint,
    NonFiniteState,
)
from step_jax.checkpoint.manifest import Place
from step_jax.checkpoint.places import steps_at
from step_jax.core.distributed import Processes
from step_jax.core.errors import (
    CheckpointError,
    RestartRequested,
    StepError,
    from_kind,
    kind_of,
)
from step_jax.core.storage import Objects

_INFO = "step.json"
_CARRIED = "carried"  # where the host's arrays hang beside the state's
_instances = itertools.count()


@dataclasses.dataclass
class _Save:
    """One save on its way to the disk."""

    key: str
    step: int
    flat: dict[str, Any]  # emptied once written, so that the arrays are freed
    info: dict[str, Any]
    started: float
    stall: float = 0.0
    response: Any = None
    finite: Any = None
    error: Exception | None = None

    def start(self, path: Place) -> None:
        try:
            self.finite = arrays.all_finite(self.flat)
            self.response = arrays.start_write(path, self.flat)
        except Exception as e:  # noqa: BLE001 - the other processes must hear of it first
            self.error = e

    def finish(self) -> None:
        if self.error is not None:
            raise self.error
        self.response.result()
        if math.isnan(abs(complex(self.finite))):
            raise NonFiniteState("the state holds NaN or infinity: not committed")


class Checkpointer:
    """Saves and restores the state of one run; use it in a ``with`` statement.

    Every process of the run makes one and calls the same methods in the same order. Leaving the
    ``with`` block waits for the save under way and raises if the newest save failed, also when the
    block is left by ``sys.exit`` or `RestartRequested`: a lost save never ends in a clean exit.

    Args:
      directory: on a file system that all processes share, or ``gs://``, ``s3://``.
      config: interval and retention.
      on_event: gets one line per event (saved, failed, damaged); may be called from a thread.
      before_commit: called by process 0, perhaps in a thread, when all of a step is written and
        before it exists; if it raises, the save has failed.

    Raises:
      ConfigError: a URL of an object store that is not known.
    """

    def __init__(
        self,
        directory: str | os.PathLike | Objects,
        config: CheckpointConfig | None = None,
        on_event: Callable[[str], None] | None = None,
        before_commit: Callable[[], None] = lambda: None,
    ):
        self.config = config or CheckpointConfig()
        self._saved = steps_at(directory)
        self._directory = self._saved.root
        self._before_commit = before_commit
        self._event = on_event or logging.getLogger("step_jax.checkpoint").warning
        self._processes = Processes(f"checkpoint/{next(_instances)}")
        self._rounds = itertools.count()
        self._last_key = "none"
        self._open = False
        self._snapshot = arrays.HostSnapshot()
        self._jobs: queue.SimpleQueue[_Save | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._newest: int | None = None  # step that is safe on disk, as saved or restored by us
        self._failure: StepError | None = None
        self._failures = 0
        self._intact: dict[int, tuple] = {}  # step -> file signature when its checksums matched
        self._damaged: set[int] = set()

    # -- saving ---------------------------------------------------------------------------------

    def __enter__(self) -> Checkpointer:
        self._processes.together(
            self._key("open"), lambda: None, lambda _: self._saved.clean(self._event)
        )
        self._open = True
        # One thread for all saves: starting one hands it the GIL, for 20 ms in a busy moment.
        self._worker = threading.Thread(target=self._work, name="checkpoint")
        self._worker.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self._open = False
        self._jobs.put(None)
        self._worker.join()
        clean_exit = error is None or isinstance(error, SystemExit | RestartRequested)
        if clean_exit and self._failure is not None:
            raise self._failure

    def due(self, step: int) -> bool:
        """Whether the interval asks for a save after this many finished steps."""
        return step % self.config.every_steps == 0

    def save(
        self,
        step: int,
        state: Any,
        meta: dict[str, Any],
        carried: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Start saving; returns when ``state`` may be donated to the next step.

        A save that fails (now or later, in the background) is reported as an event and the run
        goes on to the next interval; `wait` and the end of the ``with`` block raise it unless a
        later save succeeded, and so does this method after ``config.max_failures`` in a row.

        Args:
          step: finished optimizer steps; a step that is already on disk is not written again.
          state: tree of `jax.Array` (or NumPy) leaves, sharded in any way.
          meta: JSON-able; committed together with the arrays.
          carried: arrays of any shapes that the host carries from step to step (`carried`); every
            process gives the same ones.

        Raises:
          DiskFullError, NonFiniteState, CheckpointError: after max_failures failures in a row.
          CheckpointError: a leaf is not an array, or ``meta`` is not JSON.
        """
        if not self._open:
            raise CheckpointError("save() outside of `with Checkpointer(...)` could be lost")
        self._join()
        self._raise_if_hopeless()
        if self._newest == step:
            return
        flat = arrays.flatten(state)
        flat |= {f"{_CARRIED}.{name}": a for name, a in (carried or {}).items()}
        info = {"step": step, "leaves": arrays.describe(flat), "meta": meta}
        try:
            json.dumps(info)
        except (TypeError, ValueError) as e:
            raise CheckpointError(f"checkpoint metadata is not JSON: {e}") from e
        jax.block_until_ready(flat)  # what is waited for here is training, not saving
        job = _Save(self._key("save"), step, flat, info, time.perf_counter())
        try:
            self._prepare(job)
        except Exception as e:  # noqa: BLE001 - reported, and raised when it counts
            self._failed(job, e)
            self._raise_if_hopeless()
            return
        self._processes.forget(self._last_key)  # everybody has left the last save by now
        self._last_key = job.key
        # Orbax's start-up takes 25 ms of Python. The thread may do it unless it also has to copy
        # from devices before the next donation, or to meet other processes in a collective.
        snapshot = self._snapshot.take(flat) if self._processes.count == 1 else None
        if snapshot is None:
            job.start(self._saved.unfinished(step))
        else:
            job.flat = snapshot
        job.stall = time.perf_counter() - job.started
        self._idle.clear()
        self._jobs.put(job)

    def wait(self) -> None:
        """Wait for the save under way. Raises if the newest save failed."""
        self._join()
        if self._failure is not None:
            raise self._failure

    def _join(self) -> None:
        self._idle.wait()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._finish(job)
            self._idle.set()

    def _raise_if_hopeless(self) -> None:
        if self._failure is not None and self._failures >= self.config.max_failures:
            raise self._failure

    def _prepare(self, job: _Save) -> None:
        size = arrays.nbytes(job.flat)
        need = size + size // 50 + (64 << 10)  # array index, metadata, manifest

        def prepare(_: list) -> None:
            if name := self._saved.prepare(job.step, need):
                self._say_aside(job.step, name)

        self._processes.together(f"{job.key}/prepared", lambda: None, prepare)

    def _finish(self, job: _Save) -> None:
        path = self._saved.unfinished(job.step)

        def write() -> None:
            if job.response is None and job.error is None:
                job.start(path)
            job.finish()

        def describe(_: list) -> list[str]:
            arrays.join(path)
            self._saved.write(job.step, _INFO, json.dumps(job.info).encode())
            return manifest.list_files(path)

        def commit(parts: list) -> None:
            entries = {name: entry for part in parts for name, entry in part.items()}
            self._before_commit()
            self._publish(job.step, entries)

        everyone = self._processes
        try:
            files = everyone.together(f"{job.key}/written", write, describe)
            size = arrays.nbytes(job.flat)
            job.flat = {}
            share = files[everyone.index :: everyone.count]
            everyone.together(
                f"{job.key}/hashed", lambda: manifest.hash_files(path, share, sync=True), commit
            )
        except Exception as e:  # noqa: BLE001 - reported, and raised when it counts
            job.flat = {}
            self._failed(job, e)
            return
        self._newest, self._failure, self._failures = job.step, None, 0
        if everyone.index == 0:
            took = time.perf_counter() - job.started
            self._event(
                f"checkpoint: step {job.step} saved, {size / 1e6:.1f} MB in {took:.2f} s, "
                f"training waited {job.stall * 1e3:.1f} ms"
            )
            self._retain(job.step)

    def _failed(self, job: _Save, error: Exception) -> None:
        self._failures += 1
        message = f"checkpoint of step {job.step} failed: {error}"
        kind = kind_of(error)
        known = kind != StepError.__name__
        self._failure = from_kind(kind, message) if known else CheckpointError(message)
        self._failure.__cause__ = error
        if self._processes.index == 0:
            self._event(f"{message} (failure {self._failures} of {self.config.max_failures})")
            try:
                self._saved.discard(job.step)
            except StepError as e:  # the store that fails; the next start removes it
                self._event(f"checkpoint: step {job.step} could not be removed: {e}")

    def _publish(self, step: int, entries: dict[str, manifest.Entry]) -> None:
        if step in manifest.committed_steps(self._directory):
            self._set_aside(step)
        self._saved.commit(step, entries)
        for later in manifest.committed_steps(self._directory):
            if later > step:  # the run restarted from an older step: this branch is the run now
                self._set_aside(later)

    def _set_aside(self, step: int) -> None:
        self._say_aside(step, self._saved.set_aside(step))

    def _say_aside(self, step: int, name: str) -> None:
        why = "damaged" if step in self._damaged else "the run went on from an older step"
        self._damaged.discard(step)
        self._event(f"checkpoint: old step {step} set aside as {name} ({why})")

    def _retain(self, newest: int) -> None:
        """Delete what the policy does not keep; only ever called after ``newest`` is verified."""
        steps = [s for s in manifest.committed_steps(self._directory) if s not in self._damaged]
        every = self.config.keep_every
        for step in steps[: -self.config.keep]:
            if step == newest or (every and step % every == 0):
                continue
            try:
                self._saved.delete(step)
            except (OSError, StepError) as e:
                self._event(f"checkpoint: could not delete old step {step}: {e}")

    # -- restoring ------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Committed steps, ascending, verified or not."""
        return self._processes.together(
            self._key("steps"),
            lambda: None,
            lambda _: manifest.committed_steps(self._directory),
        )

    def latest(self) -> int | None:
        """The newest step whose every file matches its checksum; None if there is none.

        Damaged steps are reported as events and left where they are.
        """
        for step in reversed(self.steps()):
            if not self._problems(step):
                return step
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """The metadata that was saved with a step. Raises like `restore`."""
        return self._info(step)["meta"]

    def carried(self, step: int) -> dict[str, np.ndarray]:
        """The arrays that the host carried when a step was saved. Raises like `restore`."""
        leaves = self._info(step)["leaves"]
        wanted = {
            name: np.broadcast_to(np.zeros((), dtype), shape)
            for name, (shape, dtype) in leaves.items()
            if name.startswith(f"{_CARRIED}.")
        }
        loaded = arrays.read(self._step_dir(step), wanted)
        return {name.removeprefix(f"{_CARRIED}."): np.asarray(a) for name, a in loaded.items()}

    def restore(
        self, step: int | None, abstract_state: Any, *, subtree: str = ""
    ) -> tuple[Any, dict[str, Any]]:
        """Load a verified step on any mesh and number of processes.

        Args:
          step: None takes `latest`.
          abstract_state: tree of `jax.ShapeDtypeStruct` (or arrays) of the saved structure; each
            leaf arrives on its ``.sharding``, or as a NumPy array if that is None.
          subtree: dotted path of the part that ``abstract_state`` describes, such as ``params``.

        Returns:
          (state, meta as saved)

        Raises:
          CheckpointError: there is no verified step.
          CorruptCheckpoint: the step asked for is damaged; names the files.
          CheckpointMismatch: a leaf is missing, extra, or of another shape or dtype.
        """
        if step is None and (step := self.latest()) is None:
            raise CheckpointError(f"no verified checkpoint in {self._directory}")
        info = self._info(step)
        wanted = arrays.flatten(abstract_state, subtree)
        stored = {
            name: leaf
            for name, leaf in info["leaves"].items()
            if (not subtree and not name.startswith(f"{_CARRIED}."))
            or name == subtree
            or name.startswith(f"{subtree}.")
        }
        where = f"checkpoint {self._step_dir(step)}"
        arrays.check_match(stored, arrays.describe(wanted), where)
        loaded = arrays.read(self._step_dir(step), wanted)
        if not subtree:
            self._newest = step
        treedef = jax.tree.structure(abstract_state)
        return jax.tree.unflatten(treedef, [loaded[name] for name in wanted]), info["meta"]

    def _info(self, step: int) -> dict[str, Any]:
        if problems := self._problems(step):
            raise CorruptCheckpoint(
                f"checkpoint {self._step_dir(step)} is damaged: {_brief(problems)}"
            )
        return json.loads(manifest.read_file(self._step_dir(step), _INFO))

    def _problems(self, step: int) -> list[str]:
        """What is wrong with a step; checksums are computed once as long as no file changes."""
        everyone, step_dir, key = self._processes, self._step_dir(step), self._key("verify")
        now = manifest.signature(step_dir)
        if everyone.together(f"{key}/known", lambda: None, lambda _: self._intact.get(step) == now):
            return []

        def compare() -> list[str]:
            try:
                entries = manifest.read_manifest(step_dir)
            except CorruptCheckpoint as e:
                return [str(e)]
            share = slice(everyone.index, None, everyone.count)
            extra = [] if everyone.index else manifest.unexpected(step_dir, entries)
            return extra + manifest.problems_of(step_dir, entries, share)

        def merge(parts: list) -> list[str]:
            return sorted({problem for part in parts for problem in part})

        problems = everyone.together(f"{key}/compared", compare, merge)
        if not problems:
            self._intact[step] = now
            return []
        if step not in self._damaged and everyone.index == 0:
            self._event(f"checkpoint: step {step} is DAMAGED, not used: {_brief(problems)}")
        self._damaged.add(step)
        return problems

    def _step_dir(self, step: int) -> Place:
        return self._directory / manifest.step_name(step)

    def _key(self, purpose: str) -> str:
        return f"{purpose}/{next(self._rounds)}"


def _brief(problems: list[str]) -> str:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
