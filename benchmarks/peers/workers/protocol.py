"""What the workers of step_time.py and grpo.py share; standard library, runs in any peer's Python.

A worker prepares, warms up, then runs as many steps as each line of its standard input says and
answers with one JSON line. Its own prints go to standard error.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

_replies = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


def arguments() -> dict:
    """The shapes, from the command line."""
    return json.loads(sys.argv[1])


def cpu_seconds() -> float:
    """User and system time so far of all threads of this process and of those that it started."""
    return time.process_time() + sum(map(_of_process, _started(os.getpid())))


def _started(pid: int) -> list[int]:
    """The processes that one started, and those that they did, as far as they live."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *_started(child)]
    return found


def _of_process(pid: int) -> float:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0.0
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def peak_bytes() -> int:
    """The most memory that this process ever held, as Linux counts it for this program alone: the
    peak of ``getrusage`` begins at that of whoever started the process."""
    status = Path("/proc/self/status").read_text()
    (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.M)
    return int(kib) * 1024


def reply(**values) -> None:
    _replies.write(json.dumps(values) + "\n")


class Phases:
    """CPU and wall seconds of the named parts of a turn, ``NAME_cpu`` and ``NAME_wall``."""

    def __init__(self):
        self._spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, name: str):
        """Counts what is done inside, which must be finished when it is left."""
        wall, cpu = time.perf_counter(), cpu_seconds()
        yield
        self._spent[f"{name}_wall"] += time.perf_counter() - wall
        self._spent[f"{name}_cpu"] += cpu_seconds() - cpu

    def wrapped(self, name: str, function):
        """The function, counted."""

        def counted(*args, **kwargs):
            with self.of(name):
                return function(*args, **kwargs)

        return counted

    def taken(self) -> dict[str, float]:
        """What was counted since the last time."""
        spent, self._spent = dict(self._spent), defaultdict(float)
        return spent


def requests(parameters: int, version: str, phases: Phases | None = None, **about):
    """Yields the number of steps to run, until standard input ends.

    What the caller does between two yields is what is timed, so it must wait for its last step.

    Args:
      phases: parts of it that are counted apart.
      about: what else is to be known of the contender.
    """
    phases = phases or Phases()
    reply(parameters=parameters, version=version, started=cpu_seconds(), **about)
    for line in sys.stdin:
        phases.taken()
        wall, cpu = time.perf_counter(), cpu_seconds()
        yield int(line)
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        reply(wall=wall, cpu=cpu, **phases.taken(), peak_mb=peak_bytes() / 2**20)
