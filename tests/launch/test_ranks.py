"""Several processes as one run: noticed, named, ended together, started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from step_jax.core.errors import EXITS, ConfigError, ExitCode
from step_jax.launch import ranks
from step_jax.launch.supervisor import Restarts, supervise

ROOT = Path(__file__).parents[2]
#: a start of this rank, counted in the file that the first argument names
COUNTED = """
import os, sys, time, signal
rank = int(os.environ.get("JAX_PROCESS_ID", 0))
path = sys.argv[1] + str(rank)
start = os.path.getsize(path) + 1 if os.path.exists(path) else 1
open(path, "a").write("x")
"""


def command(code: str, tmp_path: Path) -> list[str]:
    return [sys.executable, "-S", "-c", COUNTED + code, str(tmp_path / "starts")]


def supervised(code: str, tmp_path: Path, count: int = 2, **restarts):
    """(exit code, the ledger's records)."""
    ledger = tmp_path / "run" / "restarts.jsonl"
    quick = {"backoff_s": 0.01, **restarts}
    code_ = supervise(command(code, tmp_path), count, Restarts(**quick), ledger)
    return code_, [json.loads(line) for line in ledger.read_text().splitlines()]


@pytest.mark.parametrize("failing", [0, 1])
def test_whichever_rank_fails_ends_all_within_seconds_and_is_named(tmp_path, capfd, failing):
    began = time.monotonic()
    code, (record,) = supervised(
        f"print('here', flush=True)\nif rank == {failing}: sys.exit(1)\ntime.sleep(60)", tmp_path
    )
    assert (code, record["culprit"], record["then"]) == (1, failing, "ended")
    assert time.monotonic() - began < 10
    out, err = capfd.readouterr()
    assert f"rank {failing} ended with exit code 1: ending 1 more" in err
    assert sorted(out.splitlines()) == ["[0] here", "[1] here"]


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path):
    began = time.monotonic()
    code, (record,) = supervised(
        "if rank == 1: time.sleep(0.5); sys.exit(78)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
        tmp_path,
    )
    assert (code, record["codes"]) == (78, [137, 78])
    assert time.monotonic() - began < 10


def test_a_saved_stop_costs_no_budget_and_a_lost_machine_does(tmp_path):
    code, records = supervised(
        "if start <= 2: sys.exit(42)\n"
        "if start == 3:\n"
        "    if rank: time.sleep(1); os.kill(os.getpid(), 9)\n"  # its machine; the other is first
        "    os.abort()\n",
        tmp_path,
        budget=1,
    )
    assert code == 0
    assert [r["code"] for r in records] == [42, 42, 137, 0]
    assert records[2]["culprit"] == 1 and records[2]["codes"] == [134, 137]
    assert [r["then"] for r in records] == [
        "start 2 in 0.01 s", "start 3 in 0.01 s", "start 4 in 0.01 s", "ended",
    ]  # fmt: skip


def test_of_a_lost_rank_and_those_that_abort_with_it_the_lost_one_is_named():
    assert ranks._first_failed({0: 134, 2: 137, 3: 134}) == 2
    assert ranks._first_failed({0: 134, 1: 134}) == 0
    assert ranks._first_failed({0: 0, 1: 42}) is None


def test_failures_in_a_row_spend_the_budget_with_waits_that_double(tmp_path):
    code, records = supervised("sys.exit(75)", tmp_path, count=1, budget=3)
    assert code == 75
    waits = ["start 2 in 0.01 s", "start 3 in 0.02 s", "start 4 in 0.04 s"]
    assert [r["then"] for r in records] == [*waits, "gave up after 3 restarts in a row"]


def test_a_start_that_lived_long_enough_gives_the_budget_back(tmp_path):
    code, records = supervised(
        "sys.exit(75 if start < 5 else 0)", tmp_path, count=1, budget=1, healthy_s=0
    )
    assert code == 0 and len(records) == 5


@pytest.mark.parametrize("code", [c for c, e in EXITS.items() if e.again == "never"])
def test_what_a_restart_cannot_help_is_not_started_again(tmp_path, code):
    got, records = supervised(f"sys.exit({code})", tmp_path, count=1)
    assert got == code and len(records) == 1


def test_a_rank_that_goes_on_long_after_the_others_is_named_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "LINGER_S", 0.2)
    code, (record,) = supervised("if rank: time.sleep(60)", tmp_path, budget=0)
    assert (code, record["culprit"]) == (ExitCode.HANG, 1)
    assert "rank 1 goes on 0.2 s after rank 0 ended" in record["reason"]


def test_who_waits_for_a_rank_that_was_stopped_alone_is_stopped_too(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(ranks, "_STOP_S", 0.2)
    began = time.monotonic()
    code = ranks.run(
        command(
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\n"
            "time.sleep(60 if rank else 1)\n"
            "sys.exit(42)",
            tmp_path,
        ),
        3,
        ranks.Signals(),
        os.environ,
    ).code
    assert code == ExitCode.RESTART and time.monotonic() - began < 10
    assert "rank 0 was stopped: stopping 2 more" in capfd.readouterr().err


def test_a_command_that_is_not_there_is_an_error_in_words():
    with pytest.raises(ConfigError, match="cannot start 'no-such-program': No such file"):
        supervise(["no-such-program"], 1, Restarts())


SAVES = """
def save(number, frame):
    if os.path.exists(sys.argv[1] + f"asked{rank}"): sys.exit(1)
    open(sys.argv[1] + f"asked{rank}", "w")
    time.sleep(0.5)
    sys.exit(42)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(60)
"""


def started(tmp_path: Path, code: str = SAVES) -> subprocess.Popen:
    launcher = subprocess.Popen(
        [sys.executable, "-m", "step_jax.launch.local", "2", "--", *command(code, tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert {launcher.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
    return launcher


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_once_and_nothing_is_started_again(tmp_path, number):
    """Also a terminal's Ctrl-C, which goes to the launcher's whole group."""
    launcher = started(tmp_path)
    os.killpg(launcher.pid, number)
    output, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == 42, output
    assert "the state is saved: start the same command again; stopped" in output
    assert (tmp_path / "starts0").read_text() == "x"


def test_a_signal_for_a_profile_reaches_every_rank_and_stops_none(tmp_path):
    code = (
        "signal.signal(signal.SIGUSR1, lambda *_: print('asked', flush=True))\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.1)"
    )
    launcher = started(tmp_path, code)
    launcher.send_signal(signal.SIGUSR1)
    assert {launcher.stdout.readline() for _ in range(2)} == {"[0] asked\n", "[1] asked\n"}
    launcher.terminate()
    launcher.communicate(timeout=20)
    assert launcher.returncode == 42


def test_ranks_go_on_when_nobody_reads_what_they_print_any_more(tmp_path):
    code = "for n in range(20000): print(n, 'words' * 10)\nsys.exit(start % 2 * 42)"
    ledger = tmp_path / "ledger.jsonl"
    options = ["--backoff", "0", "--ledger", str(ledger)]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "step_jax.launch.local", "2", *options, "--",
         *command(code, tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    launcher.stdout.close()
    launcher.stderr.close()
    launcher.wait(timeout=40)
    assert [json.loads(line)["code"] for line in ledger.read_text().splitlines()] == [42, 0]


def test_the_ranks_of_a_killed_launcher_save_and_end(tmp_path):
    launcher = started(tmp_path)
    launcher.kill()
    launcher.communicate(timeout=20)  # the ranks hold the other ends of its pipes
    asked = [tmp_path / f"startsasked{rank}" for rank in (0, 1)]
    deadline = time.monotonic() + 10
    while not all(path.exists() for path in asked):
        assert time.monotonic() < deadline
        time.sleep(0.05)
