"""What processes do together: joining, agreeing, finding compiled programs.

They agree over the key-value store of JAX's coordination service, which serves threads beside the
training loop: it needs no device collective, so nothing here can interleave with the collectives of
a training step.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the key-value client has no public name (jax 0.11, 0.12)

from step_jax.core.errors import ConfigError, PeerLostError, from_kind, kind_of
from step_jax.core.files import cache_folder

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LOOPBACK = ("127.", "localhost:", "[::1]:")
#: seconds after which the others notice that a process has died
HEARTBEAT_SECONDS = 10
# Longer than the slowest plausible write of one process's share, shorter than a wasted night.
TIMEOUT_S = 1200


def join(multihost: bool = False) -> None:
    """Joins the other processes of this run, if there are any; call before touching a device.

    Processes started by hand or by :mod:`step_jax.launch.local` find each other by the variables
    ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``. On a cluster that JAX
    knows (TPU pods, SLURM, Kubernetes, Open MPI) ``multihost`` finds them without. The coordinator
    asks nobody for a password: it listens on the loopback interface alone if its address is there.

    Raises:
      ConfigError: only some of the variables are set, the cluster is not one JAX knows, or the
        coordinator's port is in use.
    """
    given = [name for name in _VARIABLES if os.environ.get(name)]
    if given and len(given) < len(_VARIABLES):
        missing = sorted(set(_VARIABLES) - set(given))
        raise ConfigError(f"{', '.join(given)} is set and {', '.join(missing)} is not: set all")
    if jax.distributed.is_initialized() or not (given or multihost):
        return
    # Its SIGTERM handler is runs.preemption's rival: it keeps the signal to itself.
    jax.config.update("jax_enable_preemption_service", False)
    arguments: dict[str, Any] = {}
    if given:
        address, count, index = (os.environ[name] for name in _VARIABLES)
        arguments = {
            "coordinator_address": address,
            "num_processes": int(count),
            "process_id": int(index),
            "coordinator_bind_address": address if address.startswith(_LOOPBACK) else None,
        }
        if int(index) == 0:
            _check_free(address)
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **arguments)
    except ValueError as error:
        raise ConfigError(
            f"parallel.multihost is set, and JAX finds no cluster here ({error}); set "
            f"{', '.join(_VARIABLES)} instead"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        if "start RPC server" not in str(error):
            raise
        raise _not_free(arguments.get("coordinator_address", "its port")) from None


def _check_free(address: str) -> None:
    """Raises ConfigError if the coordinator's port is in use: JAX's own attempt may end in a
    segmentation fault then (0.12)."""
    host, _, port = address.rpartition(":")
    listens_on = host.strip("[]") if address.startswith(_LOOPBACK) else ""
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    with socket.socket(family) as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a run that just ended
        try:
            attempt.bind((listens_on, int(port)))
        except (OSError, ValueError, OverflowError):
            raise _not_free(address) from None


def _not_free(address: str) -> ConfigError:
    return ConfigError(
        f"the coordinator cannot listen on {address}: the port is in use, or the address is not "
        f"this machine's; {_VARIABLES[0]} names it"
    )


#: what a step of several processes fails of while all of them live
_OF_ITS_OWN = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION")


def peer_lost(error: BaseException | None) -> PeerLostError | None:
    """What a failure of JAX means in a run of several processes: as a rule that one is gone.

    A survivor hears of it by its collective, a moment before JAX's heartbeat would abort it.
    """
    own = not isinstance(error, jax.errors.JaxRuntimeError) or jax.process_count() == 1
    if own or str(error).startswith(_OF_ITS_OWN):
        return None
    text = str(error).splitlines()[0]
    return PeerLostError(f"another process is gone, or cannot be reached: {text}")


def keep_compiled_programs() -> None:
    """Keeps compiled programs on disk, so that a restarted run does not compile again.

    They lie in ``$XDG_CACHE_HOME/step_jax/programs`` (default ``~/.cache``), unless
    ``JAX_COMPILATION_CACHE_DIR`` names another folder.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("programs")))


class Processes:
    """All processes of the run. Keys must be used in the same order everywhere, each once."""

    def __init__(self, namespace: str):
        self.index = jax.process_index()
        self.count = jax.process_count()
        self._namespace = f"step_jax/{namespace}"
        self._client: Any = distributed.global_state.client if self.count > 1 else None

    def publish(self, key: str, value: str) -> None:
        """Make a value visible to all; the first value of a key stays."""
        try:
            self._client.key_value_set(f"{self._namespace}/{key}", value)
        except jax.errors.JaxRuntimeError as e:
            if "ALREADY_EXISTS" not in str(e):
                raise

    def published(self) -> dict[str, str]:
        """Everything published so far under this namespace."""
        rows = self._client.key_value_dir_get(f"{self._namespace}/")
        return {key.removeprefix(f"{self._namespace}/"): value for key, value in rows}

    def together(self, key: str, local: Callable[[], Any], lead: Callable[[list], Any]) -> Any:
        """Every process runs ``local``, process 0 runs ``lead`` on all results in process order.

        Everybody returns lead's value (JSON types), or raises the first error anywhere.
        """
        if self.count == 1:
            return lead([local()])
        report = json.dumps(_attempt(local))
        self.publish(f"{key}/reports/{self.index}", report)
        if self.index == 0:
            reports = [json.loads(self._get(f"{key}/reports/{i}")) for i in range(self.count)]
            failed = next((r for r in reports if "error" in r), None)
            outcome = failed or _attempt(lambda: lead([r["value"] for r in reports]))
            self.publish(f"{key}/outcome", json.dumps(outcome))
        else:
            outcome = json.loads(self._get(f"{key}/outcome"))
        if "error" in outcome:
            raise from_kind(*outcome["error"])
        return outcome["value"]

    def forget(self, key: str) -> None:
        """Free the store of a key and all below it (process 0 only)."""
        if self.count > 1 and self.index == 0:
            self._client.key_value_delete(f"{self._namespace}/{key}/")

    def _get(self, key: str) -> str:
        return self._client.blocking_key_value_get(f"{self._namespace}/{key}", TIMEOUT_S * 1000)


def _attempt(function: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": function()}
    except Exception as e:  # noqa: BLE001 - it is raised again on every process
        return {"error": [kind_of(e), f"process {jax.process_index()}: {e}"]}
