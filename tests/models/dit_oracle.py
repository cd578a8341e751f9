"""The diffusion transformer of Step-Video in float64 NumPy: one sample, token by token.

Written from the report (arXiv 2502.10248), PixArt-alpha (arXiv 2310.00426, adaLN-single) and DDPM's
sinusoids; nothing here may import step_jax. ``p`` is a tree with the names of the parameters.

Shapes: T tokens, S states of the text, D width, N heads, H head width.
"""

from __future__ import annotations

import math

import numpy as np

from tests.models.numpy_oracles import rms_norm, rope

AXES = 3


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def layer_norm(x, eps, scale=1.0, bias=0.0):
    return (x - x.mean()) / math.sqrt(x.var() + eps) * scale + bias


def rope_3d(u, place, widths, theta=10_000.0):
    """Each piece of a head turned by its own coordinate."""
    edges = np.cumsum([0, *widths])
    pieces = [rope(u[edges[a] : edges[a + 1]], int(place[a]), theta) for a in range(AXES)]
    return np.concatenate(pieces)


def attention(q, k, v):
    """q (T, N, H), k and v (S, N, H): every query sees every key."""
    out = np.zeros((len(q), *v.shape[1:]))
    for n in range(q.shape[1]):
        for t in range(len(q)):
            scores = np.array([q[t, n] @ k[s, n] for s in range(len(k))]) / math.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            out[t, n] = (weights / weights.sum()) @ v[:, n]
    return out


def heads(x, w, norm=None, eps=1e-6):
    """x (T, D) through w (D, N, H), each head normalised."""
    y = np.einsum("td,dnh->tnh", x, w)
    if norm is not None:
        y = np.array([[rms_norm(head, norm, eps) for head in token] for token in y])
    return y


def self_attention(p, x, places, widths):
    q, k = (
        np.array([[rope_3d(h, places[t], widths) for h in y[t]] for t in range(len(x))])
        for y in (heads(x, p.query_DNH, p.query_norm_H), heads(x, p.key_DKH, p.key_norm_H))
    )
    return np.einsum("tnh,nhd->td", attention(q, k, heads(x, p.value_DKH)), p.output_NHD)


def cross_attention(p, x, states):
    q, k = heads(x, p.query_DNH, p.query_norm_H), heads(states, p.key_DNH, p.key_norm_H)
    return np.einsum("tnh,nhd->td", attention(q, k, heads(states, p.value_DNH)), p.output_NHD)


def block(p, table, x, places, widths, states):
    """One layer: ``table`` (6, D) is the time's, to which the layer's own is added."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table + p.modulation_MD

    def modulated(x, norm, scale, shift):
        return np.array(
            [layer_norm(t, 1e-5, norm.scale_D, norm.bias_D) * (1 + scale) + shift for t in x]
        )

    y = modulated(x, p.attention_norm_D, scale_a, shift_a)
    x = x + (1 + gate_a) * self_attention(p.attention, y, places, widths)
    x = x + cross_attention(p.cross, x, states)
    y = modulated(x, p.mlp_norm_D, scale_m, shift_m)
    return x + (1 + gate_m) * (gelu(y @ p.mlp.up_DF) @ p.mlp.down_FD)


def embedded(p, number):
    """The embedding of a number through cosines and sines and two layers."""
    frequencies = np.exp(-math.log(10_000) * np.arange(128) / 128)
    waves = np.concatenate([np.cos(number * frequencies), np.sin(number * frequencies)])
    return silu(waves @ p.in_WD + p.in_bias_D) @ p.out_DD + p.out_bias_D


def model(p, layers, x, time, places, widths, texts, scalars, first=None):
    """What the transformer predicts for the patches x (T, P) of one sample.

    texts: (clip states, llm states), without padding; the first meets one layer, the second a norm
    and two.
    """
    e = embedded(p.time, 1000 * time) + sum(
        embedded(own, number) for own, number in zip(p.scalars, scalars, strict=True)
    )
    table = np.einsum("d,dme->me", silu(e), p.modulation_DMD) + p.modulation_bias_MD
    clip, llm = texts
    one, two = p.text
    normed = np.array([layer_norm(s, 1e-6) for s in llm])
    llm = gelu(normed @ two.in_ED + two.in_bias_D) @ two.out_DD + two.out_bias_D
    states = np.concatenate([clip @ one.weight_ED + one.bias_D, llm])
    x = x if first is None else np.concatenate([x, first], -1)
    x = x @ p.patch_PD + p.patch_bias_D
    for layer in layers:
        x = block(layer, table, x, places, widths, states)
    shift, scale = e + p.final_MD
    x = np.array([layer_norm(t, 1e-6) * (1 + scale) + shift for t in x])
    return x @ p.head_DP + p.head_bias_P
