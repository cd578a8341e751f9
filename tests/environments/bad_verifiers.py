"""Verifiers that go wrong in the way that a reply names; see ``test_pool.py``."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from step_jax.environments.verifiers import Record, Verifier


@dataclass(frozen=True)
class Moody(Verifier):
    """Does what a reply says, and gives 1; ``folder`` has the names of processes it started."""

    folder: str
    held: bool = False
    kind: ClassVar[str] = "moody"

    @property
    def confined(self) -> bool:
        return self.held

    def score(self, reply: str, record: Record) -> float:
        match reply:
            case "hang":
                while True:
                    pass
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(0)
            case "leave":
                raise SystemExit
            case "raise":
                raise KeyError("lost")
            case "nan":
                return float("nan")
            case "infinite":
                return -float("inf")
            case "memory":
                return float(len([bytes(2**26) for _ in range(10**6)]))
            case "print":
                os.write(1, b'{"scores": {"forged": 100}}\n')
                print("{}")
            case "fork":
                if os.fork() == 0:
                    return 100.0
            case "orphan" | "hanging orphan":
                self._start_orphan()
                while reply == "hanging orphan":
                    time.sleep(1)
            case "write":
                Path(self.folder, "written").touch()
            case "delete":
                Path(self.folder, "precious").unlink()
            case "call":
                socket.create_connection(("127.0.0.1", 9), 1)
            case "start":
                subprocess.run(["true"])
            case "end":
                os.kill(os.getppid(), signal.SIGKILL)
            case "read":
                return float(Path(self.folder, "precious").read_text())
            case "thread":
                thread = threading.Thread(target=time.sleep, args=(0,))
                thread.start()
                thread.join()
            case "alone":
                return float(record["number"])
        return 1.0

    def _start_orphan(self) -> None:
        """A process in a session of its own, whose parent is gone."""
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            Path(self.folder, str(os.getpid())).touch()
            time.sleep(600)
        while not os.listdir(self.folder):
            time.sleep(0.01)


@dataclass(frozen=True)
class NotLoadable(Verifier):
    kind: ClassVar[str] = "not_loadable"

    def load(self) -> None:
        raise ImportError("no module named abacus")

    def score(self, reply: str, record: Record) -> float:
        return 1.0


@dataclass(frozen=True)
class WhatIsLoaded(Verifier):
    """1 if the process has loaded the module that a reply names."""

    kind: ClassVar[str] = "loaded"

    def score(self, reply: str, record: Record) -> float:
        import sys

        return float(reply in sys.modules)
