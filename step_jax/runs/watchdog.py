"""Ends a run that hangs: stacks of all threads to stderr, then exit code 75."""

from __future__ import annotations

import collections
import ctypes
import faulthandler
import statistics
import sys
import time
from typing import Any

from step_jax.core.errors import ExitCode
from step_jax.runs.preemption import is_interactive

_DUMP_S = 3  # time for the stack dump between the two timers


class _SigEvent(ctypes.Structure):
    # struct sigevent of 64-bit Linux (include/uapi/asm-generic/siginfo.h), SIGEV_THREAD variant.
    _fields_ = [
        ("value", ctypes.c_uint64),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    ]


class _TimerSpec(ctypes.Structure):
    _fields_ = [(n, ctypes.c_long) for n in ("every_s", "every_ns", "value_s", "value_ns")]


class _ExitTimer:
    """A POSIX timer whose C thread calls ``_exit(code)``: needs neither the GIL nor Python."""

    _SIGEV_THREAD = 2
    _CLOCK_MONOTONIC = 1

    def __init__(self, code: int):
        self._libc = ctypes.CDLL(None, use_errno=True)
        function = ctypes.cast(self._libc._exit, ctypes.c_void_p)
        event = _SigEvent(value=code, notify=self._SIGEV_THREAD, function=function)
        self._timer = ctypes.c_void_p()
        if self._libc.timer_create(
            self._CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)
        ):
            raise OSError(ctypes.get_errno(), "timer_create failed")

    def set(self, seconds: float) -> None:
        """Fire after this many seconds; 0 disarms."""
        spec = _TimerSpec(0, 0, int(seconds), int(seconds % 1 * 1e9))
        self._libc.timer_settime(self._timer, 0, ctypes.byref(spec), None)

    def delete(self) -> None:
        self._libc.timer_delete(self._timer)


class HangWatchdog:
    """Ends the process if no `beat` arrives within max(factor x median interval, floor_s).

    Both the dump of all stacks and the exit happen in C threads, so a thread that holds the GIL
    for ever is caught as well. JAX itself never notices a rank that hangs. An interactive process
    (a notebook) holds more than the run: there the stacks are all, and it goes on.

    Args:
      floor_s: never shorter than this many seconds.
      factor: allowed multiple of the median interval of the last 64 beats.
      first_s: allowance before the second beat, which includes compilation.
    """

    def __init__(self, floor_s: float = 300.0, factor: float = 20.0, first_s: float = 3600.0):
        self._floor, self._factor, self._first = floor_s, factor, first_s
        self._intervals: collections.deque[float] = collections.deque(maxlen=64)
        self._last: float | None = None
        self._armed_at, self._armed_for = 0.0, 0.0
        self._exits = True
        self._timer: _ExitTimer | None = None

    def __enter__(self) -> HangWatchdog:
        self._exits = not is_interactive()
        # Elsewhere faulthandler's own exit (code 1) has to do.
        linux = sys.platform == "linux"
        self._timer = _ExitTimer(ExitCode.HANG) if linux and self._exits else None
        self._arm(time.monotonic())
        return self

    def __exit__(self, *_: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._timer is not None:
            self._timer.delete()

    @property
    def limit_s(self) -> float:
        """Seconds without a beat after which the process ends."""
        if len(self._intervals) < 2:
            return max(self._first, self._floor)
        return max(self._floor, self._factor * statistics.median(self._intervals))

    def beat(self) -> None:
        """Progress was made: a finished step, a finished evaluation."""
        now = time.monotonic()
        if self._last is not None:
            self._intervals.append(now - self._last)
        self._last = now
        # Re-arming starts a C thread: once per hundredth of the limit is precise enough.
        if now - self._armed_at > self._armed_for / 100:
            self._arm(now)

    def _arm(self, now: float) -> None:
        limit = self.limit_s
        self._armed_at, self._armed_for = now, limit
        # Descriptor 2: sys.stderr itself may have none in notebooks and under test runners.
        faulthandler.dump_traceback_later(limit, exit=self._exits and self._timer is None, file=2)
        if self._timer is not None:
            self._timer.set(limit + _DUMP_S)
