"""``metrics.jsonl``: one JSON object a line, appended, never lost to a kill.

Every record has ``event``, ``step`` and ``time`` (seconds since 1970). Values that JSON has no
number for are the strings ``nan``, ``inf`` and ``-inf``.

=========  ====================================================================================
step       numbers by name; the work done since the first step is counted under the name of its
           unit (``tokens``, ``images``), its rate under ``<unit>_per_s``
eval       ``name`` and numbers; a count among them is of what was evaluated
header     ``values``, numbers where there are any; ``shown``: name -> text instead of a number;
           ``units``: metric -> unit
note       ``text``
resumed    the run went on behind this step; ``dropped`` records of later steps
summary    ``values``: the outcome
end        ``status`` (see :mod:`step_jax.runs.history`) and ``reason``: how the process left
=========  ====================================================================================
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from step_jax.core.files import write_whole
from step_jax.core.storage import Objects, is_url, staged

_SYNC_SECONDS = 30.0
#: records that wait for space on a full disk: some megabytes, of more steps than a run survives
_MOST_WAITING = 10_000
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Resumed(NamedTuple):
    """What a log held before a run went on.

    dropped: how many records were forgotten.
    newest: the highest recorded step by kind: ``""`` for steps, else the name of an evaluation.
    """

    dropped: int
    newest: dict[str, int]


class MetricsLog:
    """Appends records. What a full disk does not take waits for the next record; what it has not
    taken when the log is closed costs records (``dropped`` counts them), not the run."""

    def __init__(self, path: Path, *, clock=time.time):
        self.path = path
        self.dropped = 0
        self._waiting: list[bytes] = []
        self._torn = False  # the last line was cut off by a kill
        self._clock = clock
        self._file: Any = None
        self._last_sync = 0.0

    def resume(self, step: int) -> Resumed:
        """Forget what was recorded after ``step``, so that the curve has each step once.

        A line torn by a kill is forgotten too, and a ``resumed`` record is added.
        """
        self.close()
        kept, dropped = [], 0
        newest: dict[str, int] = {}
        for line in _lines(self.path):
            record = _parse(line)
            if record is not None and record["event"] in ("step", "eval"):
                kind = _kind(record)
                newest[kind] = max(newest.get(kind, 0), record.get("step", 0))
            if record is None or record.get("step", 0) > step or record["event"] == "summary":
                dropped += 1
            else:
                kept.append(line)
        write_whole(self.path, "".join(line + "\n" for line in kept))
        self.append("resumed", step, {"dropped": dropped})
        return Resumed(dropped, newest)

    def append(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one record; it survives a killed process at once, a lost machine after 30 s."""
        record = {"event": event, "step": step, "time": round(self._clock(), 3)}
        record |= {key: _plain(value) for key, value in values.items()}
        self._waiting.append((json.dumps(record) + "\n").encode())
        self._write()

    def _write(self) -> None:
        data = b"".join(self._waiting)
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)
                self._torn = self._file.tell() > 0 and not _ends_with_newline(self.path)
            # not where the file stands: that stays behind the end of what was cut off before
            size = os.fstat(self._file.fileno()).st_size
            data = b"\n" * self._torn + data
            written = self._file.write(data)
            if written != len(data):
                os.ftruncate(self._file.fileno(), size)
                raise OSError("short write")
            self._waiting.clear()
            self._torn = False
            now = time.monotonic()
            if now - self._last_sync > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._last_sync = now
        except OSError:
            self.dropped += len(self._waiting[:-_MOST_WAITING])
            del self._waiting[:-_MOST_WAITING]

    def close(self) -> None:
        if self._waiting:
            self._write()
            self.dropped += len(self._waiting)
            self._waiting.clear()
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                self.dropped += error.errno != errno.EINVAL  # of what is no file
            self._file.close()
            self._file = None


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl`` (or of the run directory that holds it), oldest first.

    The directory may be a URL. Torn and foreign lines are left out; a run may be writing the file
    at the moment. What was done twice, because a kill came between its record and the next
    checkpoint, is there once, as it was done last: a step, an evaluation of one name at one step,
    the summary.
    """
    path = staged(Objects.at(str(path)), "metrics.jsonl") if is_url(path) else Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    records = [record for line in _lines(file) if (record := _parse(line)) is not None]
    last = {_subject(record): i for i, record in enumerate(records)}
    return [r for i, r in enumerate(records) if (s := _subject(r)) is None or last[s] == i]


def work_unit(records: Sequence[Mapping[str, Any]]) -> str | None:
    """What a run counts its work in: the number of a step that has a rate beside it.

    ``tokens`` with ``tokens_per_s``, ``images`` with ``images_per_s``; None without any step.
    """
    for record in reversed(records):
        if record["event"] == "step":
            return next((name for name in record if f"{name}_per_s" in record), None)
    return None


def _subject(record: Mapping[str, Any]) -> tuple | None:
    """What a record is the only one about; None if there may be many like it."""
    if record["event"] in ("step", "eval"):
        return _kind(record), record.get("step")
    return ("summary",) if record["event"] == "summary" else None


def _kind(record: Mapping[str, Any]) -> str:
    return record.get("name", "eval") if record["event"] == "eval" else ""


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        return None
    if record["event"] in ("step", "eval"):
        for key, value in record.items():
            if isinstance(value, str) and value in _NON_FINITE:
                record[key] = _NON_FINITE[value]
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
