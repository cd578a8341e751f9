"""Answers written by an engine that others run: vLLM or SGLang, reached over HTTP.

The policy's parameters are exported to a folder that both sides see, and the server is told to load
them: whenever a call brings other parameters than the server has.
"""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from step_jax.core.errors import ConfigError, DataError
from step_jax.inference.sampling import SamplingConfig
from step_jax.inference.served import Served
from step_jax.interop.hf import save_hf
from step_jax.interop.hf.export import config_to_hf
from step_jax.models.text.decoder import Decoder
from step_jax.tokenizers.base import Tokenizer
from step_jax.trainers.rl.config import Rollout, Server


def post(server: Server, path: str, body: dict[str, Any] | None) -> bytes:
    """The answer to a POST of ``body``, or to a GET if it is None.

    Raises:
      DataError: it does not answer, or refuses.
    """
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(
        server.url.rstrip("/") + path, data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=60 * server.minutes) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        said = error.read()[:300].decode(errors="replace")
        raise DataError(f"{server.url}{path}: status {error.code}: {said}") from error
    except OSError as error:
        raise DataError(f"{server.url}{path} does not answer: {error}") from error


def check(server: Server) -> None:
    """Raises ConfigError if the server has no such model, DataError if it does not answer."""
    answer = post(server, "/v1/models", None)
    try:
        names = [model["id"] for model in json.loads(answer)["data"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{server.url}/v1/models lists no models: {answer[:200]!r}") from error
    if server.model not in names:
        raise ConfigError(
            f"{server.url} has no model {server.model!r}; it has: {', '.join(map(str, names))}"
        )


def load(server: Server, folder: Path) -> None:
    """Has the server read a folder's weights. Raises DataError."""
    if server.kind == "sglang":  # which forgets cached prompts by itself
        said = json.loads(post(server, "/update_weights_from_disk", {"model_path": str(folder)}))
        if not said.get("success", False):
            raise DataError(f"{server.url} did not load {folder}: {said.get('message', said)}")
        return
    where = {"weights_path": str(folder), "is_checkpoint_format": True}
    post(server, "/collective_rpc", {"method": "reload_weights", "kwargs": where})
    post(server, "/reset_prefix_cache", {})  # what it read by the old parameters


class Handover:
    """Gives a server the parameters that it does not have."""

    def __init__(self, server: Server, policy: Decoder, tokenizer: Tokenizer, context: int):
        """Raises ConfigError if no Hugging Face family computes the policy."""
        config_to_hf(policy)
        self._server, self._policy = server, policy
        self._tokenizer, self._context = tokenizer, context
        self._has: Any = None
        self._count = 0

    def __call__(self, params: Any, version: int) -> None:
        if params is self._has:
            return
        self._count += 1  # a name of its own: servers keep what they read by its name
        folder = Path(self._server.weights) / f"version_{version}_{self._count}"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        save_hf(
            folder,
            params,
            self._policy,
            dtype=self._server.dtype,
            context_length=self._context,
            bos_id=self._tokenizer.start_id,
            eos_ids=self._tokenizer.stop_ids,
        )
        load(self._server, folder)
        self._has = params
        for old in folder.parent.glob("version_*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)


def served(
    server: Server, policy: Decoder, tokenizer: Tokenizer, rollout: Rollout, seed: int
) -> Served:
    """The server as an engine. Errors as ``check``."""
    check(server)
    return Served(
        server.url.rstrip("/"),
        server.model,
        SamplingConfig(temperature=rollout.temperature),
        vocab=policy.vocab,
        slots=rollout.slots,
        max_length=rollout.context,
        seed=seed,
        stop_ids=tokenizer.stop_ids,
        handover=Handover(server, policy, tokenizer, rollout.context),
    )
