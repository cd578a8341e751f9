"""The search's estimates beside what the compiler says of the same meshes.

python -m benchmarks.plan_search compile [MODEL ...] [--most N]
                                  compile the meshes below and what the search takes for the best
                                  two of each model, one after another: plan_search.json; what is
                                  there already is not compiled again
python -m benchmarks.plan_search report
                                  estimates beside it, in Markdown; compiles nothing

The meshes are written down here, not taken from the search, so that they do not change with what it
prefers: every axis, remat policy and number of microbatches is in some of them, and memory from a
tenth of a device to more than all of it. A rank correlation (Spearman) of 1 says that the estimates
order the meshes as the compiled forecasts do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
COMPILED = Path(__file__).parent / "published" / "plan_search.json"

#: Share of a device's memory from which on a program is compiled to the end.
NEAR = 0.95
#: Of a plan, what is kept.
KEPT = (
    "mesh", "remat", "accumulation", "memory", "memory_compiler", "memory_limit",
    "flops", "layers", "network_s", "bound_s", "versions",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A recipe on a topology, and the variants of it that are compiled.

    Attributes:
      flags: that make it small enough to compile many times.
      meshes: each as words: axis or ``accumulation`` and a number, or a remat policy.
    """

    recipe: str
    topology: str
    flags: tuple[str, ...]
    meshes: tuple[str, ...]


MODELS = {
    "dense": Model(
        "configs/peers/llama2_7b.yaml",
        "v5p:2x4x4",
        ("--training.batch_size", "128", "--parallel.data", "1"),
        (
            "fsdp 32 full accumulation 1",
            "fsdp 32 dots accumulation 1",
            "fsdp 32 none accumulation 4",
            "fsdp 8 tensor 4 dots accumulation 1",
            "fsdp 16 context 2 full accumulation 1",
            "pipeline 2 fsdp 16 full accumulation 1",
            "fsdp 16 tensor 2 full accumulation 1",
            "fsdp 32 none accumulation 1",
            "fsdp 4 tensor 8 none accumulation 2",
        ),
    ),
    "experts": Model(
        "configs/mfa_paper_7b_moe.yaml",
        "v5p:2x2x4",
        ("--training.batch_size", "256"),
        (
            "fsdp 2 expert 8 full accumulation 4",
            "fsdp 16 full accumulation 4",
            "fsdp 16 none accumulation 16",
            "fsdp 4 expert 4 dots accumulation 4",
            "fsdp 2 expert 4 tensor 2 full accumulation 4",
            "fsdp 2 expert 4 context 2 full accumulation 4",
            "fsdp 2 expert 8 none accumulation 16",
            "pipeline 2 fsdp 2 expert 4 full accumulation 4",
            "expert 16 full accumulation 4",
        ),
    ),
    "muon": Model(
        "benchmarks/published/muon.yaml",
        "v5p:2x2x4",
        (),
        (
            "fsdp 4 expert 4 full accumulation 4",
            "fsdp 16 full accumulation 4",
            "fsdp 2 expert 8 dots accumulation 4",
            "fsdp 4 expert 4 none accumulation 8",
            "fsdp 8 tensor 2 full accumulation 8",
        ),
    ),
}


def flags_of(words: str) -> list[str]:
    """A mesh's words as flags; axes that it does not name are 1."""
    from step_jax.core.sharding import AXES

    sizes = dict.fromkeys(AXES, 1)
    flags, parts = [], words.split()
    for word, value in zip(parts, [*parts[1:], ""], strict=True):
        if word in sizes:
            sizes[word] = int(value)
        elif word in ("none", "dots", "full"):
            flags += ["--execution.remat", word]
        elif word == "accumulation":
            flags += ["--training.accumulation", value]
    return [w for axis, n in sizes.items() for w in (f"--parallel.{axis}", str(n))] + flags


def words_of(config: Any) -> str:
    """The words of a variant."""
    from step_jax.core.sharding import AXES

    sizes = ((axis, getattr(config.parallel, axis)) for axis in AXES)
    mesh = [f"{axis} {n}" for axis, n in sizes if n > 1]
    return " ".join([*mesh, config.execution.remat, f"accumulation {config.training.accumulation}"])


def config_of(model: Model, words: str = "") -> Any:
    from step_jax.core.command_line import load_config
    from step_jax.planning import topology
    from step_jax.planning.compiled import resolved
    from step_jax.trainers import pretrain

    argv = [str(ROOT / model.recipe), *model.flags, *(flags_of(words) if words else ())]
    config = load_config(pretrain.Config, argv).config
    return resolved(config, topology.parse(model.topology).count)


def cases(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(model, words) of all that is to be compiled: what the searches would take comes first."""
    names = list(names)
    yield from ((name, words) for name in names for words in best_of_search(MODELS[name]))
    yield from ((name, words) for name in names for words in MODELS[name].meshes)


def best_of_search(model: Model) -> list[str]:
    """What the search would compile of a model."""
    from step_jax.planning import search, topology
    from step_jax.trainers import pretrain

    at = topology.parse(model.topology)
    found = search.search(pretrain, config_of(model), at, compiled=False)
    return [words_of(p.config) for p in found[: search.COMPILED]]


def compile_all(names: Iterable[str], most: int | None) -> None:
    done = 0
    for name, words in cases(names):
        saved = _saved()
        if words in saved.get(name, {}):
            continue
        if done == most:
            break
        plan, seconds = planned(MODELS[name], words)
        kept = {key: value for key, value in vars(plan).items() if key in KEPT}
        saved.setdefault(name, {})[words] = kept | {"fits": plan.fits}
        COMPILED.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
        print(f"{name} {words}: {seconds:.0f} s", flush=True)
        done += 1


def planned(model: Model, words: str) -> tuple[Any, float]:
    """(the plan of a mesh, seconds that the compiler ran).

    The compiler runs in another process, which is ended when the optimised program and what lies
    where in memory are written: machine code, most of its work, is not asked for. A program near
    the device's memory or above it is compiled to the end, for the compiler's word.
    """
    from step_jax.planning import compiled, plan, topology
    from step_jax.planning.memory import out_of_memory
    from step_jax.trainers import pretrain

    config, at = config_of(model, words), topology.parse(model.topology)
    program = compiled.program_for(pretrain, config, at)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="plan_search_") as folder:
        error = _run_compiler(model, words, Path(folder), NEAR * at.chip.hbm_bytes)
        texts = compiled.read_dump(Path(folder), program.step.__name__)
    if not texts[0]:
        raise SystemExit(f"{words}: the compiler left no program to read:\n{error[-2000:]}")
    seconds = time.monotonic() - start
    overflow = "" if out_of_memory(error) is None else error[error.index("RESOURCE_EXHAUSTED") :]
    found = compiled.Compiled(*texts, 0.0, None, seconds, overflow, program)
    return plan.take_stock(config, at, found), seconds


def _run_compiler(model: Model, words: str, folder: Path, near: float) -> str:
    """Compiles into a folder until what is asked for is there; the compiler's errors."""
    asked = [sys.executable, "-m", "benchmarks.plan_search", "one"]
    asked += [next(n for n, m in MODELS.items() if m == model), words, str(folder)]
    errors = folder / "errors.txt"
    with errors.open("w") as file, subprocess.Popen(asked, cwd=ROOT, stderr=file) as child:
        while child.poll() is None:
            time.sleep(2.0)
            if any(folder.glob("*after_buffer_assignment.txt")) and _reserved(folder) < near:
                time.sleep(2.0)  # until all is written
                child.kill()
    return errors.read_text(encoding="utf-8", errors="replace")


def _reserved(folder: Path) -> float:
    """Bytes that the compiler has assigned so far."""
    from step_jax.planning.memory import parse_assignment

    found = [*folder.glob("*-buffer-assignment.txt")]
    texts = (path.read_text(encoding="utf-8") for path in found)
    totals = (sum(a.nbytes for a in parse_assignment(text, "")[0]) for text in texts)
    return max(totals, default=math.inf)


def compile_one(name: str, words: str, folder: str) -> None:
    """Compiles a mesh to the end; XLA's dumps go into a folder."""
    from step_jax.core.kept_programs import not_kept
    from step_jax.planning import compiled, topology
    from step_jax.trainers import pretrain

    config, at = config_of(MODELS[name], words), topology.parse(MODELS[name].topology)
    with not_kept():
        compiled.program_for(pretrain, config, at).compile(
            {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        )


# --- Report ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A mesh: bytes of a device and seconds of a step, estimated and compiled.

    Attributes:
      may_fit: whether the search would take it for one that fits.
    """

    words: str
    nbytes: float
    compiled_nbytes: float
    seconds: float
    compiled_seconds: float
    may_fit: bool
    fits: bool


def rows_of(name: str) -> list[Row]:
    """The compiled meshes of a model, in the order in which the search would show them."""
    from step_jax.planning import search, topology
    from step_jax.trainers import pretrain

    model = MODELS[name]
    at = topology.parse(model.topology)
    estimated = search.Estimator(pretrain, config_of(model), at)
    rows = []
    for words, plan in _saved().get(name, {}).items():
        proposal = estimated(config_of(model, words))
        rows.append(
            Row(
                words,
                proposal.nbytes,
                plan["memory_compiler"],
                proposal.step_s,
                _forecast(plan, at),
                proposal.nbytes <= search.limit(at),
                plan["fits"],
            )
        )
    return sorted(rows, key=lambda row: (not row.may_fit, row.seconds))


def _forecast(plan: dict[str, Any], at: Any) -> float:
    """Seconds of a compiled step by the shares of the peak as they are now."""
    from step_jax.planning import forecast

    work = {(row["layer"], row["kind"]): row["amount"] for row in plan["layers"]}
    return forecast.forecast(work, plan["network_s"], at, "bfloat16", plan["bound_s"]).step


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The correlation of two lists' ranks, of equal values the mean rank."""
    ranks = [_ranks(values) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def order_of(rows: Iterable[Row]) -> float:
    """How alike the estimates and the compiled forecasts order meshes."""
    rows = list(rows)
    return spearman([r.seconds for r in rows], [r.compiled_seconds for r in rows])


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, float)
    return (array[:, None] > array).sum(1) + ((array[:, None] == array).sum(1) - 1) / 2


def errors(pairs: Iterable[tuple[float, float]]) -> list[float]:
    return [estimated / compiled - 1 for estimated, compiled in pairs]


def report() -> str:
    """The tables and figures in Markdown."""
    lines, found = [], {name: rows_of(name) for name in MODELS}
    for name, rows in found.items():
        lines += _table(name, rows)
    lines += [
        "| | meshes | order: Spearman | memory: median, largest "
        "error | time: median, largest error | fits: as the compiler says "
        "| best of the search by the best compiled |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        lines.append(f"| {name} | {_figures(rows)} | {_best(name, rows)} |")
    every = [row for rows in found.values() for row in rows]
    lines.append(f"| all | {_figures(every)} | |")
    return "\n".join(lines)


def _table(name: str, rows: list[Row]) -> list[str]:
    model = MODELS[name]
    lines = [
        f"**{name}**: `{model.recipe}` on {model.topology}"
        + (f", `{' '.join(model.flags)}`" if model.flags else ""),
        "",
        "| mesh | GB of a device | compiled | | step, s | compiled | | fits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory, seconds = errors(
            [(row.nbytes, row.compiled_nbytes), (row.seconds, row.compiled_seconds)]
        )
        lines.append(
            f"| {row.words} | {row.nbytes / 1e9:.1f} | {row.compiled_nbytes / 1e9:.1f} "
            f"| {memory:+.0%} | {row.seconds:.2f} | {row.compiled_seconds:.2f} | {seconds:+.1%} "
            f"| {'yes' if row.fits else 'no'}{'' if row.fits == row.may_fit else ' (!)'} |"
        )
    return [*lines, ""]


def _figures(rows: list[Row]) -> str:
    # one that does not fit was made smaller, by computing more again, until the compiler gave up
    run = [row for row in rows if row.fits]
    memory = np.abs(errors((r.nbytes, r.compiled_nbytes) for r in run))
    seconds = np.abs(errors((r.seconds, r.compiled_seconds) for r in run))
    right = sum(row.fits == row.may_fit for row in rows)
    return (
        f"{len(rows)} | {order_of(run):.3f} | {np.median(memory):.0%}, {memory.max():.0%} "
        f"| {np.median(seconds):.0%}, {seconds.max():.0%} | {right} of {len(rows)}"
    )


def _best(name: str, rows: list[Row]) -> str:
    """What the search would take of the two that it compiles, by the best of all compiled."""
    asked = best_of_search(MODELS[name])
    mine = [row for row in rows if row.words in asked and row.fits]
    if len({row.words for row in rows}.intersection(asked)) < len(asked):
        return "**not compiled yet**"
    best = min(row.compiled_seconds for row in rows if row.fits)
    return f"{min(row.compiled_seconds for row in mine) / best - 1:+.1%}" if mine else "none fits"


def _saved() -> dict[str, Any]:
    return json.loads(COMPILED.read_text(encoding="utf-8")) if COMPILED.exists() else {}


def main(argv: Sequence[str] | None = None) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["one"]:  # what this command starts for each mesh
        compile_one(*argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=("compile", "report"))
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--most", type=int, help="compile so many and end")
    given = parser.parse_args(argv)
    if unknown := set(given.models) - set(MODELS):
        parser.error(f"no model {', '.join(unknown)}; there are: {', '.join(MODELS)}")
    if given.do == "compile":
        compile_all(given.models or MODELS, given.most)
    else:
        print(report())


if __name__ == "__main__":
    main()
