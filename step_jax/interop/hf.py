"""Weights and configurations in the Hugging Face layout: Llama, Qwen3 and dense DeepSeek-V3 (MLA).

A family is a row in two tables: which of its config.json keys mean what (``_FAMILIES``), and which
of its tensors is which of our parameters (``_ATTENTION``). Linear weights are (out, in) there and
(in..., out...) here, which the parameter's own spec says how to turn; several of our parameters
that are one tensor there are joined on the last axis.

Rotary coordinates: a rotation turns two coordinates, which stand half the rotated width apart here
and in Llama and Qwen3, but beside each other in DeepSeek-V3. Those are reordered on the way in and
out, which changes no score because queries and keys are reordered alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import numpy as np

from step_jax.core.errors import CheckpointError, ConfigError
from step_jax.core.spec import ParamSpec, is_spec, path_name
from step_jax.models.attention import MHA, MLA
from step_jax.models.decoder import Block, Decoder, DecoderParams, Group
from step_jax.models.layers import RMSNorm, SwiGLU
from step_jax.models.positions import Rope

_TOP = {
    "model.embed_tokens.weight": "embedding_VD",
    "model.norm.weight": "final_norm_D",
    "lm_head.weight": "head_DV",
}
_LAYER = {
    "input_layernorm.weight": ("attention_norm_D",),
    "post_attention_layernorm.weight": ("mlp_norm_D",),
    "mlp.gate_proj.weight": ("mlp/gate_DF",),
    "mlp.up_proj.weight": ("mlp/up_DF",),
    "mlp.down_proj.weight": ("mlp/down_FD",),
}
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


# --- configurations ------------------------------------------------------------------------------


def _read_llama(c: Mapping, rope: Rope, window: int | None) -> MHA:
    heads = c["num_attention_heads"]
    return MHA(
        heads=heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        kv_heads=c.get("num_key_value_heads") or heads,
        window=window,
        position=rope,
    )


def _read_qwen3(c: Mapping, rope: Rope, window: int | None) -> MHA:
    return MHA(
        heads=c["num_attention_heads"],
        head_dim=c.get("head_dim") or 128,
        kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        window=window,
        qk_norm=RMSNorm(eps=c.get("rms_norm_eps", 1e-6)),
        position=rope,
    )


def _read_deepseek_v3(c: Mapping, rope: Rope, window: int | None) -> MLA:
    dense = c.get("first_k_dense_replace", 3)
    if dense < c["num_hidden_layers"]:
        raise ConfigError(
            f"layers {dense} to {c['num_hidden_layers'] - 1} of this deepseek_v3 model are "
            "mixtures of experts; only dense ones can be imported"
        )
    return MLA(
        heads=c["num_attention_heads"],
        kv_rank=c["kv_lora_rank"],
        nope_dim=c["qk_nope_head_dim"],
        rope_dim=c["qk_rope_head_dim"],
        value_dim=c["v_head_dim"],
        query_rank=c["q_lora_rank"],
        window=window,
        norm=RMSNorm(eps=1e-6),  # the library's default there, whatever rms_norm_eps says
        position=rope,
    )


def _write_mha(a: MHA) -> dict:
    return {
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv,
        "head_dim": a.head_dim,
    }


def _write_mla(a: MLA) -> dict:
    return {
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.heads,
        "kv_lora_rank": a.kv_rank,
        "q_lora_rank": a.query_rank,
        "qk_nope_head_dim": a.nope_dim,
        "qk_rope_head_dim": a.rope_dim,
        "v_head_dim": a.value_dim,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }


@dataclass(frozen=True)
class _Family:
    architecture: str
    read: Any  # (config.json, Rope, window) -> attention
    windows: bool = False  # config.json can ask for sliding windows


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", _read_llama),
    "qwen3": _Family("Qwen3ForCausalLM", _read_qwen3, windows=True),
    "deepseek_v3": _Family("DeepseekV3ForCausalLM", _read_deepseek_v3),
}


def _unsupported(c: Mapping) -> Iterator[str]:
    """What a config.json asks for and our decoder does not compute."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        yield f"rope scaling {kind!r}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor {rope['partial_rotary_factor']}"
    if any(isinstance(v, dict) for v in rope.values()):
        yield "rope parameters that differ between layers"
    if c.get("hidden_act", "silu") != "silu":
        yield f"hidden_act {c['hidden_act']!r} (only 'silu')"
    yield from (key for key in ("attention_bias", "mlp_bias", "quantization_config") if c.get(key))


def config_from_hf(hf_config: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json describes (of transformers 4 or 5).

    Raises:
      ConfigError: another architecture, a feature we do not compute, or a key that is missing,
        each by its name.
    """
    model_type = hf_config.get("model_type")
    if model_type not in _FAMILIES:
        raise ConfigError(
            f"cannot import the architecture {model_type!r}; there are: {', '.join(_FAMILIES)}"
        )
    family = _FAMILIES[model_type]
    if problems := list(_unsupported(hf_config)):
        raise ConfigError(f"this {model_type} model needs what we lack: {'; '.join(problems)}")
    try:
        rope = hf_config.get("rope_parameters") or {}
        theta = rope.get("rope_theta", hf_config.get("rope_theta", 10_000.0))
        mlp = SwiGLU(hidden=hf_config["intermediate_size"])
        blocks = [
            Block(family.read(hf_config, Rope(theta=theta), window), mlp)
            for window in _windows(hf_config, family)
        ]
        config = Decoder(
            width=hf_config["hidden_size"],
            vocab=hf_config["vocab_size"],
            tied=bool(hf_config.get("tie_word_embeddings", False)),
            norm=RMSNorm(eps=hf_config.get("rms_norm_eps", 1e-6)),
            layers=tuple(Group(len(list(same)), (block,)) for block, same in groupby(blocks)),
        )
    except KeyError as e:
        raise ConfigError(f"config.json of this {model_type} model lacks {e.args[0]!r}") from e
    return config


def _windows(c: Mapping, family: _Family) -> list[int | None]:
    """The sliding window of every layer."""
    depth = c["num_hidden_layers"]
    if not family.windows or not c.get("use_sliding_window"):
        return [None] * depth
    sliding = (
        [kind == "sliding_attention" for kind in c["layer_types"]]
        if c.get("layer_types")
        else [layer >= c["max_window_layers"] for layer in range(depth)]
    )
    if len(sliding) != depth:
        raise ConfigError(f"layer_types names {len(sliding)} layers, num_hidden_layers is {depth}")
    return [c["sliding_window"] if s else None for s in sliding]


def _flat_layers(config: Decoder) -> list[Block]:
    def explicit(block: Block) -> Block:
        if not isinstance(block.attention, MHA):
            return block
        return replace(block, attention=replace(block.attention, kv_heads=block.attention.kv))

    return [explicit(block) for group in config.layers for block in group.blocks * group.repeat]


def config_to_hf(config: Decoder) -> dict[str, Any]:
    """The config.json of ``config``, in the layout of transformers 5.

    Raises:
      ConfigError: no family computes exactly this model; names what differs from the nearest.
    """
    layers = _flat_layers(config)
    attention = layers[0].attention
    if type(attention) not in _ATTENTION:
        kind = type(attention).__name__
        raise ConfigError(f"no Hugging Face family we know has {kind} attention: cannot export")
    mla = isinstance(attention, MLA)
    model_type = "deepseek_v3" if mla else "llama" if attention.qk_norm is None else "qwen3"
    out = {
        "model_type": model_type,
        "architectures": [_FAMILIES[model_type].architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": layers[0].mlp.hidden,
        "num_hidden_layers": len(layers),
        "rms_norm_eps": config.norm.eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": config.tied,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": getattr(attention.position, "theta", 10_000.0),
        },
        **(_write_mla(attention) if mla else _write_mha(attention)),
    }
    if mla:
        out["first_k_dense_replace"] = len(layers)
    windows = {b.attention.window for b in layers if b.attention.window is not None}
    if model_type == "qwen3" and windows:
        kinds = {False: "full_attention", True: "sliding_attention"}
        out |= {
            "use_sliding_window": True,
            "sliding_window": min(windows),
            "layer_types": [kinds[b.attention.window is not None] for b in layers],
        }
    _check_same(config, config_from_hf(out), model_type)
    return out


def _check_same(ours: Decoder, theirs: Decoder, model_type: str) -> None:
    def differences(a, b, path: str) -> Iterator[str]:
        if a == b:
            return
        if is_dataclass(a) and type(a) is type(b):
            for f in fields(a):
                yield from differences(getattr(a, f.name), getattr(b, f.name), f"{path}.{f.name}")
        else:
            yield f"{path} is {a!r}, there {b!r}"

    found = [
        d
        for name in ("width", "vocab", "tied", "norm", "mtp")
        for d in differences(getattr(ours, name), getattr(theirs, name), f"model.{name}")
    ]
    for i, (a, b) in enumerate(zip(_flat_layers(ours), _flat_layers(theirs), strict=True)):
        found += differences(a, b, f"layer {i}")
    if found:
        raise ConfigError(f"a {model_type} model cannot express this one: {'; '.join(found)}")


# --- tensors -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the other layout, and the leaves of ours it holds."""

    name: str
    leaves: tuple[str, ...]
    specs: tuple[ParamSpec, ...]
    layer: int | None  # place on the leaves' stacked axis
    reorder: int = 0  # width of the neighbouring rotated coordinates at the last axis's end

    @property
    def shape(self) -> tuple[int, ...]:
        """Of our leaves, joined on the last axis."""
        shapes = [s.shape[s.stacked :] for s in self.specs]
        return (*shapes[0][:-1], sum(s[-1] for s in shapes))

    @property
    def transposed(self) -> bool:
        return self.specs[0].role in ("matrix", "head")

    @property
    def their_shape(self) -> tuple[int, ...]:
        if not self.transposed:
            return self.shape
        fan_in = self.specs[0].fan_in
        return math.prod(self.shape[fan_in:]), math.prod(self.shape[:fan_in])

    def to_ours(self, w: np.ndarray) -> list[np.ndarray]:
        a = (w.T if self.transposed else w).reshape(self.shape)
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
            a = a.reshape(self.their_shape[::-1]).T
        return np.ascontiguousarray(a)


def _layout(config: Decoder, rope_interleave: bool) -> tuple[list[_Tensor], dict[str, ParamSpec]]:
    """All tensors of ``config`` and all its leaves by path.

    Raises:
      ConfigError: parameters that the layout has no tensor for.
    """
    specs = {
        path_name(path): spec
        for path, spec in jax.tree_util.tree_leaves_with_path(config.specs(), is_leaf=is_spec)
    }
    tensors = [
        _Tensor(name, (leaf,), (specs[leaf],), None) for name, leaf in _TOP.items() if leaf in specs
    ]
    first = 0
    for g, group in enumerate(config.layers):
        for j, block in enumerate(group.blocks):
            attention = block.attention
            for name, parts in (_LAYER | _ATTENTION.get(type(attention), {})).items():
                leaves = tuple(f"groups/{g}/{j}/{part}" for part in parts)
                if leaves[0] not in specs:
                    continue
                rotated = isinstance(attention, MLA) and rope_interleave and name in _ROTATED
                reorder = attention.rope_dim if rotated else 0
                for r in range(group.repeat):
                    full = f"model.layers.{first + r * len(group.blocks) + j}.{name}"
                    its = tuple(specs[leaf] for leaf in leaves)
                    tensors.append(_Tensor(full, leaves, its, r, reorder))
        first += group.repeat * len(group.blocks)
    if homeless := specs.keys() - {leaf for t in tensors for leaf in t.leaves}:
        raise ConfigError(
            f"no Hugging Face tensor for the parameters {', '.join(sorted(homeless))}"
        )
    return tensors, specs


def params_from_hf(
    state: Mapping[str, np.ndarray], config: Decoder, *, rope_interleave: bool = True
) -> DecoderParams:
    """Parameters of ``config`` as NumPy arrays of the specs' dtype, for ``jax.device_put``.

    Args:
      state: tensor name -> array, any float dtype; read one tensor at a time.
      config: usually from ``config_from_hf``.
      rope_interleave: of DeepSeek-V3's config.json; other families do not have it.

    Raises:
      CheckpointError: names every tensor that is missing, unused or of another shape.
      ConfigError: ``config`` has parameters without a tensor.
    """
    tensors, specs = _layout(config, rope_interleave)
    # Buffers that older versions of the library saved, and a head that is the embedding.
    unused = {k for k in state if not k.endswith("rotary_emb.inv_freq")} - {t.name for t in tensors}
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
                flat[leaf][... if t.layer is None else t.layer] = a
    if problems:
        raise CheckpointError("the weights do not fit the model: " + "; ".join(problems))
    return jax.tree_util.tree_map_with_path(
        lambda path, _: flat[path_name(path)], config.specs(), is_leaf=is_spec
    )


def _same_as_embedding(state: Mapping[str, np.ndarray]) -> bool:
    embedding = state.get("model.embed_tokens.weight")
    return embedding is not None and np.array_equal(state["lm_head.weight"], embedding)


def params_to_hf(
    params: DecoderParams, config: Decoder, *, rope_interleave: bool = True, dtype=None
) -> dict[str, np.ndarray]:
    """The inverse of ``params_from_hf``: tensor name -> array, of ``dtype`` or the parameters' own.

    Raises:
      ConfigError: ``config`` has parameters without a tensor.
    """
    tensors, _ = _layout(config, rope_interleave)
    flat = {
        path_name(path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(params)
    }
    out = {}
    for t in tensors:
        leaves = [flat[leaf] if t.layer is None else flat[leaf][t.layer] for leaf in t.leaves]
        w = t.to_theirs(leaves)
        out[t.name] = w if dtype is None else w.astype(dtype)
    return out


# --- folders -------------------------------------------------------------------------------------


class _Folder(Mapping):
    """The tensors of a folder's .safetensors files, each read when it is asked for."""

    def __init__(self, path: Path):
        from safetensors import safe_open

        index = path / "model.safetensors.index.json"
        if index.is_file():  # a folder may hold other formats' files beside these
            names = set(json.loads(index.read_text())["weight_map"].values())
        else:
            names = {p.name for p in path.glob("*.safetensors")}
        if not names:
            raise CheckpointError(f"no .safetensors file in {path}")
        if absent := sorted(n for n in names if not (path / n).is_file()):
            raise CheckpointError(f"{path} lacks {', '.join(absent)}, which its index names")
        files = [safe_open(path / n, framework="np") for n in sorted(names)]
        self._file = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file[name].get_tensor(name)

    def __iter__(self):
        return iter(self._file)

    def __len__(self):
        return len(self._file)


def load_hf(path: str | Path) -> tuple[Decoder, DecoderParams]:
    """Configuration and parameters (NumPy) of a folder with config.json and .safetensors files.

    Needs the package `safetensors` (the extra `hf`).

    Raises:
      CheckpointError: a file is missing, or the tensors do not fit config.json (each is named).
      ConfigError: as ``config_from_hf``.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"no config.json in {path}")
    hf_config = json.loads((path / "config.json").read_text())
    config = config_from_hf(hf_config)
    interleaved = hf_config.get("rope_interleave", True)
    return config, params_from_hf(_Folder(path), config, rope_interleave=interleaved)


def save_hf(
    path: str | Path, params: DecoderParams, config: Decoder, dtype: str = "bfloat16"
) -> None:
    """Writes config.json and model.safetensors, which `transformers` loads, into a new folder.

    Needs the package `safetensors` (the extra `hf`).

    Raises:
      ConfigError: no Hugging Face family computes this model.
      FileExistsError: ``path`` exists and is not empty.
    """
    from safetensors.numpy import save_file

    hf_config = config_to_hf(config) | {"dtype": dtype}
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty: choose a new folder to export into")
    path.mkdir(parents=True, exist_ok=True)
    state = params_to_hf(params, config, dtype=dtype)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    # Last, so that a folder with a config.json is whole.
    (path / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
