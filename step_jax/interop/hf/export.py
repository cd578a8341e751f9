"""The config.json of a decoder: the inverse of ``families.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from step_jax.core.errors import ConfigError
from step_jax.interop.hf.families import FAMILIES, config_from_hf
from step_jax.interop.hf.rope import rope_keys, scaling_keys
from step_jax.models.layers.attention import MHA, MLA
from step_jax.models.layers.mlp import GELU
from step_jax.models.layers.moe import MoE
from step_jax.models.layers.positions import Rope
from step_jax.models.text.decoder import Block, Decoder


def layers_of(config: Decoder) -> list[Block]:
    """The blocks of all layers in turn."""
    return [stack.block for stack, _ in config.trunk.layers()]


def family_of(config: Decoder) -> str:
    """The only family that could have this decoder's layers.

    Raises:
      ConfigError: no family has such attention, or layers of unlike kinds.
    """
    layers = layers_of(config)
    attention = layers[0].attention
    for number, block in enumerate(layers):
        if type(block.attention) is not type(attention):
            raise ConfigError(
                f"layer {number} has {type(block.attention).__name__} attention, the first "
                f"{type(attention).__name__}: every Hugging Face family we know has one kind"
            )
        if isinstance(block.mlp, GELU):
            raise ConfigError(
                f"layer {number} has an MLP of kind gelu, which no Hugging Face family of decoders "
                "that we know has: cannot export"
            )
    if isinstance(attention, MLA):
        return "deepseek_v3"
    if not isinstance(attention, MHA):
        kind = type(attention).__name__
        raise ConfigError(f"no Hugging Face family we know has {kind} attention: cannot export")
    if attention.qk_norm is None:
        return "qwen2" if attention.qkv_bias else "llama"
    if attention.output_gate:
        return "step3p5"
    return "qwen3_moe" if any(isinstance(b.mlp, MoE) for b in layers) else "qwen3"


def config_to_hf(config: Decoder) -> dict[str, Any]:
    """The config.json of ``config``, in the words of both transformers 4 and 5.

    What only training knows (how a router is balanced, how tokens reach their experts and how many
    rows their devices have room for) is left out.
    A Step-3.5-Flash is written with the released file's keys.

    Raises:
      ConfigError: no family computes exactly this model; names what differs from the nearest.
    """
    model_type = family_of(config)
    layers = layers_of(config)
    write = {
        "qwen2": _qwen, "qwen3": _qwen, "qwen3_moe": _qwen3_moe, "deepseek_v3": _deepseek_v3
    }  # fmt: skip
    dense = [b.mlp.hidden for b in layers if not isinstance(b.mlp, MoE)]
    experts = [b.mlp.experts[0].hidden for b in layers if isinstance(b.mlp, MoE)]
    out = {
        "model_type": model_type,
        "architectures": [FAMILIES[model_type].architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        # of no layer, if all have experts; but the file must have it
        "intermediate_size": (dense or experts)[0],
        "num_hidden_layers": len(layers),
        "rms_norm_eps": config.norm.eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
    }
    if model_type == "step3p5":
        out |= _step(layers)
    else:
        out |= rope_keys(_rope(layers[0]))
        out |= write.get(model_type, _mha)(layers)
    _check_same(config, config_from_hf(out), model_type)
    return out


def _rope(block: Block) -> Rope:
    position = block.attention.position
    return position if isinstance(position, Rope) else Rope()


def _of[T](kind: type[T], part: Any) -> T:
    """A part of a layer, of the kind that its family has (``family_of`` has seen to it)."""
    assert isinstance(part, kind)
    return part


def _mha(layers: list[Block]) -> dict:
    a = _of(MHA, layers[0].attention)
    return {
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv,
        "head_dim": a.head_dim,
        **({} if a.qkv_bias else {"attention_bias": False}),  # Qwen2 has no such key
    }


_KINDS = {False: "full_attention", True: "sliding_attention"}


def _windows(layers: list[Block]) -> list[int | None]:
    return [getattr(b.attention, "window", None) for b in layers]


def _kinds(layers: list[Block]) -> list[str]:
    return [_KINDS[window is not None] for window in _windows(layers)]


def _smallest(values) -> Any:
    """Of those that are not None; that the others are equal is checked in the end."""
    return min((v for v in values if v is not None), default=None)


def _qwen(layers: list[Block]) -> dict:
    window = _smallest(_windows(layers))
    if window is None:
        return _mha(layers) | {"use_sliding_window": False}
    return _mha(layers) | {
        "use_sliding_window": True,
        "sliding_window": window,
        "layer_types": _kinds(layers),
    }


def _first_moe(layers: list[Block]) -> MoE | None:
    return next((b.mlp for b in layers if isinstance(b.mlp, MoE)), None)


def _qwen3_moe(layers: list[Block]) -> dict:
    window, moe = _smallest(_windows(layers)), _of(MoE, _first_moe(layers))
    return _mha(layers) | {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "num_experts": moe.total,  # in transformers 4
        "num_local_experts": moe.total,  # in transformers 5
        "num_experts_per_tok": moe.router.top_k,
        "moe_intermediate_size": moe.experts[0].hidden,
        "norm_topk_prob": moe.router.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, b in enumerate(layers) if not isinstance(b.mlp, MoE)],
    }


def _deepseek_v3(layers: list[Block]) -> dict:
    a, moe = _of(MLA, layers[0].attention), _first_moe(layers)
    out = {
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.heads,
        "attention_bias": False,
        "kv_lora_rank": a.kv_rank,
        "q_lora_rank": a.query_rank,
        "qk_nope_head_dim": a.nope_dim,
        "qk_rope_head_dim": a.rope_dim,
        "v_head_dim": a.value_dim,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
        "first_k_dense_replace": sum(not isinstance(b.mlp, MoE) for b in layers),
    }
    if moe is None:
        return out
    hidden = moe.experts[0].hidden
    return out | {
        "n_routed_experts": moe.total,
        "num_experts_per_tok": moe.router.top_k,
        "moe_intermediate_size": hidden,
        "n_shared_experts": moe.shared // hidden,
        "norm_topk_prob": moe.router.normalise,
        "routed_scaling_factor": moe.router.scale,
        "n_group": moe.router.groups,
        "topk_group": moe.router.top_groups,
    }


def _step(layers: list[Block]) -> dict:
    kinds = _kinds(layers)
    by_kind = {kind: _of(MHA, b.attention) for kind, b in zip(kinds, layers, strict=True)}
    a = by_kind.get("full_attention") or by_kind["sliding_attention"]
    ropes = [_rope(b) for b in layers]
    scaled = next((r for r in ropes if r.scaling is not None), None)
    out = {
        "num_attention_heads": a.heads,
        "num_attention_groups": a.kv,
        "head_dim": a.head_dim,
        "layer_types": kinds,
        "sliding_window": _smallest(_windows(layers)),
        "use_head_wise_attn_gate": True,
        "rope_theta": [rope.theta for rope in ropes],
        "partial_rotary_factors": [rope.fraction for rope in ropes],
        "rope_scaling": None if scaled is None else scaling_keys(scaled.scaling),
        "yarn_only_types": ["full_attention"],
        "moe_layers_enum": ",".join(str(i) for i, b in enumerate(layers) if isinstance(b.mlp, MoE)),
        "swiglu_limits": [_limits(b)[0] for b in layers],
        "swiglu_limits_shared": [_limits(b)[1] for b in layers],
        "num_nextn_predict_layers": 0,
    }
    if (windowed := by_kind.get("sliding_attention")) is not None:
        out["attention_other_setting"] = {
            "attention_type": "sliding_attention",
            "num_attention_heads": windowed.heads,
            "num_attention_groups": windowed.kv,
            "head_dim": windowed.head_dim,
        }
    if (moe := _first_moe(layers)) is not None:
        out |= {
            "moe_num_experts": moe.total,
            "moe_top_k": moe.router.top_k,
            "moe_intermediate_size": moe.experts[0].hidden,
            "share_expert_dim": moe.shared,
            "moe_router_activation": "sigmoid",
            "use_moe_router_bias": moe.router.bias,
            "moe_router_scaling_factor": moe.router.scale,
            "norm_expert_weight": True,
            "need_fp32_gate": True,
        }
    return out


def _limits(block: Block) -> tuple[float, float]:
    """Of the routed experts, and of the shared expert or a dense layer."""
    if isinstance(block.mlp, MoE):
        return block.mlp.clamp or 0.0, block.mlp.shared_clamp or 0.0
    assert not isinstance(block.mlp, GELU)  # see family_of
    return 0.0, block.mlp.clamp or 0.0


# --- is it the same model? -----------------------------------------------------------------------


def _explicit(block: Block) -> Block:
    """Without what leaves the function as it is: unwritten head counts, how parts are trained."""
    attention, mlp = block.attention, block.mlp
    if isinstance(attention, MHA | MLA):
        attention = replace(attention, output_rate=1.0)
    if isinstance(attention, MHA):
        attention = replace(attention, kv_heads=attention.kv)
    if isinstance(mlp, MoE):
        router = replace(
            mlp.router, bias_rate=0.0, balance_loss=0.0, group_loss=0.0, loss_groups=1, z_loss=0.0,
            frozen=False,
        )  # fmt: skip
        mlp = replace(mlp, router=router, exchange=None, capacity=None)
    return replace(block, attention=attention, mlp=mlp)


def differences(a: Any, b: Any, path: str) -> Iterator[str]:
    """What differs between two configurations, each in words."""
    if a == b:
        return
    if is_dataclass(a) and type(a) is type(b):
        for f in fields(a):
            yield from differences(getattr(a, f.name), getattr(b, f.name), f"{path}.{f.name}")
    else:
        yield f"{path} is {a!r}, there {b!r}"


def _check_same(ours: Decoder, theirs: Decoder, model_type: str) -> None:
    names = [f.name for f in fields(ours) if f.name not in ("layers", "init")]
    found = [
        d
        for name in names
        for d in differences(getattr(ours, name), getattr(theirs, name), f"model.{name}")
    ]
    for i, (a, b) in enumerate(zip(layers_of(ours), layers_of(theirs), strict=True)):
        found += differences(_explicit(a), _explicit(b), f"layer {i}")
    if found:
        raise ConfigError(f"a {model_type} model cannot express this one: {'; '.join(found)}")
