"""Golden tables: what plans of recipes on pods said when they were last looked at.

python -m tests.planning.golden                      compile all again and rewrite them
python -m tests.planning.golden llama2_7b            those whose name contains the word
python -m tests.planning.golden table                the tables as one in Markdown
python -m tests.planning.golden new configs/x.yaml v5p:4x4x4 [--parallel.fsdp 16 ...]
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"


def tables() -> list[Path]:
    return sorted(GOLDEN.glob("*.json"))


def make(recipe: str, topology: str, flags: list[str]) -> dict[str, Any]:
    """The table of a recipe (a path from the repository's root) on a topology."""
    from step_jax.core.command_line import load_config
    from step_jax.planning import topology as topology_lib
    from step_jax.planning.plan import Request, make_plan
    from step_jax.trainers import pretrain

    config = load_config(pretrain.Config, [str(ROOT / recipe), *flags]).config
    plan = make_plan(pretrain, config, topology_lib.parse(topology), Request(Path(recipe).stem))
    return {"recipe": recipe, "topology": topology, "flags": flags} | figures(plan)


def figures(plan) -> dict[str, Any]:
    """What a table keeps of a plan."""
    return {
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "libtpu")},
        "mesh": plan.mesh,
        "memory": plan.memory,
        "memory_total": plan.memory_total,
        "memory_compiler": plan.memory_compiler,
        "memory_limit": plan.memory_limit,
        "flops": plan.flops,
        "flops_model": plan.flops_model,
        "kernels_without_cost": len(plan.kernels_without_cost),
        "collectives": _by_axes(plan.collectives),
        "compile_cpu_s": plan.compile_cpu_s,
    }


def _by_axes(collectives: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes by kind and axes; groups of all sizes that are pieces of an axis together."""
    found: dict[str, float] = {}
    for c in collectives:
        name = f"{c['kind']} over {c['axes']}"
        found[name] = found.get(name, 0.0) + c["nbytes"]
    return found


def write(recipe: str, topology: str, flags: list[str]) -> Path:
    table = make(recipe, topology, flags)
    name = "_".join([Path(recipe).stem, topology, *flags])
    path = GOLDEN / (re.sub(r"[^\w.]+", "_", name) + ".json")
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return path


def overview() -> str:
    """One line of Markdown for each table of a recipe for pods."""
    lines = [
        "| recipe | topology | mesh | HBM of a device | sum of classes by it | compiled by needed "
        "operations | compile CPU-s |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in tables():
        t = json.loads(path.read_text(encoding="utf-8"))
        if not t["recipe"].startswith("configs/"):
            continue
        mesh = ", ".join(f"{axis} {n}" for axis, n in t["mesh"].items())
        lines.append(
            f"| {Path(t['recipe']).stem} | {t['topology']} | {mesh} "
            f"| {t['memory_compiler'] / 1e9:.1f} of {t['memory_limit'] / 1e9:.0f} GB "
            f"| {t['memory_total'] / t['memory_compiler'] - 1:+.1%} "
            f"| {t['flops'] / t['flops_model']:.2f} | {t['compile_cpu_s']:.0f} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if argv and argv[0] == "new":
        print(write(argv[1], argv[2], argv[3:]))
        return
    if argv == ["table"]:
        print(overview())
        return
    for path in tables():
        if not argv or any(word in path.name for word in argv):
            table = json.loads(path.read_text(encoding="utf-8"))
            print(write(table["recipe"], table["topology"], table["flags"]))


if __name__ == "__main__":
    main(sys.argv[1:])
