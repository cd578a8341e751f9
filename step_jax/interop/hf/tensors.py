"""Which tensor of the Hugging Face layout is which of our parameters.

Linear weights are (out, in) there and (in..., out...) here, which the parameter's own spec says how
to turn; several of our parameters that are one tensor there are joined on the last axis. Of a stack
of experts, Qwen3-MoE and DeepSeek-V3 have a tensor per expert, Step-3.5-Flash one for all experts.

Rotary coordinates: a rotation turns two coordinates, which stand half the rotated width apart here
and in the other families, but beside each other in DeepSeek-V3. Those are reordered on the way in
and out, which changes no score because queries and keys are reordered alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import numpy as np

from step_jax.core.errors import CheckpointError, ConfigError
from step_jax.core.spec import FLOAT32_ROLES, ParamSpec, is_spec, path_name
from step_jax.interop.hf.export import family_of
from step_jax.models.layers.attention import MHA, MLA
from step_jax.models.layers.moe import MoE
from step_jax.models.text.decoder import Block, Decoder, DecoderParams

_TOP = {
    "model.embed_tokens.weight": "embedding_VD",
    "model.norm.weight": "final_norm_D",
    "lm_head.weight": "head_DV",
}
_LAYER = {
    "input_layernorm.weight": ("attention_norm_D",),
    "post_attention_layernorm.weight": ("mlp_norm_D",),
}


def _swiglu(name: str, path: str, leaves=("gate_DF", "up_DF", "down_FD")):
    """The three tensors of gated perceptrons; ``name`` has their own name's place in braces."""
    parts = ("gate", "up", "down")
    return {
        name.format(f"{part}_proj.weight"): (f"{path}/{leaf}",)
        for part, leaf in zip(parts, leaves, strict=True)
    }


_EXPERTS = ("mlp/experts/0", ("gate_EDF", "up_EDF", "down_EFD"))
_DENSE = _swiglu("mlp.{}", "mlp")
# ``#`` stands for the number of an expert, of which each has a tensor.
_MOE = {
    "mlp.gate.weight": ("mlp/router_DE",),
    "mlp.gate.e_score_correction_bias": ("mlp/bias_E",),
    **_swiglu("mlp.experts.#.{}", *_EXPERTS),
    **_swiglu("mlp.shared_experts.{}", "mlp/shared"),
}
_STEP_MOE = {
    "moe.gate.weight": ("mlp/router_DE",),
    "moe.router_bias": ("mlp/bias_E",),
    **_swiglu("moe.{}", *_EXPERTS),
    **_swiglu("share_expert.{}", "mlp/shared"),
}
_GATE = {"self_attn.g_proj.weight": ("attention/gate_DN",)}
# A tensor whose parameters a configuration does not have (QK-norm, query latent) is left out.
_ATTENTION = {
    MHA: {
        "self_attn.q_proj.weight": ("attention/query_DNH",),
        "self_attn.k_proj.weight": ("attention/key_DKH",),
        "self_attn.v_proj.weight": ("attention/value_DKH",),
        "self_attn.o_proj.weight": ("attention/output_NHD",),
        "self_attn.q_norm.weight": ("attention/query_norm_H",),
        "self_attn.k_norm.weight": ("attention/key_norm_H",),
    },
    MLA: {
        "self_attn.q_proj.weight": ("attention/query_DNH",),
        "self_attn.q_a_proj.weight": ("attention/query_down_DQ",),
        "self_attn.q_a_layernorm.weight": ("attention/query_norm_Q",),
        "self_attn.q_b_proj.weight": ("attention/query_up_QNH",),
        "self_attn.kv_a_proj_with_mqa.weight": (
            "attention/latent_DR",
            "attention/rotated_key_DE",
        ),
        "self_attn.kv_a_layernorm.weight": ("attention/latent_norm_R",),
        "self_attn.kv_b_proj.weight": ("attention/key_up_RNP", "attention/value_up_RNV"),
        "self_attn.o_proj.weight": ("attention/output_NVD",),
    },
}
# Of an MLA layer, the tensors whose last ``rope_dim`` coordinates are rotated.
_ROTATED = (
    "self_attn.q_proj.weight",
    "self_attn.q_b_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight",
)


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the other layout, and the leaves of ours it holds."""

    name: str
    leaves: tuple[str, ...]
    specs: tuple[ParamSpec, ...]
    place: tuple[int, ...] = ()  # on the leaves' leading axes: layer, expert
    reorder: int = 0  # width of the neighbouring rotated coordinates at the last axis's end

    @property
    def shape(self) -> tuple[int, ...]:
        """Of our leaves, joined on the last axis."""
        shapes = [s.shape[len(self.place) :] for s in self.specs]
        return (*shapes[0][:-1], sum(s[-1] for s in shapes))

    @property
    def transposed(self) -> bool:
        return self.specs[0].role in ("matrix", "head", "router")

    @property
    def their_shape(self) -> tuple[int, ...]:
        if not self.transposed:
            return self.shape
        spec = self.specs[0]
        stack = spec.stacked - len(self.place)
        fan_in = stack + spec.fan_in
        rows, columns = math.prod(self.shape[stack:fan_in]), math.prod(self.shape[fan_in:])
        return (*self.shape[:stack], columns, rows)

    def to_ours(self, w: np.ndarray) -> list[np.ndarray]:
        a = (w.swapaxes(-1, -2) if self.transposed else w).reshape(self.shape)
        if self.reorder:
            order = np.arange(self.reorder).reshape(-1, 2).T.ravel()
            a = np.concatenate([a[..., : -self.reorder], a[..., -self.reorder :][..., order]], -1)
        widths = [s.shape[-1] for s in self.specs]
        return np.split(a, np.cumsum(widths)[:-1], axis=-1)

    def to_theirs(self, leaves: list[np.ndarray]) -> np.ndarray:
        a = np.concatenate(leaves, axis=-1)
        if self.reorder:
            order = np.arange(self.reorder).reshape(2, -1).T.ravel()
            a = np.concatenate([a[..., : -self.reorder], a[..., -self.reorder :][..., order]], -1)
        if self.transposed:
            *stack, columns, rows = self.their_shape
            a = a.reshape(*stack, rows, columns).swapaxes(-1, -2)
        return np.ascontiguousarray(a)


def _table(block: Block, family: str) -> dict[str, tuple[str, ...]]:
    """Tensor name after the layer's number -> path in the layer's parameters."""
    table = _LAYER | _ATTENTION[type(block.attention)]
    if family == "step3p5":
        table |= _GATE
    if not isinstance(block.mlp, MoE):
        return table | _DENSE
    return table | (_STEP_MOE if family == "step3p5" else _MOE)


def _layer_tensors(block: Block, family: str, specs, leaf_path: str, rope_interleave: bool):
    """Yields (name, leaves, their specs, reorder, number of experts if the name has a ``#``)."""
    for name, parts in _table(block, family).items():
        leaves = tuple(f"{leaf_path}/{part}" for part in parts)
        if leaves[0] not in specs:
            continue
        its = tuple(specs[leaf] for leaf in leaves)
        rotated = isinstance(block.attention, MLA) and rope_interleave and name in _ROTATED
        reorder = block.attention.rope_dim if rotated else 0
        yield name, leaves, its, reorder, its[0].shape[1] if "#" in name else None


def _layout(config: Decoder, rope_interleave: bool) -> tuple[list[_Tensor], dict[str, ParamSpec]]:
    """All tensors of ``config`` and all its leaves by path.

    Raises:
      ConfigError: parameters that the layout has no tensor for.
    """
    specs = {
        path_name(path): spec
        for path, spec in jax.tree_util.tree_leaves_with_path(config.specs(), is_leaf=is_spec)
    }
    family = family_of(config)
    tensors = [
        _Tensor(name, (leaf,), (specs[leaf],)) for name, leaf in _TOP.items() if leaf in specs
    ]
    for stack in config.trunk.walk():
        for name, leaves, its, reorder, experts in _layer_tensors(
            stack.block, family, specs, stack.path, rope_interleave
        ):
            for place in product(range(stack.repeat), *([range(experts)] if experts else [])):
                layer = stack.layer(place[0])
                full = f"model.layers.{layer}.{name.replace('#', str(place[-1]))}"
                tensors.append(_Tensor(full, leaves, its, place, reorder))
    if homeless := specs.keys() - {leaf for t in tensors for leaf in t.leaves}:
        raise ConfigError(
            f"no Hugging Face tensor for the parameters {', '.join(sorted(homeless))}"
        )
    return tensors, specs


def left_out(hf_config: Mapping[str, Any]) -> re.Pattern:
    """Names of a checkpoint's tensors that are no part of the decoder in its config.json.

    Those are the layers of multi-token prediction (DeepSeek-V3, Step-3.5-Flash) and what sees
    (Step-3.7-Flash).
    """
    text = hf_config.get("text_config") or hf_config
    depth = text.get("num_hidden_layers", 0)
    extra = range(depth, depth + (text.get("num_nextn_predict_layers") or 0))
    patterns = [rf"model\.layers\.{layer}\." for layer in extra]
    if text is not hf_config:
        patterns += [r"(model\.)?vision_model\.", r"(model\.)?vit_large_projector\."]
    return re.compile("|".join(patterns) or r"(?!)")


def params_from_hf(
    state: Mapping[str, np.ndarray],
    config: Decoder,
    *,
    rope_interleave: bool = True,
    ignored: re.Pattern | None = None,
) -> DecoderParams:
    """Parameters of ``config`` as NumPy arrays of the specs' dtype, for ``jax.device_put``.

    Args:
      state: tensor name -> array, any float dtype; read one tensor at a time.
      config: usually from ``config_from_hf``.
      rope_interleave: of DeepSeek-V3's config.json; other families do not have it.
      ignored: names of tensors that may be there without being read, see ``left_out``.

    Raises:
      CheckpointError: another number of experts; or names every tensor that is missing, unused or
        of another shape.
      ConfigError: ``config`` has parameters without a tensor.
    """
    tensors, specs = _layout(config, rope_interleave)
    _check_experts(state, tensors)
    # Buffers that older versions of the library saved, and a head that is the embedding.
    unused = {k for k in state if not k.endswith("rotary_emb.inv_freq")} - {t.name for t in tensors}
    if ignored is not None:
        unused = {k for k in unused if not ignored.match(k)}
    if config.tied and "lm_head.weight" in unused and _same_as_embedding(state):
        unused.remove("lm_head.weight")
    problems = [f"missing {t.name} {t.their_shape}" for t in tensors if t.name not in state]
    problems += [f"unused {name} {tuple(state[name].shape)}" for name in sorted(unused)]
    flat = {path: np.empty(s.shape, s.dtype) for path, s in specs.items()} if not problems else {}
    for t in tensors:
        if t.name not in state:
            continue
        w = state[t.name]
        if tuple(w.shape) != t.their_shape:
            problems.append(f"{t.name} has shape {tuple(w.shape)}, expected {t.their_shape}")
        elif not problems:
            for leaf, a in zip(t.leaves, t.to_ours(w), strict=True):
                flat[leaf][t.place or ...] = a
    if problems:
        raise CheckpointError("the weights do not fit the model: " + "; ".join(problems))
    return jax.tree_util.tree_map_with_path(
        lambda path, _: flat[path_name(path)], config.specs(), is_leaf=is_spec
    )


def _check_experts(state: Mapping[str, np.ndarray], tensors: list[_Tensor]) -> None:
    """Refuses routers to another number of experts, before every expert is listed as missing."""
    for t in tensors:
        if t.specs[0].role != "router" or t.name not in state:
            continue
        there, here = state[t.name].shape[0], t.their_shape[0]
        if there != here:
            raise CheckpointError(
                f"the checkpoint has {there} experts ({t.name}), the model {here}: set the "
                "number of experts to the checkpoint's"
            )


def _same_as_embedding(state: Mapping[str, np.ndarray]) -> bool:
    embedding = state.get("model.embed_tokens.weight")
    return embedding is not None and np.array_equal(state["lm_head.weight"], embedding)


def params_to_hf(
    params: DecoderParams, config: Decoder, *, rope_interleave: bool = True, dtype=None
) -> dict[str, np.ndarray]:
    """The inverse of ``params_from_hf``: tensor name -> array, of ``dtype`` or the parameters' own.

    Routers and selection biases stay float32, in which they decide.

    Raises:
      ConfigError: ``config`` has parameters without a tensor.
    """
    tensors, _ = _layout(config, rope_interleave)
    flat = {
        path_name(path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(params)
    }
    out = {}
    for t in tensors:
        w = t.to_theirs([flat[leaf][t.place or ...] for leaf in t.leaves])
        kept = dtype is None or t.specs[0].role in FLOAT32_ROLES
        out[t.name] = w if kept else w.astype(dtype)
    return out
