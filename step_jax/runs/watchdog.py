"""Ends a run that hangs: stacks of all threads to stderr, then exit code 75."""

from __future__ import annotations

import collections
import faulthandler
import statistics
import time
from typing import Any

from step_jax.core.errors import ExitCode
from step_jax.runs import exit_timer
from step_jax.runs.preemption import is_interactive

_NAME_S = 0.1  # between the line that says whose stacks follow, and the stacks
_DUMP_S = 3  # time for the stack dump between the two timers


class HangWatchdog:
    """Ends the process if no `beat` arrives within max(factor x median interval, floor_s).

    Both the dump of all stacks and the exit happen in C threads, so a thread that holds the GIL
    for ever is caught as well. JAX itself never notices a rank that hangs. An interactive process
    (a notebook) holds more than the run: there the stacks are all, and it goes on.

    Args:
      name: whose stacks they are, where several processes write to one output.
      floor_s: never shorter than this many seconds.
      factor: allowed multiple of the median interval of the last 64 beats.
      first_s: allowance before the second beat after `start`, which includes compilation.
    """

    def __init__(
        self,
        floor_s: float = 300.0,
        factor: float = 20.0,
        first_s: float = 3600.0,
        name: str = "this process",
    ):
        self._floor, self._factor, self._first = floor_s, factor, first_s
        self._name = name
        self._intervals: collections.deque[float] = collections.deque(maxlen=64)
        self._last: float | None = None
        self._armed_at, self._armed_for = 0.0, 0.0
        self._aside = "its preparation"
        self._exits = True
        self._exit: exit_timer.CTimer | None = None
        self._complaint: exit_timer.CTimer | None = None

    def __enter__(self) -> HangWatchdog:
        self._exits = not is_interactive()
        # Elsewhere faulthandler's own exit (code 1) has to do.
        if exit_timer.available() and self._exits:
            self._exit = exit_timer.CTimer("_exit", ExitCode.HANG)
        self._complaint = exit_timer.complaint(
            f"{self._name} makes no progress; this is where its threads are:"
        )
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        for timer in (self._exit, self._complaint):
            if timer is not None:
                timer.delete()

    @property
    def limit_s(self) -> float:
        """Seconds without a beat after which the process ends."""
        if len(self._intervals) < 2:
            return max(self._first, self._floor)
        return max(self._floor, self._factor * self.median_s)

    @property
    def median_s(self) -> float:
        """Of the last intervals; 0 before the second."""
        return statistics.median(self._intervals) if len(self._intervals) > 1 else 0.0

    @property
    def aside(self) -> str:
        """What is done that has an allowance of its own; nothing where steps are."""
        return self._aside or ("its first steps" if len(self._intervals) < 2 else "")

    @property
    def quiet_s(self) -> float | None:
        """Seconds since the last beat; None where what is done has an allowance of its own: before
        the third beat (compilation), in an evaluation, in a save."""
        return None if self.aside or self._last is None else time.monotonic() - self._last

    def beat(self) -> None:
        """Progress was made: a finished step, a finished evaluation."""
        now = time.monotonic()
        self._aside = ""
        if self._last is not None:
            self._intervals.append(now - self._last)
        self._last = now
        # Re-arming starts a C thread: once per hundredth of the limit is precise enough.
        if now - self._armed_at > self._armed_for / 100:
            self._arm(now, self.limit_s)

    def start(self) -> None:
        """Steps begin: the first has the allowance for it, whatever was allowed before."""
        self._arm(time.monotonic(), self.limit_s)

    def allow(self, seconds: float, what: str = "an evaluation or a save") -> None:
        """The next beat may take so long: ``what`` is done, which is no step."""
        self._aside = what
        self._arm(time.monotonic(), max(seconds, self.limit_s))
        self._armed_for = 0.0  # whatever comes next has the usual limit again

    def _arm(self, now: float, limit: float) -> None:
        self._armed_at, self._armed_for = now, limit
        # Descriptor 2: sys.stderr itself may have none in notebooks and under test runners.
        faulthandler.dump_traceback_later(
            limit + _NAME_S, exit=self._exits and self._exit is None, file=2
        )
        if self._complaint is not None:
            self._complaint.set(limit)
        if self._exit is not None:
            self._exit.set(limit + _DUMP_S)
