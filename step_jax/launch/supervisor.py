"""Starts a run again when that can help: after a saved stop, a hang, a lost process or machine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from step_jax.core.errors import ConfigError, ExitCode, exit_of
from step_jax.launch.ranks import Outcome, Signals, run, say

_LONGEST_WAIT_S = 300.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Restarts:
    """When a run is started again. Exit code 42 (the state is saved) costs nothing of the budget.

    budget: starts after crashes, hangs and lost machines in a row before giving up.
    backoff_s: seconds before a start; they double with every one in a row, up to 300.
    healthy_s: a start that lived so many seconds gives the budget back.
    """

    budget: int = 5
    backoff_s: float = 5.0
    healthy_s: float = 1800.0

    def validate(self) -> None:
        for name in ("budget", "backoff_s", "healthy_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")


class Ledger:
    """A line of JSON for every start: when, how long, each rank's code, whose fault, what next."""

    def __init__(self, path: Path | None):
        self.path = path

    def append(self, start: int, began: float, outcome: Outcome, then: str) -> None:
        if self.path is None:
            return
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began))
        record = {"start": start, "began": stamp, **asdict(outcome), "then": then}
        record["seconds"] = round(outcome.seconds, 3)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # the run is worth more than its ledger
            say(f"the ledger {self.path} cannot be written: {error.strerror}")


def supervise(
    command: list[str],
    count: int,
    restarts: Restarts,
    ledger: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> int:
    """Runs a command as ``count`` processes, as often as ``restarts`` allows.

    SIGTERM and SIGINT go to the processes, and none is started again after one.

    Args:
      env: of the processes (default: this one's).

    Returns:
      The exit code of the last start.

    Raises:
      ConfigError: the command cannot be started.
    """
    book, failures = Ledger(ledger), 0
    with Signals() as signals:
        for start in range(1, 2**31):
            began = time.time()
            try:
                outcome = run(command, count, signals, os.environ if env is None else env)
            except OSError as error:
                raise ConfigError(f"cannot start {command[0]!r}: {error.strerror}") from None
            again = exit_of(outcome.code).again
            if again == "counted":
                failures = 1 if outcome.seconds >= restarts.healthy_s else failures + 1
            elif again == "free":
                failures = 0
            if again == "never" or signals.received:
                then = "stopped" if signals.received else "ended"
            elif failures > restarts.budget:
                then = f"gave up after {restarts.budget} restarts in a row"
            else:
                wait = _wait_s(restarts, failures)
                then = f"start {start + 1} in {wait:g} s"
            book.append(start, began, outcome, then)
            if outcome.code != ExitCode.OK:
                who = "" if outcome.culprit is None else f"rank {outcome.culprit}: "
                say(f"{who}exit code {outcome.code}, {outcome.reason}; {then}")
            if not then.startswith("start ") or not _pause(wait, signals):
                return outcome.code
    raise AssertionError("unreachable")


def _wait_s(restarts: Restarts, failures: int) -> float:
    """Seconds before the next start, the first of a row after ``backoff_s``."""
    return min(restarts.backoff_s * 2 ** max(0, min(failures - 1, 30)), _LONGEST_WAIT_S)


def _pause(seconds: float, signals: Signals) -> bool:
    """Waits; False if a signal came meanwhile."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not signals.received:
        time.sleep(_POLL_S)
    return not signals.received
