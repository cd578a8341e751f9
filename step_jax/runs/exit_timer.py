"""Ending the process from a C thread, whatever its Python threads do."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any


class _SigEvent(ctypes.Structure):
    # struct sigevent of 64-bit Linux (include/uapi/asm-generic/siginfo.h), SIGEV_THREAD variant.
    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    ]


class _TimerSpec(ctypes.Structure):
    _fields_ = [(n, ctypes.c_long) for n in ("every_s", "every_ns", "value_s", "value_ns")]


class CTimer:
    """A POSIX timer whose C thread calls a function of libc: needs neither the GIL nor Python."""

    _SIGEV_THREAD = 2
    _CLOCK_MONOTONIC = 1

    def __init__(self, function: str, argument: int | bytes):
        """
        Args:
          function: of one argument, by its name in libc.
          argument: a number, or a text.
        """
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._argument: Any = argument  # a text must live as long as the timer
        if isinstance(argument, bytes):
            self._argument = ctypes.create_string_buffer(argument)
            value = ctypes.addressof(self._argument)
        else:
            value = argument
        called = ctypes.cast(getattr(self._libc, function), ctypes.c_void_p)
        event = _SigEvent(value=value, notify=self._SIGEV_THREAD, function=called)
        self._timer = ctypes.c_void_p()
        if self._libc.timer_create(
            self._CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)
        ):
            raise OSError(ctypes.get_errno(), "timer_create failed")

    def set(self, seconds: float) -> None:
        """Call after this many seconds; 0 disarms."""
        spec = _TimerSpec(0, 0, int(seconds), int(seconds % 1 * 1e9))
        self._libc.timer_settime(self._timer, 0, ctypes.byref(spec), None)

    def delete(self) -> None:
        self._libc.timer_delete(self._timer)


def available() -> bool:
    return sys.platform == "linux"


def complaint(text: str) -> CTimer | None:
    """A timer that, once set, prints a line to standard error, behind the program's name."""
    if not available():
        return None
    return CTimer("warnx", text.replace("%", "%%").encode(errors="replace"))


def rank_name(index: int, count: int) -> str:
    """How a process names itself where several write to one output."""
    where = os.uname().nodename
    return where if count == 1 else f"process {index} of {count} on {where}"
