"""Who makes which part of a corpus: processes of this machine and other hosts, together.

Nobody is told of the others. Whoever needs a corpus takes a part that is not there and that nobody
holds, until all are there: a file lock holds it, which falls with its process, and in an object
store an object that says since when. Where neither is known to another, both make the part, which
is the same bytes; each begins somewhere else, so that this is rare.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname

import step_jax
from step_jax.core.hardware import cores
from step_jax.core.storage import ABSENT, Objects, together
from step_jax.data.left_out import too_many_bad
from step_jax.data.parts import Part, PartMeta, Work, first_skips, read_part
from step_jax.data.remote import exists, obtain, publish
from step_jax.tokenizers.base import ENCODING_THREADS

_CLAIM = "claim"
#: after which a claim counts as of a host that is gone: this, and the part at this speed
_PATIENCE_S, _SLOWEST_BYTES_S = 60.0, 2.0**20
_POLL_S = 0.5
#: between two lines of progress: at least so many seconds, and this share of the time so far
_LINE_S, _LINE_SHARE = 10.0, 0.1


@dataclass(frozen=True)
class Place:
    """Where parts are made, and where they are kept for other machines. Can be sent to a process.

    folder: of this machine, or of several.
    kept: None for nowhere.
    """

    folder: Path
    kept: Objects | None = None

    def of(self, part: Part) -> Path:
        return self.folder / part.name

    def attempt(self, work: Work, part: Part) -> bool:
        """Makes a part, or gets it.

        Returns:
          Whether it is there; not if another process is making it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(self.folder / f".{part.name}.lock", "a") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return read_part(self.of(part)) is not None or self._got(work, part)
        except BlockingIOError:
            return False
        except FileNotFoundError:  # another host was done with the whole, and removed the folder
            return False

    def _got(self, work: Work, part: Part) -> bool:
        if self.kept is None:
            work.make(part, self.of(part))
            return True
        kept = self.kept / part.name
        if self._obtained(part):
            return True
        if not _claimed(kept, part.size):
            return False
        try:
            work.make(part, self.of(part))
            publish(self.of(part), kept)
        finally:
            kept.delete([_CLAIM])
        return True

    def _obtained(self, part: Part) -> bool:
        there = self.kept is not None and obtain(self.kept / part.name, self.of(part))
        return there and read_part(self.of(part)) is not None

    def fetch(self, parts: Sequence[Part]) -> None:
        """Copies the parts that are kept, several at a time."""
        if self.kept is not None:
            whole = exists(self.kept)
            names = {part.name: part for part in parts if part.name in whole}
            together(lambda name: self._obtained(names[name]), names)


def _claimed(kept: Objects, size: int) -> bool:
    """Takes a part in an object store, unless another host has taken it and may be at work.

    On the same host its lock is ours, so whoever took it is gone.
    """
    generation = kept.generation(_CLAIM)
    if generation != ABSENT and (content := kept.get(_CLAIM)) is not None:
        try:
            taken = json.loads(content)
            age = abs(time.time() - float(taken["since"]))
            ours = taken["host"] == gethostname()
        except (ValueError, KeyError, TypeError):
            age, ours = 0.0, True
        if not ours and age < _PATIENCE_S + size / _SLOWEST_BYTES_S:
            return False
    claim = {"host": gethostname(), "since": time.time()}
    return kept.write(_CLAIM, json.dumps(claim).encode(), instead_of=generation) is not None


def make_parts(
    work: Work,
    parts: Sequence[Part],
    place: Place,
    *,
    workers: int | None,
    report: Callable[[str], None],
    elsewhere: Callable[[], bool] = lambda: False,
) -> None:
    """Sees to it that all parts are there; those that are there already are not made again.

    Args:
      workers: processes that make them; None for as many as there are cores and parts. One is this
        process itself.
      elsewhere: whether another host has meanwhile done all there is to do.

    Raises:
      DataError: see `Work.make`; the parts that are finished by then stay.
    """
    place.fetch(parts)
    known = {part.name: read_part(place.of(part)) for part in parts}
    missing = [part for part in parts if known[part.name] is None]
    bad = sum(meta.counters.get("records_bad", 0) for meta in known.values() if meta)
    begin = int(hashlib.sha256(gethostname().encode()).hexdigest(), 16) % len(parts)
    missing.sort(key=lambda part: (part.index < begin, part.index))
    if missing:
        found = len(parts) - len(missing)
        more = f", {found} of {len(parts)} parts are there" if found else ""
        report(f"tokenising {work.source.path} ({_number_of_files(parts)} files{more})")
    progress = _Progress(work.source.path, len(parts), missing, report)
    if workers is None:
        workers = cores()
    with _attempts(work, place, min(workers, len(missing))) as attempt:
        while missing:
            made, missing = attempt(missing), []
            for part, there in made:
                if elsewhere():
                    return
                if not there or (meta := read_part(place.of(part))) is None:
                    missing.append(part)
                    continue
                progress.add(part, meta)
                bad += meta.counters.get("records_bad", 0)
                if bad > work.config.max_bad_records:
                    first = first_skips((place.of(part) for part in parts), bad=True)
                    raise too_many_bad(work.source, work.config, f"The first: {first}")
            if missing:
                progress.wait(len(missing))
                time.sleep(_POLL_S)


def _number_of_files(parts: Sequence[Part]) -> int:
    return len({file.name for part in parts for file, _ in part.sections})


class _Progress:
    """Says how far a source is, less and less often."""

    def __init__(
        self, path: str, parts: int, missing: Sequence[Part], report: Callable[[str], None]
    ):
        self.path, self.parts, self.report = path, parts, report
        self.left = {part.name: part.size for part in missing}
        self.size, self.tokens = sum(self.left.values()), 0
        self.began = self.said = time.monotonic()
        self.waits = False

    def add(self, part: Part, meta: PartMeta) -> None:
        self.left.pop(part.name)
        self.tokens += meta.counters.get("tokens", 0) + meta.counters.get("heldout_tokens", 0)
        now = time.monotonic()
        spent = now - self.began
        if now - self.said < max(_LINE_S, _LINE_SHARE * spent) or not self.left:
            return
        self.said, left = now, sum(self.left.values())
        self.report(
            f"{self.path}: {self.parts - len(self.left):,} of {self.parts:,} parts, "
            f"{self.tokens / spent:,.0f} tokens/s, about "
            f"{in_words(spent * left / max(1, self.size - left))} left"
        )

    def wait(self, parts: int) -> None:
        if not self.waits:
            self.report(
                f"{self.path}: waiting for {parts:,} of {self.parts:,} parts, which others make"
            )
            self.waits = True


def in_words(seconds: float) -> str:
    """A time in its largest unit."""
    for unit, of_one in (("h", 3600), ("min", 60)):
        if seconds >= 2 * of_one:
            return f"{seconds / of_one:.0f} {unit}"
    return f"{seconds:.0f} s"


@contextmanager
def _attempts(
    work: Work, place: Place, workers: int
) -> Iterator[Callable[[Sequence[Part]], Iterator[tuple[Part, bool]]]]:
    """A function that attempts parts and gives each, as it ends, with whether it is there."""
    if workers <= 1:
        yield lambda parts: ((part, place.attempt(work, part)) for part in parts)
        return
    helpers: queue.SimpleQueue[_Helper] = queue.SimpleQueue()
    started = [_Helper(work, place, max(1, cores() // workers)) for _ in range(workers)]
    for helper in started:
        helpers.put(helper)

    def attempt(part: Part) -> bool:
        helper = helpers.get()
        try:
            return helper.attempt(part)
        finally:
            helpers.put(helper)

    def all_of(parts: Sequence[Part]) -> Iterator[tuple[Part, bool]]:
        futures = {threads.submit(attempt, part): part for part in parts}
        for future in as_completed(futures):
            yield futures[future], future.result()

    with ThreadPoolExecutor(workers) as threads:
        try:
            yield all_of
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for helper in started:
                helper.end()


class _Helper:
    """A process that makes parts; see ``part_worker.py``."""

    def __init__(self, work: Work, place: Place, threads: int):
        self.work, self.place, self.ended = work, place, False
        roots = [str(Path(step_jax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "step_jax.data.part_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, roots)), ENCODING_THREADS: str(threads)},
            start_new_session=True,  # a terminal's Ctrl-C is for this process, which ends them
        )
        self.told = False

    def attempt(self, part: Part) -> bool:
        """As `Place.attempt`. What a process fails of is tried here, where an error is raised."""
        try:
            assert self.process.stdin and self.process.stdout
            if not self.told:
                pickle.dump((self.work, self.place), self.process.stdin)
                self.told = True
            pickle.dump(part, self.process.stdin)
            self.process.stdin.flush()
            if reply := self.process.stdout.readline():
                return json.loads(reply)
        except (OSError, ValueError, pickle.PicklingError):
            pass
        if self.ended:
            return False
        return self.place.attempt(self.work, part)

    def end(self) -> None:
        self.ended = True
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                assert pipe is not None
                pipe.close()
            except OSError:  # what was not written yet
                pass
