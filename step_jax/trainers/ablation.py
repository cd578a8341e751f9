"""Ablations: variants of one pretraining recipe, each trained with several seeds, in one table.

A variant is a configuration file; its name is the file's. What tells variants apart must be the
model: text, tokens, optimizer and evaluation have to agree, and a seed gives every variant the same
order of the data, so two variants are compared seed by seed.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from step_jax.core.command_line import load_config
from step_jax.core.config import load_file
from step_jax.core.errors import ConfigError
from step_jax.core.files import write_whole
from step_jax.core.spec import count
from step_jax.models.text.facts import with_vocabulary
from step_jax.runs.metrics_log import read_metrics
from step_jax.runs.plots import plot_groups
from step_jax.trainers import pretrain

BASE = "base.yaml"
PUBLISHED = "published.json"
#: Student's t at 97.5 % for 1, 2, ... degrees of freedom; the normal quantile beyond.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
      parameters: of the whole model, with the tokenizer's vocabulary.
      heads: query heads of each kind of layer.
      cache_bytes: per token, counted from the arrays of a cache for one row (16 bits a number).
      nll: held-out nats per token, by seed; seeds whose run is not finished are missing.
      runs: the run directories, by seed.
    """

    name: str
    parameters: int
    heads: tuple[int, ...]
    cache_bytes: float
    nll: Mapping[int, float]
    runs: Mapping[int, Path]


@dataclass(frozen=True)
class Difference:
    """Held-out loss of one variant minus another's, paired by seed.

    Attributes:
      mean, error: mean and its standard error (nan with fewer than two seeds), nats per token.
      certain: whether zero is outside the 95 % interval of Student's t.
    """

    mean: float
    error: float
    certain: bool


def difference(row: Row, other: Row) -> Difference | None:
    """``row`` minus ``other`` over the seeds that both have; None if there is none."""
    pairs = [row.nll[seed] - other.nll[seed] for seed in row.nll if seed in other.nll]
    if not pairs:
        return None
    mean = statistics.fmean(pairs)
    if len(pairs) < 2:
        return Difference(mean, math.nan, False)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    degrees = len(pairs) - 1
    quantile = _T[degrees - 1] if degrees <= len(_T) else 1.96
    return Difference(mean, error, abs(mean) > quantile * error)


@dataclass(frozen=True)
class Ablation:
    """What the finished runs say.

    Attributes:
      rows: one for each variant, in the order they were given.
      reference: the row that the others are compared with.
      tokens: that every run is trained on.
      published: other people's figure by variant, and where it is from; empty if there is none.
    """

    rows: tuple[Row, ...]
    reference: Row
    tokens: int
    published: Mapping[str, float]
    source: str = ""

    def markdown(self) -> str:
        """The table and the orders of the variants, as Markdown."""
        head = ["variant", "parameters", "heads", "held-out loss", "min - max"]
        head += [f"minus {self.reference.name}", "cache bytes per token", "cache"]
        head += ["published"] if self.published else []
        lines = [head, [":--"] + ["--:"] * (len(head) - 1)]
        lines += [self._cells(row) for row in self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        seeds = sorted({seed for row in self.rows for seed in row.nll})
        return (
            f"{table}\n\n{self.tokens:,} tokens a run; finished seeds: "
            f"{', '.join(map(str, seeds)) or 'none'}. Loss: mean ± standard deviation over seeds, "
            "nats per token. Difference: mean ± standard error over pairs of the same seed; * "
            "where 95 % of Student's t excludes zero.\n\n"
            f"{self.orders()}\n"
        )

    def _cells(self, row: Row) -> list[str]:
        losses = list(row.nll.values())
        cells = [row.name, f"{row.parameters:,}", "/".join(map(str, row.heads))]
        if losses:
            spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            cells.append(f"{statistics.fmean(losses):.4f}{spread}")
            cells.append(f"{min(losses):.4f} - {max(losses):.4f}")
        else:
            cells += ["-", "-"]
        gap = difference(row, self.reference)
        if row is self.reference or gap is None:
            cells.append("-")
        else:
            error = "" if math.isnan(gap.error) else f" ± {gap.error:.4f}"
            cells.append(f"{gap.mean:+.4f}{error}{' *' if gap.certain else ''}")
        change = 100 * (row.cache_bytes / self.reference.cache_bytes - 1)
        cells += [f"{row.cache_bytes:,.6g}", "-" if row is self.reference else f"{change:+.6g} %"]
        if self.published:
            cells.append(str(self.published.get(row.name, "-")))
        return cells

    def orders(self) -> str:
        """Our order, best first, beside the published one.

        ``<`` stands between neighbours whose difference is certain, ``~`` where it is not.
        """
        done = sorted(
            (row for row in self.rows if row.nll),
            key=lambda row: statistics.fmean(row.nll.values()),
        )
        if not done:
            return "No run is finished."
        ours = done[0].name
        for better, worse in zip(done, done[1:], strict=False):
            gap = difference(worse, better)
            ours += f" {'<' if gap is not None and gap.certain else '~'} {worse.name}"
        lines = [f"- ours: {ours} (`<` certain, `~` within the noise of the seeds)"]
        names = (r.name for r in done if r.name in self.published)
        known = sorted(names, key=lambda name: self.published[name])
        if known:
            theirs = known[0]
            for lower, higher in zip(known, known[1:], strict=False):
                equal = self.published[lower] == self.published[higher]
                theirs += f" {'=' if equal else '<'} {higher}"
            agree, against, open_pairs = self._agreement(done)
            lines.append(f"- published: {theirs} ({self.source})")
            lines.append(
                f"- pairs that differ in the published figures: {agree} certain here in the same "
                f"direction, {against} certain in the other, {open_pairs} within the noise (each "
                "pair at 95 %, not corrected for their number)"
            )
        return "\n".join(lines)

    def _agreement(self, rows: Sequence[Row]) -> tuple[int, int, int]:
        """Pairs certain in the published direction, certain against it, and undecided."""
        same = against = undecided = 0
        for i, row in enumerate(rows):
            for other in rows[:i]:
                theirs = self.published.get(row.name, math.nan)
                theirs -= self.published.get(other.name, math.nan)
                if not theirs or math.isnan(theirs):
                    continue
                gap = difference(row, other)
                if gap is None or not gap.certain:
                    undecided += 1
                elif (gap.mean > 0) == (theirs > 0):
                    same += 1
                else:
                    against += 1
        return same, against, undecided

    def plot(self, out: Path | str) -> Path:
        """Training loss of every variant: mean over seeds, with the band from best to worst."""
        groups = {row.name: [row.runs[seed] for seed in row.nll] for row in self.rows if row.nll}
        return plot_groups(groups, out, title=f"{self.tokens:,} tokens, mean and range over seeds")


def load_variants(
    paths: Sequence[Path | str], overrides: Sequence[str] = ()
) -> dict[str, pretrain.Config]:
    """Configurations by file name.

    Args:
      paths: configuration files, or directories of them (``base.yaml`` there is no variant).
      overrides: flags for all of them, such as ``["--training.steps", "100"]``.

    Raises:
      ConfigError: no file, two of one name, or variants that differ in more than their model.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(f for f in path.glob("*.yaml") if f.name != BASE)
        files += inside if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"no configuration (*.yaml) in {', '.join(map(str, paths))}")
    variants: dict[str, pretrain.Config] = {}
    for file in files:
        if file.stem in variants:
            raise ConfigError(f"two variants are named {file.stem}: rename {file}")
        argv = [str(file), *overrides]
        variants[file.stem] = load_config(pretrain.Config, argv, prog="step-jax ablate").config
    first, *others = variants
    for name in others:
        ours = replace(variants[name], run=variants[first].run, model=variants[first].model)
        if ours != variants[first]:
            raise ConfigError(
                f"{first} and {name} differ in more than run and model, so their losses would not "
                "compare: give what they share to both (a common `base:` does)"
            )
    return variants


def with_seed(name: str, config: pretrain.Config, seed: int) -> pretrain.Config:
    """The run of a variant with a seed, in a directory of its own."""
    directory = Path(config.run.directory) / name / f"seed_{seed}"
    return replace(config, run=replace(config.run, directory=str(directory), seed=seed))


def finished(config: pretrain.Config) -> float | None:
    """The final held-out loss in the run directory of ``config``; None if it is not finished.

    Raises:
      ConfigError: the directory holds a run of another configuration.
    """
    directory = Path(config.run.directory)
    if not (directory / "config.yaml").exists():
        return None
    saved = load_file(pretrain.Config, directory / "config.yaml")
    ours = with_vocabulary(config.decoder, saved.decoder.vocab)
    if saved.run.seed != config.run.seed or saved != replace(config, run=saved.run, model=ours):
        raise ConfigError(
            f"{directory} holds a run of another configuration: give --run.directory a new place, "
            "or move the old runs away"
        )
    records = read_metrics(directory)
    if not any(r["event"] == "summary" and r["values"].get("status") == "done" for r in records):
        return None
    return next(r["nll"] for r in reversed(records) if r["event"] == "eval" and "nll" in r)


def collect(
    paths: Sequence[Path | str],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    reference: str | None = None,
) -> Ablation:
    """The table of the runs that are finished; trains nothing. Arguments as `run_ablation`."""
    variants = load_variants(paths, overrides)
    reference = next(iter(variants)) if reference is None else reference
    if reference not in variants:
        raise ConfigError(f"no variant is named {reference}; there are {', '.join(variants)}")
    rows = {name: _row(name, config, seeds) for name, config in variants.items()}
    training, T = variants[reference].training, variants[reference].data.sequence_length
    tokens = training.rows(T, 1) * T
    published, source = _published(paths)
    return Ablation(
        rows=tuple(rows.values()),
        reference=rows[reference],
        tokens=tokens * training.total_steps(tokens),
        published=published,
        source=source,
    )


def _row(name: str, config: pretrain.Config, seeds: Sequence[int]) -> Row:
    runs = {seed: with_seed(name, config, seed) for seed in seeds}
    losses = {seed: loss for seed, run in runs.items() if (loss := finished(run)) is not None}
    model = config.decoder
    for run in runs.values():
        if (saved := Path(run.run.directory) / "config.yaml").exists():
            model = load_file(pretrain.Config, saved).decoder
    model = with_vocabulary(model, config.data.vocab_size)
    length = config.data.sequence_length
    return Row(
        name=name,
        parameters=count(model.specs()),
        heads=tuple(dict.fromkeys(s.block.attention.heads for s in model.trunk.walk())),
        cache_bytes=model.init_cache(1, length).nbytes() / length,
        nll=losses,
        runs={seed: Path(run.run.directory) for seed, run in runs.items()},
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
    say: Callable[[str], None] = print,
) -> Ablation:
    """Trains every variant with every seed; what is finished is kept, what was stopped goes on.

    Seeds come in the outer loop, so that a stopped ablation has whole rounds of all variants. The
    table and the picture are left in the variants' ``run.directory``.

    Args:
      paths, overrides: see `load_variants`.
      seeds: of parameters and data order; each variant has its run of seed n in
        ``<run.directory>/<variant>/seed_<n>``.
      reference: the variant that the others are compared with (default: the first).
      say: called with a line about every run.
    """
    variants = load_variants(paths, overrides)
    collect(paths, seeds, overrides, reference)  # what cannot work is found before hours of work
    for seed in seeds:
        for name, config in variants.items():
            run = with_seed(name, config, seed)
            loss, start = finished(run), time.process_time()
            if loss is None:
                loss = pretrain.run(run)["nll"]
            spent = time.process_time() - start
            say(f"{name}, seed {seed}: held-out loss {loss:.4f} ({spent:.0f} CPU-s)")
    result = collect(paths, seeds, overrides, reference)
    directory = Path(next(iter(variants.values())).run.directory)
    write_whole(directory / "ablation.md", result.markdown())
    result.plot(directory / "ablation.png")
    return result
