"""Hugging Face import and export against golden logits of `transformers` 5."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from step_jax.core.config import load_file
from step_jax.core.errors import CheckpointError, ConfigError
from step_jax.core.spec import map_specs
from step_jax.interop import hf
from step_jax.models.context import Context, Execution
from step_jax.models.layers.attention import MFA
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Alibi
from step_jax.models.text.decoder import Block, Group
from step_jax.models.tokens import Tokens
from step_jax.trainers.pretrain import PretrainConfig
from tests.golden import golden

safetensors = pytest.importorskip("safetensors.numpy")


def logits(config, params, tokens_BT):
    def f(params, tokens_BT):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        ctx = Context(Tokens(positions_BT), execution=Execution(dtype="float32"))
        x_BTD, *_ = config.hidden(params, tokens_BT, ctx)
        return config.logits(params, x_BTD, ctx)

    # These models run once: the compiler's time is most of the test's.
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return np.asarray(jax.jit(f, compiler_options=fast)(params, tokens_BT))


def interleaved(g: golden.Golden) -> bool:
    return g.config.get("rope_interleave", True)


def load(name: str):
    g = golden.load(name)
    config = hf.config_from_hf(g.config)
    params = hf.params_from_hf(
        g.state, config, rope_interleave=interleaved(g), ignored=hf.left_out(g.config)
    )
    return g, config, params


def decoder_tensors(g: golden.Golden) -> set[str]:
    return {k for k in g.state if not hf.left_out(g.config).match(k)}


@pytest.mark.parametrize("name", golden.NAMES)
def test_logits_equal_transformers_and_export_inverts_import(name):
    g, config, params = load(name)
    difference = np.abs(logits(config, params, g.tokens_BT) - g.logits_BTV)
    assert difference.max() < 3e-6 * np.abs(g.logits_BTV).max()

    back = hf.params_to_hf(params, config, rope_interleave=interleaved(g))
    assert back.keys() == decoder_tensors(g)
    for key, value in back.items():
        assert value.dtype == g.state[key].dtype
        np.testing.assert_array_equal(value, g.state[key])


@pytest.mark.parametrize("name", golden.NAMES)
def test_configuration_survives_the_round_trip(name):
    g, config, _ = load(name)
    written = hf.config_to_hf(config)
    assert hf.config_from_hf(written) == config
    if name == "step3p7":  # written as the decoder alone, in the released files' keys
        theirs = {"hidden_act": "silu", "attention_bias": False, **g.released_config["text_config"]}
        depth = config.trunk.depth
        theirs = {k: v[:depth] if isinstance(v, list) else v for k, v in theirs.items()}
        allowed = {"model_type", "architectures", "num_nextn_predict_layers"}
    else:
        # How a file orders rotated coordinates is no part of the model; that every second layer
        # is dense can be said in two ways.
        theirs = g.config
        allowed = {"rope_interleave", "decoder_sparse_step", "mlp_only_layers"}
    differing = {k for k, v in written.items() if theirs.get(k, "absent") != v}
    assert differing <= allowed


def test_released_and_rewritten_keys_of_step_mean_the_same():
    g, config, _ = load("step3p7")
    assert hf.config_from_hf(g.released_config) == config
    flat = g.released_config["text_config"] | {"model_type": "step3p5"}
    assert hf.config_from_hf(flat) == config


def test_the_recipe_of_step_35_flash_has_the_released_keys():
    recipe = Path(__file__).parents[2] / "configs/step35_flash_196b.yaml"
    model = replace(load_file(PretrainConfig, recipe).model, mtp=None)
    keys = hf.config_to_hf(model)
    assert keys["layer_types"] == (["full_attention"] + ["sliding_attention"] * 3) * 11 + [
        "full_attention"
    ]
    assert keys["num_attention_heads"] == 64
    assert keys["attention_other_setting"]["num_attention_heads"] == 96
    assert (keys["moe_num_experts"], keys["moe_top_k"], keys["share_expert_dim"]) == (288, 8, 1280)
    assert keys["moe_layers_enum"] == ",".join(str(i) for i in range(3, 45))
    assert keys["swiglu_limits"] == [0.0] * 43 + [7.0] * 2
    assert keys["swiglu_limits_shared"] == [0.0] * 43 + [16.0] * 2


def mixture(config, **changes):
    """``config`` with other values in its mixtures of experts or their routers."""

    def block(b):
        if not isinstance(b.mlp, MoE):
            return b
        router = {k: v for k, v in changes.items() if hasattr(b.mlp.router, k)}
        rest = {k: v for k, v in changes.items() if k not in router}
        return replace(b, mlp=replace(b.mlp, router=replace(b.mlp.router, **router), **rest))

    groups = (replace(g, blocks=tuple(map(block, g.blocks))) for g in config.layers)
    return replace(config, layers=tuple(groups))


@pytest.mark.parametrize(
    "name, changes",
    [
        ("qwen3_moe", {"normalise": False}),
        ("deepseek_v3_moe", {"groups": 1, "top_groups": 1}),
        ("step3p7", {"clamp": None}),
        ("step3p7", {"shared_clamp": None}),
    ],
)
def test_goldens_can_tell_another_mixture(name, changes):
    g, config, params = load(name)
    wrong = logits(mixture(config, **changes), params, g.tokens_BT)
    assert np.abs(wrong - g.logits_BTV).max() > 0.01


@pytest.mark.parametrize("name", ["deepseek_v3_moe", "step3p7"])
def test_goldens_can_tell_a_forgotten_selection_bias(name):
    g, config, params = load(name)
    state = hf.params_to_hf(params, config)
    for key in state:
        if key.endswith(("router_bias", "e_score_correction_bias")):
            state[key] = np.zeros_like(state[key])
    wrong = logits(config, hf.params_from_hf(state, config), g.tokens_BT)
    assert np.abs(wrong - g.logits_BTV).max() > 0.1


def test_goldens_can_tell_forgotten_rope_scaling():
    g, config, params = load("step3p7")
    text = g.config["text_config"]
    rope = text["rope_parameters"]
    plain = {"rope_theta": 500.0, "partial_rotary_factor": 0.5}
    other = hf.config_from_hf(
        {"model_type": "step3p5", **text, "rope_parameters": rope | {"full_attention": plain}}
    )
    assert np.abs(logits(other, params, g.tokens_BT) - g.logits_BTV).max() > 0.01


def test_goldens_can_tell_a_wrong_rope_convention():
    g, config, _ = load("deepseek_v3")
    wrong = hf.params_from_hf(g.state, config, rope_interleave=False)
    assert np.abs(logits(config, wrong, g.tokens_BT) - g.logits_BTV).max() > 0.1


def test_layers_of_several_blocks_are_numbered_in_turn():
    """Two window-full turns as one group give the logits of the four layers as written."""
    g, config, _ = load("qwen3")
    block = config.layers[0].blocks[0]
    short = replace(block, attention=replace(block.attention, window=3))
    turns = replace(config, layers=(Group(2, (short, block)),))
    rows = replace(config, layers=tuple(Group(1, (b,)) for b in (short, block, short, block)))
    rng = np.random.default_rng(0)
    params = map_specs(lambda s: 0.2 * rng.standard_normal(s.shape, np.float32), turns.specs())
    state = hf.params_to_hf(params, turns)
    one = logits(turns, hf.params_from_hf(state, turns), g.tokens_BT)
    four = logits(rows, hf.params_from_hf(state, rows), g.tokens_BT)
    assert np.abs(one).max() > 0.1
    np.testing.assert_allclose(one, four, rtol=1e-5, atol=1e-5)


# --- folders -------------------------------------------------------------------------------------


def write_folder(path, g: golden.Golden, shards: int = 1) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(g.config))
    names = sorted(g.state)
    if shards == 1:
        safetensors.save_file(g.state, path / "model.safetensors")
        return
    weight_map = {n: f"model-{i % shards + 1:05d}.safetensors" for i, n in enumerate(names)}
    for file in set(weight_map.values()):
        part = {n: g.state[n] for n in names if weight_map[n] == file}
        safetensors.save_file(part, path / file)
    # What an index does not name is not read.
    safetensors.save_file({"other": np.zeros(2)}, path / "consolidated.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    ["qwen3_tied_window", "deepseek_v3_no_q_lora_half_split", "deepseek_v3_moe", "step3p7"],
)
def test_load_and_save_folders(tmp_path, name):
    g, config, params = load(name)
    write_folder(tmp_path / "in", g, shards=2)
    loaded_config, loaded = hf.load_hf(tmp_path / "in")
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

    # The golden weights are representable in bfloat16, so nothing is lost.
    hf.save_hf(tmp_path / "out", loaded, config)
    saved = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    exact = {k for k, v in saved.items() if v.dtype == np.float32}
    assert exact == {k for k in saved if re.search(r"(mlp|moe)\.(gate\.|router_bias)", k)}
    assert {saved[k].dtype for k in saved.keys() - exact} == {np.dtype(ml_dtypes.bfloat16)}
    again_config, again = hf.load_hf(tmp_path / "out")
    assert again_config == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(FileExistsError, match="not empty"):
        hf.save_hf(tmp_path / "out", loaded, config)


def test_incomplete_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        hf.load_hf(tmp_path)
    g = golden.load("llama_gqa")
    write_folder(tmp_path / "in", g, shards=2)
    (tmp_path / "in" / "model-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002\.safetensors"):
        hf.load_hf(tmp_path / "in")


# --- errors --------------------------------------------------------------------------------------


def test_every_ill_fitting_tensor_is_named():
    g, config, _ = load("llama_gqa")
    state = dict(g.state)
    del state["model.norm.weight"]
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.2.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
    state["lm_head.weight"] = state["lm_head.weight"][:-1]
    with pytest.raises(CheckpointError) as e:
        hf.params_from_hf(state, config)
    for part in (
        "missing model.norm.weight (64,)",
        "missing model.layers.1.mlp.up_proj.weight (96, 64)",
        "unused model.layers.2.mlp.up_proj.weight (3, 4)",
        "lm_head.weight has shape (127, 64), expected (128, 64)",
    ):
        assert part in str(e.value)


def test_a_tied_head_may_be_saved_but_only_as_the_embedding():
    g, config, params = load("qwen3_tied_window")
    head = g.state["model.embed_tokens.weight"]
    old = g.state | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    same = hf.params_from_hf(old | {"lm_head.weight": head}, config)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    with pytest.raises(CheckpointError, match=r"unused lm_head\.weight"):
        hf.params_from_hf(old | {"lm_head.weight": head + 1}, config)


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "llama_gqa",
            {"model_type": "gpt2"},
            "'gpt2'; there are: llama, qwen3, qwen3_moe, deepseek_v3, step3p5, step3p7",
        ),
        ("llama_gqa", {"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn'"),
        (
            "llama_gqa",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope scaling 'linear'",
        ),
        ("llama_gqa", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama_gqa", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama_gqa", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (
            "qwen3_tied_window",
            {"layer_types": ["full_attention"]},
            "layer_types names 1 layers, num_hidden_layers is 3",
        ),
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
        ({"layer_types": ["linear_attention"] * 4}, "attention 'linear_attention'"),
        ({"use_rope_layers": [True, False, True, True]}, "layers without rope"),
        ({"attention_other_setting": {"head_dim": 4}}, "windowed layers with head_dim 4"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope scaling 'yarn'"),
    ],
)
def test_unsupported_features_of_step_are_named(change, message):
    config = golden.load("step3p7").released_config
    config["text_config"] |= change
    with pytest.raises(ConfigError, match=message):
        hf.config_from_hf(config)
    config["text_config"] = golden.load("step3p7").released_config["text_config"]
    config["quantization_config"] = {"quant_method": "fp8"}
    with pytest.raises(ConfigError, match="quantization_config"):
        hf.config_from_hf(config)


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("qwen3_moe", r"model\.layers\.1\.mlp\.gate\.weight"),
        ("step3p7", r"model\.layers\.1\.moe\.gate\.weight"),
    ],
)
def test_another_number_of_experts_is_refused(name, tensor):
    g, config, _ = load(name)
    four = mixture(config, experts=(Experts(4, config.layers[-1].blocks[0].mlp.experts[0].hidden),))
    with pytest.raises(CheckpointError, match=rf"has 8 experts \({tensor}\), the model 4"):
        hf.params_from_hf(g.state, four)


def test_layers_of_multi_token_prediction_are_left_out_if_announced():
    g, config, params = load("deepseek_v3_moe")
    more = g.state | {"model.layers.3.eh_proj.weight": np.zeros((2, 2), np.float32)}
    announced = hf.left_out(g.config | {"num_nextn_predict_layers": 1})
    same = hf.params_from_hf(more, config, ignored=announced)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    with pytest.raises(CheckpointError, match=r"unused model\.layers\.3\.eh_proj"):
        hf.params_from_hf(more, config, ignored=hf.left_out(g.config))


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


def test_what_cannot_be_exported_is_named():
    _, config, _ = load("llama_gqa")
    block = config.layers[0].blocks[0]

    def export(**changes):
        b = replace(block, **changes)
        return hf.config_to_hf(replace(config, layers=(Group(1, (block,)), Group(1, (b,)))))

    gate = replace(block.attention, output_gate=True)
    with pytest.raises(ConfigError, match=r"layer 1\.attention\.output_gate is True"):
        export(attention=gate)
    with pytest.raises(ConfigError, match=r"layer 1\.mlp\.clamp is 7\.0"):
        export(mlp=SwiGLU(hidden=96, clamp=7.0))
    with pytest.raises(ConfigError, match=r"layer 1\.attention\.window is 5"):
        export(attention=replace(block.attention, window=5))
    with pytest.raises(ConfigError, match=r"layer 1\.attention\.position is Alibi"):
        export(attention=replace(block.attention, position=Alibi()))
    with pytest.raises(ConfigError, match=r"model\.norm\.zero_centred is True"):
        hf.config_to_hf(replace(config, norm=RMSNorm(zero_centred=True)))
    mfa = replace(config, layers=(Group(1, (Block(MFA(heads=2, head_dim=8), block.mlp),)),))
    with pytest.raises(ConfigError, match="MFA attention: cannot export"):
        hf.config_to_hf(mfa)
    gated = replace(config, layers=(Group(1, (replace(block, attention=gate),)),))
    with pytest.raises(ConfigError, match="no Hugging Face tensor for .*gate_DN"):
        hf.params_to_hf(map_specs(lambda s: np.zeros(s.shape), gated.specs()), gated)


def test_mixtures_that_cannot_be_exported_are_named():
    _, config, _ = load("qwen3_moe")
    cases = [
        ({"scale": 2.0}, r"layer 1\.mlp\.router\.scale is 2\.0"),
        ({"shared": 8}, r"layer 1\.mlp\.shared is 8"),
        ({"common": 8}, r"layer 1\.mlp\.common is 8"),
        ({"experts": (Experts(4, 16), Experts(4, 8))}, r"layer 1\.mlp\.experts is"),
    ]
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            hf.config_to_hf(mixture(config, **changes))
    # what only training knows is not the model's
    trained = mixture(config, balance_loss=0.01, z_loss=1e-3, exchange="gather", capacity=2.0)
    assert hf.config_to_hf(trained) == hf.config_to_hf(config)
    unlike = mixture(config, experts=(Experts(4, 16), Experts(4, 8)))
    with pytest.raises(ConfigError, match="no Hugging Face tensor for .*mlp/experts/1/down_EFD"):
        hf.params_to_hf(map_specs(lambda s: np.zeros(s.shape), unlike.specs()), unlike)
