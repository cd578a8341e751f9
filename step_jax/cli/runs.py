"""``step-jax runs DIR ...``: runs side by side, as a table and as a picture."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from step_jax.core.errors import ConfigError
from step_jax.runs.console import format_value, si

_COLUMNS = (
    *("run", "status", "steps", "trained", "params", "loss", "reward", "held out", "bpb"),
    *("pass@1", "pace"),
)
_MAX_DIFFERENCES = 10  # in the table; unlike loops have little in common, and --json has all


def run(args: argparse.Namespace) -> int:
    directories = find_runs(args.directories)
    if not directories:
        where = ", ".join(map(str, args.directories))
        raise ConfigError(f"no run (a directory with metrics.jsonl) in {where}")
    rows = [summarise(directory) for directory in directories]
    labels = _labels(directories)
    differences = config_differences([read_config(d) for d in directories])
    for row, label, difference in zip(rows, labels, differences, strict=True):
        row["run"] = label
        row["config"] = difference
    if args.json:
        print(json.dumps([_finite(row) for row in rows], indent=1))
    else:
        show(rows)
    if args.plot:
        from step_jax.runs.plots import plot_comparison

        pairs = dict(zip(labels, directories, strict=True))
        try:
            path = plot_comparison(pairs, args.plot, metric=args.metric)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        print(f"plot: {path}", file=sys.stderr)
    return 0


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no number for a loss that is not finite: a text, as in ``metrics.jsonl``."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="step-jax runs", description="Compare runs as a table and a picture."
    )
    parser.add_argument(
        "directories",
        nargs="+",
        metavar="DIR",
        help="run directories, or directories that hold them; URLs as well",
    )
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="overlay the curves")
    parser.add_argument("--metric", default="loss", help="what to plot (default: loss)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    try:
        return parser.parse_args(argv)
    except SystemExit as stop:
        if stop.code:
            raise ConfigError("see step-jax runs --help") from None
        raise


def find_runs(names: Sequence[Path | str]) -> list[Path]:
    """Run directories among ``names`` and below them, in order of name, each once.

    Of those in object stores: copies of what is shown of them.
    """
    from step_jax.core.storage import Objects, is_url, staged

    found: dict[Path, None] = {}
    for name in names:
        if is_url(name):
            objects, shown = Objects.at(str(name)), ("metrics.jsonl", "config.yaml", "lock")
            files = [f for f in objects.list() if f.rpartition("/")[2] in shown]
            path = staged(objects, *files)
        else:
            path = Path(name)
        if not path.exists():
            raise ConfigError(f"no such directory: {name}")
        below = [path] if (path / "metrics.jsonl").exists() else path.rglob("metrics.jsonl")
        for item in sorted(below):
            found[item.parent if item.name == "metrics.jsonl" else item] = None
    return list(found)


def _labels(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [d.resolve().parts for d in directories]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-length:]) for p in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def summarise(directory: Path) -> dict[str, Any]:
    """What the records of a run say; a key is None where they say nothing.

    ``status`` and ``reason``: see :func:`step_jax.runs.history.outcome`. ``trained`` counts what
    ``unit`` names; ``pace`` is that of a second, the median over the second half of the steps.
    """
    from step_jax.runs.folder_lock import is_locked
    from step_jax.runs.history import outcome
    from step_jax.runs.metrics_log import read_metrics, work_unit

    records = read_metrics(directory)
    steps = [r for r in records if r["event"] == "step"]
    evaluations = [r for r in records if r["event"] == "eval"]
    headers = [r.get("values", {}) for r in records if r["event"] == "header"]
    status, reason = outcome(records, is_locked(directory))
    last: Mapping[str, Any] = steps[-1] if steps else {}
    unit = work_unit(records)
    rate = f"{unit}_per_s"
    paces = sorted(r[rate] for r in steps[len(steps) // 2 :] if rate in r)
    return {
        "run": directory.name,
        "status": status,
        "reason": reason,
        "steps": last.get("step"),
        "trained": last.get(unit or ""),
        "unit": unit,
        "params": _number(_last(headers, "parameters", "parameters of the policy")),
        "loss": last.get("loss"),
        "reward": last.get("reward"),
        "held out": _last(evaluations, "loss"),
        "bpb": _last(evaluations, "bits_per_byte"),
        "pass@1": _last(evaluations, "pass@1"),
        "pace": paces[len(paces) // 2] if paces else None,
    }


def _last(records: Sequence[Mapping[str, Any]], *keys: str) -> Any:
    return next((r[key] for r in reversed(records) for key in keys if key in r), None)


def _number(value: Any) -> int | None:
    """A count; a text with thousands marks is one as well."""
    if isinstance(value, str):
        digits = value.replace(",", "")
        return int(digits) if digits.isdecimal() else None
    return value


def read_config(directory: Path) -> dict[str, str]:
    """``config.yaml`` as key path -> text; empty if there is none."""
    from step_jax.runs.history import flat_configuration

    path = directory / "config.yaml"
    if not path.exists():
        return {}
    return flat_configuration(path.read_text(encoding="utf-8"), str(path))


def config_differences(configs: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """What each configuration says where not all say the same, but for the run's directory."""
    keys = dict.fromkeys(key for c in configs for key in c if key != "run.directory")
    varying = [key for key in keys if len({config.get(key) for config in configs}) > 1]
    return [{key: config[key] for key in varying if key in config} for config in configs]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table; columns without any value are left out."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = (*_COLUMNS, "reason", "config")
    columns = [c for c in shown if any(row[c] not in (None, "", {}) for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for column in columns:
        is_text = column in ("run", "status", "reason", "config")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(column, row)) for column in columns))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def _cell(column: str, row: Mapping[str, Any]) -> str:
    value = row[column]
    if value is None:
        return "-"
    if column == "trained":
        return f"{si(value)} {row['unit']}"
    if column == "pace":
        return f"{si(value)}/s"
    if column == "params":
        return si(value)
    if column == "config":
        words = [f"{key}={text}" for key, text in value.items()]
        more = len(words) - _MAX_DIFFERENCES
        return "  ".join(words[:_MAX_DIFFERENCES]) + (f"  and {more} more" if more > 0 else "")
    if isinstance(value, float):
        return f"{value:.4f}"
    return format_value(column, value)
