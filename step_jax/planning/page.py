"""A plan as a page to look at and to send: one file of HTML, its picture in it."""

from __future__ import annotations

import html
import io
from pathlib import Path

from step_jax.core.files import write_whole
from step_jax.planning import report
from step_jax.planning.plan import Plan

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
.verdict { margin-top: .3rem; font-size: 1.1rem; }
.bad { color: #cc0000; font-weight: 600; }
svg { width: 100%; height: auto; background: white; border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; }
tr + tr { border-top: 1px solid #8884; }
th { font-weight: 500; opacity: .7; white-space: nowrap; }
pre { white-space: pre-wrap; }
"""


def write(plan: Plan, path: Path, command: str) -> Path:
    """Writes the page.

    Args:
      command: what makes the plan again.
    """
    tables = report.tables(plan)
    notes = [f"note: {note}" for note in plan.notes]
    if not plan.fits:
        notes += [f"would help: {line}" for line in plan.advice]
    parts = [
        f"<h1>{html.escape(report.title(plan))}</h1>",
        _verdict(plan),
        _picture(plan),
        *(f"<h2>{html.escape(name)}</h2>{_table(rows)}" for name, rows in tables),
        *([f"<h2>notes</h2><ul>{''.join(map(_item, notes))}</ul>"] if notes else []),
        f"<h2>made by</h2><pre>{html.escape(command)}</pre>",
        _table({name: str(version) for name, version in plan.versions.items()}),
    ]
    head = f"<meta charset=utf-8><title>{html.escape(report.title(plan))}</title>"
    write_whole(
        path,
        f"<!doctype html><html lang=en><head>{head}<meta name=viewport "
        f'content="width=device-width"><style>{_STYLE}</style></head><body>{"".join(parts)}'
        "</body></html>\n",
    )
    return path


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return f'<p class="verdict">{html.escape(report.verdict(plan))}</p>'
    return f'<p class="verdict bad">{html.escape(report.verdict(plan))}</p>'


def _picture(plan: Plan) -> str:
    file = io.StringIO()
    report.figure(plan).savefig(file, format="svg")
    text = file.getvalue()
    return text[text.index("<svg") :]  # without the prologue of a file of its own


def _table(rows: dict[str, str]) -> str:
    lines = (
        f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(value.strip())}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{''.join(lines)}</table>"


def _item(text: str) -> str:
    return f"<li>{html.escape(text)}</li>"
