# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     name: python3
# ---

# %% [markdown]
# # Attention kinds at equal parameters
#
# The same functions as `step-jax ablate configs/ablations/attention`. Runs that are finished are
# read, not repeated; a cell that is stopped goes on where it was. Start it in the repository.

# %%
from pathlib import Path

from step_jax.runs.metrics_log import read_metrics
from step_jax.runs.plots import series
from step_jax.trainers.ablation import collect, difference, run_ablation

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "configs").is_dir())
RECIPES = [ROOT / "configs/ablations/attention"]
SEEDS = (0, 1, 2)
OVERRIDES = ["--run.directory", str(ROOT / "runs/ablations/attention")]

# %% [markdown]
# Train what is missing (about 25 CPU-minutes from nothing), or set `TRAIN = False` to read only
# what is finished.

# %%
TRAIN = True
make = run_ablation if TRAIN else collect
result = make(RECIPES, SEEDS, OVERRIDES, reference="mha")
print(result.markdown())

# %% [markdown]
# Curves: every run is a run directory, and its `metrics.jsonl` says everything.

# %%
result.plot(ROOT / "runs/ablations/attention/ablation.png")
for row in result.rows:
    for seed in row.nll:
        steps, losses = series(read_metrics(row.runs[seed]), "step", "step", "loss")
        print(f"{row.name:>16} seed {seed}: {losses[0]:.3f} -> {losses[-1]:.3f} in {steps[-1]:.0f}")

# %% [markdown]
# What the initialisation does to each kind, seed by seed.

# %%
rows = {row.name: row for row in result.rows}
for kind in ("mha", "mfa", "mla"):
    gap = difference(rows[f"{kind}_paper_init"], rows[kind])
    if gap is not None:
        print(f"{kind}: the paper's initialisation minus ours {gap.mean:+.4f} ± {gap.error:.4f}")
