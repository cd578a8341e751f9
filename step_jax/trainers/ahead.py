"""The token caches of a run, made ahead of it: what the run would make, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding, make_mesh
from step_jax.data import DataConfig, TextDataset, prepare
from step_jax.data.config import TRAIN_TOKENIZER, PreferenceConfig
from step_jax.data.preferences import PreferenceDataset, Preferences
from step_jax.interop.artifacts import Start, load_artifact
from step_jax.tokenizers.base import Tokenizer
from step_jax.trainers.judged import JudgedLoop


def prepare_ahead(
    config: Any, report: Callable[[str], None], workers: int | None = None
) -> TextDataset:
    """Trains the tokenizer and makes the caches that a run will find, or checks every byte of them.

    Args:
      config: of a loop that reads texts, conversations or judged answers: what has ``data`` and may
        have ``init_from``.
      workers: see `step_jax.data.prepare`.

    Raises:
      ConfigError: the loop reads no text; else as `step_jax.data.prepare`, and as `load_artifact`
        where the tokenizer comes with an artifact.
    """
    data = config.data
    if not isinstance(data, DataConfig):
        raise ConfigError("this is a recipe of a loop that reads no text")
    tokenizer, records = _tokenizer(config), None
    build: type[TextDataset] = TextDataset
    more: dict[str, Any] = {}
    if isinstance(data, PreferenceConfig):
        more["verdicts"] = isinstance(config, JudgedLoop) and config.verdicts
        records, build = Preferences(data.sequence_length, data.too_long, **more), PreferenceDataset
    prepared = prepare(data, report, tokenizer, records, workers=workers, verify=True)
    return build(data, prepared, batch_size=1, **more)


def _tokenizer(config: Any) -> Tokenizer | None:
    """That of the artifact that a run starts from, if the texts are read by it."""
    init = getattr(config, "init_from", None)
    if init is None or config.data.tokenizer != TRAIN_TOKENIZER:
        return None
    # An accelerator is not needed, and may be another process's.
    jax.config.update("jax_platforms", "cpu")
    sharding = Sharding(make_mesh(MeshConfig(), jax.devices()[:1]))
    artifact = load_artifact(init.artifact, sharding, init.part, arrays=False)
    return Start(artifact.model, processor=artifact.processor, origin=init.artifact).tokenizer
