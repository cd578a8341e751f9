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
# # A sweep, and the laws in it
#
# One sweep of learning rate, width and training tokens; from it the best rate of each size and
# length in the form of Step Law ([arXiv 2503.04715](https://arxiv.org/abs/2503.04715)), and the
# loss in the form of Hoffmann et al. ([arXiv 2203.15556](https://arxiv.org/abs/2203.15556)). The
# same as `step-jax sweep`, in Python. Runs that are finished are read, not repeated; interrupt a
# cell, and the run under way is saved and goes on when the cell is run again. Start it in the
# repository, with `pip install '.[notebooks]'`.
#
# One curve of it, a decoder of width 32 after 65,536 tokens, as it came out on a CPU:
#
# ![Loss against learning rate](../docs/images/sweep.png)

# %%
import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image, Markdown, display

from step_jax import Values, collect_sweep, run_sweep
from step_jax.training.scaling_laws import (
    best_value,
    fit_power_law,
    fit_scaling_law,
    step_law_learning_rate,
)

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "configs").is_dir())

# %% [markdown]
# 36 runs, of which the shortest takes half a minute of a CPU core; `TRAIN = False` reads what is
# finished.

# %% tags=["parameters"]
RECIPE = ROOT / "configs/scaling.yaml"
RATES = ("1e-3", "3e-3", "1e-2", "3e-2")
WIDTHS = ("32", "64", "128")
TOKENS = ("131072", "262144", "524288")
FLAGS = ["--run.directory", str(ROOT / "runs/scaling")]
TRAIN = True

# %%
varied = [
    Values("optimizer.learning_rate", RATES),
    Values("model.width", WIDTHS),
    Values("training.tokens", TOKENS),
]
sweep = (run_sweep if TRAIN else collect_sweep)([RECIPE], varied, overrides=FLAGS)
display(Markdown(sweep.markdown()))

# %% [markdown]
# Loss against rate, a curve for each width and length.

# %%
display(Image(filename=str(sweep.plot(sweep.picture))))

# %% [markdown]
# The best rate of every width and length: the minimum of a parabola through the lowest loss and its
# neighbours, or the lowest one where it lies at the border. N counts the matrices of the layers, as
# Step Law does.

# %%
table = pd.DataFrame(
    {
        "rate": [float(point.values[0]) for point in sweep.points],
        "N": [point.matrices for point in sweep.points],
        "parameters": [point.parameters for point in sweep.points],
        "D": [point.tokens for point in sweep.points],
        "loss": [point.loss for point in sweep.points],
    }
)
rows = []
for (n, d), group in table.groupby(["N", "D"]):
    best = best_value(list(group["rate"]), list(group["loss"]))
    rows.append({"N": n, "D": d, "best rate": best, "Step Law": step_law_learning_rate(n, d)})
    rows[-1] |= {"parameters": group["parameters"].iloc[0], "loss": group["loss"].min()}
best = pd.DataFrame(rows)
best

# %% [markdown]
# As a power law of N and D. Step Law was fitted for models of 60 million parameters and more with a
# cosine schedule: far from here, so unlike numbers are no surprise.

# %%
c, of_n, of_d = fit_power_law(best[["N", "D"]].to_numpy(), best["best rate"])
print(f"here:     rate* = {c:.3g} N^{of_n:.3f} D^{of_d:.3f}")
print("Step Law: rate* = 1.79 N^-0.713 D^0.307")

# %% [markdown]
# The lowest losses as a scaling law, and how far each run is from it. Its five numbers are from few
# and small runs: the law says little beyond them.

# %%
law = fit_scaling_law(list(best["parameters"]), list(best["D"]), list(best["loss"]))
print(f"loss = {law.floor:.3f} + {law.a:.4g} / N^{law.alpha:.3f} + {law.b:.4g} / D^{law.beta:.3f}")
best["law"] = law.loss(best["parameters"], best["D"])
best["error, %"] = 100 * (best["law"] / best["loss"] - 1)
best[["parameters", "D", "loss", "law", "error, %"]].round(4)

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
colours = itertools.cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"])
for (n, group), colour in zip(best.groupby("parameters"), colours, strict=False):
    d = np.geomspace(best["D"].min(), best["D"].max())
    axes.plot(d, law.loss(n, d), color=colour, label=f"{n:,} parameters")
    axes.plot(group["D"], group["loss"], "o", color=colour)
axes.set(xscale="log", xlabel="training tokens (log scale)", ylabel="held-out nats per token")
axes.set_title("points: runs at their best rate; lines: the law", loc="left", fontsize=10)
axes.legend()
plt.show()
