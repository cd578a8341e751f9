"""Pictures of runs, drawn from ``metrics.jsonl`` alone.

A point stands at the work that had been done when it was measured (tokens, images; steps where runs
count unlike things), an evaluation too. Metrics of unlike units have axes of their own.
"""

from __future__ import annotations

import itertools
import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from step_jax.core.storage import local
from step_jax.runs.console import si
from step_jax.runs.metrics_log import read_metrics, work_unit

_INK, _MUTED, _GRID = "#222222", "#6b7280", "#e5e7eb"
#: Okabe-Ito, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#000000")
#: Where the colours are used up, the next way to draw a line, and the shape of its points.
_LINES = (
    ("-", "o"),
    ("--", "s"),
    (":", "^"),
    ("-.", "D"),
    ((0, (6, 1, 1, 1, 1, 1)), "v"),
    ((0, (8, 3)), "P"),
)
_SHAPES = "oDs^vP"  # of the evaluations of one run
_MAX_FAINT = 3  # so many runs show their curves as measured besides the smoothed ones
_MAX_POINTS = 2000

Records = Sequence[Mapping[str, Any]]
Points = tuple[list[float], list[float]]
_Run = tuple[int, str, Records]  # number among all that are drawn, label, records


def series(records: Records, event: str, x: str, y: str, name: str | None = None) -> Points:
    """The finite points of a metric, in the order of ``x``.

    Args:
      event: ``step`` or ``eval``.
      x: ``step``, or a number of the step records; an evaluation stands where its step does.
      name: of the evaluations that are meant.
    """
    chosen = [r for r in records if r["event"] == event and name in (None, r.get("name"))]
    if event == "step":
        points = [(r.get(x), r.get(y)) for r in chosen]
    else:
        trained = [(r["step"], r[x]) for r in records if r["event"] == "step" and x in r]
        points = [(_at(trained, r["step"]), r.get(y)) for r in chosen]
    finite = sorted((float(a), float(b)) for a, b in points if _is_finite(a) and _is_finite(b))
    return [p[0] for p in finite], [p[1] for p in finite]


def _at(trained: Sequence[tuple[int, float]], step: int) -> float | None:
    """What was done after ``step``, going by the recorded steps around it."""
    i = bisect_left(trained, (step,))
    if i < len(trained) and trained[i][0] == step:
        return trained[i][1]
    (s0, x0), (s1, x1) = (
        ([(0, 0.0), *trained, *trained[-1:]])[i : i + 2] if trained else [(0, 0)] * 2
    )
    if s0 == s1:  # behind the last record, or there is none: at the pace up to it
        return x0 * step / s0 if s0 else None
    return x0 + (x1 - x0) * (step - s0) / (s1 - s0)


def _is_finite(value: Any) -> TypeGuard[float]:
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


def metric_unit(records: Records, metric: str) -> str:
    """What a metric is measured in, going by the header of the run; empty if it does not say.

    The loss of a run that records an ``nll`` is one in nats per token, and one beside a ``reward``
    the objective of a policy.
    """
    for record in reversed(records):
        if record["event"] == "header" and metric in record.get("units", {}):
            return record["units"][metric]
    last: Mapping[str, Any] = next((r for r in reversed(records) if r["event"] == "step"), {})
    if metric == "loss" and "nll" in last:
        return "nats per token"
    if metric == "loss" and "reward" in last:
        return "policy objective"
    return ""


def _x_axis(runs: Sequence[Records]) -> tuple[str, str]:
    """(what is counted, label): the work done if every run counts the same, else steps."""
    units = {work_unit(records) for records in runs}
    unit = units.pop() if len(units) == 1 else None
    return ("step", "step") if unit is None else (unit, f"{unit} trained on")


# --- parts of a picture -------------------------------------------------------------------------


def _figure(height: float, rows: Sequence[float], columns: int, width=8.0) -> tuple[Any, Any]:
    """A figure drawn without a display and without touching the caller's pyplot state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.add_gridspec(len(rows), columns, height_ratios=rows)


def _style(axes: Any, *, x: str, label: str, small: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    size = 7.5 if small else 9
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, which="both", labelsize=size, length=3)
    axes.grid(True, color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(label, loc="left", fontsize=size + 1, color=_INK)
    axes.set_xlabel(x, fontsize=size, color=_MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(5 if small else 8, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
    axes.margins(x=0.02)


def _legend(axes: Any, size: float, order: Sequence[int] | None = None) -> None:
    """Within the axes where there is room; with an order of its entries beside them."""
    handles, labels = axes.get_legend_handles_labels()
    place: dict[str, Any] = dict(loc="best")
    if order is not None:
        handles, labels = [handles[i] for i in order], [labels[i] for i in order]
        place = dict(loc="upper left", bbox_to_anchor=(1.01, 1.0), handlelength=3.6)
    axes.legend(handles, labels, frameon=False, fontsize=size, labelcolor=_INK, **place)


def _draw_curve(
    axes: Any, points: Points, colour: str, label: str, line: Any = "-", faint: bool = True
) -> None:
    """A metric smoothed and, faint, as measured; where it is short, its points."""
    xs, ys = points
    stride = math.ceil(len(xs) / _MAX_POINTS)
    averaged = smooth(ys, window=max(1, len(ys) // 50))
    if faint:
        axes.plot(xs[::stride], ys[::stride], color=colour, alpha=0.25, linewidth=0.8)
    width, dot = (1.6 if faint else 1.3), ("." if len(xs) < 3 else "")
    style = dict(color=colour, linewidth=width, linestyle=line, marker=dot)
    axes.plot(xs[::stride], averaged[::stride], label=label, **style)


def _draw_points(axes: Any, points: Points, colour: str, shape: str, label: str) -> None:
    axes.plot(
        *points,
        color=colour,
        linestyle="none",
        marker=shape,
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.7,
        label=label,
        zorder=3,
    )


def _draw_not_finite(axes: Any, records: Records, x: str, metric: str, colour: str) -> str:
    """Marks on the lower edge where the metric is no number; returns what to say of them."""
    steps = [r for r in records if r["event"] == "step" and metric in r]
    odd = [r for r in steps if not _is_finite(r[metric])]
    if not odd:
        return ""
    where = [r[x] for r in odd if x in r]
    heights = [0.015] * len(where)
    style = dict(color=colour, linestyle="none", marker="x", markersize=4.5, clip_on=False)
    axes.plot(where, heights, transform=axes.get_xaxis_transform(), zorder=4, **style)
    if odd == steps[-len(odd) :]:
        return f", not finite from step {odd[0]['step']:,}"
    return f", not finite in {len(odd):,} step{'s' if len(odd) > 1 else ''}"


def _limit(
    axes: Any, curves: Sequence[Sequence[float]], points: Sequence[Sequence[float]] = ()
) -> None:
    """Let the start of a falling curve run out of the picture instead of flattening the rest, and
    so a run that runs away from the others; the picture then says so. ``points``: the evaluations
    of each curve."""
    bodies = [curve[len(curve) // 50 :] for curve in curves]
    spans = [max(body) - min(body) for body in bodies]
    usual = sorted(spans)[(len(spans) - 1) // 2]
    kept = [i for i, span in enumerate(spans) if span <= 10 * usual] or list(range(len(bodies)))
    values = [v for i in kept for v in (*bodies[i], *(points[i] if points else ()))]
    if len(values) < 20:
        return
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    if left := len(bodies) - len(kept):
        text = f"{left} run{'s leave' if left > 1 else ' leaves'} the picture"
        place = dict(ha="right", va="bottom", transform=axes.transAxes)
        axes.text(1, 1.01, text, fontsize=8, color=_MUTED, **place)


# --- pictures -----------------------------------------------------------------------------------


def plot_run(run: Path | str, out: Path | str, *, metric: str = "loss", title: str = "") -> Path:
    """Draw a run: the metric with its evaluations, and small panels of rate and pace.

    Args:
      run: a run directory or a ``metrics.jsonl``.
      out: the PNG to write; its directory is made.
      metric: a name in the step records; evaluation records with the same name give the points.
      title: above the picture (default: the name of the directory).

    Raises:
      ValueError: no step record has the metric.
    """
    records = read_metrics(run)
    x, x_label = _x_axis([records])
    points = series(records, "step", x, metric)
    if not points[0]:
        raise ValueError(f"{run}: no step record has a finite '{metric}'")
    rate = f"{x}_per_s"
    panels = [name for name in ("lr", rate, "grad_norm") if series(records, "step", x, name)[0]]
    figure, grid = _figure(5.2 if panels else 3.8, (2.6, 1) if panels else (1,), len(panels) or 1)
    axes = figure.add_subplot(grid[0, :])
    odd = _draw_not_finite(axes, records, x, metric, "#b91c1c")
    _draw_curve(axes, points, _COLOURS[0], f"training{odd}")
    _draw_evaluations(axes, records, x, metric)
    _limit(axes, [points[1]], [series(records, "eval", x, metric)[1]])
    _style(axes, x=x_label, label=_with_unit(metric, metric_unit(records, metric)))
    _legend(axes, size=9)
    for column, name in enumerate(panels):
        panel = figure.add_subplot(grid[1, column])
        panel.plot(*series(records, "step", x, name), color=_MUTED, linewidth=0.8)
        _style(panel, x=x_label, label=name.replace("_", " "), small=True)
        if name == rate:
            _style_rate(panel)
        elif name == "grad_norm":
            _log_if_wide(panel)
    default_title = Path(run).resolve().name
    figure.suptitle(title or default_title, x=0.01, ha="left", fontsize=11, color=_INK)
    return _save(figure, out)


def _draw_evaluations(axes: Any, records: Records, x: str, metric: str) -> None:
    """A shape for the evaluations of every name, which may be of unlike texts, with their size."""
    evaluations = [r for r in records if r["event"] == "eval" and _is_finite(r.get(metric))]
    for i, name in enumerate(dict.fromkeys(r.get("name") for r in evaluations)):
        sizes = {r.get(x) for r in evaluations if r.get("name") == name}
        size = sizes.pop() if len(sizes) == 1 else None
        label = f"{name} ({si(size)} {x})" if _is_finite(size) and x != "step" else str(name)
        shape, colour = _SHAPES[i % len(_SHAPES)], _COLOURS[1 + i % (len(_COLOURS) - 1)]
        _draw_points(axes, series(records, "eval", x, metric, name), colour, shape, label)


def _with_unit(metric: str, unit: str) -> str:
    return f"{metric} ({unit})" if unit else metric


def _log_if_wide(axes: Any) -> None:
    values = axes.lines[0].get_ydata()
    if 0 < 30 * min(values) < max(values):
        axes.set_yscale("log")


def _style_rate(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))


def plot_comparison(
    runs: Mapping[str, Path | str], out: Path | str, *, metric: str = "loss", title: str = ""
) -> Path:
    """Overlay the metric of several runs; those that measure it in unlike units are kept apart.

    Args:
      runs: label -> run directory or ``metrics.jsonl``.
      out: the PNG to write.
      metric: a name in the step records.
      title: above the picture.

    Raises:
      ValueError: none of the runs has the metric, or there are more than can be told apart.
    """
    _check_count(len(runs), "runs")
    panels: dict[str, list[_Run]] = {}
    for number, (label, run) in enumerate(runs.items()):
        records = read_metrics(run)
        if series(records, "step", "step", metric)[0]:
            panels.setdefault(metric_unit(records, metric), []).append((number, label, records))
    if not panels:
        raise ValueError(f"none of the runs has a finite '{metric}' in its step records")
    heights = [max(3.6, 0.5 + 0.19 * len(panel)) for panel in panels.values()]
    figure, grid = _figure(sum(heights) + 0.3 * bool(title), heights, 1, width=9.5)
    for row, (unit, panel) in enumerate(panels.items()):
        _draw_panel(figure.add_subplot(grid[row, 0]), panel, metric, unit)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    return _save(figure, out)


def _check_count(count: int, what: str) -> None:
    if count > (most := len(_COLOURS) * len(_LINES)):
        raise ValueError(f"{count} {what} in one picture: {most} can be told apart; name fewer")


def _looks(number: int) -> tuple[str, Any, str]:
    """(colour, line, shape of the points) of a run or a group: another one for each."""
    return (_COLOURS[number % len(_COLOURS)], *_LINES[number // len(_COLOURS)])


def _draw_panel(axes: Any, panel: Sequence[_Run], metric: str, unit: str) -> None:
    """Curves of one unit. The legend stands beside them, in the order in which they end."""
    x, x_label = _x_axis([records for _, _, records in panel])
    faint = len(panel) <= _MAX_FAINT
    drawn, points, ends = [], [], []
    for number, label, records in panel:
        colour, line, shape = _looks(number)
        odd = _draw_not_finite(axes, records, x, metric, colour)
        curve = series(records, "step", x, metric)
        _draw_curve(axes, curve, colour, label + odd, line, faint)
        averaged = list(axes.lines[-1].get_ydata())
        ends.append(averaged[-1])
        drawn.append(curve[1] if faint else averaged)
        evaluations = series(records, "eval", x, metric)
        _draw_points(axes, evaluations, colour, shape, "_evaluation")
        points.append(evaluations[1])
    _limit(axes, drawn, points)
    note = "; points: evaluations" if any(points) else ""
    _style(axes, x=x_label, label=_with_unit(metric, unit) + note)
    _legend(axes, 8, sorted(range(len(ends)), key=lambda i: -ends[i]))


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
    figure, grid = _figure(max(4.2, 0.5 + 0.19 * len(groups)), (1,), 1, width=9.5)
    axes = figure.add_subplot(grid[0, 0])
    means, unit = [], ""
    _check_count(len(groups), "groups")
    read = {label: [read_metrics(run) for run in runs] for label, runs in groups.items()}
    x, x_label = _x_axis([records for group in read.values() for records in group])
    for index, (label, records) in enumerate(read.items()):
        unit = unit or metric_unit(records[0], metric)
        curves = [series(r, "step", x, metric) for r in records]
        curves = [(xs, smooth(ys, max(1, len(ys) // 20))) for xs, ys in curves if xs]
        if not curves:
            continue
        xs = min((xs for xs, _ in curves), key=len)
        columns = list(zip(*(ys for _, ys in curves), strict=False))
        mean = [sum(column) / len(column) for column in columns]
        colour, line, _ = _looks(index)
        axes.plot(xs, mean, color=colour, linestyle=line, linewidth=1.4, label=label)
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
        means.append(mean)
    if not means:
        raise ValueError(f"none of the runs has a finite '{metric}' in its step records")
    _limit(axes, means)
    _style(axes, x=x_label, label=_with_unit(metric, unit))
    _legend(axes, 8, sorted(range(len(means)), key=lambda i: -means[i][-1]))
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    return _save(figure, out)


#: tokens a problem took, accuracy, and the ends of its interval
Spending = tuple[float, float, float, float]


def plot_spending(
    curves: Mapping[str, Sequence[Spending]], out: Path | str, *, title: str = ""
) -> Path:
    """Draw accuracy against all tokens that were written for a problem, which double and double.

    Args:
      curves: label -> points; a bar at each is its interval.
      out: the PNG to write.
      title: above the picture.

    Raises:
      ValueError: there is no point, or there are more curves than can be told apart.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    _check_count(len(curves), "curves")
    if not any(curves.values()):
        raise ValueError("there is no point of accuracy to draw")
    figure, grid = _figure(4.2, (1,), 1)
    axes = figure.add_subplot(grid[0, 0])
    ends = []
    for number, (label, points) in enumerate(curves.items()):
        xs, ys, lows, highs = zip(*sorted(points), strict=True)
        colour, line, shape = _looks(number)
        bars = [[y - a for y, a in zip(ys, lows, strict=True)]]
        bars += [[b - y for y, b in zip(ys, highs, strict=True)]]
        style = dict(color=colour, linestyle=line, marker=shape, markersize=5, linewidth=1.5)
        bars_style = dict(elinewidth=0.9, capsize=2.5)
        axes.errorbar(xs, ys, yerr=bars, label=label, **style, **bars_style)
        ends.append(ys[-1])
    _style(axes, x="tokens for a problem (log scale)", label="accuracy, with 95 % intervals")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(2, numticks=10))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
    axes.margins(x=0.05)
    _legend(axes, 8, sorted(range(len(ends)), key=lambda i: -ends[i]))
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    return _save(figure, out)


#: a value as it was written, and the results of its repetitions; infinite ones diverged
Tried = tuple[str, Sequence[float]]


def plot_values(
    curves: Mapping[str, Sequence[Tried]],
    out: Path | str,
    *,
    key: str,
    label: str,
    best: tuple[str, str] | None = None,
    title: str = "",
) -> Path:
    """Draw a result against a value that was varied: means, and every repetition as a point.

    Numbers stand on a log axis where all are positive, on a linear one else; names side by side,
    without a line. A value of which a repetition diverged has a cross above instead of a mean.

    Args:
      curves: label of another value (empty if there is none) -> points, in the order of the values.
      out: the PNG to write.
      key: what was varied.
      label: what the result is.
      best: (curve, value) to mark.
      title: above the picture.

    Raises:
      ValueError: there is no finite result, or there are more curves than can be told apart.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    _check_count(len(curves), "curves")
    if not any(_is_finite(y) for points in curves.values() for _, ys in points for y in ys):
        raise ValueError("there is no finite result to draw")
    figure, grid = _figure(max(4.2, 0.5 + 0.19 * len(curves)), (1,), 1)
    axes = figure.add_subplot(grid[0, 0])
    values = list(dict.fromkeys(value for points in curves.values() for value, _ in points))
    at, kind = _places(values)
    diverged: dict[str, int] = {}
    for number, (name, points) in enumerate(curves.items()):
        looks = (
            _looks(number) if kind != "names" else (_looks(number)[0], "none", _looks(number)[2])
        )
        _draw_tried(axes, points, at, name, looks, diverged)
        if best is not None and best[0] == name:
            mean = statistics.fmean(dict(points)[best[1]])
            ring = dict(marker="o", markersize=13, markerfacecolor="none", linestyle="none")
            label_of_it = f"best: {best[1]}"
            axes.plot([at[best[1]]], [mean], color=_INK, label=label_of_it, zorder=4, **ring)
    if diverged:
        axes.plot([], [], color=_MUTED, marker="x", linestyle="none", label="diverged")
    _style(axes, x=key + (" (log scale)" if kind == "log" else ""), label=label)
    axes.set_xscale("log" if kind == "log" else "linear")
    axes.xaxis.set_major_locator(FixedLocator(list(at.values())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(values)
    axes.margins(x=0.06, y=0.12)
    _legend(axes, 8, range(len(axes.get_legend_handles_labels()[1])))
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    return _save(figure, out)


def _draw_tried(
    axes: Any,
    points: Sequence[Tried],
    at: Mapping[str, float],
    name: str,
    looks: tuple[str, Any, str],
    diverged: dict[str, int],
) -> None:
    """Repetitions, a curve of the means of values of which none diverged, and crosses for the
    others: below those of other curves, which ``diverged`` counts."""
    colour, line, shape = looks
    each = [(at[v], y) for v, ys in points for y in ys if _is_finite(y)]
    faint = dict(color=colour, linestyle="none", marker=shape, alpha=0.35, markersize=4)
    axes.plot([x for x, _ in each], [y for _, y in each], **faint)
    whole = [(at[v], statistics.fmean(ys)) for v, ys in points if ys and all(map(_is_finite, ys))]
    xs, means = [x for x, _ in sorted(whole)], [y for _, y in sorted(whole)]
    style = dict(color=colour, linestyle=line, marker=shape, markersize=5.5, linewidth=1.5)
    axes.plot(xs, means, label=name, **style)
    for v in (v for v, ys in points if not all(map(_is_finite, ys))):
        height = 0.98 - 0.04 * diverged.setdefault(v, 0)
        diverged[v] += 1
        place = dict(transform=axes.get_xaxis_transform(), clip_on=False)
        axes.plot([at[v]], [height], color=colour, marker="x", markersize=6, **place)


def _places(values: Sequence[str]) -> tuple[dict[str, float], str]:
    """Where values stand on their axis, and what it is: ``log``, ``linear`` or of ``names``."""
    try:
        at = {value: float(value) for value in values}
    except ValueError:
        return {value: float(i) for i, value in enumerate(values)}, "names"
    return at, "log" if min(at.values()) > 0 else "linear"


def _save(figure: Any, out: Path | str) -> Path:
    out = local(out, "where to draw to")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(out)
    return out
