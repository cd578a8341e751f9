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
# # Planning a pod
#
# Compile the very step of a recipe for devices that are not there, on this machine's CPU: does it
# fit, how long does a step take, what bounds it ([planning](../docs/planning.md)). For TPUs their
# compiler is needed (`pip install 'jax[tpu]'`), but no TPU. Start it in the repository, with `pip
# install '.[notebooks]'`.
#
# Then the same recipe is [launched](../docs/pods.md) there. What is drawn of such a plan, here of
# `step-jax plan configs/rl/step2_mini.yaml --topology v5p:4x8x8`:
#
# ![Memory and time of a step of Step-2 mini on 256 chips](../docs/images/plan.png)

# %%
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported: nothing runs on a chip

import pandas as pd
from IPython.display import Image, Markdown, display

from step_jax import load_config
from step_jax.planning import report
from step_jax.planning.plan import Request, make_plan
from step_jax.planning.topology import describe_all, parse
from step_jax.trainers import find_loop

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "configs").is_dir())

# %% tags=["parameters"]
RECIPE = ROOT / "configs/mfa_paper_1b_dense.yaml"
TOPOLOGY = "v5e:4x4"
FLAGS = []
OTHERS = [["--execution.remat", "dots"], ["--training.accumulation", "4"]]
PLANS = ROOT / "plans"

# %% [markdown]
# Where it could run.

# %%
print(describe_all())

# %% [markdown]
# The plan: compiled, which takes minutes for a billion parameters, and in its own words.

# %%
loop, topology = find_loop("pretrain"), parse(TOPOLOGY)


def plan_of(flags):
    """The recipe with these flags on the topology."""
    config = load_config(loop.Config, [RECIPE, *FLAGS, *flags]).config
    return make_plan(loop, config, topology, Request(RECIPE.stem, tuple(map(str, flags))))


plan = plan_of([])
display(Markdown(f"**{report.title(plan)}**: {report.verdict(plan)}"))
for title, rows in report.tables(plan):
    display(pd.Series(rows, name=title).to_frame())

# %% [markdown]
# Memory against what there is, and what a step's time is made of.

# %%
display(Image(filename=str(report.draw(plan, PLANS / f"{RECIPE.stem}.png"))))

# %% [markdown]
# The same with other flags, side by side.

# %%
plans = {"as it stands": plan, **{" ".join(flags): plan_of(flags) for flags in OTHERS}}
pd.DataFrame(
    {
        name: {
            "fits": p.fits,
            "memory of a device, GB": round(p.memory_total / 1e9, 3),
            "least step, s": p.bound_s,
            "bound by": p.bound_by,
        }
        for name, p in plans.items()
    }
).T
