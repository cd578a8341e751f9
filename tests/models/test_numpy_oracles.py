"""The float64 oracles against logits that `transformers` computed.

MFA and MFA-KR have no other implementation to compare with; what their oracles are made of (one
head's softmax, RMSNorm, RoPE, the window, QK-norm) is shared with the GQA and MLA oracles, and
those are held to a library's numbers here.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.golden import golden
from tests.models import numpy_oracles as oracle


def split_heads(weight: np.ndarray, heads: int) -> np.ndarray:
    """(heads * c, d) as stored -> (heads, d, c)."""
    return weight.reshape(heads, -1, weight.shape[1]).transpose(0, 2, 1)


def attention(c: dict, layer: int, weight, x: np.ndarray) -> np.ndarray:
    heads, eps = c["num_attention_heads"], c["rms_norm_eps"]
    sliding = c.get("layer_types", ["full_attention"] * 9)[layer] == "sliding_attention"
    positions = oracle.Positions(
        theta=c["rope_parameters"]["rope_theta"], window=c["sliding_window"] if sliding else None
    )
    output = split_heads(weight("o_proj").T, heads).transpose(0, 2, 1)
    if c["model_type"] != "deepseek_v3":
        groups = c["num_key_value_heads"]
        return oracle.gqa(
            x,
            split_heads(weight("q_proj"), heads),
            split_heads(weight("k_proj"), groups),
            split_heads(weight("v_proj"), groups),
            output,
            positions,
            eps=eps,
            q_norm=weight("q_norm"),
            k_norm=weight("k_norm"),
        )
    n, r, rank = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["kv_lora_rank"]
    # Rotating neighbours equals rotating halves after the even entries are put before the odd.
    order = np.arange(r).reshape(-1, 2).T.ravel() if c["rope_interleave"] else np.arange(r)
    low_rank = c["q_lora_rank"] is not None
    up_q = split_heads(weight("q_b_proj") if low_rank else weight("q_proj"), heads)
    down_kv = weight("kv_a_proj_with_mqa").T
    up_kv = split_heads(weight("kv_b_proj"), heads)
    return oracle.mla(
        x,
        weight("q_a_proj").T if low_rank else None,
        weight("q_a_layernorm"),
        np.concatenate([up_q[..., :n], up_q[..., n:][..., order]], axis=-1),
        down_kv[:, :rank],
        weight("kv_a_layernorm"),
        down_kv[:, rank:][:, order],
        up_kv[..., :n],
        up_kv[..., n:],
        output,
        positions,
        rope_dims=r,
        eps=eps,
    )


def decoder(c: dict, state: dict, tokens: np.ndarray) -> np.ndarray:
    """One sequence (T,) -> logits (T, V)."""

    def norm(x, name):
        weight = state[f"{name}.weight"]
        return np.stack([oracle.rms_norm(row, weight, c["rms_norm_eps"]) for row in x])

    embedding = state["model.embed_tokens.weight"]
    x = embedding[tokens]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        h = norm(x, f"{prefix}.input_layernorm")
        x = x + attention(
            c, layer, lambda name, p=prefix: state.get(f"{p}.self_attn.{name}.weight"), h
        )
        h = norm(x, f"{prefix}.post_attention_layernorm")
        gate = h @ state[f"{prefix}.mlp.gate_proj.weight"].T
        up = h @ state[f"{prefix}.mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ state[f"{prefix}.mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ state.get("lm_head.weight", embedding).T


@pytest.mark.parametrize("name", golden.DENSE)
def test_oracles_reproduce_transformers(name):
    g = golden.load(name)
    state = {k: v.astype(np.float64) for k, v in g.state.items()}
    logits = np.stack([decoder(g.config, state, tokens) for tokens in g.tokens_BT])
    # The golden logits are fp32, so their own rounding is the tolerance.
    assert np.abs(logits - g.logits_BTV).max() < 3e-6 * np.abs(g.logits_BTV).max()


def test_alibi_slopes_of_the_paper():
    assert oracle.alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert oracle.alibi_slopes(3) == [2.0**-4, 2.0**-8, 2.0**-2]
