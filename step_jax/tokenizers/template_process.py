"""The process that runs chat templates.

A template is a program that somebody else wrote. It runs in a process of its own
(`template_worker.py`): Jinja's sandbox, limits on memory, output and template size, and an end by
force when it takes too long, which no check inside the same process could promise.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from step_jax.core.errors import DataError

MAX_OUTPUT_CHARACTERS = 16 * 2**20
MAX_SECONDS = 10.0  # of a processor; on a busy machine that takes longer
_PATIENCE = 20  # times as long at most
MAX_BYTES = 2**29
_WORKER = Path(__file__).with_name("template_worker.py")


class TemplateProcess:
    """The process that runs templates, started when first asked and after every failure."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy in another process starts its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def ask(self, request: str, what: str) -> dict[str, Any]:
        """The reply to a request; raises `DataError` if there is none in time."""
        with self._lock:
            if (
                self._process is None
                or self._owner != os.getpid()
                or self._process.poll() is not None
            ):
                self._process, self._owner = _start(), os.getpid()
                weakref.finalize(self, _stop, self._process, self._owner)
            try:
                reply = _exchange(self._process, request.encode() + b"\n", MAX_SECONDS)
            except TimeoutError:
                problem = f"did not end within {MAX_SECONDS:.0f} s"
            except (OSError, EOFError):
                problem = f"needed more than {MAX_BYTES // 2**20} MiB of memory, or crashed"
            else:
                return json.loads(reply)
            _stop(self._process, self._owner)
            self._process = None
        raise DataError(f"{what} {problem}: the chat template may not be meant for this")


def _start() -> subprocess.Popen[bytes]:
    limits = [str(MAX_BYTES), str(MAX_OUTPUT_CHARACTERS)]
    # -P keeps this folder off the path; of the environment nothing but the path is handed on.
    return subprocess.Popen(
        [sys.executable, "-P", str(_WORKER), *limits],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={k: v for k, v in os.environ.items() if k in ("PYTHONPATH", "PATH", "SYSTEMROOT")},
    )


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner == os.getpid():  # a forked copy has the pipes, but not the process
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _worked(pid: int) -> float:
    """Processor seconds of a process; those of a clock where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _exchange(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> bytes:
    """Writes a line and reads one. Raises TimeoutError when the process has worked for so many
    seconds, and EOFError if it has ended."""
    assert process.stdin and process.stdout
    into, out = process.stdin.fileno(), process.stdout.fileno()
    os.set_blocking(into, False)
    started, worked = time.monotonic(), _worked(process.pid)
    deadline, reply = started + seconds, bytearray()
    while not reply.endswith(b"\n"):
        left = deadline - time.monotonic()
        readable, writable, _ = select.select([out], [into] if request else [], [], max(left, 0))
        if left <= 0 or not (readable or writable):
            left = seconds - (_worked(process.pid) - worked)
            if left <= 0 or time.monotonic() - started > _PATIENCE * seconds:
                raise TimeoutError
            deadline = time.monotonic() + left
            continue
        if writable:
            request = request[os.write(into, request[:65536]) :]
        if readable:
            got = os.read(out, 65536)
            if not got:
                raise EOFError
            reply += got
    return bytes(reply)
