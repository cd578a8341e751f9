"""What a process does before it touches a device: joining the others, finding compiled programs."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from step_jax.core.errors import ConfigError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
#: seconds after which the others notice that a process has died
HEARTBEAT_SECONDS = 10


def join(multihost: bool = False) -> None:
    """Joins the other processes of this run, if there are any; call before touching a device.

    Processes started by hand or by ``launch/local.py`` find each other by the variables
    ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``. On a cluster that JAX
    knows (TPU pods, SLURM, Kubernetes, Open MPI) ``multihost`` finds them without.

    Raises:
      ConfigError: only some of the variables are set, or the cluster is not one JAX knows.
    """
    given = [name for name in _VARIABLES if os.environ.get(name)]
    if given and len(given) < len(_VARIABLES):
        missing = sorted(set(_VARIABLES) - set(given))
        raise ConfigError(f"{', '.join(given)} is set and {', '.join(missing)} is not: set all")
    if jax.distributed.is_initialized() or not (given or multihost):
        return
    if given:
        address, count, index = (os.environ[name] for name in _VARIABLES)
        jax.distributed.initialize(
            address, int(count), int(index), heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        raise ConfigError(
            f"parallel.multihost is set, and JAX finds no cluster here ({error}); set "
            f"{', '.join(_VARIABLES)} instead"
        ) from None


def keep_compiled_programs() -> None:
    """Keeps compiled programs on disk, so that a restarted run does not compile again.

    They lie in ``$XDG_CACHE_HOME/step_jax/programs`` (default ``~/.cache``), unless
    ``JAX_COMPILATION_CACHE_DIR`` names another folder.
    """
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(base).expanduser() / "step_jax" / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
