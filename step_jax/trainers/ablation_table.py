"""What the runs of an ablation say: rows, paired differences, orders, as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from step_jax.runs.plots import plot_groups

#: Student's t at 97.5 % for 1, 2, ... degrees of freedom; the normal quantile beyond.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
#: From this score on, a head is said to look where the score is about.
LOOKS_BACK = 0.3


def is_number(word: str) -> bool:
    """Whether a value is a finite number, going by how it is written."""
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def in_order(values: Iterable[str]) -> list[str]:
    """Numbers ascending; values that are not all numbers as they come."""
    listed = list(values)
    return sorted(listed, key=float) if all(map(is_number, listed)) else listed


@dataclass(frozen=True)
class Tried:
    """What a search found for one variant.

    Attributes:
      key: of the recipe.
      losses: held-out loss by the value as it was written, in ascending order of the values; those
        whose run is not finished are missing.
      best: the value of the lowest loss; None until all runs are finished.
      border: whether nothing on one side of ``best`` was tried.
    """

    key: str
    losses: Mapping[str, float]
    best: str | None
    border: bool


@dataclass(frozen=True)
class Times:
    """How long a variant takes, medians over rounds in which every variant had its turn.

    Attributes:
      step: seconds of a training step.
      token: seconds of one decoded token of one row, by the tokens in its cache.
    """

    step: float
    token: Mapping[int, float]


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
      parameters: of the whole model, with the tokenizer's vocabulary.
      heads: query heads of each kind of layer.
      cache_bytes: per token, counted from the arrays of a cache for one row (16 bits a number).
      nll: held-out nats per token, by seed; seeds whose run is not finished are missing.
      runs: the run directories, by seed.
      looks: previous-token and induction score by layer (``evaluation.attention_probe``), means
        over seeds; empty without ``evaluation.attention``.
      looks_from: by score, the tokens trained on when a layer of it was first found above
        ``LOOKS_BACK``, the median over seeds; infinite where most never were.
      tried: the search for the variant's own value, None without one.
      times: None where nothing was timed.
    """

    name: str
    parameters: int
    heads: tuple[int, ...]
    cache_bytes: float
    nll: Mapping[int, float]
    runs: Mapping[int, Path]
    looks: Mapping[str, float] = field(default_factory=dict)
    looks_from: Mapping[str, float] = field(default_factory=dict)
    tried: Tried | None = None
    times: Times | None = None


@dataclass(frozen=True)
class Difference:
    """Held-out loss of one variant minus another's, paired by seed.

    Attributes:
      mean: nats per token.
      half: half the 95 % interval of Student's t; nan with fewer than two seeds.
    """

    mean: float
    half: float

    @property
    def certain(self) -> bool:
        """Whether zero is outside the interval."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{self.mean:+.4f}"
        low, high = self.mean - self.half, self.mean + self.half
        return f"{self.mean:+.4f} [{low:+.4f}, {high:+.4f}]{' *' if self.certain else ''}"


class Losses(Protocol):
    """What is compared: held-out losses by seed."""

    @property
    def nll(self) -> Mapping[int, float]: ...


def difference(row: Losses, other: Losses) -> Difference | None:
    """``row`` minus ``other`` over the seeds that both have; None if there is none."""
    pairs = [row.nll[seed] - other.nll[seed] for seed in row.nll if seed in other.nll]
    if not pairs:
        return None
    mean = statistics.fmean(pairs)
    if len(pairs) < 2:
        return Difference(mean, math.nan)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    degrees = len(pairs) - 1
    quantile = _T[degrees - 1] if degrees <= len(_T) else 1.96
    return Difference(mean, quantile * error)


@dataclass(frozen=True)
class Ablation:
    """What the finished runs say.

    Attributes:
      rows: one for each variant, in the order they were given.
      reference: the row that the others are compared with.
      tokens: that every run is trained on.
      published: other people's figure by variant, and where it is from; empty if there is none.
      directory: where table and picture go.
    """

    rows: tuple[Row, ...]
    reference: Row
    tokens: int
    published: Mapping[str, float]
    source: str = ""
    directory: Path = Path()

    @property
    def table(self) -> Path:
        return self.directory / "ablation.md"

    @property
    def picture(self) -> Path:
        return self.directory / "ablation.png"

    def markdown(self) -> str:
        """The tables and the orders of the variants, as Markdown."""
        seeds = sorted({seed for row in self.rows for seed in row.nll})
        losses = (
            f"{self.tokens:,} tokens a run; finished seeds: "
            f"{', '.join(map(str, seeds)) or 'none'}. Loss: mean ± standard deviation over seeds, "
            "nats per token. Difference: mean over pairs of the same seed and its 95 % interval of "
            "Student's t; * where that excludes zero."
        )
        parts = [self._losses(), losses, self._search(), self._looks(), self._times()]
        return "\n\n".join([part for part in parts if part] + [self.orders()]) + "\n"

    def _losses(self) -> str:
        head = ["variant", "parameters", "heads", "held-out loss", "min - max"]
        head += [f"minus {self.reference.name}", "cache bytes per token", "cache"]
        head += ["published"] if self.published else []
        return table(head, [self._cells(row) for row in self.rows])

    def _cells(self, row: Row) -> list[str]:
        losses = list(row.nll.values())
        cells = [row.name, f"{row.parameters:,}", "/".join(map(str, row.heads))]
        if losses:
            spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            cells.append(f"{statistics.fmean(losses):.4f}{spread}")
            cells.append(f"{min(losses):.4f} - {max(losses):.4f}")
        else:
            cells += ["-", "-"]
        gap = None if row is self.reference else difference(row, self.reference)
        cells.append("-" if gap is None else str(gap))
        change = 100 * (row.cache_bytes / self.reference.cache_bytes - 1)
        cells += [f"{row.cache_bytes:,.6g}", "-" if row is self.reference else f"{change:+.6g} %"]
        if self.published:
            cells.append(str(self.published.get(row.name, "-")))
        return cells

    def _search(self) -> str:
        """What was tried for each variant, and whose best may lie beyond."""
        tried = {row.name: row.tried for row in self.rows if row.tried is not None}
        if not tried:
            return ""
        key = next(iter(tried.values())).key
        values = in_order(dict.fromkeys(value for t in tried.values() for value in t.losses))
        lines = []
        for name, t in tried.items():
            cells = {v: f"{t.losses[v]:.4f}" if v in t.losses else "-" for v in values}
            lines.append([name, *(f"**{c}**" if v == t.best else c for v, c in cells.items())])
        said = [f"`{key}` of each variant is the best of these, by the held-out loss of one seed."]
        said += [
            f"The best {key} of {name}, {t.best}, lies at the border of what was tried: a better "
            "one may lie beyond."
            for name, t in tried.items()
            if t.border
        ]
        return table([key, *values], lines) + "\n\n" + "\n".join(said)

    def _looks(self) -> str:
        """Where the layers' attention looks after training."""
        rows = [row for row in self.rows if row.looks]
        if not rows:
            return ""
        names = list(dict.fromkeys(name for row in rows for name in row.looks))
        first = list(dict.fromkeys(name for row in rows for name in row.looks_from))
        lines = [
            [row.name]
            + [f"{row.looks[n]:.3f}" if n in row.looks else "-" for n in names]
            + [_count(row.looks_from.get(n, math.inf)) for n in first]
            for row in rows
        ]
        head = ["score/layer", *names, *(f"{n} above {LOOKS_BACK:g} from token" for n in first)]
        return table(head, lines)

    def _times(self) -> str:
        rows = [(row.name, row.times) for row in self.rows if row.times is not None]
        if not rows:
            return ""
        lengths = list(rows[0][1].token)
        head = ["time", "training step, s", *(f"token with {n:,} cached, ms" for n in lengths)]
        lines = [
            [name, f"{times.step:.4g}", *(f"{1e3 * times.token[n]:.4g}" for n in lengths)]
            for name, times in rows
        ]
        return table(head, lines)

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


def _count(number: float) -> str:
    return "-" if math.isinf(number) else f"{number:,.0f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column is of names, the others of numbers."""
    rows = [head, [":--"] + ["--:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
