"""Makes the golden logits that tests/interop/test_hf.py compares with.

Command (needs `torch` and `transformers>=5`; no network, no accelerator, a few seconds):

    python tests/golden/make_hf_golden.py [NAME ...]

Each `<name>.npz` holds one small decoder with random weights, run by `transformers` itself
(fp32, eager attention): its tensors as `save_pretrained` writes them under `state/<tensor name>`,
`tokens` (2, 24) int32, `logits` (2, 24, 128) float32 and `config`, the text of the config.json
that `save_pretrained` writes.

Weights are seeded and rounded to bfloat16-representable float32, which halves the file (the low
mantissa bytes compress away) and mirrors released checkpoints. They are scaled so that attention
is far from uniform and logits are of order one to ten, and norm weights are random: an exchanged
norm, a forgotten scale or a wrong rope convention then moves the logits by far more than 1e-4.
Selection biases are as wide as the scores, so that they change who is chosen.

Rope conventions: Llama and Qwen3 rotate dimension i with i + d/2 ("half split"); DeepSeek-V3
rotates neighbours 2i, 2i+1 ("interleaved") unless `rope_interleave` is false.

Experts: `save_pretrained` writes one tensor per expert for Qwen3-MoE and DeepSeek-V3 and one
three-dimensional tensor for all experts of a layer of Step-3.5/3.7-Flash, as released checkpoints
do, whatever the modules hold in memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

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
MOE = {**COMMON, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
QWEN3_MOE = {
    **MOE,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
# In the keys of the released Step-3.5-Flash: two layers of either attention, per-layer lists that
# end with the layer of multi-token prediction, limits that bind in the upper two layers.
STEP35 = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_attention_groups": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"]
    + ["sliding_attention"],
    "sliding_window": 7,
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "num_attention_heads": 6,
        "num_attention_groups": 2,
        "head_dim": 8,
    },
    "use_head_wise_attn_gate": True,
    "rope_theta": [500.0, 100.0, 100.0, 500.0, 100.0],
    "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5, 1.0],
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 2.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 32.0,
    },
    "yarn_only_types": ["full_attention"],
    "moe_layers_enum": "1,2,3",
    "moe_num_experts": 8,
    "moe_top_k": 3,
    "moe_intermediate_size": 14,
    "share_expert_dim": 20,
    "moe_router_activation": "sigmoid",
    "use_moe_router_bias": True,
    "moe_router_scaling_factor": 3.0,
    "norm_expert_weight": True,
    "need_fp32_gate": True,
    "swiglu_limits": [0.0, 0.0, 0.7, 0.9, 0.0],
    "swiglu_limits_shared": [1.1, 0.0, 0.6, 0.0, 0.0],
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
}
SMALL = {**COMMON, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 16}
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
    "qwen3_moe": ("qwen3_moe", {**QWEN3_MOE, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    # Weights of the chosen as they are, every second layer dense, windows.
    "qwen3_moe_raw_window": (
        "qwen3_moe",
        {
            **QWEN3_MOE,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
    "deepseek_v3_moe": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            **MOE,
            "num_hidden_layers": 3,
            "q_lora_rank": 16,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 12,
            "n_routed_experts": 9,
            "num_experts_per_tok": 3,
            "n_group": 3,
            "topk_group": 2,
            "n_shared_experts": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    # The library has this decoder as a part of the model that also sees; its tower is minimal.
    "step3p7": (
        "step3p7",
        {
            "text_config": STEP35,
            "vision_config": {
                "width": 4,
                "layers": 1,
                "heads": 1,
                "image_size": 16,
                "patch_size": 4,
                "mlp_ratio": 1.0,
                "max_position_embeddings": 16,
            },
        },
    ),
    # Biases on queries, keys and values, tied, a window in the upper of two layers.
    "qwen2": (
        "qwen2",
        {
            **SMALL,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "llama_linear": (
        "llama",
        {
            **SMALL,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
        },
    ),
    # As Qwen writes it: the factor on queries and keys is the paper's.
    "llama_yarn": (
        "llama",
        {**SMALL, "rope_parameters": {"rope_theta": 500.0, **YARN, "factor": 4.0}},
    ),
    "llama_yarn_attention_factor": (
        "llama",
        {
            **SMALL,
            "rope_parameters": {
                "rope_theta": 500.0,
                **YARN,
                "factor": 2.0,
                "attention_factor": 0.7,
                "truncate": False,
                "beta_fast": 1.2,
                "beta_slow": 0.5,
            },
        },
    ),  # fmt: skip
    # Both of DeepSeek's factors, unlike so that each is seen: on what is rotated and on scores.
    "deepseek_v3_yarn": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            **SMALL,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "rope_parameters": {
                "rope_theta": 1e4,
                **YARN,
                "factor": 40.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "beta_fast": 6.0,
            },
        },
    ),  # fmt: skip
}


def random_weight(
    name: str, shape: tuple[int, ...], rng: np.random.Generator, zero_centred: bool
) -> np.ndarray:
    """Float32 weights representable in bfloat16, scaled by the tensor's role."""
    if "e_score_correction_bias" in name or name.endswith("proj.bias"):
        w = 0.3 * rng.standard_normal(shape)
    elif len(shape) == 1:
        w = (0.0 if zero_centred else 1.0) + 0.3 * rng.standard_normal(shape)
    elif "embed_tokens" in name:
        w = 0.5 * rng.standard_normal(shape)
    else:  # Linear weights are (out, in), those of experts (expert, out, in).
        w = 1.5 / np.sqrt(shape[-1]) * rng.standard_normal(shape)
    bits = w.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) & np.uint32(0xFFFF0000)).view(np.float32)


def randomise(model, rng: np.random.Generator, zero_centred: bool) -> None:
    """Fills every parameter and persistent buffer that is floating point."""
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    state = {
        key: torch.from_numpy(random_weight(key, tuple(value.shape), rng, zero_centred))
        for key, value in sorted(model.state_dict().items())
        if not (tied and key == "lm_head.weight") and value.is_floating_point()
    }
    loaded = model.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    model.tie_weights()


def make(name: str, model_type: str, options: dict, seed: int) -> None:
    """Writes `<name>.npz`: tensors, tokens, logits and config of one model."""
    rng = np.random.default_rng(seed)
    sees = "vision_config" in options
    model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(
        AutoConfig.for_model(model_type, **options), attn_implementation="eager"
    )
    model = model.float().eval()
    randomise(model, rng, zero_centred=model_type == "step3p7")

    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH), dtype=np.int32)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        state = load_file(Path(folder) / "model.safetensors")
        text = json.dumps(json.loads((Path(folder) / "config.json").read_text()), sort_keys=True)
    arrays = {f"state/{key}": value for key, value in state.items()}
    if sees:  # the form of the released config.json, of which the library writes another
        arrays["released_config"] = np.array(json.dumps({"model_type": model_type, **options}))
    path = HERE / f"{name}.npz"
    np.savez_compressed(path, tokens=tokens, logits=logits, config=np.array(text), **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes, logits std {logits.std():.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for index, (name, (model_type, options)) in enumerate(MODELS.items()):
        if len(sys.argv) == 1 or name in sys.argv[1:]:
            make(name, model_type, options, seed=index)
