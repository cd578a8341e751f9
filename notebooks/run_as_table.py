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
# # A run as a DataFrame
#
# Everything that a run reports is a line of its `metrics.jsonl` ([runs](../docs/runs.md)).
# `read_metrics` reads it, of a run that is still going as well; the rest is pandas. Start it in the
# repository, with `pip install '.[notebooks]'`, after `make quickstart`.
#
# What a run draws of itself at its end:
#
# ![Loss, learning rate and pace of the quickstart](../docs/images/quickstart.png)

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from step_jax import read_metrics

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "configs").is_dir())

# %% [markdown]
# Which run.

# %% tags=["parameters"]
RUN = ROOT / "runs/quickstart"

# %% [markdown]
# A record has an `event`, a `step` and a `time`; a step's numbers are columns.

# %%
records = pd.DataFrame(read_metrics(RUN))
records["time"] = pd.to_datetime(records["time"], unit="s")
records["event"].value_counts()


# %%
def of(event: str) -> pd.DataFrame:
    """The records of one kind, by step."""
    chosen = records[records["event"] == event]
    return chosen.dropna(axis="columns", how="all").set_index("step").drop(columns="event")


steps, evaluations = of("step"), of("eval")
steps.describe().T

# %% [markdown]
# The loss as measured, its mean over a twentieth of the steps, and the held-out text.

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
window = max(1, len(steps) // 20)
axes.plot(steps["tokens"], steps["loss"], color="tab:blue", alpha=0.3, label="a step")
smooth = steps["loss"].rolling(window, center=True, min_periods=1).mean()
axes.plot(steps["tokens"], smooth, color="tab:blue", label=f"mean over {window} steps")
at = steps["tokens"].reindex(evaluations.index, method="nearest")
axes.plot(at, evaluations["nll"], "o", color="tab:red", label="held-out text")
axes.set(xlabel="tokens", ylabel="nats per token", title=RUN.name)
axes.legend()
plt.show()

# %% [markdown]
# Where the time went: the steps, what the host waited for data meanwhile, and what was no step
# (compilation, evaluations, checkpoints, stops).

# %%
whole = (records["time"].iloc[-1] - records["time"].iloc[0]).total_seconds()
per_record = steps.index.to_series().diff().fillna(steps.index[0])
stepping = (steps["step_s"] * per_record).sum()
waiting = (steps["data_wait_s"] * per_record).sum()
pd.Series({"whole": whole, "steps": stepping, "of it for data": waiting}, name="seconds").round(1)

# %% [markdown]
# What happened beside the steps: starts, stops, notes.

# %%
notes = records[records["event"].isin(["note", "resumed", "summary", "end"])]
notes.dropna(axis="columns", how="all").drop(columns="values", errors="ignore")
