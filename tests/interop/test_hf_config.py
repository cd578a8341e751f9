"""What is read from a config.json, and what is refused by its name."""

from __future__ import annotations

import pytest

from step_jax.core.errors import ConfigError
from step_jax.interop import hf
from step_jax.models.layers.positions import LinearScaling, RopeScaling, Yarn
from tests.golden import golden

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LINEAR = {"type": "linear", "factor": 2}


def rope_of(config):
    return config.layers[0].blocks[0].attention.position


# --- rotary embeddings ---------------------------------------------------------------------------


def spelled(old: dict | None = None, new: dict | None = None, theta: float | None = None) -> dict:
    """The keys of a Llama with ``rope_scaling``, ``rope_parameters`` and ``rope_theta``."""
    keys = golden.load("llama_gqa").config | {"rope_parameters": new, "rope_scaling": old}
    return keys if theta is None else keys | {"rope_theta": theta}


@pytest.mark.parametrize(
    "scaling, expected",
    [
        (YARN, Yarn(4.0, 16)),
        (LINEAR, LinearScaling(2.0)),
        (LLAMA3, RopeScaling(8.0, 16)),
        ({"type": "yarn", "factor": 4.0}, Yarn(4.0, 64)),  # of max_position_embeddings
    ],
)
def test_a_scaling_is_read_in_either_spelling_and_beside_a_plain_rotation(scaling, expected):
    plain = {"rope_type": "default", "rope_theta": 500.0}
    spellings = [
        spelled(old=scaling, theta=500.0),
        spelled(new=scaling | {"rope_theta": 500.0}),
        spelled(old=scaling, new=plain, theta=500.0),
        spelled(old=scaling | {"rope_theta": 500.0}, new=plain),
        spelled(old=scaling, new=scaling | {"rope_theta": 500.0}, theta=500.0),
    ]
    for keys in spellings:
        rope = rope_of(hf.config_from_hf(keys))
        assert (rope.theta, rope.scaling) == (500.0, expected)


@pytest.mark.parametrize(
    "keys, message",
    [
        (spelled(old=LINEAR, new={"rope_theta": 500.0}), "rope_theta in rope_parameters 500.0"),
        (spelled(new={"rope_theta": 500.0}, theta=1e4), "rope_theta 10000.0, and beside it 500.0"),
        (spelled(old=YARN, new=YARN | {"factor": 2.0}), "rope_parameters .*'factor': 2.0"),
        (spelled(old=YARN, new=LLAMA3), "rope_parameters .*'llama3'"),
        (spelled(old=YARN | {"type": "linear"}), "rope_type 'yarn' but type 'linear'"),
    ],
)
def test_spellings_that_disagree_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        hf.config_from_hf(keys)


@pytest.mark.parametrize(
    "scaling, message",
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "rope scaling 'dynamic' .only 'llama3', 'linear'",
        ),
        ({"rope_type": "longrope", "factor": 2.0}, "rope scaling 'longrope'"),
        ({"factor": 2.0}, "factor 2.0 .a key of no known meaning"),
        (YARN | {"finetuned": True}, "finetuned True"),
        (LLAMA3 | {"mscale_all_dim": 1.0}, "mscale_all_dim 1.0"),
        (YARN | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"full_attention": YARN}, "rope parameters that differ between layers"),
        ({"rope_type": "yarn"}, "rope_parameters, lacks 'factor'"),
        (YARN | {"factor": "4"}, "factor '4'; it must be a number of at least 0"),
        (YARN | {"factor": 0.5}, "a factor and a length of at least 1, not 0.5"),
        (YARN | {"beta_fast": 1, "beta_slow": 2}, "yarn needs 0 < slow < fast, not 2.0 and 1.0"),
        (YARN | {"truncate": "yes"}, "truncate 'yes'; it must be true or false"),
        (LLAMA3 | {"low_freq_factor": None}, "has no value for 'low_freq_factor'"),
        (YARN | {"rope_theta": 0}, "rope theta is 0.0"),
        (YARN | {"rope_type": 3}, "rope_type 3; it must be a text"),
    ],
)
def test_scalings_that_cannot_be_had_are_named(scaling, message):
    with pytest.raises(ConfigError, match=message):
        hf.config_from_hf(spelled(new=scaling))


# --- other keys ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("llama_gqa", {"is_causal": False}, "is_causal False"),
        ("llama_gqa", {"mscale_all_dim": 1.0}, "mscale_all_dim 1.0 .a key of no known meaning"),
        ("llama_gqa", {"original_max_position_embeddings": 16}, "original_max_position_embeddings"),
        ("llama_gqa", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ("llama_gqa", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("llama_gqa", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ("qwen3", {"layer_types": ["linear_attention"] * 2}, "layer_types"),
        ("qwen3_tied_window", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention' in"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 16}, "shared_expert_intermediate_size"),
        ("qwen3_moe", {"num_experts": 4}, "num_experts 4 but num_local_experts 8"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads 2 .only 4"),
        ("deepseek_v3", {"index_topk": 2048}, "index_topk 2048"),
        ("deepseek_v3_moe", {"n_routed_experts": None}, "lacks|no value for 'n_routed_experts'"),
        ("step3p7", {"text_config": [1]}, "text_config .1.; it must be a table of keys"),
    ],
)
def test_keys_that_change_the_function_are_refused(name, change, message):
    with pytest.raises(ConfigError, match=message):
        hf.config_from_hf(golden.load(name).config | change)


def test_keys_without_effect_and_empty_ones_are_passed_over():
    g = golden.load("llama_gqa").config
    more = {"torch_dtype": "float16", "temperature": 0.6, "auto_map": {}, "some_new_key": None}
    assert hf.config_from_hf(g | more) == hf.config_from_hf(g)


@pytest.mark.parametrize("value", [None, -4, 0, "64", 64.5, True, [64], {}])
@pytest.mark.parametrize(
    "key", ["hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"]
)
def test_sizes_of_the_wrong_kind_are_one_clear_error(key, value):
    with pytest.raises(ConfigError, match=f"(has {key} .*; it must be|no value for '{key}')"):
        hf.config_from_hf(golden.load("llama_gqa").config | {key: value})


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("llama_gqa", {"rms_norm_eps": "1e-5"}, "rms_norm_eps '1e-5'; it must be a number"),
        ("llama_gqa", {"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
        ("llama_gqa", {"rope_parameters": []}, r"rope_parameters \[\]; it must be a table"),
        ("llama_gqa", {"tie_word_embeddings": "no"}, "tie_word_embeddings 'no'; it must be true"),
        ("llama_gqa", {"model_type": None}, "architecture None"),
        ("llama_gqa", {"model_type": ["llama"]}, "architecture ..llama"),
        ("llama_gqa", {"num_attention_heads": 3, "head_dim": None}, "heads 3 does not divide"),
        ("llama_gqa", {"num_key_value_heads": 3}, "kv_heads 3 does not divide heads 4"),
        ("llama_gqa", {"vocab_size": -1}, "vocab_size -1"),
        ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers"),
        ("qwen3_tied_window", {"sliding_window": None}, "no value for 'sliding_window'"),
        ("qwen3_tied_window", {"layer_types": [None, 3, 4]}, "has 3 in layer_types"),
        ("deepseek_v3_moe", {"n_group": 2}, "groups 2 does not divide 9 experts"),
        ("deepseek_v3_moe", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers -1"),
        ("deepseek_v3", {"rope_interleave": 1}, "rope_interleave 1"),
    ],
)
def test_odd_values_are_one_clear_error(name, change, message):
    with pytest.raises(ConfigError, match=message):
        hf.config_from_hf(golden.load(name).config | change)


def test_every_required_key_is_named_when_it_is_missing():
    for name in ("llama_gqa", "qwen3", "qwen3_moe", "deepseek_v3_moe"):
        whole = golden.load(name).config
        for key in whole:
            rest = {k: v for k, v in whole.items() if k != key}
            try:
                hf.config_from_hf(rest)
            except ConfigError as e:
                assert repr(key) in str(e) or key == "model_type", (name, key, str(e))


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "llama_gqa",
            {"model_type": "gpt2"},
            "'gpt2'; there are: llama, qwen2, qwen3, qwen3_moe, deepseek_v3, step3p5, step3p7",
        ),
        ("llama_gqa", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama_gqa", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama_gqa", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (
            "qwen3_tied_window",
            {"layer_types": ["full_attention"]},
            "layer_types names 1 layers, num_hidden_layers is 3",
        ),
        ("qwen3", {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "fmt 'e5m2'"),
        ("deepseek_v3_moe", {"topk_method": "greedy"}, "topk_method 'greedy' .only 'noaux_tc'"),
        ("deepseek_v3_moe", {"num_experts_per_tok": 10}, "top_k is 10, but there are 9 experts"),
    ],
)
def test_unsupported_features_are_named(name, change, message):
    with pytest.raises(ConfigError, match=message):
        hf.config_from_hf(golden.load(name).config | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm_expert_weight": False}, "norm_expert_weight False"),
        ({"moe_router_activation": "softmax"}, "moe_router_activation 'softmax'"),
        ({"query_pre_attn_scalar": 4}, "query_pre_attn_scalar 4"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ({"layer_types": ["linear_attention"] * 4}, "'linear_attention' in layer_types"),
        ({"use_rope_layers": [True, False, True, True]}, "layers without rope"),
        ({"sink": True}, "sink True"),
        ({"moe_layers_enum": "1,x"}, "'x' in moe_layers_enum"),
        ({"moe_top_k": 4, "num_experts_per_tok": 3}, "num_experts_per_tok 3 but moe_top_k 4"),
        ({"swiglu_limits": [0.0, "7"]}, "swiglu_limits names 2 layers"),
        ({"swiglu_limits": [0.0, "7", 0, 0]}, "has '7' in swiglu_limits"),
        ({"attention_other_setting": {"head_dim": 4}}, "head_dim 4 .only 8"),
        ({"rope_scaling": {"rope_type": "su"}}, "rope scaling 'su'"),
        ({"rope_parameters": {"full_attention": {}}}, "lacks 'sliding_attention'"),
    ],
)
def test_unsupported_features_of_step_are_named(change, message):
    config = golden.load("step3p7").released_config
    config["text_config"] |= change
    with pytest.raises(ConfigError, match=message):
        hf.config_from_hf(config)
    config["text_config"] = golden.load("step3p7").released_config["text_config"]
    config["quantization_config"] = {"quant_method": "awq"}
    with pytest.raises(ConfigError, match="quantization_config"):
        hf.config_from_hf(config)


def test_a_missing_key_is_named():
    config = golden.load("llama_gqa").config
    del config["intermediate_size"]
    with pytest.raises(ConfigError, match="lacks 'intermediate_size'"):
        hf.config_from_hf(config)


def test_transformers_4_rope_keys():
    """rope_theta at the top level, rope_scaling null."""
    config = golden.load("llama_gqa").config
    theta = config.pop("rope_parameters")["rope_theta"]
    old = config | {"rope_theta": theta, "rope_scaling": None}
    assert hf.config_from_hf(old) == hf.config_from_hf(golden.load("llama_gqa").config)
