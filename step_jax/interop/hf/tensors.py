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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from step_jax.core.errors import ConfigError
from step_jax.core.spec import ParamSpec, by_name
from step_jax.interop.hf.export import family_of
from step_jax.interop.hf.families import mtp_depth, text_keys
from step_jax.interop.hf.keys import Keys
from step_jax.models.layers.attention import MHA, MLA
from step_jax.models.layers.moe import MoE
from step_jax.models.text.decoder import Block, Decoder

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
_ATTENTION: dict[type, dict[str, tuple[str, ...]]] = {
    MHA: {
        "self_attn.q_proj.weight": ("attention/query_DNH",),
        "self_attn.k_proj.weight": ("attention/key_DKH",),
        "self_attn.v_proj.weight": ("attention/value_DKH",),
        "self_attn.q_proj.bias": ("attention/query_bias_NH",),
        "self_attn.k_proj.bias": ("attention/key_bias_KH",),
        "self_attn.v_proj.bias": ("attention/value_bias_KH",),
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


#: Of each of their axes in turn, the axes of ours that it is made of; none for an axis of one.
Form = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Tensor:
    """One tensor of the other layout, and the leaves of ours it holds."""

    name: str
    leaves: tuple[str, ...]
    specs: tuple[ParamSpec, ...]
    place: tuple[int, ...] = ()  # on the leaves' leading axes: layer, expert
    reorder: int = 0  # width of the neighbouring rotated coordinates at the last axis's end
    form: Form | None = None  # None for what the parameter's role says

    @property
    def shape(self) -> tuple[int, ...]:
        """Of our leaves, joined on the last axis."""
        shapes = [s.shape[len(self.place) :] for s in self.specs]
        return (*shapes[0][:-1], sum(s[-1] for s in shapes))

    @property
    def made_of(self) -> Form:
        """A matrix is two axes there, what it gives before what it reads, a vector one, and
        experts may be stacked before them."""
        if self.form is not None:
            return self.form
        every, spec = tuple(range(len(self.shape))), self.specs[0]
        if spec.role == "embedding":
            return tuple((axis,) for axis in every)
        stack = spec.stacked - len(self.place)
        leading = tuple((axis,) for axis in every[:stack])
        if spec.role in ("vector", "balance"):
            return (*leading, every[stack:])
        out = stack + spec.fan_in
        return (*leading, every[out:], every[stack:out])

    @property
    def axes(self) -> tuple[int, ...]:
        """Our axes in their order."""
        return tuple(axis for ours in self.made_of for axis in ours)

    @property
    def apart(self) -> tuple[int, ...]:
        """Their shape with each of our axes for itself."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def their_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[axis] for axis in ours) for ours in self.made_of)

    @property
    def order(self) -> np.ndarray:
        """For every one of our joined coordinates on the last axis, which one it is there."""
        order = np.arange(self.shape[-1])
        if self.reorder:
            order[-self.reorder :] = order[-self.reorder :].reshape(-1, 2).T.ravel()
        return order

    def parts(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every leaf with its part of ``order``."""
        widths = [s.shape[-1] for s in self.specs]
        yield from zip(self.leaves, np.split(self.order, np.cumsum(widths)[:-1]), strict=True)


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
        reorder = 0
        if isinstance(block.attention, MLA) and rope_interleave and name in _ROTATED:
            reorder = block.attention.rope_dim
        yield name, leaves, its, reorder, its[0].shape[1] if "#" in name else None


def layout(
    config: Decoder, rope_interleave: bool = True
) -> tuple[list[Tensor], dict[str, ParamSpec]]:
    """All tensors of ``config`` and all its leaves by path.

    Args:
      rope_interleave: of DeepSeek-V3's config.json; other families do not have it.

    Raises:
      ConfigError: parameters that the layout has no tensor for.
    """
    specs = by_name(config.specs())
    family = family_of(config)
    tensors = [
        Tensor(name, (leaf,), (specs[leaf],)) for name, leaf in _TOP.items() if leaf in specs
    ]
    for stack in config.trunk.walk():
        for name, leaves, its, reorder, experts in _layer_tensors(
            stack.block, family, specs, stack.path, rope_interleave
        ):
            for place in product(range(stack.repeat), *([range(experts)] if experts else [])):
                layer = stack.layer(place[0])
                full = f"model.layers.{layer}.{name.replace('#', str(place[-1]))}"
                tensors.append(Tensor(full, leaves, its, place, reorder))
    check_complete(tensors, specs)
    return tensors, specs


def check_complete(tensors: list[Tensor], specs: Mapping[str, ParamSpec]) -> None:
    """Raises ConfigError for parameters that no tensor holds."""
    if homeless := specs.keys() - {leaf for t in tensors for leaf in t.leaves}:
        raise ConfigError(
            f"no Hugging Face tensor for the parameters {', '.join(sorted(homeless))}"
        )


def left_out(hf_config: Mapping[str, Any]) -> re.Pattern:
    """Names of a checkpoint's tensors that are no part of the decoder in its config.json.

    Those are the layers of multi-token prediction (DeepSeek-V3, Step-3.5-Flash) and what sees
    (Step-3.7-Flash).
    """
    text = text_keys(hf_config)
    c = Keys(text, "config.json")
    depth = c.integer("num_hidden_layers")
    extra = range(depth, depth + mtp_depth(c))
    patterns = [rf"model\.layers\.{layer}\." for layer in extra]
    if text is not hf_config:
        patterns += [r"(model\.)?vision_model\.", r"(model\.)?vit_large_projector\."]
    return re.compile("|".join(patterns) or r"(?!)")
