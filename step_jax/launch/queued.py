"""TPU slices of Cloud TPU, asked for as queued resources: every host runs a start-up script."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import ClassVar

from step_jax.core.errors import ConfigError
from step_jax.launch import slices
from step_jax.launch.job import RECIPE, Job, Rendered, exports

_HOME = "/var/lib/step-jax"
_END = "END_OF_RECIPE"


@dataclass(frozen=True)
class QueuedResources:
    """TPU slices of Cloud TPU, by `gcloud compute tpus queued-resources`.

    topology: of a slice, as `step-jax plan` names it: v6e:4x4.
    image: that holds step_jax (launch/Dockerfile).
    zone: of Compute Engine.
    slices: joined by the data centre's network.
    project: of Google Cloud; null for gcloud's.
    runtime: of the virtual machines; null for what the topology needs.
    service_account: for access to buckets.
    spot: may be taken away.
    reserved: from a reservation.
    setup: shell lines that every host runs first, to mount a shared folder for instance.
    mounts: folders of the host that the container sees under the same path.
    """

    kind: ClassVar[str] = "queued-resources"
    platform: ClassVar[str] = "tpu"
    topology: str
    image: str
    zone: str
    slices: int = 1
    project: str | None = None
    runtime: str | None = None
    service_account: str | None = None
    spot: bool = False
    reserved: bool = False
    setup: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()

    def validate(self) -> None:
        if slices.parse(self.topology).accelerator is None:
            raise ConfigError(f"{self.topology} is not offered as queued resources; use kind gke")
        slices.check_slices(self.slices)
        if self.spot and self.reserved:
            raise ConfigError("spot and reserved exclude each other")

    @property
    def processes(self) -> int:
        return self.slices * slices.parse(self.topology).hosts

    @property
    def devices(self) -> int:
        return self.slices * slices.parse(self.topology).devices

    def render(self, job: Job) -> Rendered:
        piece = slices.parse(self.topology)
        assert piece.accelerator and piece.runtime, "validated"
        file = job.folder / "startup.sh"
        where = ["--zone", self.zone] + (["--project", self.project] if self.project else [])
        nodes = ["--node-id", job.name]
        if self.slices > 1:
            nodes = ["--node-count", str(self.slices), "--node-prefix", job.name]
        tpus = ["gcloud", "compute", "tpus"]
        submit = [*tpus, "queued-resources", "create", job.name, *where, *nodes]
        submit += ["--accelerator-type", piece.accelerator]
        submit += ["--runtime-version", self.runtime or piece.runtime]
        submit += ["--metadata-from-file", f"startup-script={file}"]
        submit += ["--service-account", self.service_account] if self.service_account else []
        submit += ["--spot"] if self.spot else []
        submit += ["--reserved"] if self.reserved else []
        node = job.name if self.slices == 1 else f"{job.name}-0"
        watch = [*tpus, "tpu-vm", "ssh", node, *where, "--worker", "0"]
        watch += ["--command", "sudo docker logs -f step-jax"]
        end = [*tpus, "queued-resources", "delete", job.name, *where, "--force"]
        return Rendered(
            {file.name: self.script(job)},
            submit,
            f"watch: {shlex.join(watch)}\nend:   {shlex.join(end)}   (also once the run is done: "
            "the machines stay, and cost, until then)",
        )

    def script(self, job: Job) -> str:
        """What every host runs, as root, at every boot: so a slice that came back goes on."""
        registry = self.image.partition("/")[0]
        login = ""
        if registry.endswith(".pkg.dev"):
            login = f"gcloud auth configure-docker {registry} --quiet\n"
        # The chips are devices of the host; on the machines of Cloud TPU a container gets them, and
        # the slice's network, in no other way.
        docker = ["docker", "run", "--rm", "--name", "step-jax", "--privileged", "--net", "host"]
        docker += ["--stop-timeout", str(job.grace_s), "--shm-size", "16g"]
        docker += [word for name in job.environment for word in ("--env", name)]
        docker += ["--volume", f"{_HOME}:{_HOME}"]
        docker += [word for path in self.mounts for word in ("--volume", f"{path}:{path}")]
        command = [*docker, self.image, *job.supervised(f"{_HOME}/{RECIPE}")]
        setup = "\n".join(self.setup)
        return f"""#!/bin/bash
# {job.name}: made by `step-jax launch`
set -euo pipefail
mkdir -p {_HOME}
cat > {_HOME}/{RECIPE} <<'{_END}'
{job.recipe.rstrip()}
{_END}
{exports(job.environment)}
{setup}
{login}docker rm -f step-jax 2>/dev/null || true
exec {shlex.join(command)}
"""
