"""Makes the golden logits that tests/interop/test_hf.py compares with.

Command (needs `torch` and `transformers>=5`; no network, no accelerator, a few seconds):

    python tests/golden/make_hf_golden.py

Each `<name>.npz` holds one small decoder with random weights, run by `transformers` itself
(fp32, eager attention): its state dict under `state/<tensor name>`, `tokens` (2, 24) int32,
`logits` (2, 24, 128) float32 and `config`, the text of its config.json.

Weights are seeded and rounded to bfloat16-representable float32, which halves the file (the low
mantissa bytes compress away) and mirrors released checkpoints. They are scaled so that attention
is far from uniform and logits are of order one to ten, and norm weights are random: an exchanged
norm, a forgotten scale or a wrong rope convention then moves the logits by far more than 1e-4.

Rope conventions: Llama and Qwen3 rotate dimension i with i + d/2 ("half split"); DeepSeek-V3
rotates neighbours 2i, 2i+1 ("interleaved") unless `rope_interleave` is false.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
BATCH, LENGTH, VOCAB = 2, 24, 128

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
DEEPSEEK = {
    **COMMON,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 2,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-6,
}
MODELS = {
    "llama_gqa": (
        "llama",
        {
            **COMMON,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    # Heads wider than hidden_size / heads, as in the released Qwen3 models.
    "qwen3": (
        "qwen3",
        {
            **COMMON,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    # Tied embeddings, and a sliding window in the upper two of three layers.
    "qwen3_tied_window": (
        "qwen3",
        {
            **COMMON,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "q_lora_rank": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "deepseek_v3_no_q_lora_half_split": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "rope_interleave": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}


def random_weight(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Float32 weights representable in bfloat16, scaled by the tensor's role."""
    if len(shape) == 1:
        w = 1.0 + 0.3 * rng.standard_normal(shape)
    elif "embed_tokens" in name:
        w = 0.5 * rng.standard_normal(shape)
    else:  # Linear weights are (out, in).
        w = 1.5 / np.sqrt(shape[1]) * rng.standard_normal(shape)
    bits = w.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) & np.uint32(0xFFFF0000)).view(np.float32)


def make(name: str, model_type: str, options: dict, seed: int) -> None:
    """Writes `<name>.npz`: weights, tokens, logits and config of one model."""
    rng = np.random.default_rng(seed)
    config = AutoConfig.for_model(model_type, **options)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    tied = bool(config.tie_word_embeddings)
    # As in a saved checkpoint, a tied head is not a tensor of its own.
    state = {
        key: random_weight(key, tuple(value.shape), rng)
        for key, value in sorted(model.state_dict().items())
        if not (tied and key == "lm_head.weight")
    }
    loaded = model.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=False)
    assert set(loaded.missing_keys) <= {"lm_head.weight"} and not loaded.unexpected_keys
    model.tie_weights()

    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH), dtype=np.int32)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    arrays = {f"state/{key}": value for key, value in state.items()}
    config.architectures = [type(model).__name__]
    text = json.dumps(config.to_dict(), sort_keys=True)
    path = HERE / f"{name}.npz"
    np.savez_compressed(path, tokens=tokens, logits=logits, config=np.array(text), **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes, logits std {logits.std():.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for index, (name, (model_type, options)) in enumerate(MODELS.items()):
        make(name, model_type, options, seed=index)
