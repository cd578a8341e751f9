"""What a run shows: tables and a live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

_REFRESH_SECONDS = 0.125
_DETAILS = ("loss_weight", "param_norm", "skipped_total")


@dataclass(frozen=True)
class Shown:
    """A value of a header or a summary that is shown in words of its own and recorded as it is."""

    value: Any
    text: str


def format_value(name: str, value: Any) -> str:
    """A value for people, by the ending of its name.

    ``*_s`` and ``seconds`` are durations, ``*_per_s`` rates, ``*bytes`` sizes, ``mfu`` and
    ``*_fraction`` fractions; other floats get four digits, large whole numbers thousands marks.
    """
    if isinstance(value, Shown):
        return value.text
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    leaf = name.rsplit("/", 1)[-1].replace(" ", "_").lower()
    if leaf.endswith("_per_s"):
        return si(value)
    if leaf.endswith("_s") or leaf.endswith("seconds"):
        return duration(value)
    if leaf.endswith("bytes"):
        return f"{si(value)}B"
    if leaf == "mfu" or leaf.endswith("_fraction"):
        return f"{100 * value:.1f}%"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3e}" if value and not 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"


def cells(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Names and values for a progress line; details, and what has nothing to say, are left out."""
    shown = {
        k.replace("_per_s", "/s"): format_value(k, v)
        for k, v in metrics.items()
        if not _is_detail(k, v, metrics)
    }
    for name, value in metrics.items():
        if name in shown and isinstance(value, int | float) and f"{name}_per_s" in metrics:
            shown[name] = si(value)  # the work done so far
    return shown


def _is_detail(name: str, value: Any, metrics: Mapping[str, Any]) -> bool:
    if name == "skipped":
        return value == 0
    if name == "nll":  # the loss has no other part
        return value == metrics.get("loss")
    if name == "data_wait_s":
        return value < 0.01 * metrics.get("step_s", 0)
    return "/" in name or name in _DETAILS


def si(value: float) -> str:
    """1234567 -> ``1.23M``."""
    for suffix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5:
            return f"{value:.3g}{suffix}"
        value /= 1000
    return f"{value:.3g}E"


def duration(seconds: float) -> str:
    """Seconds as ``850us``, ``12ms``, ``3.21s``, ``4m05s`` or ``2h07m``."""
    if seconds == 0:
        return "0s"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f}us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g}ms"
    if seconds < 60:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02}s"
    return f"{minutes // 60}h{minutes % 60:02}m"


class Console(Protocol):
    """How the reporter shows things."""

    def table(self, title: str, rows: Mapping[str, str]) -> None: ...

    def line(self, text: str) -> None: ...

    def progress(self, step: int, total: int | None, cells: Mapping[str, str]) -> None: ...

    def close(self) -> None: ...


class PlainConsole:
    """One line each, for files and pipes. ``every`` steps make one progress line."""

    def __init__(self, stream: TextIO, *, every: int):
        self.stream = stream
        self.every = every

    def line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        width = max(map(len, rows), default=0)
        self.line(title)
        for name, value in rows.items():
            self.line(f"  {name:<{width}}  {value}")

    def progress(self, step: int, total: int | None, cells: Mapping[str, str]) -> None:
        if step % self.every == 0 or step == total or step == 1:
            self.line(progress_text(step, total, cells))

    def close(self) -> None:
        self.stream.flush()


def progress_text(step: int, total: int | None, cells: Mapping[str, str]) -> str:
    """``step 10/300  loss 5.4  ...``."""
    head = f"step {step}/{total}" if total else f"step {step}"
    return "  ".join([head, *(f"{name} {value}" for name, value in cells.items())])


class RichConsole:
    """Tables, and one live line that is redrawn in place; every ``every`` steps it is kept."""

    def __init__(self, stream: TextIO, *, every: int):
        from rich.console import Console as Terminal

        self.terminal = Terminal(file=stream, highlight=False)
        self.every = every
        self._live: Any = None
        self._drawn = 0.0

    def line(self, text: str) -> None:
        from rich.text import Text

        self.terminal.print(Text(text))

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        self.close()  # a live line would be left standing above the table
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", box=box.ROUNDED, show_header=False)
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, Text(value))
        self.terminal.print(table)

    def progress(self, step: int, total: int | None, cells: Mapping[str, str]) -> None:
        from rich.live import Live

        keep = step % self.every == 0 or step == total
        if keep:
            self.line(progress_text(step, total, cells))
        now = time.monotonic()
        if now - self._drawn < _REFRESH_SECONDS and step != total:
            return
        self._drawn = now
        if self._live is None:
            self._live = Live(console=self.terminal, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(self._bar(step, total, cells), refresh=True)

    def _bar(self, step: int, total: int | None, cells: Mapping[str, str]) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(f"{step}/{total}" if total else f"step {step}", style="bold")
        for name, value in cells.items():
            text.append(f"  {name} ", style="dim").append(value)
        grid = Table.grid(padding=(0, 1))
        if total:
            grid.add_row(ProgressBar(total=total, completed=step, width=24), text)
        else:
            grid.add_row(text)
        return grid

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def make_console(*, every: int, stream: TextIO | None = None) -> Console:
    """Rich on a terminal, plain otherwise."""
    stream = stream or sys.stdout
    if stream.isatty():
        return RichConsole(stream, every=every)
    return PlainConsole(stream, every=every)
