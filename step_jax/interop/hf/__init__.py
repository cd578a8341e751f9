"""Weights and configurations in the Hugging Face layout.

Llama, Qwen2 and Qwen2.5, Qwen3, Qwen3-MoE, DeepSeek-V3 (dense and MoE) and the language model of
Step-3.5-Flash and Step-3.7-Flash, in both directions; and the released layouts of Step-Video's
transformer (``step_video.py``) and autoencoder (``step_video_vae.py``).

``keys.py`` reads a config.json, ``families.py`` says what the keys of a family mean (``rope.py``:
those of rotary embeddings), ``export.py`` the inverse. ``tensors.py`` says which tensor is which of
our parameters; ``files.py`` reads a folder, ``fp8.py`` weights of eight bits, ``load.py`` brings
tensors to devices and ``save.py`` back into a folder.
"""

from step_jax.interop.hf.export import config_to_hf
from step_jax.interop.hf.families import config_from_hf
from step_jax.interop.hf.load import load_hf, params_from_hf
from step_jax.interop.hf.save import Exported, params_to_hf, save_hf
from step_jax.interop.hf.step_video import load_transformer, save_transformer
from step_jax.interop.hf.step_video_vae import load_vae, save_vae
from step_jax.interop.hf.tensors import left_out

__all__ = [
    "Exported",
    "config_from_hf",
    "config_to_hf",
    "left_out",
    "load_hf",
    "load_transformer",
    "load_vae",
    "params_from_hf",
    "params_to_hf",
    "save_hf",
    "save_transformer",
    "save_vae",
]
