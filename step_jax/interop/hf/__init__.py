"""Weights and configurations in the Hugging Face layout.

Llama, Qwen3, Qwen3-MoE, DeepSeek-V3 (dense and MoE) and the language model of Step-3.5-Flash and
Step-3.7-Flash, in both directions.

``families.py`` says what the keys of a family's config.json mean, ``export.py`` the inverse,
``tensors.py`` which of its tensors is which of our parameters, ``folders.py`` reads and writes
checkpoints.
"""

from step_jax.interop.hf.export import config_to_hf
from step_jax.interop.hf.families import config_from_hf
from step_jax.interop.hf.folders import load_hf, save_hf
from step_jax.interop.hf.tensors import left_out, params_from_hf, params_to_hf

__all__ = [
    "config_from_hf",
    "config_to_hf",
    "left_out",
    "load_hf",
    "params_from_hf",
    "params_to_hf",
    "save_hf",
]
