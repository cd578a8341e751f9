"""Hugging Face import and export against golden logits of `transformers` 5."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax import PretrainConfig
from step_jax.core.config import load_file
from step_jax.core.errors import CheckpointError
from step_jax.core.spec import map_specs
from step_jax.interop import hf
from step_jax.models.context import Context, Execution
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.text.decoder import Group
from step_jax.models.tokens import Tokens
from tests.golden import golden

# These models run once: the compiler's time is most of the test's.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def logits(config, params, tokens_BT):
    def f(params, tokens_BT):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        ctx = Context(Tokens(positions_BT), execution=Execution(dtype="float32"))
        x_BTD, *_ = config.hidden(params, tokens_BT, ctx)
        return config.logits(params, x_BTD, ctx)

    return np.asarray(jax.jit(f, compiler_options=FAST)(params, tokens_BT))


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


def slow(*values):
    """A case beyond those that every run of the tests tries."""
    return pytest.param(*values, marks=pytest.mark.slow)


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
        # both spellings are written; defaults of YaRN too
        allowed |= {"rope_theta", "rope_scaling", "num_experts", "head_dim"}
        rope = written["rope_parameters"]
        assert theirs["rope_parameters"].items() <= rope.items()
        assert written["rope_theta"] == rope["rope_theta"]
        theirs = theirs | {"rope_parameters": rope}
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


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name, changes",
    [
        slow("qwen3_moe", {"normalise": False}),
        slow("deepseek_v3_moe", {"groups": 1, "top_groups": 1}),
        slow("step3p7", {"clamp": None}),
        ("step3p7", {"shared_clamp": None}),
    ],
)
def test_goldens_can_tell_another_mixture(name, changes):
    g, config, params = load(name)
    wrong = logits(mixture(config, **changes), params, g.tokens_BT)
    assert np.abs(wrong - g.logits_BTV).max() > 0.01


@pytest.mark.parametrize("name", [slow("deepseek_v3_moe"), "step3p7"])
def test_goldens_can_tell_a_forgotten_selection_bias(name):
    g, config, params = load(name)
    state = hf.params_to_hf(params, config)
    for key in state:
        if key.endswith(("router_bias", "e_score_correction_bias")):
            state[key] = np.zeros_like(state[key])
    wrong = logits(config, hf.params_from_hf(state, config), g.tokens_BT)
    assert np.abs(wrong - g.logits_BTV).max() > 0.1


def with_rope(config, **changes):
    """``config`` with another rotation in all layers."""

    def block(b):
        rope = replace(b.attention.position, **changes)
        return replace(b, attention=replace(b.attention, position=rope))

    groups = (replace(g, blocks=tuple(map(block, g.blocks))) for g in config.layers)
    return replace(config, layers=tuple(groups))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name, changes",
    [
        ("llama_linear", None),
        slow("llama_yarn", None),
        slow("llama_yarn", {"attention_factor": 1.0}),
        slow("llama_yarn_attention_factor", {"attention_factor": None}),
        ("llama_yarn_attention_factor", {"truncate": True}),
        slow("llama_yarn_attention_factor", {"fast": 32.0}),
        slow("deepseek_v3_yarn", None),
        slow("deepseek_v3_yarn", {"mscale": 0.5}),
        ("deepseek_v3_yarn", {"mscale_all_dim": 0.0}),
    ],
)
def test_goldens_can_tell_another_scaling(name, changes):
    g, config, params = load(name)
    scaling = config.layers[0].blocks[0].attention.position.scaling
    other = with_rope(config, scaling=None if changes is None else replace(scaling, **changes))
    assert np.abs(logits(other, params, g.tokens_BT) - g.logits_BTV).max() > 0.01


def test_goldens_can_tell_a_forgotten_bias():
    g, config, params = load("qwen2")
    for kind in "qkv":
        state = hf.params_to_hf(params, config)
        for key in state:
            if key.endswith(f"{kind}_proj.bias"):
                state[key] = np.zeros_like(state[key])
        wrong = logits(config, hf.params_from_hf(state, config), g.tokens_BT)
        assert np.abs(wrong - g.logits_BTV).max() > 0.01, kind


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["qwen2", slow("llama_yarn"), "deepseek_v3_yarn"])
def test_a_cached_decode_gives_the_logits_of_transformers(name):
    """The factors of YaRN and the biases, through caches and absorbed projections."""
    g, config, params = load(name)

    def step(params, token_B1, position, cache):
        position_B1 = jnp.broadcast_to(position, token_B1.shape)
        ctx = Context(Tokens(position_B1), execution=Execution(dtype="float32"))
        x_B1D, cache, _ = config.hidden(params, token_B1, ctx, cache)
        return config.logits(params, x_B1D, ctx), cache

    step, cache = jax.jit(step, compiler_options=FAST), config.init_cache(2, 9, jnp.float32)
    got = []
    for t in range(9):
        logits_B1V, cache = step(params, g.tokens_BT[:, t : t + 1], t, cache)
        got.append(logits_B1V)
    got = np.concatenate(got, axis=1)
    np.testing.assert_allclose(got, g.logits_BTV[:, :9], atol=1e-5 * np.abs(g.logits_BTV).max())


@pytest.mark.thorough
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


@pytest.mark.thorough
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
