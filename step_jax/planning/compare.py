"""Two saved plans side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from step_jax.core.errors import ConfigError
from step_jax.runs.console import Console, duration, si

#: What names a plan's model: plans of different ones are compared all the same, and it is said.
_MODEL = ("parameters", "active")


def load(path: Path) -> dict[str, Any]:
    """A plan as ``Plan.save`` wrote it.

    Raises:
      ConfigError: no such file, or one that is no plan.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no saved plan: {error}") from None
    if not isinstance(found, dict) or "bound_s" not in found:
        raise ConfigError(f"{path} is no saved plan of a train step: `step-jax plan` writes them")
    return found


def show(a: Path, b: Path, console: Console) -> None:
    """Prints a table of both, and what makes them hard to compare."""
    one, two = load(a), load(b)
    console.table(f"{a.stem} | {b.stem}", rows(one, two))
    for line in warnings(one, two):
        console.line(f"note: {line}")


def warnings(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Differences that a reader of the figures should know of."""
    found = []
    if any(one.get(key) != two.get(key) for key in _MODEL):
        sizes = " and ".join(f"{plan['recipe']} ({si(plan['parameters'])})" for plan in (one, two))
        found.append(f"these are different models: {sizes} parameters")
    if one["work"] != two["work"] or one["unit"] != two["unit"]:
        steps = " and ".join(f"{plan['work']:,} {plan['unit']}" for plan in (one, two))
        found.append(f"a step is not the same work: {steps}; compare the rates")
    if one.get("versions") != two.get("versions"):
        found.append(f"made with other versions: {one.get('versions')} and {two.get('versions')}")
    return found


def rows(one: dict[str, Any], two: dict[str, Any]) -> dict[str, str]:
    """Figure -> both values, and by how much the second is above the first."""
    found = {"mesh": f"{_mesh(one)} | {_mesh(two)}"}
    for name, value in _figures(one).items():
        other = _figures(two).get(name)
        if value is None or other is None:
            continue
        (first, text), (second, other_text) = value, other
        change = f"   {second / first - 1:+.1%}" if first else ""
        found[name] = f"{text} | {other_text}{change}"
    found["fits"] = f"{_word(one)} | {_word(two)}"
    return found


def _mesh(plan: dict[str, Any]) -> str:
    mesh = " x ".join(f"{a}={n}" for a, n in plan["mesh"].items()) or "1 device"
    return f"{plan['topology']} {mesh}, accumulation {plan['accumulation']}"


def _word(plan: dict[str, Any]) -> str:
    return "yes" if plan["fits"] else "no"


def _figures(plan: dict[str, Any]) -> dict[str, tuple[float, str] | None]:
    """Figure -> (value, in words); None for what a plan does not have."""
    expected = plan.get("forecast")

    def said(value: float | None, words) -> tuple[float, str] | None:
        return None if value is None else (value, words(value))

    def of_layer(name: str) -> tuple[float, str] | None:
        return said(expected and expected["layers"].get(name), duration)

    layers = list(expected["layers"]) if expected else []
    return {
        "memory": said(plan["memory_compiler"], lambda v: f"{v / 1e9:.3g} GB"),
        "bound of a step": said(plan["bound_s"], duration),
        "forecast of a step": said(expected and expected["step"], duration),
        **{f"  {name}": of_layer(name) for name in layers},
        "  communication not hidden": said(expected and expected["exposed"], duration),
        f"{plan['unit']} per second and chip": said(plan.get("rate"), lambda v: f"{v:,.0f}"),
        "MFU": said(plan.get("mfu"), lambda v: f"{v:.1%}"),
        "days": said(plan.get("days"), lambda v: f"{v:.3g}"),
        "chip-hours": said(plan.get("chip_hours"), si),
        "cost": said(plan.get("cost"), lambda v: f"{si(v)} {plan.get('currency')}"),
    }
