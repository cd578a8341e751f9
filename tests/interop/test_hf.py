"""Hugging Face import and export against golden logits of `transformers` 5."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from step_jax.core.errors import CheckpointError, ConfigError
from step_jax.core.spec import map_specs
from step_jax.interop import hf
from step_jax.models.attention import MFA
from step_jax.models.context import Context, Execution
from step_jax.models.decoder import Block, Group
from step_jax.models.layers import RMSNorm, SwiGLU
from step_jax.models.positions import Alibi
from tests.golden import golden

safetensors = pytest.importorskip("safetensors.numpy")


def logits(config, params, tokens_BT):
    def f(params, tokens_BT):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        ctx = Context(positions_BT, execution=Execution(dtype="float32"))
        x_BTD, *_ = config.hidden(params, tokens_BT, ctx)
        return config.logits(params, x_BTD, ctx)

    return np.asarray(jax.jit(f)(params, tokens_BT))


def interleaved(g: golden.Golden) -> bool:
    return g.config.get("rope_interleave", True)


def load(name: str):
    g = golden.load(name)
    config = hf.config_from_hf(g.config)
    return g, config, hf.params_from_hf(g.state, config, rope_interleave=interleaved(g))


@pytest.mark.parametrize("name", golden.NAMES)
def test_logits_equal_transformers_and_export_inverts_import(name):
    g, config, params = load(name)
    difference = np.abs(logits(config, params, g.tokens_BT) - g.logits_BTV)
    assert difference.max() < 3e-6 * np.abs(g.logits_BTV).max()

    back = hf.params_to_hf(params, config, rope_interleave=interleaved(g))
    assert back.keys() == g.state.keys()
    for key, value in g.state.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value)


@pytest.mark.parametrize("name", golden.NAMES)
def test_configuration_survives_the_round_trip(name):
    g, config, _ = load(name)
    written = hf.config_to_hf(config)
    differing = {k for k, v in written.items() if g.config.get(k, "absent") != v}
    # How the file orders rotated coordinates is no part of the model.
    assert differing <= {"rope_interleave"}
    assert hf.config_from_hf(written) == config


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


@pytest.mark.parametrize("name", ["qwen3_tied_window", "deepseek_v3_no_q_lora_half_split"])
def test_load_and_save_folders(tmp_path, name):
    g, config, params = load(name)
    write_folder(tmp_path / "in", g, shards=2)
    loaded_config, loaded = hf.load_hf(tmp_path / "in")
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

    # The golden weights are representable in bfloat16, so nothing is lost.
    hf.save_hf(tmp_path / "out", loaded, config)
    saved = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert {v.dtype for v in saved.values()} == {np.dtype(ml_dtypes.bfloat16)}
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
        ("llama_gqa", {"model_type": "gpt2"}, "'gpt2'; there are: llama, qwen3, deepseek_v3"),
        ("llama_gqa", {"rope_parameters": {"rope_type": "llama3"}}, "rope scaling 'llama3'"),
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
        ("deepseek_v3", {"first_k_dense_replace": 1}, "layers 1 to 1 .* mixtures of experts"),
    ],
)
def test_unsupported_features_are_named(name, change, message):
    with pytest.raises(ConfigError, match=message):
        hf.config_from_hf(golden.load(name).config | change)


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
