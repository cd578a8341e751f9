"""Processes of this machine, in the foreground, watched and started again."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

from step_jax.core.errors import ConfigError
from step_jax.launch.job import RECIPE, Job, Rendered


@dataclass(frozen=True)
class Local:
    """This machine.

    processes: one, with all its devices, or several on the CPU that find each other.
    devices_per_process: simulated on the CPU, where there are several processes.
    """

    kind: ClassVar[str] = "local"
    platform: ClassVar[str] = "any"
    processes: int = 1
    devices_per_process: int = 1

    def validate(self) -> None:
        if self.processes < 1 or self.devices_per_process < 1:
            raise ConfigError("processes and devices_per_process must be at least 1")
        if self.processes == 1 and self.devices_per_process > 1:
            raise ConfigError("devices_per_process is of several processes; one takes what is here")

    @property
    def devices(self) -> int | None:
        """None for what this machine has."""
        return self.processes * self.devices_per_process if self.processes > 1 else None

    def render(self, job: Job) -> Rendered:
        environment = dict(job.environment)
        if self.processes > 1:
            environment["JAX_PLATFORMS"] = "cpu"
            environment["XLA_FLAGS"] = (
                f"--xla_force_host_platform_device_count={self.devices_per_process}"
            )
        words = ["env", *(f"{k}={v}" for k, v in environment.items())]
        supervised = job.supervised(job.folder / RECIPE, self.processes, sys.executable)
        cut = supervised.index("--")
        words += [*supervised[:cut], "--ledger", str(job.folder / "restarts.jsonl"), "--"]
        # The installed command may be of another environment than this one.
        words += [sys.executable, "-m", "step_jax.cli", *supervised[cut + 2 :]]
        return Rendered({RECIPE: job.recipe}, words, "", foreground=True)
