"""A trained model from its run directory, without its optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from step_jax.checkpoint import Checkpointer
from step_jax.core import spec as spec_lib
from step_jax.core.config import parse_config
from step_jax.core.errors import CheckpointError, ConfigError
from step_jax.core.sharding import Sharding
from step_jax.data import DataConfig
from step_jax.models.context import Execution
from step_jax.models.text.decoder import Decoder, DecoderParams
from step_jax.tokenizers.base import Tokenizer
from step_jax.tokenizers.files import load_tokenizer


@dataclass(frozen=True)
class Trained:
    """A model as its run left it.

    params: float32, laid out on the mesh; the moving average if the run kept one.
    data: configuration of what it was trained on; ``data.sequence_length`` is its context.
    meta: all that was saved beside the arrays.
    """

    decoder: Decoder
    params: DecoderParams
    tokenizer: Tokenizer
    data: DataConfig
    execution: Execution
    step: int
    meta: dict[str, Any]


def run_directory_of(path: str | Path) -> tuple[Path, int | None]:
    """(run directory, step) of a path to a run or to one of its ``checkpoints/STEP``.

    Raises:
      ConfigError: it is neither.
    """
    path = Path(path).expanduser()
    if (path / "checkpoints").is_dir():
        return path, None
    if path.is_dir() and path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent, int(path.name)
    what = "has no checkpoints/ folder" if path.is_dir() else "does not exist"
    raise ConfigError(f"{path} {what}: give the directory of a run, or one of its checkpoints/STEP")


def load_model(path: str | Path, sharding: Sharding, step: int | None = None) -> Trained:
    """The model of a run at the newest verified step, or at ``step``.

    A run that is still going may be read: nothing is written or removed.

    Args:
      path: a run directory, or a step in its ``checkpoints/``.

    Raises:
      ConfigError: ``path`` is not a run.
      CheckpointError: no verified step, a damaged one, or one of another model.
      DataError: the tokenizer kept with the run is missing or not the one it was trained with.
    """
    directory, named = run_directory_of(path)
    step = named if step is None else step
    checkpointer = Checkpointer(directory / "checkpoints")
    step = checkpointer.latest() if step is None else step
    if step is None:
        raise CheckpointError(f"{directory} has no verified checkpoint to load")
    meta = checkpointer.meta(step)
    config = meta["config"]
    decoder = _group(Decoder, config, "model", directory)
    tokenizer = load_tokenizer(directory / "tokenizer")
    tokenizer.require(meta["tokenizer"], f"the checkpoint of step {step}")
    averaged = config["training"]["ema_decay"] is not None
    specs = decoder.specs()
    params, _ = checkpointer.restore(
        step,
        spec_lib.abstract(specs, sharding.params(specs)),
        subtree="ema" if averaged else "params",
    )
    return Trained(
        decoder=decoder,
        params=params,
        tokenizer=tokenizer,
        data=_group(DataConfig, config, "data", directory),
        execution=_group(Execution, config, "execution", directory),
        step=step,
        meta=meta,
    )


def _group[T](cls: type[T], config: dict[str, Any], name: str, directory: Path) -> T:
    if name not in config:
        raise CheckpointError(f"the run in {directory} has no `{name}`: it is no language model's")
    return parse_config(cls, yaml.safe_dump(config[name]), f"{directory}, {name}")
