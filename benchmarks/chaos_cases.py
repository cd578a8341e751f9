"""What ``chaos.py`` disturbs: every loop with a model of nothing, as one to three processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_DECODER = """
model:
  width: 16
  layers:
    - repeat: 2
      blocks:
        - attention: {kind: mfa, heads: 2, head_dim: 8}
          mlp: {kind: swiglu, hidden: 32}
"""
_COMMON = """
run: {checkpoint: {every_steps: 6, keep: 3}, logging: {sinks: []}}
optimizer: {kind: adamw, learning_rate: 1e-2, schedule: {kind: constant}}
"""
#: loop -> recipe: models of nothing, in loops that do all they ever do
RECIPES = {
    "pretrain": _DECODER
    + _COMMON
    + """
training: {steps: 60, batch_size: 6}
data: {path: {package}/core, vocab_size: 512, sequence_length: 32, cache_dir: {cache}}
evaluation: {every_steps: 20, tokens: 500}
sample: {tokens: 0}
execution: {dtype: float32}
""",
    "rl": _DECODER
    + _COMMON
    + """
tokenizer: {tokenizer}
training: {steps: 36, prompts: 6, samples: 4}
rollout: {max_new_tokens: 6, max_prompt_tokens: 6, slots: 6, lag: 1, token_budget: 40}
problems:
  task: {kind: addition, digits: [1, 1]}
  verifier: {kind: format, thinking: {open: '', close: '#'}}
evaluation: {every_steps: 18, problems: 6, samples: 1}
execution: {dtype: float32, loss_chunks: 1}
""",
    "diffusion": """
model:
  width: 16
  depth: 2
  channels: 3
  patch: [1, 4, 4]
  attention: {kind: mha, heads: 2, head_dim: 8, position: {kind: rope, axes: [4, 2, 2]}}
  mlp: {kind: gelu, hidden: 32}
  text:
    - kind: tower
      name: clip
      tokens: 4
      vocab: 320
      width: 16
      depth: 1
      attention: {kind: mha, heads: 2, head_dim: 8}
      mlp: {kind: gelu, hidden: 16}
training: {steps: 60, batch_size: 12}
data:
  kind: scenes
  clips: 60
  families: [{frames: 1, height: 12, width: 12, count: 1, background: plain}]
sample: {count: 0}
execution: {dtype: float32}
"""
    + _COMMON,
}


@dataclass(frozen=True)
class Case:
    """What is disturbed. ``command`` has ``{run_dir}`` in it; each process runs it."""

    name: str
    command: tuple[str, ...]
    processes: int = 1


def loops(work: Path) -> Iterator[Case]:
    """The cases of the soak, with all that their recipes name."""
    import step_jax
    from step_jax.tokenizers.huggingface import character_tokenizer

    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(work / "programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PLATFORMS"] = "cpu"
    if not (work / "tokenizer").exists():
        (work / "tokenizer").mkdir(parents=True)
        character_tokenizer("0123456789+=#;,", "<end>").save(work / "tokenizer")
    places = {
        "package": str(Path(step_jax.__file__).parent),
        "cache": str(work / "cache"),
        "tokenizer": str(work / "tokenizer"),
    }
    for processes in (1, 2, 3):
        for loop, recipe in RECIPES.items():
            for name, value in places.items():
                recipe = recipe.replace(f"{{{name}}}", value)
            path = work / f"{loop}-{processes}.yaml"
            path.write_text(recipe)
            words = [sys.executable, "-m", "step_jax", loop, str(path)]
            words += ["--run.directory", "{run_dir}", "--parallel.data", str(processes)]
            yield Case(f"{loop}-{processes}", tuple(words), processes)
