"""Reads the golden files of make_hf_golden.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DENSE = (
    "llama_gqa",
    "qwen3",
    "qwen3_tied_window",
    "deepseek_v3",
    "deepseek_v3_no_q_lora_half_split",
)
NAMES = (
    *DENSE,
    "qwen3_moe",
    "qwen3_moe_raw_window",
    "deepseek_v3_moe",
    "step3p7",
    "qwen2",
    "llama_linear",
    "llama_yarn",
    "llama_yarn_attention_factor",
    "deepseek_v3_yarn",
)


@dataclass(frozen=True)
class Golden:
    config: dict  # config.json
    state: dict[str, np.ndarray]  # tensor name -> float32
    tokens_BT: np.ndarray  # int32
    logits_BTV: np.ndarray  # float32
    released_config: dict | None = None  # in the released checkpoint's keys


def load(name: str) -> Golden:
    """The golden file of that name."""
    with np.load(Path(__file__).parent / f"{name}.npz") as file:
        prefix = "state/"
        state = {k.removeprefix(prefix): file[k] for k in file if k.startswith(prefix)}
        texts = [json.loads(str(file[k])) for k in ("config", "released_config") if k in file]
        return Golden(texts[0], state, file["tokens"], file["logits"], *texts[1:])
