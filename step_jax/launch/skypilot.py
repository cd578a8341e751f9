"""SkyPilot: a managed job on whichever cloud has the accelerators."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, field
from typing import Any, ClassVar

from step_jax.core.errors import ConfigError
from step_jax.launch.job import RECIPE, Job, Rendered, codes, to_yaml

_FOLDER = "/tmp/step-jax"
_PORT = 8476
_GPUS = re.compile(r"[A-Z][\w-]*:([1-9]\d*)")
_TPU = re.compile(r"tpu-(v\d\w*)-([1-9]\d*)")
# v5p is counted in cores
_CHIPS = {"v5litepod": 1, "v5e": 1, "v5p": 2, "v6e": 1}


@dataclass(frozen=True)
class SkyPilot:
    """A managed job of SkyPilot.

    accelerators: of a node: H100:8, or of a TPU slice: tpu-v6e-16.
    nodes: machines with GPUs; a slice counts as one.
    infra: cloud, region and zone as SkyPilot writes them: gcp/us-east5; null for the cheapest.
    image: that holds step_jax (launch/Dockerfile); null installs it in `setup`.
    setup: shell lines that run once on every machine.
    spot: machines that may be taken away.
    file_mounts: folder -> bucket or local folder, as SkyPilot takes it.
    """

    kind: ClassVar[str] = "skypilot"
    accelerators: str
    nodes: int = 1
    infra: str | None = None
    image: str | None = None
    setup: tuple[str, ...] = ()
    spot: bool = False
    file_mounts: dict[str, str] = field(default_factory=dict)

    def validate(self) -> None:
        if self.nodes < 1:
            raise ConfigError(f"nodes is {self.nodes}; it must be at least 1")
        tpu = _TPU.fullmatch(self.accelerators)
        if tpu is None and not _GPUS.fullmatch(self.accelerators):
            raise ConfigError(
                f"accelerators is {self.accelerators!r}; it is a GPU and its number (H100:8) or a "
                "TPU slice (tpu-v6e-16)"
            )
        if tpu and tpu[1] not in _CHIPS:
            raise ConfigError(f"no TPU {tpu[1]!r} in SkyPilot; there are: {', '.join(_CHIPS)}")
        if tpu and self.nodes > 1:
            raise ConfigError("SkyPilot joins no TPU slices; use kind gke or queued-resources")
        if not self.image and not self.setup:
            raise ConfigError("name an image, or install step_jax in setup")

    @property
    def platform(self) -> str:
        return "tpu" if _TPU.fullmatch(self.accelerators) else "gpu"

    @property
    def processes(self) -> int:
        """One a machine, which has four chips or (up to eight in all) every one of a slice."""
        if self.platform == "gpu":
            return self.nodes
        return 1 if self.devices <= 8 else math.ceil(self.devices / 4)

    @property
    def devices(self) -> int:
        if tpu := _TPU.fullmatch(self.accelerators):
            return int(tpu[2]) // _CHIPS[tpu[1]]
        gpus = _GPUS.fullmatch(self.accelerators)
        assert gpus is not None, "validated"
        return self.nodes * int(gpus[1])

    def render(self, job: Job) -> Rendered:
        file = job.folder / "task.yaml"
        return Rendered(
            {RECIPE: job.recipe, file.name: to_yaml(self.task(job))},
            ["sky", "jobs", "launch", "--name", job.name, "--yes", "--detach-run", str(file)],
            f"watch: sky jobs logs --name {job.name}\nend:   sky jobs cancel --name {job.name}",
        )

    def task(self, job: Job) -> dict[str, Any]:
        """The task, as plain values."""
        resources: dict[str, Any] = {"accelerators": self.accelerators, "use_spot": self.spot}
        if self.infra:
            resources["infra"] = self.infra
        if self.image:
            resources["image_id"] = f"docker:{self.image}"
        # A machine that is lost is replaced whatever these say. Of errors SkyPilot can count all
        # or none, so it counts none and the supervisor on every machine does.
        resources["job_recovery"] = {
            "max_restarts_on_errors": 0,
            "recover_on_exit_codes": codes("free"),
        }
        task: dict[str, Any] = {"name": job.name, "num_nodes": self.nodes, "resources": resources}
        task["envs"] = dict(job.environment)
        recipe = {f"{_FOLDER}/{RECIPE}": str(job.folder / RECIPE)}
        task["file_mounts"] = recipe | self.file_mounts
        if self.setup:
            task["setup"] = "\n".join(self.setup) + "\n"
        task["run"] = self._run(job)
        return task

    def _run(self, job: Job) -> str:
        lines = []
        if self.platform == "gpu" and self.nodes > 1:  # on TPUs JAX finds its peers by itself
            lines = [
                f'JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{_PORT}"',
                "export JAX_COORDINATOR_ADDRESS",
                'export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES"',
                'export JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"',
            ]
        command = shlex.join(job.supervised(f"{_FOLDER}/{RECIPE}"))
        return "\n".join([*lines, f"exec {command}", ""])
