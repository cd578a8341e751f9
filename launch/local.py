"""Starts one run as several processes on this machine.

    python launch/local.py 2 -- step-jax pretrain configs/quickstart.yaml --parallel.data 2

The processes find each other on the loopback interface through the variables that
``step_jax.core.distributed`` reads. SIGTERM and SIGINT are passed on to all of them. When one
fails, the others are ended too. The exit code is the first failure's, else 42 if any process wants
to be started again, else 0.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

RESTART = 42
GRACE_SECONDS = 15


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(count: int, command: list[str]) -> list[subprocess.Popen]:
    """``count`` processes of ``command`` that know of each other; only the first one prints."""
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for index in range(count):
        env = {
            **os.environ,
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        processes.append(subprocess.Popen(command, env=env))
    return processes


def wait(processes: list[subprocess.Popen]) -> int:
    """Waits for all; ends the rest once one has failed. Returns the exit code of the run."""
    failed: int | None = None
    deadline = 0.0
    while any(p.poll() is None for p in processes):
        codes = [p.returncode for p in processes if p.returncode not in (None, 0, RESTART)]
        if codes and failed is None:
            failed, deadline = codes[0], time.monotonic() + GRACE_SECONDS
        if failed is not None and time.monotonic() > deadline:
            for p in processes:
                p.kill()
        time.sleep(0.05)
    codes = [p.returncode for p in processes]
    bad = failed or next((c for c in codes if c not in (0, RESTART)), 0)
    if bad:
        return 128 - bad if bad < 0 else bad
    return RESTART if RESTART in codes else 0


def main(argv: list[str]) -> int:
    if len(argv) < 3 or not argv[0].isdigit() or int(argv[0]) < 1 or argv[1] != "--":
        print(__doc__, file=sys.stderr)
        return 2
    processes = start(int(argv[0]), argv[2:])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            number, lambda n, _: [p.send_signal(n) for p in processes if p.poll() is None]
        )
    return wait(processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
