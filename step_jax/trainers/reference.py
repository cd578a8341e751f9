"""Frozen reference policies: their log-probabilities, computed once, or their parameters, pinned.

``reference/`` of a run directory holds ``logprobs.npz`` (for each source of the data set, then for
what is held out of each: float32 (N, 2), see ``PreferenceDataset.reference``) and ``meta.json``:
whose they are (the reference's name and a digest of its parameters), of which texts, and the
arrays' checksum. Reading checks all of it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from step_jax.core import spec as spec_lib
from step_jax.core.errors import CheckpointError, ConfigError, DataError
from step_jax.core.files import write_whole
from step_jax.core.sharding import Sharding
from step_jax.data.batches import to_mesh
from step_jax.data.preferences import PreferenceDataset
from step_jax.interop.artifacts import (
    HUGGING_FACE,
    InitFrom,
    Start,
    differences,
    load_artifact,
)
from step_jax.models.context import Execution
from step_jax.models.text.decoder import Decoder
from step_jax.tokenizers.base import Tokenizer
from step_jax.training.losses.judged import reference_logprobs

_META, _ARRAYS = "meta.json", "logprobs.npz"
_ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D)


@dataclass(frozen=True)
class Reference:
    """The log-probabilities, and what they are of.

    Attributes:
      facts: JSON: ``reference`` (its name), ``parameters`` (their digest), ``dtype`` (that they
        were computed in) and ``texts`` (a digest of each source).
      logprobs: as ``PreferenceDataset.reference`` has them.
    """

    facts: dict[str, Any]
    logprobs: list[np.ndarray]

    def save(self, folder: Path) -> None:
        """Writes them whole: ``meta.json`` comes last."""
        stream = io.BytesIO()
        np.savez(stream, *self.logprobs)
        content = stream.getvalue()
        write_whole(folder / _ARRAYS, content)
        meta = self.facts | {"checksum": xxhash.xxh3_128_hexdigest(content)}
        write_whole(folder / _META, json.dumps(meta, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Reference | None:
        """What ``save`` wrote, None if nothing was. Raises DataError if it is damaged."""
        if not (folder / _META).exists():
            return None
        try:
            facts = json.loads((folder / _META).read_bytes())
            content = (folder / _ARRAYS).read_bytes()
            if facts.pop("checksum") != xxhash.xxh3_128_hexdigest(content):
                raise ValueError(f"{_ARRAYS} is not what was written")
            with np.load(io.BytesIO(content)) as arrays:
                return cls(facts, [arrays[f"arr_{i}"] for i in range(len(arrays.files))])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"the reference's log-probabilities in {folder} are damaged ({error}): remove the "
                "folder, and they are computed anew from the reference"
            ) from error

    def check(self, saved: Mapping[str, Any] | None, step: int) -> None:
        """Raises CheckpointError unless a checkpoint was made with this reference."""
        for name, value in self.facts.items():
            if saved is not None and saved[name] != value:
                raise CheckpointError(
                    f"the reference policy is not the one of step {step}: its {name} was "
                    f"{saved[name]} and is {value}; set it back, or start a new run"
                )


@dataclass(frozen=True)
class Compared:
    """The reference policy, before its parameters are looked at.

    Attributes:
      name: of its artifact.
      part: which of its models; None for the first.
      start: of the run, if that is the reference.
      goes_on: the run has steps: the reference was checked when it began, and need not be there.
    """

    name: str
    part: str | None = None
    start: Start | None = None
    goes_on: bool = False

    def check(self, tokenizer: Tokenizer, sharding: Sharding) -> None:
        """Raises ConfigError for a policy that says nothing of this tokenizer's tokens; others as
        ``load_artifact``."""
        if self.goes_on:
            return
        if self.start is not None:
            model, theirs = self.start.model, self.start.tokenizer
            missing = spec_lib.map_specs(lambda s, a: a is None, model.specs(), self.start.params)
            if any(jax.tree.leaves(missing)):
                raise ConfigError(
                    f"init_from.fresh leaves no whole policy of {self.name} to compare with: name "
                    "one as reference"
                )
        else:
            artifact = load_artifact(self.name, sharding, self.part, arrays=False)
            model, theirs = artifact.require(Decoder, "reference"), artifact.tokenizer
        if theirs.hash != tokenizer.hash or model.vocab < tokenizer.vocab_size:
            raise ConfigError(
                f"the reference {self.name} has another vocabulary ({theirs.name}: "
                f"{theirs.vocab_size} tokens; model.vocab {model.vocab}) than the run "
                f"({tokenizer.name}: {tokenizer.vocab_size} tokens): likelihoods of unlike tokens "
                "cannot be compared. Take another reference, or set data.tokenizer to its own"
            )

    def loaded(self, sharding: Sharding) -> tuple[Decoder, Any]:
        """(model, parameters)."""
        if self.start is not None and self.start.params is not None:
            return self.start.model, self.start.params
        artifact = load_artifact(self.name, sharding, self.part)
        return artifact.require(Decoder, "reference"), artifact.params


def compared_with(
    asked: str | None, init: InitFrom | None, begin: Start, *, goes_on: bool
) -> Compared:
    """The reference policy of a run: the artifact that is ``asked`` for, or else its start."""
    if asked is not None:
        return Compared(asked, goes_on=goes_on)
    assert init is not None  # see the loop's validate
    return Compared(init.artifact, init.part, begin, goes_on)


def reference_of(
    compared: Compared,
    dataset: PreferenceDataset,
    execution: Execution,
    sharding: Sharding,
    folder: Path,
    report,
) -> Reference:
    """The reference's log-probabilities: those in ``folder`` if they are of it, else computed.

    Raises:
      DataError, CheckpointError: see ``load_artifact`` and ``Reference.load``.
    """
    facts = {
        "reference": compared.name,
        "dtype": execution.dtype,
        "texts": [source.digest for source in dataset.sources],
    }
    kept = Reference.load(folder)
    if kept is not None and any(kept.facts.get(key) != value for key, value in facts.items()):
        kept = None
    if kept is not None and compared.goes_on:
        return kept
    model, params = compared.loaded(sharding)
    facts |= {"parameters": digest_of_params(params)}
    if kept is not None and kept.facts == facts:
        return kept
    report(f"computing the log-probabilities of all answers under {compared.name}")
    return Reference(facts, computed(model, params, dataset, execution, sharding))


def computed(
    model: Decoder,
    params: Any,
    dataset: PreferenceDataset,
    execution: Execution,
    sharding: Sharding,
) -> list[np.ndarray]:
    """The log-probabilities of every example's two answers, for each of ``dataset.sources``."""
    of = reference_logprobs(model, execution, sharding)

    def cast(params, batch):
        return of(spec_lib.cast(params, execution.dtype, model.specs()), batch)

    step = jax.jit(cast, out_shardings=sharding.replicated())
    schema, made = dataset.schema, []
    for i, source in enumerate(dataset.sources):
        found_NS = np.zeros((source.number, 2), np.float32)
        for batch, which_BK in dataset.sweep(i):
            logprobs_BSK = np.asarray(step(params, to_mesh(sharding, schema, batch)))
            rows, k = np.nonzero(which_BK >= 0)
            found_NS[which_BK[rows, k]] = logprobs_BSK[rows, :, k]
        made.append(found_NS)
    return made


def frozen_reference(
    asked: str | None,
    init: InitFrom | None,
    begin: Start,
    tokenizer: Tokenizer | None,
    sharding: Sharding,
    was: Mapping[str, str] | None,
) -> tuple[Any, dict[str, str]]:
    """The parameters of a reference that every step is compared with anew, and what pins them.

    Args:
      asked: its artifact; None for the run's start.
      begin, tokenizer: of the policy.
      was: what the finished steps were compared with, as this function told it.

    Raises:
      ConfigError: it is another model than the policy, or reads other tokens.
      CheckpointError: see :func:`pinned`.
    """
    name, part = asked, None
    if name is None:
        assert init is not None  # see the loop's validate
        name, part = (init.artifact if was is None else was["name"]), init.part
    artifact = load_artifact(name, sharding, part)
    model = artifact.require(type(begin.model), "the reference")
    if unlike := [key for key, *_ in differences(model, begin.model)]:
        raise ConfigError(
            f"the reference {name} is another model than the policy, by {', '.join(unlike)}: they "
            "are compared by one forward pass"
        )
    if tokenizer is not None and artifact.tokenizer.hash != tokenizer.hash:
        raise ConfigError(f"the reference {name} has another tokenizer than the policy")
    if not name.startswith(HUGGING_FACE) and "@" not in name:
        name = f"{name}@{artifact.step}"
    return artifact.params, pinned(name, artifact.params, was)


def pinned(name: str, params: Any, was: Mapping[str, str] | None) -> dict[str, str]:
    """What a checkpoint says of a reference: its name, and the digest of its parameters.

    Raises:
      CheckpointError: it is not what the run's finished steps were compared with, ``was``.
    """
    found = {"name": name, "parameters": digest_of_params(params)}
    if was is not None and was["parameters"] != found["parameters"]:
        raise CheckpointError(
            f"the reference policy is not the one that the finished steps were compared with: it "
            f"was {was['name']}, and {name} has other parameters; set it back, or start a new run"
        )
    return found


def digest_of_params(params: Any) -> str:
    """Of the bits of float32 parameters; the same on every mesh, since integers add up exactly."""

    @jax.jit
    def sums(params):
        def of(a):
            bits = jax.lax.bitcast_convert_type(a.astype(jnp.float32), jnp.uint32)
            weight = jnp.uint32(1)
            for axis, odd in zip(range(a.ndim), _ODD, strict=False):
                place = jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis)
                weight = weight + place * jnp.uint32(odd)
            return jnp.sum(bits * (2 * weight + 1), dtype=jnp.uint32)

        return jax.tree.map(of, params)

    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(sums(params)))
    text = json.dumps([[spec_lib.path_name(path), int(value)] for path, value in leaves])
    return xxhash.xxh3_128_hexdigest(text.encode())
