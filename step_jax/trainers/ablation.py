"""Ablations: variants of one pretraining recipe, each trained with several seeds, in one table.

A variant is a configuration file; its name is the file's. Variants may differ in any part of the
recipe (attention, optimizer, rate, data), but not in what makes losses comparable: the number of
tokens, the tokenizer and the held-out documents. A seed gives every variant of one data recipe the
same order of the data, so two variants are compared seed by seed. A search gives each variant a
value of its own, the best of those tried.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from step_jax.core.command_line import load_config
from step_jax.core.config import load_file
from step_jax.core.errors import ConfigError
from step_jax.core.files import write_whole
from step_jax.core.spec import count
from step_jax.core.storage import local
from step_jax.data.config import TRAIN_TOKENIZER
from step_jax.models.text.facts import with_vocabulary
from step_jax.runs.history import outcome
from step_jax.runs.metrics_log import read_metrics
from step_jax.trainers import pretrain, text
from step_jax.trainers.ablation_table import LOOKS_BACK, Ablation, Row, Times, Tried
from step_jax.trainers.ablation_times import measure
from step_jax.training.step import DivergedError

BASE = "base.yaml"
PUBLISHED = "published.json"
SCORES = ("previous_token/", "induction/")  # of ``evaluation.attention_probe``


@dataclass(frozen=True)
class Search:
    """A key of the recipe and the values of it that every variant tries.

    Attributes:
      key: as in ``optimizer.learning_rate``.
      values: numbers as they were written, ascending.
    """

    key: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Search:
        """From ``KEY=VALUE,VALUE,...``. Raises ConfigError for anything else."""
        key, _, listed = text.partition("=")
        values = [value.strip() for value in listed.split(",")]
        try:
            numbers = [float(value) for value in values]
        except ValueError:
            numbers = []
        if not key or len(set(numbers)) < 2 or not all(map(math.isfinite, numbers)):
            raise ConfigError(
                f"--search {text}: write KEY=NUMBER,NUMBER,... with two or more numbers, as in "
                "optimizer.learning_rate=1e-3,3e-3,1e-2"
            )
        by_number = dict(zip(numbers, values, strict=True))
        return cls(key.replace("-", "_"), tuple(by_number[number] for number in sorted(by_number)))

    def folder(self, value: str) -> str:
        """Where a variant keeps the runs with one of the values."""
        return f"{self.key.rsplit('.', 1)[-1]}_{value}"


@dataclass(frozen=True)
class Plan:
    """All configurations of an ablation.

    Attributes:
      variants: by name, then by the value that is tried (None where nothing is searched for).
      search: None for none.
    """

    variants: Mapping[str, Mapping[str | None, pretrain.Config]]
    search: Search | None = None

    def of_seed(self, name: str, value: str | None, seed: int) -> pretrain.Config:
        """The run of a variant with a seed, in a directory of its own."""
        config = self.variants[name][value]
        directory = local(config.run.directory, "run.directory of an ablation") / name
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
        return Tried(self.search.key, known, best, best in (values[0], values[-1]))

    @property
    def directory(self) -> Path:
        """Where table and picture go."""
        first = next(iter(self.variants.values()))
        return Path(next(iter(first.values())).run.directory)


def load_variants(
    paths: Sequence[Path | str], overrides: Sequence[str] = (), search: Search | None = None
) -> Plan:
    """The configurations of files.

    Args:
      paths: configuration files, or directories of them (``base.yaml`` there is no variant).
      overrides: flags for all of them, such as ``["--training.steps", "100"]``.
      search: what every variant tries; None for nothing.

    Raises:
      ConfigError: no file, two of one name, or variants whose losses would not compare.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(f for f in path.glob("*.yaml") if f.name != BASE)
        files += inside if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"no configuration (*.yaml) in {', '.join(map(str, paths))}")
    variants: dict[str, dict[str | None, pretrain.Config]] = {}
    for file in files:
        if file.stem in variants:
            raise ConfigError(f"two variants are named {file.stem}: rename {file}")
        values = (None,) if search is None else search.values
        variants[file.stem] = {value: _load(file, overrides, search, value) for value in values}
    _check_comparable(variants, search)
    return Plan(variants, search)


def _load(
    file: Path, overrides: Sequence[str], search: Search | None, value: str | None
) -> pretrain.Config:
    argv = [str(file), *overrides]
    if search is not None and value is not None:
        argv += [f"--{search.key}", value]
    return load_config(pretrain.Config, argv, prog="step-jax ablate").config


def _check_comparable(
    variants: Mapping[str, Mapping[str | None, pretrain.Config]], search: Search | None
) -> None:
    """Raises ConfigError for variants that differ in tokens, tokenizer or held-out documents."""

    def named(name: str, value: str | None) -> str:
        return name if search is None else f"{name} ({search.key} {value})"

    (first, ours), *others = (
        (named(name, value), _compared(config))
        for name, tried in variants.items()
        for value, config in tried.items()
    )
    for name, theirs in others:
        for what, (shown, identity) in ours.items():
            other, other_identity = theirs[what]
            if identity != other_identity:
                raise ConfigError(
                    f"{first} and {name} differ in their {what}, so their losses would not "
                    f"compare: {shown} and {other}. Give what they share to both (a common `base:` "
                    "does)"
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
        "tokens": (f"{tokens:,}", tokens),
        "tokenizer": (shown, tokenizer),
        "held-out documents": (f"{data.heldout_fraction:g} of {paths}", heldout),
    }


def tokens_of(config: pretrain.Config) -> int:
    """Tokens that the whole run is trained on."""
    tokens = _tokens_of_step(config)
    return tokens * config.training.total_steps(tokens)


def _tokens_of_step(config: pretrain.Config) -> int:
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
    return _final(records)["nll"]


def tried_loss(config: pretrain.Config) -> float | None:
    """As `finished`; infinite for a run that diverged, which a search goes on without."""
    loss = finished(config)
    ended = outcome(read_metrics(config.run.directory), running=False)
    if loss is None and ended.reason.startswith(DivergedError.__name__):
        return math.inf
    return loss


def _final(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The evaluation that a finished run ended with."""
    return next(r for r in reversed(records) if r["event"] == "eval" and "nll" in r)


def collect(
    paths: Sequence[Path | str],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    reference: str | None = None,
    search: Search | None = None,
    times: Mapping[str, Times] | None = None,
) -> Ablation:
    """The table of the runs that are finished; trains nothing.

    Args:
      paths, seeds, overrides, reference, search: as `run_ablation`.
      times: by variant, for the table.

    Raises:
      ConfigError: no such reference, or finished runs that were scored on unlike documents.
    """
    plan = load_variants(paths, overrides, search)
    names = list(plan.variants)
    reference = names[0] if reference is None else reference
    if reference not in plan.variants:
        raise ConfigError(f"no variant is named {reference}; there are {', '.join(names)}")
    rows = {name: _row(plan, name, seeds, (times or {}).get(name)) for name in names}
    _check_scored(rows.values())
    published, source = _published(paths)
    return Ablation(
        rows=tuple(rows.values()),
        reference=rows[reference],
        tokens=tokens_of(_any(plan.variants[reference])),
        published=published,
        source=source,
        directory=plan.directory,
    )


def _any(tried: Mapping[str | None, pretrain.Config]) -> pretrain.Config:
    return next(iter(tried.values()))


def _row(plan: Plan, name: str, seeds: Sequence[int], times: Times | None) -> Row:
    tried = plan.tried(name, seeds[0]) if seeds else None
    value = None if tried is None else tried.best
    chosen = plan.search is None or value is not None
    runs = {seed: plan.of_seed(name, value, seed) for seed in seeds} if chosen else {}
    losses = {seed: loss for seed, run in runs.items() if (loss := finished(run)) is not None}
    model = complete_model(_any(plan.variants[name]), runs.values())
    length = _any(plan.variants[name]).data.sequence_length
    looks = [_looks(runs[seed]) for seed in losses] or [({}, {})]
    final, first = zip(*looks, strict=True)
    return Row(
        name=name,
        parameters=count(model.specs()),
        heads=tuple(dict.fromkeys(s.block.attention.heads for s in model.trunk.walk())),
        cache_bytes=model.init_cache(1, length).nbytes() / length,
        nll=losses,
        runs={seed: Path(run.run.directory) for seed, run in runs.items()},
        looks={n: statistics.fmean(seed[n] for seed in final) for n in final[0]},
        looks_from={n: statistics.median(seed[n] for seed in first) for n in first[0]},
        tried=tried,
        times=times,
    )


def complete_model(config: pretrain.Config, runs):
    """The model with the vocabulary that its runs found, else with that of the configuration."""
    model = config.decoder
    for run in runs:
        if (saved := Path(run.run.directory) / "config.yaml").exists():
            model = load_file(pretrain.Config, saved).decoder
    return with_vocabulary(model, config.data.vocab_size)


def _looks(run: pretrain.Config) -> tuple[dict[str, float], dict[str, float]]:
    """Of a finished run: (the scores at its end, the tokens after which each was above a bound)."""
    records = read_metrics(run.run.directory)
    final = {n: v for n, v in _final(records).items() if n.startswith(SCORES)}
    first = {name.partition("/")[0]: math.inf for name in final}
    for record in reversed([r for r in records if r["event"] == "eval"]):
        for name in final:
            if record.get(name, 0.0) > LOOKS_BACK:
                first[name.partition("/")[0]] = record["step"] * _tokens_of_step(run)
    return final, first


def _check_scored(rows) -> None:
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


def _published(paths: Sequence[Path | str]) -> tuple[dict[str, float], str]:
    for path in map(Path, paths):
        file = (path if path.is_dir() else path.parent) / PUBLISHED
        if file.exists():
            content = json.loads(file.read_text(encoding="utf-8"))
            return content["values"], content["source"]
    return {}, ""


def run_ablation(
    paths: Sequence[Path | str],
    seeds: Sequence[int] = (0, 1, 2),
    overrides: Sequence[str] = (),
    reference: str | None = None,
    search: Search | None = None,
    rounds: int = 0,
    say: Callable[[str], None] = print,
) -> Ablation:
    """Trains every variant with every seed; what is finished is kept, what was stopped goes on.

    A search comes first: every variant with every value and the first seed. Then seeds come in the
    outer loop, so that a stopped ablation has whole rounds of all variants. The table and the
    picture are left in the variants' ``run.directory``.

    Args:
      paths, overrides, search: see `load_variants`.
      seeds: of parameters and data order; each variant has its run of seed n in
        ``<run.directory>/<variant>/seed_<n>``, with a search in a folder of its value in between.
      reference: the variant that the others are compared with (default: the first).
      rounds: in which a step and a decoded token of every variant are timed at the end; 0: none.
      say: called with a line about every run.
    """
    plan = load_variants(paths, overrides, search)
    # what cannot work is found before hours of work
    collect(paths, seeds, overrides, reference, search)
    if search is not None:
        for value in search.values:
            for name in plan.variants:
                run = plan.of_seed(name, value, seeds[0])
                if tried_loss(run) != math.inf:
                    with suppress(DivergedError):  # its loss is infinite then
                        _train(f"{name}, {search.key} {value}", run, say)
    best: dict[str, str | None] = {}
    for name in plan.variants:
        tried = plan.tried(name, seeds[0])
        best[name] = None if tried is None else tried.best
    for seed in seeds:
        for name, own in best.items():
            _train(name, plan.of_seed(name, own, seed), say)
    chosen = {name: plan.of_seed(name, value, seeds[0]) for name, value in best.items()}
    models = {name: complete_model(config, [config]) for name, config in chosen.items()}
    times = measure(chosen, models, rounds) if rounds else {}
    result = collect(paths, seeds, overrides, reference, search, times)
    write_whole(result.table, result.markdown())
    result.plot(result.picture)
    return result


def _train(name: str, run: pretrain.Config, say: Callable[[str], None]) -> None:
    loss, start = finished(run), time.process_time()
    if loss is None:
        loss = pretrain.run(run)["nll"]
    spent = time.process_time() - start
    say(f"{name}, seed {run.run.seed}: held-out loss {loss:.4f} ({spent:.0f} CPU-s)")
