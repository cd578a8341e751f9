# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Attention kinds at equal parameters
#
# The same functions as `step-jax ablate configs/ablations/attention`. Runs that are finished are
# read, not repeated; a cell that is stopped goes on where it was. Start it in the repository, with
# `pip install '.[notebooks]'`.
#
# What it came to on two CPU cores, and what was found since, is [on a
# page](../benchmarks/attention_ablation.md):
#
# ![Training loss of the kinds compared there](../docs/images/attention_ablation.png)

# %% tags=["parameters"]
from pathlib import Path

from IPython.display import Image, Markdown, display

from step_jax import collect_ablation, read_metrics, run_ablation
from step_jax.runs.plots import series
from step_jax.trainers.ablation_table import difference

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "configs").is_dir())
RECIPES = [ROOT / "configs/ablations/attention"]
SEEDS = (0, 1, 2)
OVERRIDES = ["--run.directory", str(ROOT / "runs/ablations/attention")]
TRAIN = True

# %% [markdown]
# Train what is missing (about 25 CPU-minutes from nothing), or set `TRAIN = False` to read only
# what is finished.

# %%
make = run_ablation if TRAIN else collect_ablation
result = make(RECIPES, SEEDS, OVERRIDES, reference="mha")
display(Markdown(result.markdown()))

# %% [markdown]
# The picture: mean and range over seeds.

# %%
display(Image(filename=str(result.plot(result.picture))))

# %% [markdown]
# Every run is a run directory, and its `metrics.jsonl` says everything.

# %%
for row in result.rows:
    for seed in row.nll:
        steps, losses = series(read_metrics(row.runs[seed]), "step", "step", "loss")
        print(f"{row.name:>16} seed {seed}: {losses[0]:.3f} -> {losses[-1]:.3f} in {steps[-1]:.0f}")

# %% [markdown]
# What the paper's initialisation does to each kind, seed by seed.

# %%
rows = {row.name: row for row in result.rows}
for name in rows:
    kind = name.removesuffix("_paper_init")
    if kind != name and (gap := difference(rows[name], rows[kind])) is not None:
        print(f"{kind}: the paper's initialisation minus ours {gap}")
