"""Sweeps: one pretraining recipe with every combination of some values, its loss against them.

The runs are those of ablations (``trainers/variants.py``): a combination is a variant, finished
runs are kept, a run that diverged counts as an infinite loss. Combinations have equal tokens,
unless the length is what is varied: then losses say what more tokens give.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_jax.core.errors import ConfigError
from step_jax.core.files import write_whole
from step_jax.core.spec import count
from step_jax.runs.plots import plot_values
from step_jax.trainers import pretrain, variants
from step_jax.trainers.ablation_table import difference, table
from step_jax.trainers.variants import Plan, Values

#: what varies the length of a run on purpose
_LENGTHS = ("training.tokens", "training.steps")


@dataclass(frozen=True)
class Point:
    """One combination of values.

    Attributes:
      values: as they were written, in the order of the keys.
      parameters: of the whole model.
      matrices: those in matrices of the layers, the N of scaling laws.
      tokens: that a run is trained on.
      losses: held-out nats per token by seed; infinite for a run that diverged, missing for one
        that is not finished.
      runs: the run directories, by seed.
    """

    values: tuple[str, ...]
    parameters: int
    matrices: int
    tokens: int
    losses: Mapping[int, float]
    runs: Mapping[int, Path]

    @property
    def nll(self) -> Mapping[int, float]:
        """The losses that are finite."""
        return {seed: loss for seed, loss in self.losses.items() if math.isfinite(loss)}

    @property
    def loss(self) -> float | None:
        """Mean over the seeds; infinite if one diverged, None before all are finished."""
        done = len(self.losses) == len(self.runs) > 0
        return sum(self.losses.values()) / len(self.losses) if done else None


@dataclass(frozen=True)
class Sweep:
    """What the finished runs say.

    Attributes:
      varied: keys and values.
      points: every combination; the values of the last key change fastest.
      directory: where table and picture go.
    """

    varied: tuple[Values, ...]
    points: tuple[Point, ...]
    directory: Path = Path()

    @property
    def best(self) -> Point | None:
        """The combination of the lowest mean loss; None while there is none."""
        known = [(p.loss, i) for i, p in enumerate(self.points) if p.loss is not None]
        loss, index = min(known, default=(math.inf, 0))
        return self.points[index] if math.isfinite(loss) else None

    @property
    def border(self) -> tuple[Values, ...]:
        """The keys of which nothing was tried on one side of the best value."""
        if self.best is None:
            return ()
        chosen = zip(self.varied, self.best.values, strict=True)
        return tuple(varied for varied, value in chosen if varied.border(value))

    @property
    def table(self) -> Path:
        """The JSON table is beside it."""
        return self.directory / "sweep.md"

    @property
    def picture(self) -> Path:
        return self.directory / "sweep.png"

    def markdown(self) -> str:
        """The table, and what it comes to."""
        best = self.best
        sizes = len({p.parameters for p in self.points}) > 1
        lengths = len({p.tokens for p in self.points}) > 1
        head = [varied.key for varied in self.varied] + ["parameters"] * sizes
        head += ["tokens"] * lengths + ["held-out loss", "minus the best"]
        lines = []
        for p in self.points:
            cells = [f"**{v}**" if p is best else v for v in p.values]
            cells += [f"{p.parameters:,}"] * sizes + [f"{p.tokens:,}"] * lengths
            gap = None if best is None or p is best else difference(p, best)
            lines.append([*cells, _loss(p), "-" if gap is None else str(gap)])
        return table(head, lines) + "\n\n" + "\n".join(self._said()) + "\n"

    def _said(self) -> list[str]:
        seeds = len(self.points[0].runs)
        said = [
            "Loss: nats per token of held-out text"
            + (", one seed: small differences may be noise." if seeds == 1 else
               f", mean ± standard deviation over {seeds} seeds; minus the best: over pairs of the "
               "same seed, with the 95 % interval of Student's t; * where that excludes zero.")
        ]  # fmt: skip
        if self.best is None:
            every = all(p.loss == math.inf for p in self.points)
            return [*said, "Every run diverged." if every else "No combination is finished."]
        said.append(f"Best: {self.named(self.best)}.")
        gaps = {self.named(p): difference(p, self.best) for p in self.points if p is not self.best}
        near = [name for name, gap in gaps.items() if gap is not None and not gap.certain]
        if seeds > 1 and near:
            said.append(f"Within the noise of the seeds: {'; '.join(near)}.")
        values = dict(zip(self.varied, self.best.values, strict=True))
        said += [
            f"The best {varied.key}, {values[varied]}, lies at the border of what was tried: a "
            "better one may lie beyond."
            for varied in self.border
        ]
        return said

    def named(self, point: Point) -> str:
        """The values of a point with their keys."""
        pairs = zip(self.varied, point.values, strict=True)
        return ", ".join(f"{varied.key} {value}" for varied, value in pairs)

    def plain(self) -> dict[str, Any]:
        """The table for JSON; an infinite loss is the text ``inf``."""

        def point(p: Point) -> dict[str, Any]:
            losses = {seed: x if math.isfinite(x) else str(x) for seed, x in p.losses.items()}
            return {
                "values": dict(zip((v.key for v in self.varied), p.values, strict=True)),
                "parameters": p.parameters,
                "matrices": p.matrices,
                "tokens": p.tokens,
                "loss": p.loss if p.loss is None or math.isfinite(p.loss) else str(p.loss),
                "losses": losses,
                "runs": {seed: str(run) for seed, run in p.runs.items()},
            }

        points = [point(p) for p in self.points]
        best = None if self.best is None else points[self.points.index(self.best)]["values"]
        return {"points": points, "best": best, "border": [v.key for v in self.border]}

    def plot(self, out: Path | str) -> Path:
        """Loss against the first key, a curve for each combination of the others.

        Raises:
          ValueError: no run has a finite loss.
        """
        curves: dict[str, list[tuple[str, Sequence[float]]]] = {}
        for p in self.points:
            if p.losses:
                curves.setdefault(self._curve(p), []).append((p.values[0], [*p.losses.values()]))
        best = self.best
        tokens = {p.tokens for p in self.points}
        return plot_values(
            curves,
            out,
            key=self.varied[0].key,
            label="held-out loss (nats per token)",
            best=None if best is None else (self._curve(best), best.values[0]),
            title=f"{tokens.pop():,} tokens a run" if len(tokens) == 1 else "",
        )

    def _curve(self, point: Point) -> str:
        others = zip(self.varied[1:], point.values[1:], strict=True)
        return ", ".join(f"{varied.name} {value}" for varied, value in others)


def _loss(point: Point) -> str:
    losses = list(point.nll.values())
    diverged = len(point.losses) - len(losses)
    if not losses:
        return "diverged" if diverged else "-"
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    some = f" ({diverged} of {len(point.losses)} diverged)" if diverged else ""
    return f"{statistics.fmean(losses):.4f}{spread}{some}"


def load_sweep(
    files: Sequence[Path | str], varied: Sequence[Values], overrides: Sequence[str] = ()
) -> tuple[Plan, dict[str, tuple[str, ...]]]:
    """The configurations of a sweep.

    Args:
      files: of the recipe; later ones win.
      varied: keys with their values.
      overrides: flags for all runs, such as ``["--training.steps", "100"]``.

    Returns:
      (plan, values of each of its variants)

    Raises:
      ConfigError: a key that there is not or that comes twice, a value that it does not take, or
        runs whose losses would not compare.
    """
    keys = [v.key for v in varied]
    if double := next((key for key in keys if keys.count(key) > 1), None):
        raise ConfigError(f"{double} is varied twice: give all its values in one list")
    if kept := next((key for key in keys if key.startswith("run.")), None):
        raise ConfigError(
            f"{kept} says how a run is kept: no loss depends on it. Of seeds: --seeds N"
        )
    combinations = {
        "/".join(v.folder(value) for v, value in zip(varied, values, strict=True)): values
        for values in itertools.product(*(v.values for v in varied))
    }
    configs: dict[str, dict[str | None, pretrain.Config]] = {}
    for name, values in combinations.items():
        chosen = dict(zip(keys, values, strict=True))
        configs[name] = {None: variants.load(files, overrides, chosen, "step-jax sweep")}
    plan = Plan(configs)
    variants.check_comparable(plan, [variants.TOKENS] if set(keys) & set(_LENGTHS) else [])
    if (plan.directory / "config.yaml").exists():
        raise ConfigError(
            f"{plan.directory} holds a run, and would hold those of the sweep: name a place for "
            "them with --run.directory"
        )
    return plan, combinations


def collect_sweep(
    files: Sequence[Path | str],
    varied: Sequence[Values],
    seeds: Sequence[int] = (0,),
    overrides: Sequence[str] = (),
) -> Sweep:
    """What the runs that are finished say; trains nothing. Arguments: as `run_sweep`.

    Raises:
      ConfigError: see `load_sweep`; or runs there of another configuration or on other texts.
    """
    plan, combinations = load_sweep(files, varied, overrides)
    points = []
    for name, values in combinations.items():
        runs = {seed: plan.of_seed(name, None, seed) for seed in seeds}
        ended = {seed: variants.tried_loss(run) for seed, run in runs.items()}
        (config,) = plan.variants[name].values()
        model = variants.complete_model(config, runs.values())
        point = Point(
            values=values,
            parameters=count(model.specs()),
            matrices=count(model.specs(), roles=("matrix",)),
            tokens=variants.tokens_of(config),
            losses={seed: loss for seed, loss in ended.items() if loss is not None},
            runs={seed: Path(run.run.directory) for seed, run in runs.items()},
        )
        points.append(point)
    variants.check_scored(points)
    return Sweep(tuple(varied), tuple(points), plan.directory)


def run_sweep(
    files: Sequence[Path | str],
    varied: Sequence[Values],
    seeds: Sequence[int] = (0,),
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Sweep:
    """Trains every combination with every seed; what is finished is kept, what was stopped goes on.

    Seeds come in the outer loop, so that a stopped sweep has whole rounds of all values. The tables
    (``sweep.md``, ``sweep.json``) and the picture (``sweep.png``) are left in ``run.directory``.

    Args:
      files, varied, overrides: see `load_sweep`.
      seeds: of parameters and data order; each combination has its run of seed n in
        ``<run.directory>/<key>_<value>/.../seed_<n>``.
      say: called with a line about every run.

    Raises:
      ConfigError: see `load_sweep`; or every run diverged.
    """
    collect_sweep(files, varied, seeds, overrides)  # what cannot work is found before hours of work
    plan, combinations = load_sweep(files, varied, overrides)
    for seed in seeds:
        for name in combinations:
            variants.try_out(name, plan.of_seed(name, None, seed), say)
    result = collect_sweep(files, varied, seeds, overrides)
    write_whole(result.table, result.markdown())
    write_whole(result.table.with_suffix(".json"), json.dumps(result.plain(), indent=1) + "\n")
    if result.best is None:
        raise ConfigError(f"every run of the sweep diverged: see {result.table}")
    result.plot(result.picture)
    return result
