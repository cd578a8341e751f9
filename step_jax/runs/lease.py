"""Who may write a run in an object store: the lock of a run directory, without file locks.

The owner writes the object ``lock`` again every ten seconds, each time on condition that nobody
else has. One that stays as it is for a minute belongs to a process that is gone, and whoever finds
it takes it over. No clocks are compared. An owner that was only slow finds its lock taken when it
writes it next, at the latest before it commits a checkpoint, and its run ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from step_jax.core.errors import ConfigError, StepError, TakenOverError
from step_jax.core.storage import ABSENT, Objects

LOCK = "lock"
_PROBE = "may-write"
BEAT_S = 10.0
PATIENCE_S = 60.0


class Lock(Protocol):
    """What a run holds while it may write."""

    def take(self) -> None:
        """Raises ConfigError if another process has it."""

    def renew(self) -> None:
        """Raises TakenOverError if another process has it by now."""

    def release(self) -> None:
        """Gives it back; one that was lost is left alone."""


class Renewal:
    """A thread that renews a lock, while the context is open, until that shows it to be lost."""

    def __init__(self, lock: Lock, on_lost: Callable[[StepError], None]):
        """``on_lost`` is called in the thread, once."""
        self._lock, self._on_lost = lock, on_lost
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)

    def __enter__(self) -> Renewal:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._thread is not threading.current_thread():
            self._thread.join(PATIENCE_S)

    def _work(self) -> None:
        while not self._closing.wait(BEAT_S):
            try:
                self._lock.renew()
            except TakenOverError as error:
                if not self._closing.is_set():
                    self._on_lost(error)
                return
            except (StepError, OSError) as error:
                # No end of the run yet: that is for the next checkpoint to say, if it lasts.
                logging.getLogger("step_jax.runs").warning("%s", error)


class Lease:
    """The lock of the objects under a URL."""

    def __init__(self, objects: Objects):
        self._objects = objects
        self._generation: bytes | None = None
        self._renewing = threading.Lock()  # a thread does, and whoever commits a checkpoint
        self._owner = this_process()

    def take(self) -> None:
        """Waits up to ``PATIENCE_S`` if the last owner may be gone.

        Raises:
          ConfigError: another process has it, or who asks may not write there.
        """
        found = self._objects.generation(LOCK)
        if found != ABSENT:
            owner = owner_in(self._objects.get(LOCK) or b"")
            alive = lives(owner)
            if alive or (alive is None and self._beats(found)):
                raise ConfigError(self._refusal(owner))
        if self._write(found):
            return
        if self._objects.generation(LOCK) == ABSENT:  # so too fails a condition without a bucket
            self._objects.write(_PROBE, b"")
            self._objects.delete([_PROBE])
        raise ConfigError(self._refusal(owner_in(self._objects.get(LOCK) or b"")))

    def _beats(self, generation: bytes) -> bool:
        """Whether the owner writes its lock again."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(min(BEAT_S / 4, PATIENCE_S / 4))
            if self._objects.generation(LOCK) != generation:
                return True
        return False

    def renew(self) -> None:
        """Raises TakenOverError if another process has taken the lock over."""
        with self._renewing:
            if self._generation is not None and self._write(self._generation):
                return
            self._generation = None
            owner = owner_in(self._objects.get(LOCK) or b"")
            raise TakenOverError(
                f"this process was taken for dead: {self._refusal(owner)}. Nothing more is written"
            )

    def release(self) -> None:
        """Gives the lock back; one that was lost is left alone."""
        if self._generation is not None:
            with contextlib.suppress(TakenOverError):
                self.renew()
                self._objects.delete([LOCK])
            self._generation = None

    def _write(self, instead_of: bytes) -> bool:
        content = json.dumps(self._owner | {"beat": time.time()}).encode()
        made = self._objects.write(LOCK, content, instead_of=instead_of)
        if made is None:
            there = owner_in(self._objects.get(LOCK) or b"")
            if there.get("token") == self._owner["token"]:  # written, and the answer got lost
                made = self._objects.generation(LOCK)
        if made is not None:
            self._generation = made
        return made is not None

    def _refusal(self, owner: Mapping[str, Any]) -> str:
        return refusal(self._objects, owner)


def this_process() -> dict[str, Any]:
    """What a lock says of this process as its owner."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv),
        "machine": _machine(),
        "born": _born(os.getpid()),
        "token": uuid.uuid4().hex,
    }


def refusal(place: Path | Objects, owner: Mapping[str, Any]) -> str:
    """Who has a run directory, in words for another who wants it."""
    who = f"process {owner.get('pid', '?')} on {owner.get('host', 'another machine')}"
    since = f" since {owner['started']}" if "started" in owner else ""
    return (
        f"the run directory {place} is in use by {who}{since}; stop that run or choose another "
        "directory"
    )


def owner_in(content: bytes) -> dict[str, Any]:
    """What a lock says of its owner."""
    try:
        owner = json.loads(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def beats(owner: Mapping[str, Any]) -> bool:
    """Whether a lock says that its owner lives, going by the clocks of both."""
    return abs(time.time() - owner.get("beat", 0)) < PATIENCE_S


def lives(owner: Mapping[str, Any]) -> bool | None:
    """Whether the owner's process runs, None where it is of another machine."""
    if owner.get("machine") != _machine() or not isinstance(owner.get("pid"), int):
        return None
    born = _born(owner["pid"])
    return born is not None and born == owner.get("born")


def _born(pid: int) -> str | None:
    """When a process began, in ticks since this machine did; None for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    """What tells this start of this machine, and this container on it, from all others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex
