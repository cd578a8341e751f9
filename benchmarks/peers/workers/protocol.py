"""What the workers of step_time.py share; standard library only, runs in every peer's Python.

A worker prepares, warms up, then runs as many steps as each line of its standard input says and
answers with one JSON line. Its own prints go to standard error.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from pathlib import Path

_replies = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


def arguments() -> dict:
    """The shapes, from the command line."""
    return json.loads(sys.argv[1])


def cpu_seconds() -> float:
    """User and system time of all threads of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_bytes() -> int:
    """The most memory that this process ever held, as Linux counts it for this program alone: the
    peak of ``getrusage`` begins at that of whoever started the process."""
    status = Path("/proc/self/status").read_text()
    (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.M)
    return int(kib) * 1024


def reply(**values) -> None:
    _replies.write(json.dumps(values) + "\n")


def requests(parameters: int, version: str):
    """Yields the number of steps to run, until standard input ends.

    What the caller does between two yields is what is timed, so it must wait for its last step.
    """
    reply(parameters=parameters, version=version)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), cpu_seconds()
        yield int(line)
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        reply(wall=wall, cpu=cpu, peak_mb=peak_bytes() / 2**20)
