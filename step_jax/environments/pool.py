"""Worker processes that verify replies, each within a deadline.

A verifier may crash, hang, fork, need all memory or return what is no number: that costs the one
sample, which gets the failure's score and is counted by reason. Its process is ended with all that
it started, and the next sample gets another one.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import queue
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.environments.processes import end_tree
from step_jax.environments.verifiers import Record, Verifier

Failure = Literal["timeout", "crash", "memory", "error", "not_finite"]
FAILURES: tuple[str, ...] = get_args(Failure)

_START_SECONDS = 300.0  # importing is slow on a busy machine
_GRACE_SECONDS = 5.0  # after which a process ends itself, should this one be gone
_LONGEST_ANSWER = 2**20
_LARGEST_CHUNK = 32  # samples that a process is given at once
_DEADLY = ("timeout", "crash", "memory")  # after which a process is not used again


@dataclass(frozen=True)
class PoolConfig:
    """How replies are verified.

    processes: how many at a time.
    seconds: the most that one reply may take.
    memory_mib: address space of a process.
    failure_score: of a reply whose verifier failed.
    """

    processes: int = 2
    seconds: float = 10.0
    memory_mib: int = 4096
    failure_score: float = 0.0

    def validate(self):
        checks.at_least(self, processes=1, memory_mib=64)
        checks.above(self, seconds=0)
        if not abs(self.failure_score) < float("inf"):
            raise ConfigError(f"failure_score is {self.failure_score}; it must be finite")


@dataclass(frozen=True)
class Score:
    """What came of a reply.

    total: the reward, finite.
    parts: name -> what it added to the total; empty after a failure.
    seconds: that it took to verify, or until the failure.
    failure: why there is no score; None if there is one.
    detail: what the process said of the failure.
    """

    total: float
    parts: Mapping[str, float]
    seconds: float
    failure: Failure | None = None
    detail: str = ""


class Pool:
    """Processes that hold one verifier.

    Attributes:
      failures: reason -> how many replies so far.
      restarts: processes that were started in the place of others.
      confined: whether the processes can only read and compute.
    """

    def __init__(self, verifier: Verifier, config: PoolConfig = PoolConfig()):
        """Starts the processes; what the verifier imports is imported once in each of them.

        Raises:
          ConfigError: the verifier cannot be loaded there; the message says why.
        """
        self.verifier, self.config = verifier, config
        self.failures: Counter[str] = Counter()
        self.restarts = 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(config.processes, "verifier")
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        started = [_Process(verifier, config) for _ in range(config.processes)]
        try:
            for process in started:
                process.wait_until_ready()
        except BaseException:
            for process in started:
                process.end()
            self._threads.shutdown(wait=False)
            raise
        self.confined = all(process.confined for process in started)
        for process in started:
            self._idle.put(process)

    def submit(self, reply: str, record: Record) -> Future[Score]:
        """The score to come; replies are verified in the order in which they are submitted."""
        future: Future[Score] = Future()

        def verify() -> None:
            try:
                future.set_result(*self._scores([(reply, record)]))
            except BaseException as error:
                future.set_exception(error)

        self._threads.submit(verify)
        return future

    def score(self, samples: Sequence[tuple[str, Record]]) -> list[Score]:
        """The scores of (reply, record) pairs, in their order."""
        size = min(max(len(samples) // (4 * self.config.processes), 1), _LARGEST_CHUNK)
        chunks = [samples[i : i + size] for i in range(0, len(samples), size)]
        return [score for scores in self._threads.map(self._scores, chunks) for score in scores]

    def close(self) -> None:
        """Ends the processes; what was submitted is done first."""
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().end()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _scores(self, samples: Sequence[tuple[str, Record]]) -> list[Score]:
        """The scores of samples that one process is given together; each has its own deadline."""
        process, scores = self._idle.get(), list[Score]()
        try:
            while len(scores) < len(samples):
                if not process.alive:  # it ended between two samples, which is no sample's fault
                    process = self._replaced(process)
                for score in process.verify(samples[len(scores) :], self.config.seconds):
                    scores.append(self._counted(score))
                    if score.failure in _DEADLY:
                        process = self._replaced(process)
                        break
        finally:
            self._idle.put(process)
        return scores

    def _counted(self, score: Score) -> Score:
        if score.failure is None:
            return score
        with self._lock:
            self.failures[score.failure] += 1
        return replace(score, total=self.config.failure_score)

    def _replaced(self, process: _Process) -> _Process:
        process.end()
        with self._lock:
            self.restarts += 1
        for pause in (0.1, 1.0):  # a machine that is full for a moment
            try:
                return self._started()
            except (ConfigError, OSError):
                time.sleep(pause)
        return self._started()

    def _started(self) -> _Process:
        process = _Process(self.verifier, self.config)
        process.wait_until_ready()
        return process


class _Process:
    """One process of ``worker.py``."""

    def __init__(self, verifier: Verifier, config: PoolConfig):
        self._verifier = verifier
        limits = [str(config.memory_mib * 2**20), str(config.seconds + _GRACE_SECONDS)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "step_jax.environments.worker", *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,
        )
        assert self._process.stdin
        os.set_blocking(self._process.stdin.fileno(), False)
        self._deadline, self._read = 0.0, bytearray()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        self._deadline = time.monotonic() + _START_SECONDS
        answer = self._answer(self._verifier)
        if "ready" not in answer:
            self.end()
            raise ConfigError(
                f"the verifier {self._verifier.kind} cannot be loaded in a process of its own: "
                f"{answer['detail']}"
            )
        self.confined = answer["confined"]

    def verify(self, samples: Sequence[tuple[str, Record]], seconds: float) -> Iterator[Score]:
        """A score of each sample, up to the first after which the process is of no use."""
        request: Any = samples
        for _ in samples:
            begun = time.monotonic()
            self._deadline = begun + seconds
            answer = self._answer(request)
            request = None
            if "scores" in answer:
                scores = answer["scores"]
                yield Score(float(sum(scores.values())), scores, answer["seconds"])
            else:
                took = time.monotonic() - begun
                yield Score(0.0, {}, took, answer["failure"], answer["detail"])

    def _answer(self, request: Any) -> dict[str, Any]:
        """The next line of the process, after a request if there is one to make."""
        try:
            if request is not None:
                content = pickle.dumps(request)
                self._send(len(content).to_bytes(8, "little") + content)
            return json.loads(self._line())
        except TimeoutError:
            return {"failure": "timeout", "detail": "no answer before the deadline"}
        except (OSError, EOFError, ValueError) as error:
            return {"failure": "crash", "detail": str(error)}

    def _send(self, content: bytes) -> None:
        assert self._process.stdin
        into, left = self._process.stdin.fileno(), memoryview(content)
        while left:
            self._wait(into, select.POLLOUT)
            left = left[os.write(into, left[:65536]) :]

    def _line(self) -> bytes:
        assert self._process.stdout
        out = self._process.stdout.fileno()
        while b"\n" not in self._read:
            self._wait(out, select.POLLIN)
            got = os.read(out, 65536)
            self._read += got
            if not got:
                raise EOFError(self._how_it_ended())
            if len(self._read) > _LONGEST_ANSWER:
                raise ValueError(f"an answer of more than {_LONGEST_ANSWER} bytes")
        line, _, rest = bytes(self._read).partition(b"\n")
        self._read = bytearray(rest)
        return line

    def _wait(self, descriptor: int, event: int) -> None:
        left = self._deadline - time.monotonic()
        poll = select.poll()
        poll.register(descriptor, event)
        if left <= 0 or not poll.poll(math.ceil(left * 1000)):
            raise TimeoutError

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "the process closed its pipe"
        return f"the process ended by signal {-code}" if code < 0 else f"it exited with {code}"

    def end(self) -> None:
        end_tree(self._process.pid)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _environment() -> dict[str, str]:
    """The variables of a worker: where Python finds modules, and one thread for each library."""
    kept = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT")
    path = os.pathsep.join(os.path.abspath(place) for place in sys.path)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {k: v for k, v in os.environ.items() if k in kept} | threads | {"PYTHONPATH": path}
