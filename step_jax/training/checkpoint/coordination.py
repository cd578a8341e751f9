"""Messages between the processes of one run over JAX's coordination service.

The key-value store serves threads beside the training loop: it needs no device collective, so
nothing here can interleave with the collectives of a training step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the key-value client has no public name (jax 0.11, 0.12)

from step_jax.training.checkpoint.errors import from_kind, kind_of

# Longer than the slowest plausible write of one process's share, shorter than a wasted night.
TIMEOUT_S = 1200


class Processes:
    """All processes of the run. Keys must be used in the same order everywhere, each once."""

    def __init__(self, namespace: str):
        self.index = jax.process_index()
        self.count = jax.process_count()
        self._namespace = f"step_jax/{namespace}"
        self._client = distributed.global_state.client if self.count > 1 else None

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
