"""A process that verifies: ``python -P -m step_jax.environments.worker BYTES SECONDS``.

Started by `pool.py`, which ends it when a reply takes too long. It ends itself a little later, in
case nobody is there to do it.

It reads a verifier and then lists of (reply, record) pairs, each a pickle of the parent's after its
length in eight bytes. It writes JSON, an object a line, a line for the verifier and for each pair:

  {"ready": true, "confined": bool}      the verifier is loaded
  {"scores": {name: score}, "seconds": time that it took}
  {"failure": reason, "detail": text}

It writes nothing else to the pipe: what the verifier prints goes nowhere. Processes that a verifier
leaves behind are this one's to end, however they were started.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import pickle
import resource
import signal
import sys
import time
from typing import Any

from step_jax.environments import system_calls
from step_jax.environments.processes import end_children

_SUBREAPER = 36  # prctl(PR_SET_CHILD_SUBREAPER): orphans below become this process's children
_LONGEST_DETAIL = 300


def main() -> None:
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # not every system limits memory
        resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
    try:
        verifier = _read(requests)
        verifier.load()
    except Exception as error:
        _write(replies, _failure("load", error))
        return
    confined = verifier.confined and system_calls.confine()
    _write(replies, {"ready": True, "confined": confined})
    while True:
        try:
            samples = _read(requests)
        except EOFError:
            return
        for reply, record in samples:
            signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))
            answer = _verify(verifier, reply, record)
            if _has_children():
                end_children(os.getpid())
            signal.setitimer(signal.ITIMER_REAL, 0)
            _write(replies, answer)


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _verify(verifier: Any, reply: str, record: Any) -> dict[str, Any]:
    pid, begun = os.getpid(), time.perf_counter()
    try:
        scores = verifier.scores(reply, record)
        if odd := {name: score for name, score in scores.items() if not math.isfinite(score)}:
            return {"failure": "not_finite", "detail": str(odd)[:_LONGEST_DETAIL]}
        return {"scores": scores, "seconds": time.perf_counter() - begun}
    except MemoryError as error:
        return _failure("memory", error)
    except (Exception, SystemExit) as error:
        return _failure("error", error)
    finally:
        if os.getpid() != pid:  # the verifier forked, and this is the copy
            os._exit(0)


def _failure(reason: str, error: BaseException) -> dict[str, Any]:
    return {"failure": reason, "detail": f"{type(error).__name__}: {error}"[:_LONGEST_DETAIL]}


def _read(stream: Any) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    return pickle.loads(stream.read(int.from_bytes(head, "little")))


def _write(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


if __name__ == "__main__":
    main()
