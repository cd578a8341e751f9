"""Artifacts by name, whoever made them, and what a loop starts from.

``RUN`` and ``RUN@STEP`` are runs of this package, ``hf:PATH`` is a folder in the Hugging Face
layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from step_jax.checkpoint.artifact import Artifact, Part, load_run
from step_jax.core import spec as spec_lib
from step_jax.core.config import to_plain
from step_jax.core.errors import CheckpointError, ConfigError
from step_jax.core.sharding import Sharding
from step_jax.core.storage import is_url
from step_jax.training.learner import LoRA

HUGGING_FACE = "hf:"
#: Settings of models that say how they are trained, and nothing of what their parameters compute.
#: Whatever is not named here counts, so that a new setting is safe until somebody decides.
OF_TRAINING = {
    "Decoder.init",
    "Tower.init",
    "VideoDiT.init",
    "MFA.output_rate",
    "MHA.output_rate",
    "MLA.output_rate",
    "MTP.weight",
    "MoE.capacity",
    "MoE.exchange",
    "Router.balance_loss",
    "Router.bias_rate",
    "Router.frozen",
    "Router.group_loss",
    "Router.loss_groups",
    "Router.z_loss",
}


def load_artifact(
    name: str,
    sharding: Sharding,
    part: str | None = None,
    *,
    arrays: bool = True,
    accept: Callable[[Artifact], None] | None = None,
) -> Artifact:
    """The artifact of a name.

    Args:
      name: ``RUN``, ``RUN@STEP`` or ``hf:PATH``.
      sharding: where its parameters are laid out.
      part: which of its models; None for the first.
      arrays: False leaves the parameters out, for those who only ask what it is.
      accept: told of the artifact before its parameters are laid out; raises for one that will not
        do.

    Raises:
      ConfigError: there is nothing of that name.
      CheckpointError, DataError: it cannot be loaded; says why.
    """
    if not name.startswith(HUGGING_FACE):
        return load_run(name, sharding, part, arrays=arrays, accept=accept)
    if part is not None:
        raise ConfigError(f"{name} has a single model: leave part {part!r} out")
    from step_jax.interop.hf.artifact import load_hf_artifact

    folder = name.removeprefix(HUGGING_FACE)
    if accept is not None:
        accept(load_hf_artifact(folder, sharding, arrays=False))
    return load_hf_artifact(folder, sharding, arrays=arrays)


@dataclass(frozen=True)
class InitFrom:
    """What a run starts from instead of fresh parameters.

    artifact: ``RUN``, ``RUN@STEP`` or ``hf:PATH``.
    part: which of its models; the first by default.
    fresh: parameters that start anew all the same, as paths with ``*``; they may have other shapes.
    changed: settings of ``model`` that are meant to be others than the artifact's though its
      parameters fit, as paths with ``*``: ``*.position.theta``.
    freeze: parameters that are not trained.
    lora: train adapters of low rank beside the frozen model.
    """

    artifact: str
    part: str | None = None
    fresh: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    lora: LoRA | None = None

    def validate(self):
        if self.lora is not None and (self.freeze or self.fresh):
            raise ConfigError("init_from.lora freezes the whole model: leave freeze and fresh out")


@dataclass(frozen=True)
class Start:
    """Where a learner starts: the model, and the parameters that it does not start afresh.

    Attributes:
      model: its configuration.
      params: a tree of the model's, None in the place of fresh ones; None if all are.
      processor: that came with it, by name.
      origin: what it started from, in words for whoever finds its result; "" if it is fresh.
      freeze, lora: see ``training.learner.tables``.
    """

    model: Any
    params: Any = None
    processor: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    freeze: tuple[str, ...] = ()
    lora: LoRA | None = None

    @property
    def tokenizer(self):
        """That came with the artifact. Raises CheckpointError if none did."""
        if "tokenizer" not in self.processor:
            raise CheckpointError(
                f"{self.origin or 'a fresh model'} has no tokenizer: its model reads no text"
            )
        return self.processor["tokenizer"]

    def given(self, learner: str) -> dict[str, Any]:
        """The learner's parameters that do not start afresh, as ``Session.start`` takes them."""
        return {} if self.params is None else {learner: self.params}

    def part(self, model: Any = None, *, average: bool = False) -> Part:
        """What a checkpoint says of the learner; ``model`` if it is another one by now."""
        return Part(self.model if model is None else model, average, self.freeze, self.lora)


def starting_point(
    model: Any,
    init: InitFrom | None,
    sharding: Sharding,
    kind: type,
    goes_on_from: str | None = None,
    *,
    complete: Callable[[Any, Any], Any] = lambda model, found: model,
    convert: Callable[[Artifact], Artifact] = lambda artifact: artifact,
    arrays: bool = True,
) -> Start:
    """The start of a loop that is configured with a ``model``, an ``init_from``, or both.

    With both, the artifact's parameters must fit the model but for the fresh ones, and compute in
    it what they computed but for the settings that ``init.changed`` names.

    Args:
      kind: of the model that the loop trains.
      goes_on_from: ``Session.goes_on_from``. A run that goes on is what it is by now: what it once
        started from need not be there any more.
      complete: (model, the artifact's model) -> the model with what it leaves to the artifact.
      convert: makes an artifact of another kind one of ``kind``, if it can.
      arrays: False leaves the parameters out, of a plan: that of a recipe which says its model can
        be made before the artifact is there.

    Raises:
      ConfigError: neither is given, or a pattern names nothing.
      CheckpointError: an artifact of another kind, parameters that do not fit, or settings that are
        not those that they were trained with; names each.
    """
    if init is None:
        if model is None:
            raise ConfigError("give a model, or init_from: what to start from")
        return Start(model)
    goes_on = goes_on_from is not None
    name, part = (goes_on_from, None) if goes_on_from else (init.artifact, init.part)

    def accept(found: Artifact) -> None:
        convert(found).require(kind, "init_from here")

    reads = arrays and not goes_on
    try:
        artifact = convert(load_artifact(name, sharding, part, arrays=reads, accept=accept))
    except ConfigError:
        if model is None or arrays or goes_on or present(name):
            raise
        return Start(model, freeze=init.freeze, lora=init.lora)
    model = artifact.model if model is None else complete(model, artifact.model)
    origin = artifact.meta["artifact"]["origin"] if goes_on else f"{name}, step {artifact.step}"
    start = Start(model, None, artifact.processor, origin, init.freeze, init.lora)
    if goes_on:
        return start
    fresh = _fresh(artifact, model, init)
    _check_settings(artifact, model, init)
    if not arrays:
        return start
    held = spec_lib.by_name(artifact.params)
    params = spec_lib.map_names(lambda n: None if n in fresh else held[n], model.specs())
    return replace(start, params=params)


def present(name: str) -> bool:
    """Whether something of an artifact's name is there; of a URL that is taken for granted."""
    path = name.removeprefix(HUGGING_FACE)
    return is_url(path) or any(Path(p).expanduser().exists() for p in (path, path.split("@")[0]))


def _fresh(artifact: Artifact, model: Any, init: InitFrom) -> set[str]:
    """The parameters that start anew; the others must be alike in artifact and model."""
    found, wanted = (spec_lib.by_name(m.specs()) for m in (artifact.model, model))
    fresh = spec_lib.matching(wanted | found, init.fresh)
    problems = []
    for name in sorted((wanted | found).keys() - fresh):
        here, there = (table[name].shape if name in table else None for table in (wanted, found))
        if here != there:
            problems.append(f"{name}: the model has {here or 'none'}, it has {there or 'none'}")
    if problems:
        raise CheckpointError(
            f"the parameters of {init.artifact} do not fit the model: {'; '.join(problems)}. "
            "Leave model out to take the artifact's, or name what starts anew in init_from.fresh"
        )
    return fresh


def _check_settings(artifact: Artifact, model: Any, init: InitFrom) -> None:
    """Raises CheckpointError if parameters that fit would compute something else in the model."""
    unlike = [
        f"{key} was {to_plain(was)} and is {to_plain(now)}"
        for key, was, now in differences(artifact.model, model)
        if not any(fnmatchcase(key, pattern) for pattern in init.changed)
        and not (init.fresh and _makes_other_parameters(artifact.model, key, now))
    ]
    if unlike:
        raise CheckpointError(
            f"the parameters of {init.artifact} fit the model, and would compute something else in "
            f"it:\n  {'\n  '.join(unlike)}\n"
            "Leave model out to take the artifact's settings, set them back, or name what is meant "
            "to change in init_from.changed"
        )


def differences(model: Any, other: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, the one's value, the other's) of the settings by which two models compute unlike things
    from the same parameters (all but ``OF_TRAINING``)."""
    if is_dataclass(model) and type(model) is type(other):
        for f in fields(model):
            if f"{type(model).__name__}.{f.name}" not in OF_TRAINING:
                pair = getattr(model, f.name), getattr(other, f.name)
                yield from differences(*pair, f"{key}.{f.name}".lstrip("."))
    elif isinstance(model, tuple) and isinstance(other, tuple) and len(model) == len(other):
        for i, pair in enumerate(zip(model, other, strict=True)):
            yield from differences(*pair, f"{key}.{i}")
    elif model != other:
        yield key, model, other


def _makes_other_parameters(model: Any, key: str, value: Any) -> bool:
    """Whether a setting alone changes which parameters there are, and so ``init_from.fresh`` says
    what becomes of them."""

    def changed(tree: Any, path: list[str]) -> Any:
        if not path:
            return value
        name, *rest = path
        if isinstance(tree, tuple):
            i = int(name)
            return (*tree[:i], changed(tree[i], rest), *tree[i + 1 :])
        return replace(tree, **{name: changed(getattr(tree, name), rest)})

    def shapes(model: Any) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in spec_lib.by_name(model.specs()).items()}

    try:
        return shapes(changed(model, key.split("."))) != shapes(model)
    except (ValueError, AssertionError, ZeroDivisionError):  # no model at all without the others
        return True
