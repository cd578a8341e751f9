"""What the keys of a config.json mean: one function per family gives the decoder's layers.

A key that has a default there and is missing has that default here. What a file asks for and our
decoder does not compute is refused by its name, and so is a key of no known meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from step_jax.core.config import validate
from step_jax.core.errors import ConfigError
from step_jax.interop.hf.fp8 import check_quantization
from step_jax.interop.hf.keys import REQUIRED, WITHOUT_EFFECT, Keys
from step_jax.interop.hf.rope import one_rope, read_rope
from step_jax.models.layers.attention import MHA, MLA
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Rope
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import Block, Decoder, Group


@dataclass(frozen=True)
class Family:
    """
    Attributes:
      architecture: what config.json names.
      layers: keys -> the blocks of all layers in turn.
      zero_centred: of the norms between layers.
      auto_class: the class of `transformers` that loads the model by the file alone, None if the
        library has this architecture only as part of another one.
      note: what a reader of an exported folder has to know.
    """

    architecture: str
    layers: Callable[[Keys], list[Block]]
    zero_centred: bool = False
    auto_class: str | None = "AutoModelForCausalLM"
    note: str = ""


# --- keys that families share --------------------------------------------------------------------

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _plain(c: Keys) -> None:
    """What changes the function of any decoder, and is nowhere supported."""
    c.only(
        hidden_act="silu", attention_bias=False, mlp_bias=False, attention_dropout=0.0,
        is_causal=True, use_bidirectional_attention=False, is_encoder_decoder=False,
        add_cross_attention=False, pruned_heads={},
    )  # fmt: skip
    check_quantization(c)


def _depth(c: Keys) -> int:
    return c.integer("num_hidden_layers")


def _kv_heads(c: Keys, heads: int) -> int:
    return c.integer("num_key_value_heads", heads)


def _head_dim(c: Keys, heads: int) -> int:
    """As written, else an equal part of the width."""
    width = c.integer("hidden_size")
    if "head_dim" not in c and width % heads:
        raise ConfigError(
            f"{c.where} has hidden_size {width}, which num_attention_heads {heads} does not "
            "divide, and no head_dim"
        )
    return c.integer("head_dim", width // heads)


def _kinds(c: Keys, depth: int) -> list[str]:
    """``layer_types``: full or sliding attention, for every layer."""
    known = (_FULL, _SLIDING)
    return c.per_layer(
        "layer_types", depth, known.__contains__, " or ".join(map(repr, known)), _FULL
    )


# --- Llama and Qwen ------------------------------------------------------------------------------


def _llama(c: Keys) -> list[Block]:
    heads = c.integer("num_attention_heads")
    attention = MHA(heads, _head_dim(c, heads), _kv_heads(c, heads), position=one_rope(c))
    return [Block(attention, SwiGLU(c.integer("intermediate_size")))] * _depth(c)


def _qwen2(c: Keys) -> list[Block]:
    heads = c.integer("num_attention_heads")
    head_dim, kv, rope = _head_dim(c, heads), _kv_heads(c, heads), one_rope(c)
    mlp = SwiGLU(c.integer("intermediate_size"))
    return [
        Block(MHA(heads, head_dim, kv, window, qkv_bias=True, position=rope), mlp)
        for window in _qwen_windows(c)
    ]


def _qwen3_attention(c: Keys, head_dim: int) -> MHA:
    heads = c.integer("num_attention_heads")
    norm = RMSNorm(eps=c.number("rms_norm_eps", 1e-6))
    return MHA(heads, head_dim, _kv_heads(c, heads), qk_norm=norm, position=one_rope(c))


def _qwen3(c: Keys) -> list[Block]:
    attention = _qwen3_attention(c, c.integer("head_dim", 128))
    mlp = SwiGLU(c.integer("intermediate_size"))
    return [Block(replace(attention, window=w), mlp) for w in _qwen_windows(c)]


def _qwen_windows(c: Keys) -> list[int | None]:
    depth = _depth(c)
    if not c.flag("use_sliding_window", False):
        c.without_effect("sliding_window", "max_window_layers")
        c.only(layer_types=[_FULL] * depth)
        return [None] * depth
    window = c.integer("sliding_window")
    if "layer_types" in c:
        c.without_effect("max_window_layers")
        kinds = _kinds(c, depth)
    else:
        full = c.integer("max_window_layers", least=0)
        kinds = [_FULL if layer < full else _SLIDING for layer in range(depth)]
    return [window if kind == _SLIDING else None for kind in kinds]


def _qwen3_moe(c: Keys) -> list[Block]:
    heads = c.integer("num_attention_heads")
    attention = _qwen3_attention(c, _head_dim(c, heads))
    if c.flag("use_sliding_window", False):  # of every layer
        attention = replace(attention, window=c.integer("sliding_window"))
    c.without_effect("sliding_window", "max_window_layers", "router_aux_loss_coef")
    experts = c.one_of(("num_experts", "num_local_experts"), c.integer)
    router = Router(c.integer("num_experts_per_tok"), normalise=c.flag("norm_topk_prob", False))
    moe = MoE((Experts(experts, c.integer("moe_intermediate_size")),), router)
    step, dense = c.integer("decoder_sparse_step", 1), c.integers("mlp_only_layers") or ()
    mlp = SwiGLU(c.integer("intermediate_size"))
    return [
        Block(attention, moe if layer not in dense and (layer + 1) % step == 0 else mlp)
        for layer in range(_depth(c))
    ]


# --- DeepSeek-V3 ---------------------------------------------------------------------------------


def _deepseek_v3(c: Keys) -> list[Block]:
    heads, rope_dim = c.integer("num_attention_heads"), c.integer("qk_rope_head_dim")
    nope_dim = c.integer("qk_nope_head_dim")
    attention = MLA(
        heads=heads,
        kv_rank=c.integer("kv_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=c.integer("v_head_dim"),
        query_rank=c.integer("q_lora_rank", None),
        norm=RMSNorm(eps=1e-6),  # the library's default there, whatever rms_norm_eps says
        position=one_rope(c),
    )
    # Keys of the released files that the library does not read, and those it derives.
    c.only(
        scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1,
        num_key_value_heads=heads, head_dim=rope_dim, qk_head_dim=nope_dim + rope_dim,
    )  # fmt: skip
    c.flag("rope_interleave", True)  # how rotated coordinates lie in the file: see tensors.py
    c.without_effect("ep_size", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef")
    mtp_depth(c)
    depth, dense = _depth(c), c.integer("first_k_dense_replace", 3, least=0)
    first = [Block(attention, SwiGLU(c.integer("intermediate_size")))] * min(dense, depth)
    mixture = (
        "moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor",
        "n_group", "topk_group", "n_routed_experts", "num_local_experts", "n_shared_experts",
    )  # fmt: skip
    if dense >= depth:
        c.without_effect(*mixture)
        return first
    hidden = c.integer("moe_intermediate_size")
    router = Router(
        top_k=c.integer("num_experts_per_tok"),
        score="sigmoid",
        normalise=c.flag("norm_topk_prob", True),
        scale=c.number("routed_scaling_factor", 2.5),
        groups=c.integer("n_group"),
        top_groups=c.integer("topk_group"),
        bias=True,
    )
    experts = c.one_of(("n_routed_experts", "num_local_experts"), c.integer)
    moe = MoE((Experts(experts, hidden),), router, hidden * c.integer("n_shared_experts"))
    return [*first, *[Block(attention, moe)] * (depth - dense)]


def mtp_depth(c: Keys) -> int:
    """Layers of multi-token prediction that follow the decoder's own in the checkpoint."""
    return c.one_of(("num_nextn_predict_layers", "num_mtp_layers"), c.integer, 0, 0)


# --- Step-3.5-Flash and the language model of Step-3.7-Flash -------------------------------------


def _step(c: Keys) -> list[Block]:
    """Reads the released files' keys and those that `transformers` writes instead."""
    depth = _depth(c)
    kinds, head_dim = _kinds(c, depth), c.integer("head_dim")
    window = c.integer("sliding_window", REQUIRED if _SLIDING in kinds else None)
    kv = c.one_of(("num_key_value_heads", "num_attention_groups"), c.integer)
    full_heads = c.integer("num_attention_heads")
    sliding_heads = _step_sliding_heads(c, kinds, full_heads, kv, head_dim)
    norm = RMSNorm(eps=c.number("rms_norm_eps", 1e-5), zero_centred=True)
    full = MHA(full_heads, head_dim, kv, qk_norm=norm, output_gate=True)
    by_kind = {_FULL: full, _SLIDING: replace(full, heads=sliding_heads, window=window)}
    c.only(
        use_head_wise_attn_gate=True, yarn_only_types=[_FULL], query_pre_attn_scalar=head_dim,
        use_qk_norm=True, zero_centered=True, sink=False, att_impl_type="GQA",
    )  # fmt: skip
    c.without_effect("max_seq_len", "mtp_layer_types", "mtp_mlp_layer_types")
    mtp_depth(c)
    if not all(c.get("use_rope_layers", ())):
        c.unsupported("use_rope_layers: layers without rope")
    return [
        Block(replace(by_kind[kind], position=rope), mlp)
        for kind, rope, mlp in zip(kinds, _step_ropes(c, kinds), _step_mlps(c, depth), strict=True)
    ]


def _step_sliding_heads(c: Keys, kinds: list[str], heads: int, kv: int, head_dim: int) -> int:
    """Heads of windowed layers, of which there are three spellings."""
    other = c.table("attention_other_setting")
    other.only(
        attention_type=_SLIDING, num_attention_groups=kv, head_dim=head_dim, true_head_dim=head_dim
    )
    there = other.integer("num_attention_heads", None)
    other.note_unread()
    sliding = c.integer("num_sliding_attention_heads", there or heads)
    if there not in (None, sliding):
        raise ConfigError(
            f"{c.where} has num_sliding_attention_heads {sliding} but num_attention_heads {there} "
            "in attention_other_setting"
        )
    c.only(
        per_layer_config={
            str(i): {"num_attention_heads": sliding} for i, k in enumerate(kinds) if k == _SLIDING
        }
    )
    return sliding


def _step_mlps(c: Keys, depth: int) -> list[SwiGLU | MoE]:
    sparse = _step_sparse(c, depth)
    limits = c.numbers_per_layer("swiglu_limits", depth)
    shared_limits = c.numbers_per_layer("swiglu_limits_shared", depth)
    c.only(moe_router_activation="sigmoid", norm_expert_weight=True, use_moe=True)
    c.without_effect("need_fp32_gate")  # ours is float32 either way
    c.without_effect(
        *_STEP_EXPERTS, *_STEP_TOP_K, *_STEP_SHARED, "moe_intermediate_size", "intermediate_size",
        "moe_router_scaling_factor", "use_moe_router_bias",
    )  # fmt: skip

    def mlp(layer: int) -> SwiGLU | MoE:
        shared_limit = shared_limits[layer] or None
        if layer not in sparse:  # a dense layer has the limit of a shared expert
            return SwiGLU(c.integer("intermediate_size"), shared_limit)
        return MoE(
            (Experts(c.one_of(_STEP_EXPERTS, c.integer), c.integer("moe_intermediate_size")),),
            Router(
                top_k=c.one_of(_STEP_TOP_K, c.integer),
                score="sigmoid",
                scale=c.number("moe_router_scaling_factor", 1.0),
                bias=c.flag("use_moe_router_bias", True),
            ),
            shared=c.one_of(_STEP_SHARED, c.integer),
            clamp=limits[layer] or None,
            shared_clamp=shared_limit,
        )

    return [mlp(layer) for layer in range(depth)]


_STEP_EXPERTS = ("n_routed_experts", "moe_num_experts", "num_local_experts")
_STEP_TOP_K = ("num_experts_per_tok", "moe_top_k")
_STEP_SHARED = ("share_expert_dim", "share_expert_dims")


def _step_sparse(c: Keys, depth: int) -> set[int]:
    """Layers with experts; those past the depth are of multi-token prediction."""
    known = ("dense", "sparse")
    kinds = c.per_layer("mlp_layer_types", depth, known.__contains__, "'dense' or 'sparse'")
    named = c.get("moe_layers_enum")
    if isinstance(named, str):
        items = [item.strip() for item in named.split(",") if item.strip()]
        if wrong := [item for item in items if not item.isdecimal()]:
            raise ConfigError(f"{c.where} has {wrong[0]!r} in moe_layers_enum; it must be a layer")
        listed: list[int] | None = [int(item) for item in items]
    else:
        listed = c.integers("moe_layers_enum")
    by_number = set(range(3, depth)) if listed is None else {i for i in listed if i < depth}
    by_kind = {i for i, kind in enumerate(kinds) if kind == "sparse"}
    if kinds[0] is None:
        return by_number
    if listed is not None and by_kind != by_number:
        raise ConfigError(f"{c.where}: mlp_layer_types and moe_layers_enum name unlike layers")
    return by_kind


def _step_ropes(c: Keys, kinds: list[str]) -> list[Rope]:
    length = c.integer("max_position_embeddings", None)
    nested, ropes = c.table("rope_parameters"), []
    if nested.values:
        by_kind = {
            kind: read_rope(nested.table(kind, REQUIRED), 10_000.0, length) for kind in set(kinds)
        }
        nested.note_unread(frozenset({_FULL, _SLIDING}))
        ropes.append([by_kind[kind] for kind in kinds])
    released = ("rope_theta", "partial_rotary_factors", "rope_scaling")
    if not nested.values or any(name in c for name in released):
        ropes.append(_released_step_ropes(c, kinds, length))
    if ropes[0] != ropes[-1]:
        raise ConfigError(
            f"{c.where}: rope_parameters say otherwise than {', '.join(released)}: which of them "
            "holds depends on the reader, so make them equal"
        )
    return ropes[0]


def _released_step_ropes(c: Keys, kinds: list[str], length: int | None) -> list[Rope]:
    thetas = c.numbers_per_layer("rope_theta", len(kinds), 10_000.0)
    fractions = c.numbers_per_layer("partial_rotary_factors", len(kinds), 1.0)
    table = c.table("rope_scaling")
    table.only(rope_theta=10_000.0, partial_rotary_factor=1.0)
    scaling = read_rope(table, 10_000.0, length).scaling
    return [
        Rope(theta, fraction, scaling if kind == _FULL else None)
        for kind, theta, fraction in zip(kinds, thetas, fractions, strict=True)
    ]


# --- the table -----------------------------------------------------------------------------------

FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _deepseek_v3),
    "step3p5": Family(
        "Step3p5ForCausalLM",
        _step,
        zero_centred=True,
        auto_class=None,
        note="`transformers` (5.24) has this architecture only within "
        "Step3p7ForConditionalGeneration; Step3p5ForCausalLM is the class of the released model's "
        "own code and of serving engines",
    ),
}


def text_keys(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of the language model: of a model that also sees, those of its ``text_config``.

    How the weights are quantized stands at the top there.

    Raises:
      ConfigError: ``text_config`` is no table.
    """
    if not isinstance(hf_config, Mapping):
        raise ConfigError(f"config.json is no table of keys but {type(hf_config).__name__}")
    if hf_config.get("model_type") != "step3p7" or "text_config" not in hf_config:
        return hf_config
    text = Keys(hf_config, "config.json").table("text_config").values
    outer = {k: hf_config[k] for k in ("quantization_config",) if hf_config.get(k) is not None}
    return text | outer | {"model_type": "step3p5"}


def config_from_hf(hf_config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json describes (of transformers 4 or 5).

    Of a Step-3.7-Flash (``step3p7``) it is the language model. Routers are those of inference:
    balance losses and the bias's step are zero.

    Raises:
      ConfigError: another architecture, a feature we do not compute, a key that is missing, of the
        wrong type or of no known meaning, each by its name; or keys that contradict each other.
    """
    text = text_keys(hf_config)
    model_type = text.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"cannot import the architecture {model_type!r}; there are: "
            f"{', '.join(FAMILIES)}, step3p7"
        )
    family = FAMILIES[model_type]
    c = Keys(text, f"config.json of this {model_type} model")
    _plain(c)
    blocks = family.layers(c)
    config = Decoder(
        width=c.integer("hidden_size"),
        vocab=c.integer("vocab_size"),
        tied=c.flag("tie_word_embeddings", False),
        norm=RMSNorm(
            c.number("rms_norm_eps", 1e-5 if family.zero_centred else 1e-6), family.zero_centred
        ),
        layers=tuple(Group(len(list(same)), (block,)) for block, same in groupby(blocks)),
    )
    c.note_unread(WITHOUT_EFFECT)
    if c.problems:
        raise ConfigError(f"this {model_type} model needs what we lack: {'; '.join(c.problems)}")
    validate(config)
    return config
