"""What Step's models would take on pods of several chips: one page.

    python -m benchmarks.step_family_plans > benchmarks/step_family_plans.md

Every recipe is searched on every topology (`step-jax plan RECIPE --topology NAME --search`, by its
estimates alone, nothing is compiled), and the best that fits by the estimate gives a row. Where a
golden table holds the compiled step of the recipe's own mesh (`tests/planning/golden`), that mesh
has a row as well: its memory, and that it fits, are the compiler's word. All times are forecasts
from estimated work. CPU-minutes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "planning" / "golden"

#: Recipe -> topologies (and slices of them) of about equal peak, the first that of the recipe.
PODS = {
    "step2_1t": ("v5p:8x8x16", "4 v6e:16x16", "tpu7x:8x8x8", "gpu:h200x1024"),
    "step3_316b": ("v5p:4x8x8", "2 v6e:16x16", "tpu7x:4x4x8", "gpu:h200x256"),
    "step35_flash_196b": ("v5p:4x8x8", "v6e:16x16", "tpu7x:4x4x8", "gpu:h200x256"),
    "step2_mini": ("v5p:4x4x8", "v6e:8x16", "tpu7x:4x4x4", "gpu:h200x128"),
}


HEAD = """# Step's models on pods

`python -m benchmarks.step_family_plans > benchmarks/step_family_plans.md` prints this page. Nothing
here has been run on an accelerator: times are forecasts (`docs/planning.md`) from work that is
estimated from shapes, with the range that two thirds of published runs stayed within. A row that
says `compiler` is the recipe's own mesh, whose step was compiled (`tests/planning/golden`): its
memory, and that it fits, are the compiler's word. A row that says `estimate` is the best of
`step-jax plan RECIPE --topology NAME --search`, not compiled: estimates of memory were within 10 %
of compiled steps (`benchmarks/plan_search.md`), and the search fills nine tenths of a device at
most. Tokens, rows and dimensions are those of the recipes, which say what of them was published.
Days are of the whole run without stops; a tpu7x chip is two devices."""

COLUMNS = (
    "pod", "mesh", "memory of a device (whose word)", "step, s (range)", "tokens/s/chip", "MFU",
    "days", "chip-hours",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A mesh of a recipe on a topology; see ``search.Proposal`` for its figures.

    Attributes:
      compiled: bytes of a device by the compiler, None for the estimate alone.
    """

    recipe: str
    pod: str
    chips: int
    limit: float
    found: object
    compiled: float | None

    def text(self) -> str:
        p, nbytes = self.found, self.compiled or self.found.nbytes
        word = "estimate" if self.compiled is None else "compiler"
        if nbytes > self.limit:
            need = f"{nbytes / 1e9:.0f} of {self.limit / 1e9:.0f} GB ({word})"
            return f"| {self.pod} | none fits: the least takes | {need} | | | | | |"
        mesh = " ".join(f"{a} {n}" for a, n in p.config.parallel.sizes().items() if n > 1)
        training = p.config.training
        hours = p.days * 24 * self.chips
        return (
            f"| {self.pod} | {mesh}; remat {p.config.execution.remat}, accumulation "
            f"{training.accumulation} | {nbytes / 1e9:.0f} of {self.limit / 1e9:.0f} GB ({word}) "
            f"| {p.step_s:.1f} ({p.low_s:.1f} to {p.high_s:.1f}) | {p.rate:,.0f} | {p.mfu:.0%} "
            f"| {p.days:.0f} | {hours / 1e6:.2f} M |"
        )


def rows_of(recipe: str, pod: str) -> Iterator[Row]:
    """The compiled mesh of a recipe on a pod, if there is one, and the search's best."""
    from step_jax.core.command_line import load_config
    from step_jax.planning import search, topology
    from step_jax.planning.compiled import resolved
    from step_jax.trainers import pretrain

    slices, _, name = pod.rpartition(" ")
    at = topology.parse(name, int(slices or 1))
    path = ROOT / "configs" / f"{recipe}.yaml"
    config = load_config(pretrain.Config, [str(path)]).config

    def row(found, compiled: float | None = None) -> Row:
        return Row(recipe, pod, at.chips, at.chip.hbm_bytes, found, compiled)

    for table in (json.loads(p.read_text(encoding="utf-8")) for p in GOLDEN.glob("*.json")):
        mine = (f"configs/{recipe}.yaml", pod, [])
        if (table["recipe"], table["topology"], table["flags"]) == mine:
            estimated = search.Estimator(pretrain, config, at)
            yield row(estimated(resolved(config, at.count)), table["memory_compiler"])
    yield row(search.search(pretrain, config, at, compiled=False)[0])


def page() -> Iterator[str]:
    """The lines of the page."""
    from step_jax.core.command_line import load_config
    from step_jax.runs.console import si
    from step_jax.trainers import pretrain

    yield HEAD
    for recipe, pods in PODS.items():
        path = ROOT / "configs" / f"{recipe}.yaml"
        config = load_config(pretrain.Config, [str(path)]).config
        training = config.training
        step = f"{training.batch_size:,} rows of {config.data.sequence_length:,}"
        yield f"\n## {recipe}: {si(training.tokens)} tokens, {step} a step\n"
        yield f"| {' | '.join(COLUMNS)} |"
        yield "|---" * len(COLUMNS) + "|"
        for pod in pods:
            print(recipe, pod, file=sys.stderr, flush=True)
            yield from (row.text() for row in rows_of(recipe, pod))


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for line in page():
        print(line, flush=True)


if __name__ == "__main__":
    main()
