"""What a run leaves behind: models that anyone can load, with what they read and write by.

A checkpoint holds, beside its arrays, a :class:`Description`: the model of every learner and how it
is kept. The processors (a tokenizer) lie in folders of the run directory, by their hashes.
``interop.artifacts.load_artifact`` also finds artifacts that are no runs of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import yaml

from step_jax.checkpoint.checkpointer import Checkpointer
from step_jax.checkpoint.manifest import committed_steps
from step_jax.core import spec as spec_lib
from step_jax.core.config import parse_config, to_plain
from step_jax.core.errors import CheckpointError, ConfigError
from step_jax.core.sharding import Sharding
from step_jax.core.storage import Objects, is_url, staged
from step_jax.models.context import ComputeDtype, Execution
from step_jax.models.kinds import Model
from step_jax.tokenizers.files import load_tokenizer
from step_jax.training.learner import LoRA, tables, view

#: name of a processor -> how it is read from its folder
PROCESSORS = {"tokenizer": load_tokenizer}


@dataclass(frozen=True)
class Part:
    """One learner's model, and how a state keeps it.

    model: the resolved configuration.
    average: whether there is a moving average of what is trained.
    freeze, lora: see ``training.learner.tables``.
    """

    model: Model
    average: bool = False
    freeze: tuple[str, ...] = ()
    lora: LoRA | None = None


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of its models.

    loop: the command that made them.
    parts: by learner; the first is what is meant when none is named.
    processor: hash of every processor, by name.
    context: tokens that a text of the model may have; null for models of no text.
    dtype: that the model was computed in.
    origin: what it started from, "" for fresh parameters.
    """

    loop: str
    parts: dict[str, Part]
    processor: dict[str, str] = field(default_factory=dict)
    context: int | None = None
    dtype: ComputeDtype = "bfloat16"
    origin: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON, which keeps no order of the parts: that is said beside."""
        return to_plain(self) | {"order": list(self.parts)}


@dataclass(frozen=True)
class Artifact:
    """A model as its maker left it.

    Attributes:
      name: what it was asked for as.
      directory: where it lies, or a copy of it here.
      model: its configuration.
      params: float32, laid out on the mesh; the moving average if the run kept one. None if they
        were left out.
      processor: what turns the user's text (pictures, sound) into its input and back, by name.
      context: tokens that a text may have, None for models of no text.
      dtype: that it was computed in.
      step: optimizer steps behind it; 0 if unknown.
      meta: all else that was saved beside the arrays.
    """

    name: str
    directory: Path
    model: Any
    params: Any
    processor: Mapping[str, Any]
    context: int | None
    dtype: ComputeDtype
    step: int
    meta: Mapping[str, Any]

    @property
    def execution(self) -> Execution:
        """How to compute it here: in its dtype, with whatever this machine has."""
        return Execution(dtype=self.dtype)

    @property
    def tokenizer(self):
        """The tokenizer. Raises CheckpointError if the artifact has none."""
        if "tokenizer" not in self.processor:
            raise CheckpointError(f"{self.name} has no tokenizer: its model reads no text")
        return self.processor["tokenizer"]

    @property
    def context_of_text(self) -> int:
        """``context``. Raises CheckpointError if the model is one of no text."""
        if self.context is None:
            raise CheckpointError(f"{self.name} does not say how many tokens a text may have")
        return self.context

    def require[T: Model](self, kind: type[T], purpose: str) -> T:
        """The model, if it is of this kind.

        Args:
          purpose: of the caller, for the message: ``step-jax generate``.

        Raises:
          CheckpointError: it is of another; says of which.
        """
        if not isinstance(self.model, kind):
            raise CheckpointError(
                f"{self.name} is a model of kind {self.model.kind}; {purpose} needs one of kind "
                f"{kind.kind}"
            )
        return self.model


def split_name(name: str) -> tuple[Path | Objects, int | None]:
    """(run directory, step or None) of ``RUN`` or ``RUN@STEP``.

    Raises:
      ConfigError: it is no run, or the step is no number.
    """
    text, at, step = name.rpartition("@")
    if not at or (not is_url(name) and Path(name).expanduser().exists()):
        text, step = name, ""
    if step and not step.isdecimal():
        raise ConfigError(f"{name}: after @ comes the number of a step, not {step!r}")
    number = int(step) if step else None
    if is_url(text):
        if not has_steps(text):
            raise ConfigError(f"{text} has no checkpoints: give the URL of a run, RUN or RUN@STEP")
        return Objects.at(text), number
    path = Path(text).expanduser()
    if not (path / "checkpoints").is_dir():
        what = "has no checkpoints/ folder" if path.is_dir() else "does not exist"
        hint = ""
        if path.parent.name == "checkpoints":
            hint = f" (one step of a run is {path.parent.parent}@{path.name.lstrip('0') or 0})"
        raise ConfigError(f"{text} {what}: give the directory of a run, RUN or RUN@STEP{hint}")
    return path, number


def has_steps(run: str) -> bool:
    """Whether a run directory, or its URL, has anything to go on from."""
    return bool(committed_steps((Objects.at(run) if is_url(run) else Path(run)) / "checkpoints"))


def open_run(name: str) -> tuple[Path, Checkpointer, int]:
    """(directory, checkpoints, step) of ``RUN`` at its newest verified step, or of ``RUN@STEP``.

    A run that is still going may be read: nothing is written or removed. Of a run in an object
    store the directory is a copy of what its artifacts need.

    Raises:
      ConfigError: ``name`` is no run.
      CheckpointError: no verified step, or none of that number.
    """
    run, step = split_name(name)
    checkpointer = Checkpointer(run / "checkpoints")
    if step is None:
        step = checkpointer.latest()
        if step is None:
            raise CheckpointError(f"{run} has no verified checkpoint to load")
    elif step not in (steps := checkpointer.steps()):
        raise CheckpointError(f"{run} has no step {step}; there are: {steps}")
    if isinstance(run, Objects):
        run = staged(run, "heldout", *PROCESSORS)
    return run, checkpointer, step


def load_run(
    name: str,
    sharding: Sharding,
    part: str | None = None,
    *,
    arrays: bool = True,
    accept: Callable[[Artifact], None] | None = None,
) -> Artifact:
    """The model of a run; see :func:`open_run`.

    Args:
      part: the learner whose model it is; None for the first.
      arrays: False leaves the parameters out.
      accept: told of the artifact before its parameters are laid out; raises for one that will not
        do.

    Raises:
      ConfigError: ``name`` is no run.
      CheckpointError: no verified step, none of that number, a damaged one, no such part.
      DataError: a processor kept with the run is missing, or not the one it was trained with.
    """
    directory, checkpointer, step = open_run(name)
    meta = checkpointer.meta(step)
    description, order = _description(meta, directory)
    part = part or order[0]
    if part not in description.parts:
        raise CheckpointError(f"{name} has no part {part!r}; there are: {', '.join(order)}")
    held = description.parts[part]
    processor = {
        kind: _processor(directory, kind, digest, step)
        for kind, digest in description.processor.items()
    }
    artifact = Artifact(
        name=name,
        directory=directory,
        model=held.model,
        params=None,
        processor=processor,
        context=description.context,
        dtype=description.dtype,
        step=step,
        meta=meta,
    )
    if accept is not None:
        accept(artifact)
    if not arrays:
        return artifact
    params = _params(checkpointer, step, f"learners.{part}", held, sharding)
    return replace(artifact, params=params)


def _processor(directory: Path, kind: str, digest: str, step: int) -> Any:
    found = PROCESSORS[kind](directory / kind)
    found.require(digest, f"the checkpoint of step {step}")
    return found


def _description(meta: Mapping[str, Any], directory: Path) -> tuple[Description, list[str]]:
    if "artifact" not in meta:
        raise CheckpointError(f"the run in {directory} does not say what model it holds")
    tree = dict(meta["artifact"])
    order = tree.pop("order")
    text = yaml.safe_dump(tree)
    return parse_config(Description, text, f"{directory}, artifact"), order


def _params(checkpointer: Checkpointer, step: int, learner: str, held: Part, sharding: Sharding):
    """The model's parameters: those kept, with the average of the trained ones in their place."""
    model_specs, specs = tables(held.model.specs(), held.freeze, held.lora)
    abstract = spec_lib.abstract(specs, sharding.params(specs))
    trained = spec_lib.trained(specs, abstract)
    params = None
    if not held.average or len(jax.tree.leaves(trained)) < len(jax.tree.leaves(abstract)):
        params, _ = checkpointer.restore(step, abstract, subtree=f"{learner}.params")
    if held.average:
        average, _ = checkpointer.restore(step, trained, subtree=f"{learner}.average")
        params = average if params is None else spec_lib.completed(specs, average, params)
    return view(model_specs, params, held.lora)
