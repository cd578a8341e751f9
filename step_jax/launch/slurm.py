"""SLURM: a batch script whose processes save on SIGTERM and which queues itself again.

Met on a real controller: a `srun` that gets SIGTERM kills its processes at once, so the script and
with it `srun` ignore the signal, which SLURM sends to the processes itself; and a job that ends
during the grace of a preemption counts as completed, so it asks to be queued again.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import ClassVar

from step_jax.core.errors import ConfigError
from step_jax.launch.job import RECIPE, Job, Rendered, codes, exports
from step_jax.launch.ranks import LINGER_S


@dataclass(frozen=True)
class Slurm:
    """Nodes of a SLURM cluster, with a folder that all of them share.

    nodes: of the job.
    processes_per_node: as a rule one, with all GPUs of the node.
    gpus_per_node: 0 for CPUs.
    devices_per_process: that JAX sees in a process on CPUs.
    cpus_per_process: null for the partition's default.
    time: limit, as sbatch takes it; SIGTERM comes a grace before it.
    partition, account, qos: null for the cluster's.
    setup: shell lines before the processes: modules, the environment that holds step_jax.
    options: further options of sbatch, `constraint: h100`.
    """

    kind: ClassVar[str] = "slurm"
    nodes: int
    processes_per_node: int = 1
    gpus_per_node: int = 0
    devices_per_process: int = 1
    cpus_per_process: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    setup: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)

    def validate(self) -> None:
        for name in ("nodes", "processes_per_node", "devices_per_process"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.gpus_per_node % self.processes_per_node:
            raise ConfigError(
                f"{self.gpus_per_node} GPUs do not divide over {self.processes_per_node} processes"
            )

    @property
    def platform(self) -> str:
        return "gpu" if self.gpus_per_node else "cpu"

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def devices(self) -> int:
        if self.gpus_per_node:
            return self.nodes * self.gpus_per_node
        return self.processes * self.devices_per_process

    def render(self, job: Job) -> Rendered:
        file = job.folder / "job.sh"
        return Rendered(
            {RECIPE: job.recipe, file.name: self.script(job)},
            ["sbatch", str(file)],
            f"watch: tail -F {job.folder}/output.log\n"
            f"stop:  scancel --signal=TERM --name={job.name}   (saves and is queued again)\n"
            f"end:   scancel --name={job.name}",
        )

    def script(self, job: Job) -> str:
        """The batch script."""
        options = {
            "job-name": job.name,
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.processes_per_node),
            "output": f"{job.folder}/output.log",
            "open-mode": "append",
            "signal": f"TERM@{job.grace_s}",  # to the processes, before the time limit
        }
        given = {
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_process,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
        }
        options |= {k: str(v) for k, v in given.items() if v is not None} | self.options
        directives = "\n".join(f"#SBATCH --{k}={v}" for k, v in options.items())
        environment = dict(job.environment)
        if not self.gpus_per_node:  # whatever the shell says from which the job is submitted
            flag = f"--xla_force_host_platform_device_count={self.devices_per_process}"
            environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}".strip()
        # srun's code is the highest of its processes'. A process that is done waits for no others.
        srun = ["srun", "--label", "--kill-on-bad-exit=0", f"--wait={LINGER_S:.0f}"]
        command = shlex.join([*srun, *job.words(job.folder / RECIPE)])
        setup = "\n".join(self.setup)
        free, counted = ("|".join(map(str, codes(c))) for c in ("free", "counted"))
        return f"""#!/bin/bash
# {job.name}: made by `step-jax launch`
{directives}
#SBATCH --requeue
trap '' TERM
{exports(environment)}
{setup}
failures={shlex.quote(f"{job.folder}/failures")}
count=0
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] && [ -f "$failures" ]; then count=$(cat "$failures"); fi
began=$SECONDS
code=0
{command} || code=$?
if [ $((SECONDS - began)) -ge {job.restarts.healthy_s:.0f} ]; then count=0; fi
again=no
case $code in
  {free}) count=0 again=yes ;;
  {counted})
    count=$((count + 1))
    if [ "$count" -le {job.restarts.budget} ]; then again=yes; fi ;;
esac
echo "$count" > "$failures"
echo "step-jax launch: start ${{SLURM_RESTART_COUNT:-0}} ended with exit code $code;" \\
  "failures in a row: $count; again: $again"
if [ $again = yes ]; then
  trap - TERM  # which ends this script once it is to be queued again
  for attempt in 1 2 3 4 5 6; do
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
    echo "step-jax launch: not queued again yet (attempt $attempt)"  # a busy controller
    sleep 10
  done
fi
exit "$code"
"""
