"""Pods of a JobSet on this machine: each a network namespace with a host name of its own.

A pod runs its container's command in its container's environment, as the JobSet says, with what GKE
adds for TPUs. The pods find each other by the names that a JobSet gives them, over a bridge, and
the link of each can be cut.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from step_jax.launch.job import RECIPE

PROGRAMS = ("ip", "unshare")
_BRIDGE = "stepjax-br"
_NETWORK = "10.231.77"


def missing() -> str:
    """Why there can be no namespaces here; nothing if there can."""
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(absent)} (Debian: apt install iproute2 util-linux)"
    if os.geteuid() != 0:
        return "network namespaces are made by root alone"
    done = subprocess.run(
        ["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False
    )
    return f"no network namespaces can be made here: {done.stderr.strip()}" * (done.returncode != 0)


class Pod:
    """One pod: its name, and its processes, one after the other."""

    def __init__(self, jobset: dict[str, Any], index: int, hosts: list[str], folder: Path):
        slices = jobset["spec"]["replicatedJobs"][0]
        self._spec = slices["template"]["spec"]["template"]
        self.index, self.host = index, hosts[index]
        self.namespace = f"stepjax-{index}"
        self._hosts, self._folder = hosts, folder
        self.log = folder / f"{self.host}.log"
        self.process: subprocess.Popen | None = None
        recipe = self._spec["metadata"]["annotations"]["step-jax/recipe"]
        (folder / RECIPE).write_text(recipe)

    def start(self, env: dict[str, str]) -> None:
        """The container's command. ``env``: what its image has."""
        (container,) = self._spec["spec"]["containers"]
        (mount,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "recipe"]
        words = [word.replace(mount, str(self._folder)) for word in container["command"]]
        # Memory is pinned for TPUs, and root may not raise that limit where it is itself contained.
        words = [re.sub(r"^ulimit -l \d+ && ", "", word) for word in words]
        injected = {
            # GKE says so to every container that asks for TPUs, the last three where a JobSet has
            # several slices; JAX would ask a server of Google's cloud for them. It looks for all
            # this where it finds a TPU, or is told that there is one.
            "TPU_WORKER_ID": str(self.index),
            "TPU_WORKER_HOSTNAMES": ",".join(self._hosts),
            "MEGASCALE_COORDINATOR_ADDRESS": self._hosts[0],
            "MEGASCALE_NUM_SLICES": "1",
            "MEGASCALE_SLICE_ID": "0",
            "JAX_FORCE_TPU_INIT": "1",
        }
        own = {variable["name"]: variable["value"] for variable in container["env"]}
        inside = f"hostname {self.host} && exec {shlex.join(words)}"
        out: IO[bytes]
        with open(self.log, "ab") as out:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", inside],
                stdout=out, stderr=out, stdin=subprocess.DEVNULL, env={**env, **injected, **own},
            )  # fmt: skip

    def cut(self) -> None:
        _ip("link", "set", f"stepjax{self.index}", "down")

    def heal(self) -> None:
        _ip("link", "set", f"stepjax{self.index}", "up")

    def ended(self, seconds: float) -> int:
        """The exit code, in a shell's form. Raises TimeoutExpired."""
        assert self.process is not None
        code = self.process.wait(seconds)
        return 128 - code if code < 0 else code


@contextlib.contextmanager
def pods(jobset: str, folder: Path) -> Iterator[list[Pod]]:
    """The pods of a JobSet of one slice, and their network."""
    document = yaml.safe_load(jobset)
    (job,) = document["spec"]["replicatedJobs"]
    name, count = document["metadata"]["name"], job["template"]["spec"]["completions"]
    hosts = [f"{name}-{job['name']}-0-{index}.{name}" for index in range(count)]
    made = [Pod(document, index, hosts, folder) for index in range(count)]
    _remove(count)
    try:
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("link", "set", _BRIDGE, "up")
        table = "127.0.0.1 localhost\n" + "".join(
            f"{_NETWORK}.{index + 1} {host}\n" for index, host in enumerate(hosts)
        )
        for pod in made:
            space, outer, inner = pod.namespace, f"stepjax{pod.index}", "eth0"
            _ip("netns", "add", space)
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", space)
            _ip("link", "set", outer, "master", _BRIDGE, "up")
            _ip("-n", space, "addr", "add", f"{_NETWORK}.{pod.index + 1}/24", "dev", inner)
            for device in (inner, "lo"):
                _ip("-n", space, "link", "set", device, "up")
            place = Path("/etc/netns", space)  # laid over /etc by `ip netns exec`
            place.mkdir(parents=True, exist_ok=True)
            (place / "hosts").write_text(table)
        yield made
    finally:
        for pod in made:
            if pod.process is not None:
                pod.process.kill()
                pod.process.wait()
        _remove(count)


def _remove(count: int) -> None:
    for index in range(count):
        _ip("netns", "del", f"stepjax-{index}", check=False)
        _ip("link", "del", f"stepjax{index}", check=False)
        shutil.rmtree(f"/etc/netns/stepjax-{index}", ignore_errors=True)
    _ip("link", "del", _BRIDGE, check=False)


def _ip(*words: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
