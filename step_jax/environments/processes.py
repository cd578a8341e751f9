"""Ending processes together with all that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

_MOST_ROUNDS = 200


def end_children(pid: int) -> int:
    """Ends every process below ``pid``, which stays; returns how many there were.

    Each is stopped before any is killed, so that none starts another meanwhile. Children that are
    this process's own are collected. Without /proc it does nothing.
    """
    found: set[int] = set()
    for _ in range(_MOST_ROUNDS):
        new = _below(pid) - found
        for child in new:
            _signal(child, signal.SIGSTOP)
        if not new:
            break
        found |= new
    for child in found:
        _signal(child, signal.SIGKILL)
    if found and pid == os.getpid():
        deadline = time.monotonic() + 5
        while _below(pid) and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.001)
    return len(found)


def end_tree(pid: int) -> None:
    """Ends a process that leads a group, the group, and every process below."""
    _signal(pid, signal.SIGSTOP)
    end_children(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    _signal(pid, signal.SIGKILL)


def _below(pid: int) -> set[int]:
    if sys.platform != "linux":
        return set()
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                with contextlib.suppress(OSError):
                    with open(f"/proc/{parent}/task/{task}/children") as file:
                        children = {int(child) for child in file.read().split()}
                    waiting += children - found
                    found |= children
    return found


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
