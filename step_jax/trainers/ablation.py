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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from step_jax.core.errors import ConfigError
from step_jax.core.files import write_whole
from step_jax.core.spec import count
from step_jax.runs.metrics_log import read_metrics
from step_jax.trainers import pretrain, variants
from step_jax.trainers.ablation_table import LOOKS_BACK, Ablation, Row, Times
from step_jax.trainers.ablation_times import measure
from step_jax.trainers.variants import Plan, Values

BASE = "base.yaml"
PUBLISHED = "published.json"
SCORES = ("previous_token/", "induction/")  # of ``evaluation.attention_probe``


def load_variants(
    paths: Sequence[Path | str], overrides: Sequence[str] = (), search: Values | None = None
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
    found: dict[str, dict[str | None, pretrain.Config]] = {}
    for file in files:
        if file.stem in found:
            raise ConfigError(f"two variants are named {file.stem}: rename {file}")
        tried: dict[str | None, dict[str, str]] = {None: {}}
        if search is not None:
            tried = {value: {search.key: value} for value in search.values}
        found[file.stem] = {
            value: variants.load([file], overrides, chosen, "step-jax ablate")
            for value, chosen in tried.items()
        }
    plan = Plan(found, search)
    variants.check_comparable(plan)
    return plan


def collect(
    paths: Sequence[Path | str],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    reference: str | None = None,
    search: Values | None = None,
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
    variants.check_scored(rows.values())
    published, source = _published(paths)
    return Ablation(
        rows=tuple(rows.values()),
        reference=rows[reference],
        tokens=variants.tokens_of(_any(plan.variants[reference])),
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
    losses = {
        seed: loss for seed, run in runs.items() if (loss := variants.finished(run)) is not None
    }
    model = variants.complete_model(_any(plan.variants[name]), runs.values())
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


def _looks(run: pretrain.Config) -> tuple[dict[str, float], dict[str, float]]:
    """Of a finished run: (the scores at its end, the tokens after which each was above a bound)."""
    records = read_metrics(run.run.directory)
    final = {n: v for n, v in variants.final_evaluation(records).items() if n.startswith(SCORES)}
    first = {name.partition("/")[0]: math.inf for name in final}
    for record in reversed([r for r in records if r["event"] == "eval"]):
        for name in final:
            if record.get(name, 0.0) > LOOKS_BACK:
                first[name.partition("/")[0]] = record["step"] * variants.tokens_of_step(run)
    return final, first


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
    search: Values | None = None,
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
                variants.try_out(f"{name}, {search.key} {value}", run, say)
    best: dict[str, str | None] = {}
    for name in plan.variants:
        tried = plan.tried(name, seeds[0])
        best[name] = None if tried is None else tried.best
    for seed in seeds:
        for name, own in best.items():
            variants.train(name, plan.of_seed(name, own, seed), say)
    chosen = {name: plan.of_seed(name, value, seeds[0]) for name, value in best.items()}
    models = {name: variants.complete_model(config, [config]) for name, config in chosen.items()}
    times = measure(chosen, models, rounds) if rounds else {}
    result = collect(paths, seeds, overrides, reference, search, times)
    write_whole(result.table, result.markdown())
    result.plot(result.picture)
    return result
