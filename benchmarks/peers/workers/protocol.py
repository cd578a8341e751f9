"""What the workers of step_time.py share; standard library only, runs in every peer's Python.

A worker prepares, warms up, then runs as many steps as each line of its standard input says and
answers with one JSON line. Its own prints go to standard error.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time

_replies = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


def arguments() -> dict:
    """The shapes, from the command line."""
    return json.loads(sys.argv[1])


def cpu_seconds() -> float:
    """User and system time of all threads of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


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
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        reply(wall=time.perf_counter() - wall, cpu=cpu_seconds() - cpu, peak_mb=peak_mb)
