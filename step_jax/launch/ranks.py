"""One run as several processes of this machine: started, listened to, ended together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from step_jax.core.errors import ExitCode, exit_of

_POLL_S = 0.05
#: seconds that the other ranks have to end by themselves once one has failed (they often fail of
#: the same, each with its message), and then to act on SIGTERM
_OWN_END_S, _TERM_S = 3.0, 2.0
#: seconds that the other ranks have to stop by themselves once one has. All that have joined stop
#: together; who waits for one that stopped before it joined would do so for minutes.
_STOP_S = 10.0
#: seconds that a rank may go on after another has ended well, or after it was asked to stop: longer
#: than the last save and the pictures take
LINGER_S = 1200.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Outcome:
    """How a start ended.

    Attributes:
      code: of the run: the culprit's, else 42 if any rank wants to be started again, else 0.
      codes: of every rank, in the shell's form (128 + n for signal n).
      culprit: the rank that ended all, None if none did.
      reason: in words.
      seconds: from the start to the last rank's end.
    """

    code: int
    codes: tuple[int, ...]
    culprit: int | None
    reason: str
    seconds: float


class Signals:
    """SIGTERM, SIGINT and SIGUSR1 of this process, passed on to the ranks that run: use it with
    ``with``. The first two ask them to stop, the third for a profile.

    The ranks are in process groups of their own. A terminal's Ctrl-C would reach them twice
    otherwise, and a second signal ends a run without saving.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.since = 0.0
        self._ranks: list[subprocess.Popen] = []
        self._told = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._pass_on)
        ask = lambda number, _: send(self._ranks, number)  # noqa: E731
        self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def attach(self, ranks: list[subprocess.Popen]) -> None:
        """From now on signals go to these, and one that came while they were being started."""
        self._ranks = ranks
        if self.received is not None and not self._told:
            self._told = True
            send(ranks, self.received)

    def _pass_on(self, number: int, _: object) -> None:
        if self.received is None:
            self.received, self.since = number, time.monotonic()
        self._told = any(rank.poll() is None for rank in self._ranks)
        send(self._ranks, number)


def run(command: list[str], count: int, signals: Signals, env: Mapping[str, str]) -> Outcome:
    """Starts ``count`` processes of ``command`` that know of each other and waits for all.

    Args:
      command: the words of what each runs.
      env: of every rank, besides the variables by which they find each other.

    Raises:
      OSError: the command cannot be started.
    """
    began = time.monotonic()
    ranks: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []
    place = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    try:
        for index in range(count):
            own = place | {"JAX_PROCESS_ID": str(index)} if count > 1 else {}
            ranks.append(_start(command, {**env, **own}, piped=count > 1))
            readers += _readers(ranks[-1], index)
        signals.attach(ranks)
        culprit, reason = _wait(ranks, signals)
    finally:
        send(ranks, signal.SIGKILL)
    for thread in readers:  # a grandchild may hold the pipe open
        thread.join(_TERM_S)
    codes = tuple(shell_code(rank.wait()) for rank in ranks)
    if culprit is None:
        code = ExitCode.RESTART if ExitCode.RESTART in codes else ExitCode.OK
        reason = exit_of(code).meaning
    else:
        code = ExitCode.HANG if reason else codes[culprit]
        reason = reason or exit_of(code).meaning
    return Outcome(code, codes, culprit, reason, time.monotonic() - began)


def _wait(ranks: list[subprocess.Popen], signals: Signals) -> tuple[int | None, str]:
    """(the first rank that failed or is late, why if its exit code does not say)."""
    first_end: tuple[float, int] | None = None
    told = False
    while any(rank.poll() is None for rank in ranks):
        ended = _ended(ranks)
        culprit = _first_failed(ended)
        if culprit is not None:
            if others := len(ranks) - len(ended):
                say(f"rank {culprit} ended with exit code {ended[culprit]}: ending {others} more")
            by_themselves = _end(ranks)
            if ended[culprit] == ExitCode.ABORTED:  # it may have noticed the lost one first
                culprit = _first_failed(by_themselves)
            return culprit, ""
        now = time.monotonic()
        if ended and first_end is None:
            first_end = (now, next(iter(ended)))
        told |= signals.received is not None
        if first_end and ExitCode.RESTART in ended.values() and not told:
            if told := now - first_end[0] > _STOP_S:
                stopped = next(i for i, code in ended.items() if code == ExitCode.RESTART)
                say(f"rank {stopped} was stopped: stopping {len(ranks) - len(ended)} more")
                send(ranks, signal.SIGTERM)
        alive = next((i for i in range(len(ranks)) if i not in ended), 0)
        if first_end and now - first_end[0] > LINGER_S:
            _end(ranks)
            return alive, f"rank {alive} goes on {LINGER_S:g} s after rank {first_end[1]} ended"
        if signals.received and now - signals.since > LINGER_S:
            _end(ranks)
            return alive, f"rank {alive} goes on {LINGER_S:g} s after it was asked to stop"
        time.sleep(_POLL_S)
    return _first_failed(_ended(ranks)), ""


def _ended(ranks: list[subprocess.Popen]) -> dict[int, int]:
    """Rank -> exit code of those that have ended."""
    return {i: shell_code(r.returncode) for i, r in enumerate(ranks) if r.poll() is not None}


def _first_failed(ended: Mapping[int, int]) -> int | None:
    """Of the ranks that failed the one that the others followed: those of a lost one abort."""
    failed = [i for i, code in ended.items() if code not in (ExitCode.OK, ExitCode.RESTART)]
    return min(failed, key=lambda i: (ended[i] == ExitCode.ABORTED, i), default=None)


def _end(ranks: list[subprocess.Popen]) -> dict[int, int]:
    """Waits a little for the ranks, asks them to stop, and ends them; ranks and exit codes of those
    that were not asked."""
    by_themselves: dict[int, int] = {}
    for number, seconds in ((None, _OWN_END_S), (signal.SIGTERM, _TERM_S), (signal.SIGKILL, None)):
        if number == signal.SIGTERM:
            by_themselves = _ended(ranks)
        if number is not None:
            send(ranks, number)
        deadline = None if seconds is None else time.monotonic() + seconds
        while any(rank.poll() is None for rank in ranks):
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
    return by_themselves


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever listened may be gone; the ranks are not
        print(f"step-jax launch: {text}", file=sys.stderr, flush=True)


def send(ranks: list[subprocess.Popen], number: int) -> None:
    """A signal to every rank that runs, and for SIGKILL to what it started."""
    for rank in ranks:
        if rank.poll() is not None:
            continue
        if number == signal.SIGKILL:
            os.killpg(rank.pid, number)
        else:
            rank.send_signal(number)


def shell_code(returncode: int) -> int:
    """The exit code as a shell gives it."""
    return 128 - returncode if returncode < 0 else returncode


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _start(command: list[str], env: Mapping[str, str], *, piped: bool) -> subprocess.Popen:
    pipe = subprocess.PIPE if piped else None
    return subprocess.Popen(
        command,
        env={**env, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        process_group=0,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )


def _die_with_parent() -> None:
    """A rank whose launcher is killed gets SIGTERM: it saves, and does not stay behind."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _readers(rank: subprocess.Popen, index: int) -> list[threading.Thread]:
    """Threads that print what a rank prints, a line at a time behind its number."""
    pairs: list[tuple[IO[bytes] | None, IO[str]]] = [
        (rank.stdout, sys.stdout),
        (rank.stderr, sys.stderr),
    ]
    threads = [
        threading.Thread(target=_print_lines, args=(pipe, stream, f"[{index}] "), daemon=True)
        for pipe, stream in pairs
        if pipe is not None
    ]
    for thread in threads:
        thread.start()
    return threads


_printing = threading.Lock()


def _print_lines(pipe: IO[bytes], stream: IO[str], prefix: str) -> None:
    for line in pipe:  # to the end, or the rank would wait for somebody to read
        with _printing, contextlib.suppress(OSError):
            stream.write(prefix + line.decode(errors="replace").rstrip("\n") + "\n")
            stream.flush()
