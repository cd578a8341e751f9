"""Runs whose held-out losses are compared: what must agree, what is finished, training the rest.

Ablations (variants in files) and sweeps (values of keys) are made of these. A variant is a
pretraining recipe; a seed gives every variant of one data recipe the same order of the data.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from step_jax.core.command_line import load_config
from step_jax.core.config import load_file
from step_jax.core.errors import ConfigError
from step_jax.core.storage import local
from step_jax.data.config import TRAIN_TOKENIZER
from step_jax.models.text.facts import with_vocabulary
from step_jax.runs.history import outcome
from step_jax.runs.metrics_log import read_metrics
from step_jax.trainers import pretrain, text
from step_jax.trainers.ablation_table import Tried, in_order, is_number
from step_jax.training.step import DivergedError


@dataclass(frozen=True)
class Values:
    """A key of the recipe and the values of it that are tried.

    Attributes:
      key: as in ``optimizer.learning_rate``.
      values: as they were written; numbers ascending, others in their order.
    """

    key: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, words: str, option: str) -> Values:
        """From ``KEY=VALUE,VALUE,...``; commas within brackets belong to a value.

        Args:
          option: that was given it, for messages.

        Raises:
          ConfigError: no key, or fewer than two values that differ.
        """
        key, _, listed = words.partition("=")
        values = {
            float(value) if is_number(value) else value: value
            for value in map(str.strip, re.split(r",(?![^\[{]*[\]}])", listed))
        }
        if not key or len(values) < 2 or "" in values:
            raise ConfigError(
                f"{option} {words}: write KEY=VALUE,VALUE,... with two or more values, as in "
                "optimizer.learning_rate=1e-3,3e-3,1e-2"
            )
        return cls(key.replace("-", "_"), tuple(in_order(values.values())))

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]

    def folder(self, value: str) -> str:
        """Where the runs with one of the values are kept."""
        return f"{self.name}_{quote(value, safe=' ,+[]')}"

    def border(self, value: str) -> bool:
        """Whether nothing on one side of a value was tried, of several numbers."""
        ordered = in_order(self.values)
        numbers = len(ordered) > 1 and all(map(is_number, ordered))
        return numbers and value in (ordered[0], ordered[-1])


@dataclass(frozen=True)
class Plan:
    """All configurations of a comparison.

    Attributes:
      variants: by name, then by the value that is tried (None where nothing is searched for).
      search: None for none.
    """

    variants: Mapping[str, Mapping[str | None, pretrain.Config]]
    search: Values | None = None

    def of_seed(self, name: str, value: str | None, seed: int) -> pretrain.Config:
        """The run of a variant with a seed, in a directory of its own."""
        config = self.variants[name][value]
        directory = local(config.run.directory, "run.directory of runs to compare") / name
        if self.search is not None and value is not None:
            directory /= self.search.folder(value)
        run = replace(config.run, directory=str(directory / f"seed_{seed}"), seed=seed)
        return replace(config, run=run)

    def tried(self, name: str, seed: int) -> Tried | None:
        """What the finished runs of ``seed`` say of a variant's values; None without a search."""
        if self.search is None:
            return None
        values = self.search.values
        losses = {value: tried_loss(self.of_seed(name, value, seed)) for value in values}
        known = {value: loss for value, loss in losses.items() if loss is not None}
        if len(known) < len(losses):
            return Tried(self.search.key, known, None, False)
        best = min(known, key=lambda value: known[value])
        if math.isinf(known[best]):
            raise ConfigError(
                f"{name} diverged with every {self.search.key} of {', '.join(values)}"
            )
        return Tried(self.search.key, known, best, self.search.border(best))

    @property
    def directory(self) -> Path:
        """Where table and picture go."""
        first = next(iter(self.variants.values()))
        return Path(next(iter(first.values())).run.directory)


def load(
    files: Sequence[Path | str], overrides: Sequence[str], chosen: Mapping[str, str], prog: str
) -> pretrain.Config:
    """A recipe with flags and a value for each key in ``chosen``.

    Raises:
      ConfigError: a key that there is not, or a value that it does not take.
    """
    flags = [f"--{key}={value}" for key, value in chosen.items()]
    return load_config(pretrain.Config, [*map(str, files), *overrides, *flags], prog=prog).config


TOKENS = "tokens"  # what runs must agree in, unless it is what is varied


def check_comparable(plan: Plan, free: Sequence[str] = ()) -> None:
    """Raises ConfigError for runs that differ in tokens, tokenizer or held-out documents.

    Args:
      free: which of these may differ.
    """

    def named(name: str, value: str | None) -> str:
        return name if plan.search is None else f"{name} ({plan.search.key} {value})"

    (first, ours), *others = (
        (named(name, value), _compared(config))
        for name, tried in plan.variants.items()
        for value, config in tried.items()
    )
    for name, theirs in others:
        for what, (shown, identity) in ours.items():
            other, other_identity = theirs[what]
            if identity != other_identity and what not in free:
                remedy = "Give what they share to both (a common `base:` does)"
                if what == TOKENS:
                    remedy = "Give both one `training.tokens`, which their batches divide"
                raise ConfigError(
                    f"{first} and {name} differ in their {what}, so their losses would not "
                    f"compare: {shown} and {other}. {remedy}"
                )


def _compared(config: pretrain.Config) -> dict[str, tuple[str, Any]]:
    """What variants must agree in -> (as it is shown, as it is compared)."""
    data = config.data
    sources = tuple(replace(source, weight=1.0) for source in data.resolved_sources)
    paths = ", ".join(source.path for source in sources)
    tokens = tokens_of(config)
    tokenizer: tuple[Any, ...] = (data.tokenizer,)
    shown = data.tokenizer
    if text.trains_tokenizer(config):  # of the sources, which are compared below, by weight
        weights = [source.weight for source in data.resolved_sources]
        tokenizer += (data.vocab_size, *(w / sum(weights) for w in weights))
        shown = f"one of {data.vocab_size:,} pieces that is trained"
        shown += f" on sources of weights {weights}" if weights[1:] else ""
    elif config.init_from is not None and data.tokenizer == TRAIN_TOKENIZER:
        tokenizer += (config.init_from.artifact,)
        shown = f"that of {config.init_from.artifact}"
    heldout = (sources, data.heldout_fraction, data.max_document_bytes)
    return {
        TOKENS: (f"{tokens:,}", tokens),
        "tokenizer": (shown, tokenizer),
        "held-out documents": (f"{data.heldout_fraction:g} of {paths}", heldout),
    }


def tokens_of(config: pretrain.Config) -> int:
    """Tokens that the whole run is trained on."""
    tokens = tokens_of_step(config)
    return tokens * config.training.total_steps(tokens)


def tokens_of_step(config: pretrain.Config) -> int:
    """Tokens of one step."""
    T = config.data.sequence_length
    return config.training.rows(T, 1) * T


def finished(config: pretrain.Config) -> float | None:
    """The final held-out loss in the run directory of ``config``; None if it is not finished.

    A run of another length is not finished: it goes on, if its learning rate allows that.

    Raises:
      ConfigError: the directory holds a run of another configuration.
    """
    directory = Path(config.run.directory)
    if not (directory / "config.yaml").exists():
        return None
    saved = load_file(pretrain.Config, directory / "config.yaml")
    ours = with_vocabulary(config.decoder, saved.decoder.vocab)
    length = replace(config.training, steps=saved.training.steps, tokens=saved.training.tokens)
    same = replace(config, run=saved.run, model=ours, training=length)
    if saved.run.seed != config.run.seed or saved != same:
        raise ConfigError(
            f"{directory} holds a run of another configuration: give --run.directory a new place, "
            "or move the old runs away"
        )
    records = read_metrics(directory)
    done = any(r["event"] == "summary" and r["values"].get("status") == "done" for r in records)
    if not done or saved.training != config.training:
        return None
    return final_evaluation(records)["nll"]


def tried_loss(config: pretrain.Config) -> float | None:
    """As `finished`; infinite for a run that diverged, which others go on without."""
    loss = finished(config)
    ended = outcome(read_metrics(config.run.directory), running=False)
    if loss is None and ended.reason.startswith(DivergedError.__name__):
        return math.inf
    return loss


def final_evaluation(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The evaluation that a finished run ended with."""
    return next(r for r in reversed(records) if r["event"] == "eval" and "nll" in r)


def complete_model(config: pretrain.Config, runs: Iterable[pretrain.Config]):
    """The model with the vocabulary that its runs found, else with that of the configuration."""
    model = config.decoder
    for run in runs:
        if (saved := Path(run.run.directory) / "config.yaml").exists():
            model = load_file(pretrain.Config, saved).decoder
    return with_vocabulary(model, config.data.vocab_size)


class Scored(Protocol):
    """Losses by seed, those of finished runs, and the run directories."""

    @property
    def nll(self) -> Mapping[int, float]: ...
    @property
    def runs(self) -> Mapping[int, Path]: ...


def check_scored(rows: Iterable[Scored]) -> None:
    """Raises ConfigError if finished runs kept unlike held-out documents or tokenizers.

    What configurations do not tell: a text that was changed between two runs.
    """
    kept: dict[str, Path] = {}
    for row in rows:
        for seed in row.nll:
            meta = row.runs[seed] / "heldout" / "meta.json"
            if meta.exists():
                kept.setdefault(json.loads(meta.read_text())["checksum"], row.runs[seed])
    if len(kept) > 1:
        one, other, *_ = kept.values()
        raise ConfigError(
            f"{one} and {other} were scored on unlike held-out documents or with unlike "
            "tokenizers: the text was changed between the two. Move the older one away to train it "
            "again"
        )


def train(name: str, run: pretrain.Config, say: Callable[[str], None]) -> None:
    """Trains a run, unless it is finished; ``say`` is told how it came out."""
    loss, start = finished(run), time.process_time()
    if loss is None:
        loss = pretrain.run(run)["nll"]
    spent = time.process_time() - start
    say(f"{name}, seed {run.run.seed}: held-out loss {loss:.4f} ({spent:.0f} CPU-s)")


def try_out(name: str, run: pretrain.Config, say: Callable[[str], None]) -> None:
    """As `train`, of a run that may diverge: `tried_loss` is infinite then, and it stays so."""
    try:
        if tried_loss(run) != math.inf:
            return train(name, run, say)
    except DivergedError:
        pass
    say(f"{name}, seed {run.run.seed}: diverged")
