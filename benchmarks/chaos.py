"""Faults at random moments of runs, of a seed; every run must go on and end in the same bits.

    python benchmarks/chaos.py WORK --faults 300                 every loop below, 1 to 3 processes
    python benchmarks/chaos.py WORK --faults 20 --processes 2 -- \\
        step-jax pretrain configs/quickstart.yaml --run.directory {run_dir}
    python benchmarks/chaos.py WORK --report                     what was injected so far

First each case (a command and a number of processes) runs undisturbed. Then it runs again and again
in new directories. At a moment of a start a process gets a signal, is frozen, or the disk fills up;
between two starts a file that the next one reads is damaged. What a fault ends is started again
until the run ends by itself. It counts as survived if

* a start ends in time, with an exit code that a launcher starts again (or that says what was asked
  for: 73 of a full disk, 130 of Ctrl-C),
* nothing has to be repaired by hand, and
* at the end the log has each step once, with every number equal to the undisturbed run's in all
  bits, but for what clocks measure.

The command is everything after ``--``; ``{run_dir}`` is replaced. Several processes are started as
``step_jax.launch.local`` starts them. Runs lie on a small file system of their own where one can be
mounted (root), or the disk does not fill up. The same command goes on where it was stopped:
``WORK/ledger.jsonl`` has a line for every run that ended.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chaos_cases import Case, loops

#: what every start may end with: done, saved, full disk, hang, lost process, signals
GOOD = {0, 42, 73, 75, 130, 134, 137, 139, 143}
#: seconds in which a start has to end after its fault, on a machine with much other work
LIMIT_S = 180.0
#: a start that ended as if a process was lost, or hung, without a fault: a machine that lets a
#: process wait for ten seconds looks so to the others
UNPROVOKED = "unprovoked"
_POLL_S = 0.05
_DISK_MB = 96


# --- what a run leaves ---------------------------------------------------------------------------


def read_curve(run_dir: Path) -> dict[str, Any]:
    """Step -> its numbers as hexadecimal float64 bits, so that -0.0, NaN and last bits count.

    A step that is there twice has the text of both. What clocks measure is left out.
    """
    curve: dict[str, Any] = {}
    path = run_dir / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and "loss" in record and record.get("event") != "eval":
                step = str(record["step"])
                curve[step] = (curve[step] + " and " if step in curve else "") + _bits(record)
    return curve


def _bits(record: dict[str, Any]) -> str:
    numbers = {
        name: struct.pack(">d", float(value)).hex()
        for name, value in record.items()
        if name not in ("event", "time", "step", "mfu") and not name.endswith("_s")
    }
    return json.dumps(numbers, sort_keys=True)


def differences(reference: dict[str, Any], curve: dict[str, Any]) -> list[str]:
    """Steps whose numbers are missing, extra or not equal in all bits."""
    steps = sorted(reference.keys() | curve.keys(), key=int)
    return [
        f"step {step}: {reference.get(step)} undisturbed, {curve.get(step)} after faults"
        for step in steps
        if reference.get(step) != curve.get(step)
    ]


def newest_step(run_dir: Path) -> int:
    """The last step in the log of a run that may be writing it."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 4096))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, TypeError):
            return int(json.loads(line)["step"])
    return 0


# --- a start -------------------------------------------------------------------------------------

_SEVERAL = """
import os, sys
from step_jax.launch.ranks import Signals, run
with Signals() as signals:
    outcome = run(sys.argv[2:], int(sys.argv[1]), signals, os.environ)
print("ranks ended with", outcome.codes, "culprit", outcome.culprit, file=sys.stderr)
sys.exit(outcome.code)
"""


class Start:
    """One start of a case: its processes, while they live.

    Attributes:
      run_dir: of the run.
      disk: the file system that it lies on, if that may be filled.
    """

    def __init__(self, case: Case, run_dir: Path, log: Path, disk: Path | None):
        words = [word.replace("{run_dir}", str(run_dir)) for word in case.command]
        if case.processes > 1:
            words = [sys.executable, "-c", _SEVERAL, str(case.processes), *words]
        self.run_dir, self.disk, self._count = run_dir, disk, case.processes
        with open(log, "ab") as out:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, process_group=0
            )

    @property
    def ranks(self) -> list[int]:
        """The ids of the processes that run the command."""
        pid = self._process.pid
        if self._count == 1:
            return [pid]
        try:
            return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except OSError:
            return []

    def send(self, number: int, rng: random.Random) -> None:
        """A signal to one of the processes."""
        ranks = self.ranks
        if ranks and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(ranks), number)

    def ended(self, seconds: float) -> int | None:
        """The exit code, in a shell's form, once it has ended; None if it goes on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(max(0.0, seconds))
            return 128 - code if code < 0 else code
        return None

    def destroy(self) -> None:
        """Ends what is left of it at once."""
        for pid in [*self.ranks, self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


# --- faults while it runs ------------------------------------------------------------------------


def _crash(start: Start, rng: random.Random) -> None:
    start.send(rng.choice((signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)), rng)


def _power(start: Start, rng: random.Random) -> None:
    start.destroy()


def _stop(start: Start, rng: random.Random) -> None:
    start.send(signal.SIGTERM, rng)


def _interrupt(start: Start, rng: random.Random) -> None:
    start.send(signal.SIGINT, rng)


def _twice(start: Start, rng: random.Random) -> None:
    for _ in range(2):
        start.send(signal.SIGTERM, rng)
        time.sleep(rng.uniform(0.0, 0.5))


def _grace(start: Start, rng: random.Random) -> None:
    start.send(signal.SIGTERM, rng)
    start.ended(rng.uniform(0.0, 1.5))
    start.destroy()


def _freeze(start: Start, rng: random.Random) -> None:
    """Shorter than others wait for a sign of life, or longer: then they end, and it is ended."""
    frozen = rng.choice(start.ranks or [0])
    if not frozen:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(frozen, signal.SIGSTOP)
        start.ended(rng.choice((1.0, 3.0, 25.0) if len(start.ranks) > 1 else (1.0, 3.0)))
        os.kill(frozen, signal.SIGCONT)


def _full(start: Start, rng: random.Random) -> None:
    """Another program takes all of the disk but a little, for a moment or until the run ends."""
    assert start.disk is not None
    left = rng.choice((0, 4096, 100_000))
    filler = start.disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while (free := shutil.disk_usage(start.disk).free) > left:
            file.write(bytes(min(1 << 20, free - left)))
    start.ended(rng.choice((0.5, 3.0, LIMIT_S)))
    filler.unlink()


ENDS: dict[str, Callable[[Start, random.Random], None]] = {
    "crash": _crash,
    "power": _power,
    "stop": _stop,
    "interrupt": _interrupt,
    "twice": _twice,
    "grace": _grace,
    "freeze": _freeze,
    "full": _full,
}
#: after these a run may go on, to its next fault
GO_ON = {"freeze", "full"}


# --- damage between two starts -------------------------------------------------------------------


def spoil(path: Path, rng: random.Random) -> str:
    """Flips a bit of a file, cuts it, empties it or deletes it; says which."""
    data = bytearray(path.read_bytes())
    how = rng.choice(("flip", "cut", "zero", "delete"))
    if how == "delete" or not data:
        path.unlink()
        return "delete"
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[rng.randrange(len(data)) :]
    else:
        data[:] = bytes(len(data))
    path.write_bytes(data)
    return how


def _checkpoint(run_dir: Path, work: Path, rng: random.Random) -> str | None:
    """Of the newest step, if there is another to go on from that was left alone."""
    known = run_dir / "spoilt"  # by inode: a step may be saved again
    spoilt = known.read_text().split() if known.exists() else []
    steps = sorted(p for p in run_dir.glob("checkpoints/*") if p.name.isdigit())
    whole = [step for step in steps if str(step.stat().st_ino) not in spoilt]
    if len(whole) < 2:
        return None
    path = rng.choice(sorted(p for p in whole[-1].rglob("*") if p.is_file()))
    known.write_text(" ".join([*spoilt, str(whole[-1].stat().st_ino)]))
    return f"{spoil(path, rng)} {path.relative_to(run_dir)}"


def _cache(run_dir: Path, work: Path, rng: random.Random) -> str | None:
    """Tokens, and what is known of source files."""
    files = sorted(p for p in (work / "cache").rglob("*") if p.is_file())
    path = rng.choice(files) if files else None
    return f"{spoil(path, rng)} {path.relative_to(work)}" if path else None


def _programs(run_dir: Path, work: Path, rng: random.Random) -> str | None:
    """Compiled programs of JAX's cache."""
    files = sorted(p for p in (work / "programs").glob("*-cache") if p.is_file())
    path = rng.choice(files) if files else None
    return f"{spoil(path, rng)} {path.relative_to(work)}" if path else None


def _torn(run_dir: Path, work: Path, rng: random.Random) -> str | None:
    """The log ends in half a record."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return None
    with open(path, "ab") as file:
        file.write(b'{"event": "step", "step": 7, "loss": 1.2345'[: rng.randrange(1, 43)])
    return "half a record"


def _leftovers(run_dir: Path, work: Path, rng: random.Random) -> str | None:
    """What a killed process leaves: half a checkpoint, a half written file, a lock."""
    if not run_dir.exists():
        return None
    half = run_dir / "checkpoints" / ".tmp-00000123"
    half.mkdir(parents=True, exist_ok=True)
    (half / "step.json").write_bytes(b'{"step"')
    (run_dir / ".config.yaml.host.1.tmp").write_bytes(b"run:")
    (run_dir / "lock").write_bytes(rng.choice((b"", b'{"host": "gone", "pid": 1', b"\0" * 100)))
    return "half a checkpoint, a half written file, a lock"


DAMAGES: dict[str, Callable[[Path, Path, random.Random], str | None]] = {
    "checkpoint": _checkpoint,
    "cache": _cache,
    "programs": _programs,
    "torn": _torn,
    "leftovers": _leftovers,
}


# --- a run with its faults -----------------------------------------------------------------------


class Soak:
    """Cases in turn, one disturbed run each, until enough faults were injected."""

    def __init__(
        self, work: Path, cases: Sequence[Case], seed: int, per_run: int, kinds: Sequence[str] = ()
    ):
        """``kinds``: the faults that are injected; all that can be, if it is empty."""
        self.work, self.cases, self.seed, self.per_run = work, cases, seed, per_run
        self.runs, self.disk = _small_disk(work)
        self.ends = [k for k in ENDS if (not kinds or k in kinds) and (self.disk or k != "full")]
        self.damages = [k for k in DAMAGES if not kinds or k in kinds]
        self.ledger = work / "ledger.jsonl"

    def until(self, faults: int) -> bool:
        """Whether every run of the ledger, at its end, survived all of its faults."""
        done = collections.Counter(record["case"] for record in read_ledger(self.work))
        while count_faults(self.work) < faults:
            case = min(self.cases, key=lambda case: done[case.name])
            record = self.run(case, done[case.name])
            done[case.name] += 1
            with open(self.ledger, "a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{count_faults(self.work)} of {faults}", flush=True)
        print(report(self.work))
        return all(record["problem"] is None for record in read_ledger(self.work))

    def run(self, case: Case, number: int) -> dict[str, Any]:
        """A run to its end, with faults on the way, as a line of the ledger."""
        rng = random.Random(f"{self.seed} {case.name} {number}")
        reference = self.undisturbed(case)["curve"]
        run_dir, log = self.runs / f"{case.name}-{number}", self.work / f"{case.name}-{number}.log"
        shutil.rmtree(run_dir, ignore_errors=True)  # of an earlier try
        log.unlink(missing_ok=True)
        began, faults, problem = time.time(), [], None
        code = None
        while code != 0 and problem is None:
            most = max(0, self.per_run - len(faults))
            while most and self.damages and rng.random() < 0.7:
                faults += self._damage(run_dir, rng)
            new, code, problem = self._start(case, run_dir, log, rng, most)
            faults += new
            print(f"{case.name}-{number}: {code} after {new}", flush=True)
        different = [] if problem else differences(reference, read_curve(run_dir))
        if different:
            problem = "; ".join(different[:3])
        if problem is None:
            shutil.rmtree(run_dir, ignore_errors=True)
            log.unlink()
        else:
            print(f"PROBLEM in {case.name}-{number}: {problem}", flush=True)
            if run_dir.exists():
                shutil.copytree(run_dir, self.work / "problems" / run_dir.name, dirs_exist_ok=True)
            shutil.rmtree(run_dir, ignore_errors=True)
        return {
            "case": case.name, "number": number, "processes": case.processes, "faults": faults,
            "seconds": round(time.time() - began, 1), "problem": problem,
        }  # fmt: skip

    def undisturbed(self, case: Case) -> dict[str, Any]:
        """Curve and seconds of a run that nothing disturbs, made once."""
        path = self.work / "undisturbed" / f"{case.name}.json"
        if path.exists():
            return json.loads(path.read_text())
        run_dir, log = self.runs / f"{case.name}-undisturbed", self.work / f"{case.name}.log"
        shutil.rmtree(run_dir, ignore_errors=True)
        began = time.monotonic()
        code = Start(case, run_dir, log, None).ended(3600.0)
        if code != 0 or not (curve := read_curve(run_dir)):
            raise SystemExit(f"FAILED: {case.name} ended with {code}:\n{_tail(log)}")
        seconds = time.monotonic() - began
        shutil.rmtree(run_dir)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"seconds": seconds, "curve": curve}))
        return json.loads(path.read_text())

    def _damage(self, run_dir: Path, rng: random.Random) -> list[dict[str, Any]]:
        """One, if there is anything to damage yet."""
        kind = rng.choice(self.damages)
        what = DAMAGES[kind](run_dir, self.work, rng) if run_dir.exists() else None
        return [] if what is None else [{"kind": kind, "what": what}]

    def _start(
        self, case: Case, run_dir: Path, log: Path, rng: random.Random, most: int
    ) -> tuple[list[dict[str, Any]], int | None, str | None]:
        """(at most so many faults of one start, how it ended, what is wrong with that)."""
        reference = self.undisturbed(case)
        faults: list[dict[str, Any]] = []
        code, began = None, time.monotonic()
        start = Start(case, run_dir, log, self.disk)
        try:
            goes_on = True
            while code is None and goes_on and len(faults) < most:
                kind = rng.choice(self.ends)
                comes = self._moment(rng, began, newest_step(run_dir), reference)
                while code is None and not comes(newest_step(run_dir)):
                    code = start.ended(_POLL_S)
                if code is None:
                    faults.append({"kind": kind, "step": newest_step(run_dir)})
                    ENDS[kind](start, rng)
                    goes_on = kind in GO_ON
            hit = time.monotonic()
            if code is None:
                code = start.ended(LIMIT_S + 20 * reference["seconds"])
            if not faults and code in (75, 134):
                faults.append({"kind": UNPROVOKED, "step": newest_step(run_dir)})
            if faults:
                faults[-1] |= {"code": code, "seconds": round(time.monotonic() - hit, 1)}
            if code in (GOOD if faults else {0}):
                return faults, code, None
            how = "it did not end" if code is None else f"exit code {code}"
            return faults, code, f"{how} after {faults}\n{_tail(log)}"
        finally:
            start.destroy()

    @staticmethod
    def _moment(
        rng: random.Random, began: float, before: int, reference: dict[str, Any]
    ) -> Callable[[int], bool]:
        """Whether a fault comes, by the newest step: at a time of the start, or at a step."""
        steps = len(reference["curve"])
        if rng.random() < 0.4 or before >= steps - 2:
            due = max(began, time.monotonic() - 1) + rng.uniform(0.0, reference["seconds"])
            return lambda step: time.monotonic() > due
        wanted = rng.randrange(before + 1, min(steps, before + 1 + max(2, steps // 4)))
        return lambda step: step >= wanted


def _small_disk(work: Path) -> tuple[Path, Path | None]:
    """Where runs lie, and the file system there that may be filled."""
    place = work / "disk"
    place.mkdir(parents=True, exist_ok=True)
    if not os.path.ismount(place):
        command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "tmpfs", str(place)]
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(command, capture_output=True, check=False)
    if not os.path.ismount(place):
        print("no file system can be mounted: the disk does not fill up", flush=True)
        return place, None
    (place / "filler").unlink(missing_ok=True)
    return place, place


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:] if log.exists() else ""


# --- what was done -------------------------------------------------------------------------------


def read_ledger(work: Path) -> list[dict[str, Any]]:
    path = work / "ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def count_faults(work: Path) -> int:
    """Of the ledger's runs, without what nobody injected."""
    faults = (fault for record in read_ledger(work) for fault in record["faults"])
    return sum(fault["kind"] != UNPROVOKED for fault in faults)


def report(work: Path) -> str:
    """A table of kinds by case, and what was not survived."""
    records = read_ledger(work)
    by_case: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for record in records:
        by_case[record["case"]].update(fault["kind"] for fault in record["faults"])
    kinds = [k for k in (*ENDS, *DAMAGES, UNPROVOKED) if any(by_case[case][k] for case in by_case)]
    lines = [f"| case | runs | {' | '.join(kinds)} | all |", "|---" * (len(kinds) + 3) + "|"]
    for case, counts in by_case.items():
        runs = sum(record["case"] == case for record in records)
        cells = [str(counts[kind]) for kind in kinds]
        lines.append(f"| {case} | {runs} | {' | '.join(cells)} | {counts.total()} |")
    bad = [record for record in records if record["problem"]]
    lines.append("")
    lines.append(
        f"{count_faults(work)} faults in {len(records)} runs, {len(bad)} not survived; "
        f"{len(records) - len(bad)} runs ended in the bits of undisturbed ones"
    )
    lines += [f"{r['case']}-{r['number']}: {r['problem'].splitlines()[0]}" for r in bad]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="keeps runs, what they share and the ledger")
    parser.add_argument("--faults", type=int, default=300, help="until so many were injected")
    parser.add_argument("--per-run", type=int, default=12, help="before a run may finish")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="of a command after --")
    parser.add_argument("--report", action="store_true", help="only say what was done so far")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, command = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    work = options.work.absolute()
    if options.report:
        print(report(work))
        return 0
    work.mkdir(parents=True, exist_ok=True)
    if command and not any("{run_dir}" in word for word in command):
        parser.error("the command after -- must contain {run_dir}")
    own = [Case("command", tuple(command), options.processes)]
    soak = Soak(work, own if command else list(loops(work)), options.seed, options.per_run)
    return 0 if soak.until(options.faults) else 1


if __name__ == "__main__":
    sys.exit(main())
