"""A SLURM cluster of two nodes on the loopback interface: munged, slurmctld and two slurmd."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NODES = ("step-jax-n0", "step-jax-n1")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

# Two partitions over the same nodes; what is in the lower one makes room for the upper one.
_CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
ReturnToService=2
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SchedulerParameters=batch_sched_delay=0,sched_interval=2
NodeName={nodes[0]} NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName={nodes[1]} NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=60 State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Starts it, gives the environment of its clients, and stops it whatever happens."""
    # In a place of its own: the path of a socket may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        yield from _started(Path(folder))


def _started(folder: Path) -> Iterator[dict[str, str]]:
    conf, host = folder / "slurm.conf", socket.gethostname().partition(".")[0]
    conf.write_text(_CONF.format(folder=folder, host=host, nodes=NODES, ports=_free_ports(3)))
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    env = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(conf)}
    munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munged += [f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
    munged += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    daemons = [munged, ["slurmctld", "-D", "-i"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    running: list[subprocess.Popen] = []
    with _names_in_hosts():
        try:
            for words in daemons:
                log = open(folder / f"{words[0]}-{len(running)}.out", "wb")
                running.append(
                    subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True)
                )
                if words[0] == "munged":
                    _until((folder / "munge.socket").exists, folder)
            _until(lambda: _idle(env), folder)
            yield env
        finally:
            subprocess.run(["scancel", "--user=root", "--signal=KILL"], env=env, timeout=30)
            time.sleep(1)
            for daemon in reversed(running):
                daemon.send_signal(signal.SIGTERM)
            for daemon in running:
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()


def ask(env: dict[str, str], *words: str) -> str:
    """What a client prints."""
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def _idle(env: dict[str, str]) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T", "--partition=low"],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.split() == ["idle"]


def _until(condition, folder: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        logs = sorted(folder.glob("*.log")) + sorted(folder.glob("*.out"))
        tails = "\n".join(f"{p.name}: {p.read_text(errors='replace')[-1000:]}" for p in logs)
        assert time.monotonic() < deadline, f"the cluster did not come up:\n{tails}"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextlib.contextmanager
def _names_in_hosts() -> Iterator[None]:
    """The nodes' names resolve meanwhile: JAX asks for the first node's address."""
    hosts = Path("/etc/hosts")
    line = f"127.0.0.1 {' '.join(NODES)}  # a test of step_jax\n"
    hosts.write_text(hosts.read_text().rstrip("\n") + "\n" + line)
    try:
        yield
    finally:
        hosts.write_text(hosts.read_text().replace(line, ""))
