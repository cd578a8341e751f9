"""Pictures of runs, drawn from ``metrics.jsonl`` alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from step_jax.runs.console import si
from step_jax.runs.metrics_log import read_metrics

_INK, _MUTED, _GRID = "#222222", "#6b7280", "#e5e7eb"
#: Okabe-Ito, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#000000")
_PANELS = ("lr", "tokens_per_s", "grad_norm")
_MAX_POINTS = 2000

Records = Sequence[Mapping[str, Any]]


def series(records: Records, event: str, x: str, y: str) -> tuple[list[float], list[float]]:
    """The finite points of a metric, in the order of ``x``."""
    points = [
        (float(r[x]), float(r[y]))
        for r in records
        if r["event"] == event and _is_finite(r.get(x)) and _is_finite(r.get(y))
    ]
    points.sort()
    return [p[0] for p in points], [p[1] for p in points]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over a centred window, which has no lag; the window is narrow at the steep start."""
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for i in range(len(values)):
        reach = min(window // 2, i)
        low, high = i - reach, min(i + reach + 1, len(values))
        result.append((sums[high] - sums[low]) / (high - low))
    return result


def _x_axis(runs: Sequence[Records]) -> str:
    """Tokens if every run counts them, else steps."""
    counted = all(any("tokens" in r for r in records if r["event"] == "step") for records in runs)
    return "tokens" if counted else "step"


def _figure(height: float, rows: Sequence[float], columns: int) -> tuple[Any, Any]:
    """A figure drawn without a display and without touching the caller's pyplot state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.add_gridspec(len(rows), columns, height_ratios=rows)


def _style(axes: Any, *, x: str, label: str, small: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter

    size = 7.5 if small else 9
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, labelsize=size, length=3)
    axes.grid(True, color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(label, loc="left", fontsize=size + 1, color=_INK)
    axes.set_xlabel(x, fontsize=size, color=_MUTED)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
    axes.margins(x=0.02)


def _draw_curve(axes: Any, records: Records, x: str, metric: str, colour: str, label: str) -> bool:
    """The metric as measured (faint) and smoothed; returns whether there was anything."""
    xs, ys = series(records, "step", x, metric)
    if not xs:
        return False
    stride = math.ceil(len(xs) / _MAX_POINTS)
    averaged = smooth(ys, window=max(1, len(ys) // 50))
    axes.plot(xs[::stride], ys[::stride], color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(xs[::stride], averaged[::stride], color=colour, linewidth=1.6, label=label)
    return True


def _draw_evaluations(axes: Any, records: Records, x: str, metric: str, colour: str, label: str):
    xs, ys = series(records, "eval", x, metric)
    if xs:
        axes.plot(
            xs,
            ys,
            color=colour,
            linestyle="none",
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            label=label,
            zorder=3,
        )


def _limit_to_curve(axes: Any, curves: Sequence[Sequence[float]]) -> None:
    """Let the start of a falling curve run out of the picture instead of flattening the rest."""
    values = sorted(value for curve in curves for value in curve[len(curve) // 50 :])
    if len(values) < 20:
        return
    low, high = values[0], values[-1]
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def plot_run(run: Path | str, out: Path | str, *, metric: str = "loss", title: str = "") -> Path:
    """Draw a run: the metric with its held-out points, and small panels of rate and pace.

    Args:
      run: a run directory or a ``metrics.jsonl``.
      out: the PNG to write; its directory is made.
      metric: a name in the step records; evaluation records with the same name give the points.
      title: above the picture (default: the name of the directory).

    Raises:
      ValueError: no step record has the metric.
    """
    records = read_metrics(run)
    x = _x_axis([records])
    steps = [r for r in records if r["event"] == "step"]
    panels = [name for name in _PANELS if any(name in r for r in steps)]
    figure, grid = _figure(5.2 if panels else 3.8, (2.6, 1) if panels else (1,), len(panels) or 1)
    axes = figure.add_subplot(grid[0, :])
    if not _draw_curve(axes, records, x, metric, _COLOURS[0], "training"):
        raise ValueError(f"{run}: no step record has a finite '{metric}'")
    _draw_evaluations(axes, records, x, metric, _COLOURS[1], "held out")
    _limit_to_curve(axes, [series(records, "step", x, metric)[1]])
    _style(axes, x=x, label=metric)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    for column, name in enumerate(panels):
        panel = figure.add_subplot(grid[1, column])
        xs, ys = series(records, "step", x, name)
        panel.plot(xs, ys, color=_MUTED, linewidth=0.8)
        _style(panel, x=x, label=name.replace("_", " "), small=True)
        if name == "tokens_per_s":
            _style_rate(panel)
    default_title = Path(run).resolve().name
    figure.suptitle(title or default_title, x=0.01, ha="left", fontsize=11, color=_INK)
    return _save(figure, out)


def _style_rate(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))


def plot_comparison(
    runs: Mapping[str, Path | str], out: Path | str, *, metric: str = "loss", title: str = ""
) -> Path:
    """Overlay the metric of several runs.

    Args:
      runs: label -> run directory or ``metrics.jsonl``.
      out: the PNG to write.
      metric: a name in the step records.
      title: above the picture.

    Raises:
      ValueError: none of the runs has the metric.
    """
    all_records = {label: read_metrics(run) for label, run in runs.items()}
    all_records = {
        label: records
        for label, records in all_records.items()
        if series(records, "step", "step", metric)[0]
    }
    if not all_records:
        raise ValueError(f"none of the runs has a finite '{metric}' in its step records")
    x = _x_axis(list(all_records.values()))
    figure, grid = _figure(4.2, (1,), 1)
    axes = figure.add_subplot(grid[0, 0])
    for index, (label, records) in enumerate(all_records.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        _draw_curve(axes, records, x, metric, colour, label)
        _draw_evaluations(axes, records, x, metric, colour, "_held out")
    _limit_to_curve(axes, [series(r, "step", x, metric)[1] for r in all_records.values()])
    _style(axes, x=x, label=f"{metric} (points: held out)")
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    return _save(figure, out)


def plot_groups(
    groups: Mapping[str, Sequence[Path | str]],
    out: Path | str,
    *,
    metric: str = "loss",
    title: str = "",
) -> Path:
    """Draw repeated runs: each group's mean curve, smoothed, and a band from its best to its worst.

    Args:
      groups: label -> run directories (or ``metrics.jsonl``) that differ in their seed.
      out: the PNG to write.
      metric: a name in the step records.
      title: above the picture.

    Raises:
      ValueError: none of the runs has the metric.
    """
    figure, grid = _figure(4.2, (1,), 1)
    axes = figure.add_subplot(grid[0, 0])
    means = []
    for index, (label, runs) in enumerate(groups.items()):
        curves = [series(read_metrics(run), "step", "step", metric) for run in runs]
        curves = [(xs, smooth(ys, max(1, len(ys) // 20))) for xs, ys in curves if xs]
        if not curves:
            continue
        xs = min((xs for xs, _ in curves), key=len)
        columns = list(zip(*(ys for _, ys in curves), strict=False))
        mean = [sum(column) / len(column) for column in columns]
        colour = _COLOURS[index % len(_COLOURS)]
        axes.plot(xs, mean, color=colour, linewidth=1.4, label=label)
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
        means.append(mean)
    if not means:
        raise ValueError(f"none of the runs has a finite '{metric}' in its step records")
    _limit_to_curve(axes, means)
    _style(axes, x="step", label=metric)
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    return _save(figure, out)


def draw_images(images: Any, columns: int, out: Path | str, zoom: int = 4) -> Path:
    """Write a PNG of images side by side, ``columns`` in a row.

    Args:
      images: NumPy array (B, H, W, C) of values in [-1, 1]; C is 1 (grey, -1 is black) or 3.
      columns: divides B.
      out: its directory is made.
      zoom: side of a pixel in the picture.
    """
    import numpy as np
    from matplotlib.image import imsave

    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))  # a grey frame
    B, H, W, C = images.shape
    grid = images.reshape(B // columns, columns, H, W, C).swapaxes(1, 2)
    grid = grid.reshape(B // columns * H, columns * W, C).repeat(zoom, 0).repeat(zoom, 1)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    imsave(out, ((grid.clip(-1, 1) + 1) / 2).repeat(3 // C, -1))
    return out


def _save(figure: Any, out: Path | str) -> Path:
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(out)
    return out
