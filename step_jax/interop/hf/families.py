"""What the keys of a config.json mean: one function per family gives the decoder's layers.

A key that has a default there and is missing has that default here. What a file asks for and our
decoder does not compute is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from step_jax.core.config import validate
from step_jax.core.errors import ConfigError
from step_jax.models.layers.attention import MHA, MLA
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Rope, RopeScaling
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import Block, Decoder, Group

# The keys of a config.json, of which a missing one raises KeyError.
Keys = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """
    Attributes:
      architecture: what config.json names.
      layers: keys -> the blocks of all layers in turn.
      unsupported: keys -> what they ask for and we lack.
      zero_centred: of the norms between layers.
    """

    architecture: str
    layers: Callable[[Keys], list[Block]]
    unsupported: Callable[[Keys], Iterator[str]]
    zero_centred: bool = False


# --- keys that families share --------------------------------------------------------------------


def _rope(parameters: Keys, theta: float) -> Rope:
    """Of ``rope_parameters`` or ``rope_scaling`` (transformers 4), whose kinds are checked."""
    scaling = None
    if _rope_kind(parameters) == "llama3":
        scaling = RopeScaling(
            factor=parameters["factor"],
            length=parameters["original_max_position_embeddings"],
            low=parameters["low_freq_factor"],
            high=parameters["high_freq_factor"],
        )
    fraction = parameters.get("partial_rotary_factor", 1.0)
    return Rope(parameters.get("rope_theta", theta), fraction, scaling)


def _rope_kind(parameters: Keys) -> str:
    return parameters.get("rope_type", parameters.get("type", "default"))


def _one_rope(c: Keys) -> Rope:
    """The rotation that all layers share."""
    parameters = c.get("rope_parameters") or c.get("rope_scaling") or {}
    return _rope(parameters, c.get("rope_theta", 10_000.0))


def _plain_unsupported(c: Keys) -> Iterator[str]:
    if c.get("hidden_act", "silu") != "silu":
        yield f"hidden_act {c['hidden_act']!r} (only 'silu')"
    yield from (key for key in ("attention_bias", "mlp_bias", "quantization_config") if c.get(key))


def _unsupported(c: Keys) -> Iterator[str]:
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    yield from _rope_unsupported(rope)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor {rope['partial_rotary_factor']}"
    if any(isinstance(v, dict) for v in rope.values()):
        yield "rope parameters that differ between layers"
    yield from _plain_unsupported(c)


def _only(c: Keys, allowed: Keys) -> Iterator[str]:
    """Keys that may be missing but may not have another value."""
    for key, value in allowed.items():
        if c.get(key) not in (None, value):
            yield f"{key} {c[key]!r} (only {value!r})"


def _rope_unsupported(parameters: Keys) -> Iterator[str]:
    if (kind := _rope_kind(parameters)) not in ("default", "llama3"):
        yield f"rope scaling {kind!r} (only 'llama3')"


# --- Llama and Qwen3 -----------------------------------------------------------------------------


def _llama(c: Keys) -> list[Block]:
    heads = c["num_attention_heads"]
    attention = MHA(
        heads=heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        kv_heads=c.get("num_key_value_heads") or heads,
        position=_one_rope(c),
    )
    return [Block(attention, SwiGLU(c["intermediate_size"]))] * c["num_hidden_layers"]


def _qwen3_attention(c: Keys, head_dim: int, window: int | None) -> MHA:
    return MHA(
        heads=c["num_attention_heads"],
        head_dim=head_dim,
        kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        window=window,
        qk_norm=RMSNorm(eps=c.get("rms_norm_eps", 1e-6)),
        position=_one_rope(c),
    )


def _qwen3(c: Keys) -> list[Block]:
    head_dim, mlp = c.get("head_dim") or 128, SwiGLU(c["intermediate_size"])
    return [Block(_qwen3_attention(c, head_dim, w), mlp) for w in _qwen3_windows(c)]


def _qwen3_windows(c: Keys) -> list[int | None]:
    depth = c["num_hidden_layers"]
    if not c.get("use_sliding_window"):
        return [None] * depth
    sliding = (
        [kind == "sliding_attention" for kind in c["layer_types"]]
        if c.get("layer_types")
        else [layer >= c["max_window_layers"] for layer in range(depth)]
    )
    if len(sliding) != depth:
        raise ConfigError(f"layer_types names {len(sliding)} layers, num_hidden_layers is {depth}")
    return [c["sliding_window"] if s else None for s in sliding]


def _qwen3_moe(c: Keys) -> list[Block]:
    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    window = c["sliding_window"] if c.get("use_sliding_window") else None  # of every layer
    attention = _qwen3_attention(c, head_dim, window)
    experts = c["num_experts"] if "num_experts" in c else c["num_local_experts"]
    router = Router(c["num_experts_per_tok"], normalise=c.get("norm_topk_prob", False))
    moe = MoE((Experts(experts, c["moe_intermediate_size"]),), router)
    step, dense = c.get("decoder_sparse_step", 1), c.get("mlp_only_layers") or ()

    def mlp(layer: int):
        sparse = layer not in dense and (layer + 1) % step == 0
        return moe if sparse else SwiGLU(c["intermediate_size"])

    return [Block(attention, mlp(layer)) for layer in range(c["num_hidden_layers"])]


# --- DeepSeek-V3 ---------------------------------------------------------------------------------


def _deepseek_v3(c: Keys) -> list[Block]:
    attention = MLA(
        heads=c["num_attention_heads"],
        kv_rank=c["kv_lora_rank"],
        nope_dim=c["qk_nope_head_dim"],
        rope_dim=c["qk_rope_head_dim"],
        value_dim=c["v_head_dim"],
        query_rank=c["q_lora_rank"],
        norm=RMSNorm(eps=1e-6),  # the library's default there, whatever rms_norm_eps says
        position=_one_rope(c),
    )
    depth, dense = c["num_hidden_layers"], c.get("first_k_dense_replace", 3)
    first = [Block(attention, SwiGLU(c["intermediate_size"]))] * min(dense, depth)
    if dense >= depth:
        return first
    hidden = c["moe_intermediate_size"]
    router = Router(
        top_k=c["num_experts_per_tok"],
        score="sigmoid",
        normalise=c.get("norm_topk_prob", True),
        scale=c.get("routed_scaling_factor", 2.5),
        groups=c["n_group"],
        top_groups=c["topk_group"],
        bias=True,
    )
    moe = MoE((Experts(c["n_routed_experts"], hidden),), router, hidden * c["n_shared_experts"])
    return [*first, *[Block(attention, moe)] * (depth - dense)]


def _deepseek_v3_unsupported(c: Keys) -> Iterator[str]:
    yield from _unsupported(c)
    # Keys of the released files that the library does not read.
    yield from _only(c, {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1})


# --- Step-3.5-Flash and the language model of Step-3.7-Flash -------------------------------------


def _step(c: Keys) -> list[Block]:
    """Reads the released files' keys and those that `transformers` writes instead."""
    norm = RMSNorm(eps=c.get("rms_norm_eps", 1e-5), zero_centred=True)
    kinds = _step_kinds(c)
    depth, sparse = len(kinds), _step_sparse(c)
    full_heads = c["num_attention_heads"]
    other = c.get("attention_other_setting") or {}
    other_heads = c.get("num_sliding_attention_heads") or other.get("num_attention_heads")
    heads = {"full_attention": full_heads, "sliding_attention": other_heads or full_heads}
    windows = {"full_attention": None, "sliding_attention": c.get("sliding_window")}
    limits = _per_layer(c.get("swiglu_limits"), depth)
    shared_limits = _per_layer(c.get("swiglu_limits_shared"), depth)

    def mlp(layer: int):
        if layer not in sparse:  # a dense layer has the limit of a shared expert
            return SwiGLU(c["intermediate_size"], shared_limits[layer] or None)
        return MoE(
            (Experts(_either(c, *_EXPERTS), c["moe_intermediate_size"]),),
            Router(
                top_k=_either(c, "num_experts_per_tok", "moe_top_k"),
                score="sigmoid",
                scale=c.get("moe_router_scaling_factor", 1.0),
                bias=c.get("use_moe_router_bias", True),
            ),
            shared=_either(c, "share_expert_dim", "share_expert_dims"),
            clamp=limits[layer] or None,
            shared_clamp=shared_limits[layer] or None,
        )

    return [
        Block(
            MHA(
                heads=heads[kind],
                head_dim=c["head_dim"],
                kv_heads=_either(c, "num_key_value_heads", "num_attention_groups"),
                window=windows[kind],
                qk_norm=norm,
                output_gate=True,
                position=rope,
            ),
            mlp(layer),
        )
        for layer, (kind, rope) in enumerate(zip(kinds, _step_ropes(c, kinds), strict=True))
    ]


_EXPERTS = ("n_routed_experts", "moe_num_experts", "num_local_experts")


def _either(c: Keys, *names: str):
    return c[next((n for n in names if n in c), names[0])]


def _per_layer(value, depth: int, default=None) -> list:
    """A value for every layer; a list may go on with those of multi-token prediction."""
    if isinstance(value, list):
        return value[:depth]
    return [default if value is None else value] * depth


def _step_kinds(c: Keys) -> list[str]:
    depth = c["num_hidden_layers"]
    kinds = _per_layer(c.get("layer_types"), depth, "full_attention")
    if len(kinds) != depth:
        raise ConfigError(f"layer_types names {len(kinds)} layers, num_hidden_layers is {depth}")
    return kinds


def _step_sparse(c: Keys) -> set[int]:
    """Layers with experts."""
    depth = c["num_hidden_layers"]
    if kinds := c.get("mlp_layer_types"):
        return {i for i, kind in enumerate(kinds[:depth]) if kind == "sparse"}
    named = c.get("moe_layers_enum")
    if named is None:
        return set(range(3, depth))
    items = named.split(",") if isinstance(named, str) else named
    return {int(i) for i in items if str(i).strip()}


def _step_ropes(c: Keys, kinds: list[str]) -> list[Rope]:
    parameters = c.get("rope_parameters") or {}
    if all(isinstance(parameters.get(kind), Mapping) for kind in kinds):
        return [_rope(parameters[kind], 10_000.0) for kind in kinds]
    thetas = _per_layer(c.get("rope_theta"), len(kinds), 10_000.0)
    fractions = _per_layer(c.get("partial_rotary_factors"), len(kinds), 1.0)
    full = c.get("rope_scaling") or {}
    return [
        _rope({**(full if kind == "full_attention" else {}), "partial_rotary_factor": f}, theta)
        for kind, theta, f in zip(kinds, thetas, fractions, strict=True)
    ]


def _step_unsupported(c: Keys) -> Iterator[str]:
    yield from _plain_unsupported(c)
    scalings = [v for v in (c.get("rope_parameters") or {}).values() if isinstance(v, Mapping)]
    for parameters in (*scalings, c.get("rope_scaling") or {}):
        yield from _rope_unsupported(parameters)
    other = {"full_attention", "sliding_attention"}
    yield from sorted(f"attention {kind!r}" for kind in set(_step_kinds(c)) - other)
    yield from _only(
        c,
        {
            "moe_router_activation": "sigmoid",
            "norm_expert_weight": True,
            "use_head_wise_attn_gate": True,
            "yarn_only_types": ["full_attention"],
            "use_bidirectional_attention": False,
            "query_pre_attn_scalar": c["head_dim"],
        },
    )
    groups = _either(c, "num_key_value_heads", "num_attention_groups")
    windowed = c.get("attention_other_setting") or {}
    same = {"num_attention_groups": groups, "head_dim": c["head_dim"]}
    yield from (f"windowed layers with {problem}" for problem in _only(windowed, same))
    if not all(c.get("use_rope_layers") or ()):
        yield "layers without rope"


# --- the table -----------------------------------------------------------------------------------

FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama, _unsupported),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, _unsupported),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, _unsupported),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _deepseek_v3, _deepseek_v3_unsupported),
    "step3p5": Family("Step3p5ForCausalLM", _step, _step_unsupported, zero_centred=True),
}


def config_from_hf(hf_config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json describes (of transformers 4 or 5).

    Of a Step-3.7-Flash (``step3p7``) it is the language model. Routers are those of inference:
    balance losses and the bias's step are zero.

    Raises:
      ConfigError: another architecture, a feature we do not compute, or a key that is missing,
        each by its name.
    """
    model_type = hf_config.get("model_type")
    if model_type == "step3p7" and "text_config" in hf_config:
        outer = {k: hf_config[k] for k in ("quantization_config",) if k in hf_config}
        return config_from_hf(outer | hf_config["text_config"] | {"model_type": "step3p5"})
    if model_type not in FAMILIES:
        raise ConfigError(
            f"cannot import the architecture {model_type!r}; there are: "
            f"{', '.join(FAMILIES)}, step3p7"
        )
    family = FAMILIES[model_type]
    eps = 1e-5 if family.zero_centred else 1e-6
    try:
        if problems := list(family.unsupported(hf_config)):
            raise ConfigError(f"this {model_type} model needs what we lack: {'; '.join(problems)}")
        blocks = family.layers(hf_config)
        config = Decoder(
            width=hf_config["hidden_size"],
            vocab=hf_config["vocab_size"],
            tied=bool(hf_config.get("tie_word_embeddings", False)),
            norm=RMSNorm(hf_config.get("rms_norm_eps", eps), family.zero_centred),
            layers=tuple(Group(len(list(same)), (block,)) for block, same in groupby(blocks)),
        )
    except KeyError as e:
        raise ConfigError(f"config.json of this {model_type} model lacks {e.args[0]!r}") from e
    validate(config)
    return config
