"""A run on real SLURM: stopped, killed, preempted, queued again, and the same in all bits."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from step_jax.runs.metrics_log import read_metrics
from tests.launch.slurm_cluster import ask, cluster, missing

ROOT = Path(__file__).parents[2]
STEPS = 240
RECIPE = f"""
base: {ROOT}/configs/toys/pretrain.yaml
run: {{directory: {{run}}, checkpoint: {{every_steps: 40}}, logging: {{sinks: []}}}}
model:
  width: 64
  layers:
    - repeat: 1
      blocks:
        - attention: {{kind: mha, heads: 2, kv_heads: 1, head_dim: 32}}
          mlp: {{kind: swiglu, hidden: 64}}
training: {{steps: {STEPS}}}
data: {{path: {ROOT}/step_jax/core, vocab_size: 512, sequence_length: 64}}
parallel: {{fsdp: 2}}
"""
TARGET = f"""
name: bits
place:
  kind: slurm
  nodes: 2
  time: "30"
  setup: ["export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}"]
restarts: {{budget: 2}}
save_s: 10
"""

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of SLURM start jobs as root alone"),
]


def launch(tmp_path: Path, run: Path, target: str, env: dict[str, str]) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("{run}", str(run)))
    (tmp_path / "target.yaml").write_text(target)
    command = [sys.executable, "-m", "step_jax.cli", "launch", str(tmp_path / "recipe.yaml")]
    command += ["--target", str(tmp_path / "target.yaml"), "--output", str(tmp_path / "launches")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(run: Path) -> dict[int, float]:
    if not (run / "metrics.jsonl").exists():
        return {}
    return {r["step"]: r["loss"] for r in read_metrics(run) if r["event"] == "step"}


class Job:
    def __init__(self, env: dict[str, str], run: Path, log: Path):
        self.env, self.run, self.log = env, run, log
        self.id = ask(env, "squeue", "--noheader", "--format=%i", "--name=bits").strip()

    def shown(self, key: str) -> str:
        text = ask(self.env, "scontrol", "show", "job", self.id)
        return re.search(rf"\b{key}=(\S+)", text)[1]

    def wait(self, condition, what: str, seconds: float = 900) -> None:
        deadline = time.monotonic() + seconds
        alive = time.monotonic()
        while not condition():
            log = self.log.read_text()[-3000:] if self.log.exists() else ""
            state = f"{self.shown('JobState')}, {self.shown('Reason')}"
            assert time.monotonic() < deadline, f"no {what}: {state}\n{log}"
            # Between the end of its script and its place in the queue a job may be shown as failed.
            if self.shown("JobState") not in ("FAILED", "CANCELLED"):
                alive = time.monotonic()
            assert time.monotonic() - alive < 30, f"{state}\n{log}"
            time.sleep(0.1)

    def trained(self, steps: int) -> None:
        before = max(losses(self.run), default=0)
        assert before + steps < STEPS
        self.wait(lambda: max(losses(self.run), default=0) >= before + steps, f"{steps} steps")

    def started_again(self, restarts: int) -> None:
        self.wait(lambda: int(self.shown("Restarts")) == restarts, f"restart {restarts}")
        self.wait(lambda: self.shown("JobState") in ("PENDING", "RUNNING"), "place in the queue")
        if self.shown("JobState") == "PENDING":
            # A cluster lets two minutes pass, so that what served the last start is gone from the
            # nodes: what starts beside it fails for good. Here it is waited for, not the minutes.
            self.wait(lambda: not running("slurmstepd"), "end of the last start on the nodes")
            ask(self.env, "scontrol", "update", f"JobId={self.id}", "StartTime=now")


def running(name: str) -> list[Path]:
    """The processes of a name."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (place / "comm").read_text().strip() == name:
                found.append(place)
    return found


def process_of(job: str, rank: int) -> int:
    """The id of a rank's Python."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
            if (
                wanted <= set((place / "environ").read_bytes().split(b"\0"))
                and b"pretrain" in words
            ):
                return int(place.name)
        except OSError:
            continue
    raise AssertionError(f"rank {rank} of job {job} does not run")


def test_a_run_that_is_stopped_killed_and_preempted_ends_in_the_bits_of_an_undisturbed_one(
    tmp_path,
):
    local = "place: {kind: local, processes: 2}\nname: reference"
    launch(tmp_path, tmp_path / "reference", local, dict(os.environ))
    with cluster() as env:
        run, log = tmp_path / "run", tmp_path / "launches" / "bits" / "output.log"
        launch(tmp_path, run, TARGET, env)
        ask(env, "sbatch", "--test-only", str(log.parent / "job.sh"))
        job = Job(env, run, log)

        job.trained(15)
        ask(env, "scancel", "--signal=TERM", "--name=bits")
        job.started_again(1)

        job.trained(30)
        os.kill(process_of(job.id, rank=1), 9)
        job.started_again(2)

        job.trained(30)
        ask(env, "sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=true")
        job.started_again(3)

        job.wait(lambda: job.shown("JobState") == "COMPLETED", "end")
        ends = re.findall(r"start (\d) ended with exit code (\d+); failures in a row: (\d)",
                          log.read_text())  # fmt: skip
    assert ends == [("0", "42", "0"), ("1", "137", "1"), ("2", "42", "0"), ("3", "0", "0")]
    assert list(losses(run)) == list(range(1, STEPS + 1))
    assert losses(run) == losses(tmp_path / "reference")  # floats as they were written: all bits
