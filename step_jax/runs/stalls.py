"""Says where every process stands when no step ends, long before the watchdog ends the run.

A step of several processes hangs in all of them at once, and all that is seen of most is that they
wait for the others. So each publishes where its main thread stands: who does not answer, or stands
anywhere but in the wait for the devices, holds the others up and is named. One that is in an
evaluation or a save takes no step and misses none: it says so when others ask.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol

from step_jax.core.distributed import Processes
from step_jax.runs.watchdog import HangWatchdog

WAITS = "waits for the devices"
_PACKAGE = Path(__file__).parents[1]
_SESSION = Path("runs", "session.py")
_instances = itertools.count()


class Board(Protocol):
    """What all processes can read (`Processes`)."""

    index: int
    count: int

    def publish(self, key: str, value: str) -> None: ...

    def published(self) -> dict[str, str]: ...


class StallNotice:
    """A thread that says, once a stall, who holds up a run: on standard error of every process.

    Args:
      watchdog: knows when the last step ended.
      processes: of the run.
      floor_s: without a step after which it is said; three steps where that is longer.
      answers_s: what the others have to say where they stand. Both together are what a hang takes
        to be noticed: a minute.
      look_s: between two looks at the watchdog. Where no step is expected, two of them pass between
        looks at what others ask.
    """

    def __init__(
        self,
        watchdog: HangWatchdog,
        processes: Board | None = None,
        floor_s: float = 50.0,
        answers_s: float = 6.0,
        look_s: float = 1.0,
    ):
        self._watchdog = watchdog
        self._processes = processes or Processes(f"stalls/{next(_instances)}")
        self._floor, self._answers, self._look = floor_s, answers_s, look_s
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stall-notice", daemon=True)
        self.begun = 0  # steps that this process has given to the devices

    def __enter__(self) -> StallNotice:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(self._answers + 1)

    def _run(self) -> None:
        said_at = -1
        for looks in itertools.count():
            if self._ended.wait(self._look):
                return
            quiet = self._watchdog.quiet_s
            if said_at == self.begun:
                continue
            if quiet is None:
                if looks % 2 and self._answered():
                    said_at = self.begun
            elif quiet > max(self._floor, 3 * self._watchdog.median_s):
                said_at = self.begun
                os.write(2, f"step-jax: {self._report(quiet)}\n".encode())

    def _answered(self) -> bool:
        """Whether others asked where this process is that takes no step; they were told."""
        if self._processes.count == 1:
            return False
        try:
            if not self._near(self._processes.published()):
                return False
            place = standing(sys._current_frames().get(self._main))
            where = "waiting for the devices" if place == WAITS else f"at {place}"
            self._publish(f"{self._watchdog.aside} ({where})")
        except Exception:  # noqa: BLE001 - the process that keeps the board may be gone
            return False
        return True

    def _report(self, quiet: float) -> str:
        place = standing(sys._current_frames().get(self._main))
        head = f"no step ended for {quiet:.0f} s, with {self.begun} begun"
        if self._processes.count == 1:
            return f"{head}: it {place if place == WAITS else 'is at ' + place}"
        try:
            return f"{head}; {verdict(self._gathered(place), self._processes.count)}"
        except Exception as error:  # noqa: BLE001 - the process that keeps the board may be gone
            return f"{head}; the other processes cannot be asked ({error}); this one is at {place}"

    def _gathered(self, place: str) -> dict[int, str]:
        """Where each process that answers stands."""
        # The first that notices asks; all are near the same step. Each answers once for a step.
        self._publish(place)
        deadline = time.monotonic() + self._answers
        while True:
            found = self._near(self._processes.published())
            late = time.monotonic() > deadline
            if len(found) == self._processes.count or late or self._ended.wait(self._look):
                return found

    def _publish(self, place: str) -> None:
        self._processes.publish(f"{self.begun}/{self._processes.index}", place)

    def _near(self, published: Mapping[str, str]) -> dict[int, str]:
        """What processes said at this step, or beside it: dispatch runs a step ahead."""
        found: dict[int, str] = {}
        for key, said in published.items():
            step, _, index = key.partition("/")
            if abs(int(step) - self.begun) <= 1:
                found[int(index)] = said
        return found


def standing(frame: FrameType | None) -> str:
    """Where in this package a thread stands, or that it waits for the devices.

    It does where results are fetched, and in a loop's own call of its compiled step, which has no
    frame of its own and waits where devices take no work ahead.
    """
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(str(_PACKAGE)):
            file = Path(code.co_filename).relative_to(_PACKAGE)
            if file.parts[0] == "trainers" or (file == _SESSION and code.co_name == "flush"):
                return WAITS
            return f"{_PACKAGE.name}/{file}:{frame.f_lineno} in {code.co_name}"
        frame = frame.f_back
    return "code of others"


def verdict(places: Mapping[int, str], count: int) -> str:
    """Who holds the others up, in a sentence.

    Args:
      places: of the processes that answered.
      count: of all processes.
    """
    silent = [index for index in range(count) if index not in places]
    by_place: dict[str, list[int]] = {}
    for index in sorted(places):
        by_place.setdefault(places[index], []).append(index)
    waiting = by_place.pop(WAITS, [])
    parts = [f"{_names(silent)} no answer"] if silent else []
    parts += [f"{_names(indices)} at {place}" for place, indices in by_place.items()]
    if waiting and parts:
        return f"held up by {'; '.join(parts)}; {_names(waiting)} in the wait for the devices"
    if waiting:
        return "all processes wait for the devices: a device, a link, or one that left a collective"
    return "; ".join(parts)


def _names(indices: list[int]) -> str:
    """``process 3:``, ``processes 0-2, 5:``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    text = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    return f"process{'es' if len(indices) > 1 else ''} {text}:"
