"""The target file: where a recipe is run. With a recipe it makes a job."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from step_jax.core import config as configuration
from step_jax.core.config import to_yaml
from step_jax.core.errors import ConfigError
from step_jax.launch.environment import environment
from step_jax.launch.gke import Gke
from step_jax.launch.job import Job, check_name, name_of
from step_jax.launch.queued import QueuedResources
from step_jax.launch.skypilot import SkyPilot
from step_jax.launch.slurm import Slurm
from step_jax.launch.supervisor import Restarts
from step_jax.launch.this_machine import Local
from step_jax.runs.metrics_log import read_metrics

_SAVED = re.compile(r"checkpoint: step \d+ saved, .* in ([\d.]+) s")
_UNKNOWN_SAVE_S = 120.0
#: seconds for the step under way, for agreeing and for leaving, besides two saves: the one under
#: way and the last
_REST_S = 30.0


@dataclass(frozen=True)
class Target:
    """Where a recipe is run, and what starts it again.

    place: the cluster, by its kind.
    name: of the job; null for that of the recipe's file.
    restarts: after crashes, hangs and lost machines.
    save_s: seconds of the longest save, from which the grace after SIGTERM follows; null for what
      was measured in the run directory, else 120.
    cache: folder for compiled programs that outlives a machine.
    environment: further variables of every process.
    """

    place: Gke | QueuedResources | Slurm | SkyPilot | Local
    name: str | None = None
    restarts: Restarts = Restarts()
    save_s: float | None = None
    cache: str | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def validate(self) -> None:
        if self.name is not None:
            check_name(self.name)
        if self.save_s is not None and not self.save_s > 0:
            raise ConfigError(f"save_s is {self.save_s}; it must be above 0")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ConfigError(f"environment: {name!r} is no name of a variable")


def load_target(path: Path | str) -> Target:
    """The target in a file. Raises ConfigError."""
    return configuration.load_file(Target, path)


def make_job(target: Target, config: Any, loop: str, recipe: str, folder: Path) -> Job:
    """The job of a recipe at a target.

    Args:
      config: the recipe's whole configuration.
      loop: the name of its loop.
      recipe: the file's name.
      folder: of all jobs; this one gets a folder of its own there.

    Raises:
      ConfigError: what no other machine could make sense of.
    """
    name = target.name or name_of(recipe)
    check_name(name)
    directory = config.run.directory
    here = isinstance(target.place, Local)
    if not here:
        if not (directory.startswith("/") or "://" in directory):
            raise ConfigError(
                f"run.directory is {directory}, a folder of the machine that runs: name one that "
                "all machines share and that outlives them, --run.directory /shared/runs/mine"
            )
        if target.place.processes > 1:
            config = replace(config, parallel=replace(config.parallel, multihost=True))
    return Job(
        name=name,
        loop=loop,
        recipe=to_yaml(config),
        environment=environment(target.place.platform, target.cache, target.environment),
        restarts=target.restarts,
        grace_s=grace_s(target.save_s or longest_save(directory) or _UNKNOWN_SAVE_S),
        folder=folder.absolute() / name,
    )


def grace_s(save_s: float) -> int:
    """Seconds from SIGTERM to SIGKILL that a run needs whose saves take so many."""
    return math.ceil(_REST_S + 2 * save_s)


def longest_save(directory: Path | str) -> float | None:
    """Seconds of the longest save that a run recorded, None without any that can be read here."""
    if "://" in str(directory) or not (Path(directory) / "metrics.jsonl").is_file():
        return None
    notes = (str(r.get("text", "")) for r in read_metrics(directory) if r["event"] == "note")
    return max((float(m[1]) for note in notes if (m := _SAVED.match(note))), default=None)
