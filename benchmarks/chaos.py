"""Kill a run with SIGKILL at random moments, resume it, and compare the loss curve bit for bit.

    python benchmarks/chaos.py --kills 20 --processes 1 -- \\
        step-jax pretrain configs/quickstart.yaml --run.directory {run_dir}

The command is everything after ``--``. ``{run_dir}`` is replaced, and with several processes the
usual variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, besides the
placeholders ``{coordinator}``, ``{processes}`` and ``{process}``. The run must write
``metrics.jsonl`` with records {"step": ..., "loss": ...} into its run directory.

First the command runs undisturbed. Then it runs again and again in new run directories, with a
SIGKILL at a random moment between its start and its expected end (with several processes: to one
of them, the others follow a moment later, as a cluster's supervisor would do), and is started
again until it ends by itself. Every record of every run, also of steps that were taken twice,
must equal the undisturbed run's in all bits.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path


@dataclasses.dataclass
class Curve:
    losses: dict[int, set[str]]  # step -> bit patterns of all records
    torn: int  # lines cut off by a kill
    records: int


def read_curve(run_dir: Path) -> Curve:
    """Losses by step as hexadecimal float64 bits, so that -0.0, NaN and last bits count."""
    curve = Curve(collections.defaultdict(set), 0, 0)
    path = run_dir / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            curve.torn += 1
            continue
        if isinstance(record, dict) and "step" in record and "loss" in record:
            curve.losses[record["step"]].add(struct.pack(">d", record["loss"]).hex())
            curve.records += 1
    return curve


def differences(reference: Curve, curve: Curve) -> list[str]:
    """Steps whose losses are missing, extra or not equal in all bits."""
    found = []
    for step in sorted(reference.losses.keys() | curve.losses.keys()):
        expected, got = reference.losses.get(step, set()), curve.losses.get(step, set())
        if expected != got:
            found.append(f"step {step}: {sorted(expected)} undisturbed, {sorted(got)} after kills")
    return found


def launch(command: list[str], run_dir: Path, processes: int, log: Path) -> list[subprocess.Popen]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{s.getsockname()[1]}"
    runs = []
    for index in range(processes):
        values = {
            "{run_dir}": str(run_dir),
            "{coordinator}": coordinator,
            "{processes}": str(processes),
            "{process}": str(index),
        }
        words = []
        for word in command:
            for name, value in values.items():
                word = word.replace(name, value)
            words.append(word)
        environment = dict(os.environ)
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": coordinator,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        with open(log, "ab") as out:
            runs.append(subprocess.Popen(words, stdout=out, stderr=out, env=environment))
    return runs


def wait_all(runs: list[subprocess.Popen], seconds: float) -> bool:
    """Whether all ended within the time."""
    deadline = time.monotonic() + seconds
    for run in runs:
        try:
            run.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    return True


def kill_all(runs: list[subprocess.Popen], rng: random.Random) -> None:
    first = rng.choice(runs)
    first.send_signal(signal.SIGKILL)
    time.sleep(rng.uniform(0.0, 0.5) if len(runs) > 1 else 0.0)
    for run in runs:
        run.kill()
        run.wait()


def require_success(runs: list[subprocess.Popen], log: Path) -> None:
    codes = [run.returncode for run in runs]
    if any(codes):
        tail = log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"FAILED: the command ended with {codes}; end of its output:\n{tail}")


def disturbed_run(
    command: list[str],
    run_dir: Path,
    processes: int,
    kills: int,
    duration: float,
    rng: random.Random,
    limit: float,
) -> int:
    """One run to its end with at most ``kills`` kills on the way; returns how many there were."""
    log, done = run_dir.with_suffix(".log"), 0
    while True:
        runs = launch(command, run_dir, processes, log)
        moment = rng.uniform(0.0, duration) if done < kills else limit
        if wait_all(runs, moment):
            require_success(runs, log)
            return done
        kill_all(runs, rng)
        if done == kills:
            raise SystemExit(f"FAILED: {run_dir.name} did not end within {limit:.0f} s")
        done += 1
        steps = read_curve(run_dir).losses
        print(f"kill {done:3} after {moment:6.1f} s, newest logged step {max(steps, default=0)}")


def chaos(
    command: list[str], directory: Path, processes: int, kills: int, per_run: int, seed: int
) -> bool:
    """Whether every run resumed after every kill with the undisturbed loss curve."""
    rng = random.Random(seed)
    reference_dir = directory / "undisturbed"
    log = directory / "undisturbed.log"
    begin = time.monotonic()
    runs = launch(command, reference_dir, processes, log)
    for run in runs:
        run.wait()
    duration = time.monotonic() - begin
    require_success(runs, log)
    reference = read_curve(reference_dir)
    if not reference.losses:
        raise SystemExit(f"FAILED: no loss records in {reference_dir / 'metrics.jsonl'}")
    print(f"undisturbed: {len(reference.losses)} logged steps in {duration:.1f} s")
    done, number, equal, extra, torn = 0, 0, True, 0, 0
    while done < kills:
        number += 1
        run_dir = directory / f"killed-{number}"
        planned = min(per_run, kills - done)
        done += disturbed_run(
            command, run_dir, processes, planned, duration, rng, 10 * duration + 300
        )
        curve = read_curve(run_dir)
        extra += curve.records - len(curve.losses)
        torn += curve.torn
        for line in (different := differences(reference, curve))[:10]:
            print(f"  {run_dir.name}: {line}")
        equal &= not different
    print(
        f"{done} kills of {processes} process(es), seed {seed}: {done}/{done} resumed in {number} "
        f"runs; steps taken again: {extra}, torn log lines: {torn}; "
        f"loss curves {'bit-equal to' if equal else 'DIFFERENT from'} the undisturbed run"
    )
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per-run", type=int, default=5, help="kills before a run may finish")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="keep the runs here")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND ... {run_dir} ...")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not any("{run_dir}" in word for word in command):
        parser.error("the command after -- must contain {run_dir}")
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        arguments = (options.processes, options.kills, options.per_run, options.seed)
        return 0 if chaos(command, directory, *arguments) else 1


if __name__ == "__main__":
    sys.exit(main())
