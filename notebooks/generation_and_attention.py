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
# # What a model writes, and where it looks
#
# Any [artifact](../docs/artifacts.md) that writes text does: a run, a step of one, a folder of
# Hugging Face (`hf:PATH`). Start it in the repository, with `pip install '.[notebooks]'`.
#
# Heads of the quickstart's four layers while they read what it wrote itself:
#
# ![Attention maps of the quickstart](../docs/images/attention_maps.png)

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from step_jax import (
    MeshConfig,
    PretrainConfig,
    SamplingConfig,
    Sharding,
    attention_weights,
    generate,
    load_artifact,
    load_config,
    pretrain,
)
from step_jax.evaluation.attention_probe import repeated_tokens, scores_N

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "configs").is_dir())

# %% tags=["parameters"]
RECIPE = ROOT / "configs/quickstart.yaml"
RUN = ROOT / "runs/quickstart"
PROMPT = "def "
TOKENS = 48
FLAGS = []

# %% [markdown]
# Train it if it is not there: about five minutes on two cores. Interrupt once and the run saves
# after its step, twice and it stops at once; run the cell again and it goes on.

# %%
if not (RUN / "checkpoints").exists():
    flags = ["--run.directory", RUN, *FLAGS]
    pretrain(load_config(PretrainConfig, [RECIPE, *flags]).config)

sharding = Sharding.build(MeshConfig(fsdp=-1))
artifact = load_artifact(str(RUN), sharding)
tokenizer, model = artifact.tokenizer, artifact.model

# %% [markdown]
# The same prompt at three temperatures, and how probable each token was to the model that wrote it.

# %%
prompt = tokenizer.encode_prompt(PROMPT)
texts = {}
for temperature in (0.0, 0.7, 1.0):
    written = generate(
        artifact.params,
        model,
        [prompt],
        SamplingConfig(max_new_tokens=TOKENS, temperature=temperature),
        max_length=artifact.context_of_text,
        stop_ids=tokenizer.stop_ids,
        execution=artifact.execution,
        sharding=sharding,
    )
    texts[temperature] = (written.tokens[0], written.logprobs[0])
    print(f"--- temperature {temperature}")
    print(PROMPT + tokenizer.decode_continuation(prompt, written.tokens[0]))

# %%
tokens, logprobs = texts[0.7]
pieces = [repr(tokenizer.decode([token])) for token in tokens]
table = pd.DataFrame({"token": pieces, "probability": np.exp(logprobs)})
table.head(20).style.bar(subset="probability", vmin=0, vmax=1).format({"probability": "{:.3f}"})

# %% [markdown]
# Where its heads look while the text is read: a row is a token, its columns the tokens before it
# that it takes from. Of each layer the first four heads.

# %%
text = [*prompt, *tokens][:32]
weights = attention_weights(artifact.params, model, np.array([text], np.int32), artifact.execution)
heads = min(4, min(layer.shape[1] for layer in weights))
figure, grid = plt.subplots(
    len(weights),
    heads,
    figsize=(2.4 * heads + 1, 2.4 * len(weights)),
    layout="constrained",
    squeeze=False,
)
for layer, row in enumerate(grid):
    for head, axes in enumerate(row):
        image = axes.imshow(weights[layer][0, head], vmin=0, vmax=1, cmap="magma")
        axes.set_title(f"layer {layer}, head {head}", fontsize=8)
        axes.set(xticks=[], yticks=[])
figure.colorbar(image, ax=grid, shrink=0.6, label="weight")
figure.supxlabel("token that is looked at", fontsize=9)
figure.supylabel("token that looks", fontsize=9)
plt.show()

# %% [markdown]
# One map with its tokens.

# %%
layer, head = len(weights) - 1, 0
figure, axes = plt.subplots(figsize=(7, 6.5), layout="constrained")
image = axes.imshow(weights[layer][0, head], vmin=0, cmap="magma")
names = [repr(tokenizer.decode([token]))[1:-1].replace(" ", "␣") for token in text]
axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
axes.set_yticks(range(len(names)), names, fontsize=7)
axes.set(xlabel="token that is looked at", ylabel="token that looks")
axes.set_title(f"layer {layer}, head {head}", loc="left", fontsize=10)
figure.colorbar(image, shrink=0.6, label="weight")
plt.show()

# %% [markdown]
# Heads that look one token back, and heads of induction, which look behind the last place where the
# same token stood: scores between 0 and 1 in a random text that comes twice ([arXiv
# 2209.11895](https://arxiv.org/abs/2209.11895)).

# %%
length = min(128, artifact.context_of_text) // 2 * 2
probe = repeated_tokens(model.vocab, length)
seen = attention_weights(artifact.params, model, probe, artifact.execution)
scores = [scores_N(layer) for layer in seen]
for name in scores[0]:
    by_head = pd.DataFrame([np.asarray(layer[name]) for layer in scores]).round(3)
    print(f"{name} (rows: layers, columns: heads)\n{by_head}\n")
