"""Attention mechanisms transcribed from their papers in float64 NumPy, head by head.

Written from the equations, not from step_jax, and deliberately slow: one sequence, explicit loops
over heads, queries and keys, no masks as arrays, no batching. Nothing here may import step_jax.

Sources: MFA and MFA-KR, arXiv 2412.19255 eq. for O_i and the key-reuse reparameterisation;
released MFA form, Step-3 (arXiv 2507.19427); MLA, arXiv 2405.04434 sec. 2.1; RoPE,
arXiv 2104.09864 (rotation of dimension c with c + d/2); ALiBi, arXiv 2108.12409, with the
square-root distance of Step-1; head-wise gate, Step-3.5-Flash (arXiv 2602.10604).

Shapes: T positions, D model width, C head width, R rank of a latent, m heads, g key/value heads.
Every vector is a row, as in the papers: x_i S_q is x_i @ S_q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x (n,), weight (n,) -> x / sqrt(mean(x^2) + eps) * weight."""
    return x / math.sqrt(float(np.mean(x * x)) + eps) * weight


def rope(u: Array, position: int, theta: float, rotary_dims: int | None = None) -> Array:
    """Rotates the pairs (c, c + d/2) of the first d = rotary_dims entries of u (n,)."""
    d = len(u) if rotary_dims is None else rotary_dims
    out = u.copy()
    for c in range(d // 2):
        angle = position * theta ** (-2.0 * c / d)
        a, b = u[c], u[c + d // 2]
        out[c] = a * math.cos(angle) - b * math.sin(angle)
        out[c + d // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8h/m), h = 1..m, for a power of two m; else the nearest smaller power of two's slopes
    followed by every other slope of twice that power (the ALiBi authors' rule)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    finer = [2.0 ** (-8.0 * h / (2 * power)) for h in range(1, 2 * power + 1)]
    return slopes + finer[0::2][: heads - power]


def alibi_bias(head: int, heads: int, square_root: bool) -> Callable[[int, int], float]:
    """bias(i, j) = -slope |i - j|, or -slope sqrt |i - j|."""
    slope = alibi_slopes(heads)[head]
    return lambda i, j: -slope * (math.sqrt(abs(i - j)) if square_root else float(abs(i - j)))


@dataclass(frozen=True)
class Positions:
    """How position enters (rotary, partial or by pieces, or a bias on the scores, or neither), and
    who sees whom."""

    theta: float | None = None
    rotary_dims: int | None = None
    alibi: str | None = None  # None, "linear" or "sqrt"
    window: int | None = None  # keys j with i - window < j <= i, and j < i + window
    causal: bool = True
    documents: Array | None = None  # (T,), 0 for padding
    blocks: Array | None = None  # (T,), negative for none
    axes: tuple[int, ...] = ()  # widths of the pieces of a head that turn by places (T, axes)
    places: Array | None = None

    def rotate(self, u: Array, position: int) -> Array:
        if self.theta is None:
            return u
        if not self.axes:
            return rope(u, position, self.theta, self.rotary_dims)
        edges = [sum(self.axes[:a]) for a in range(len(self.axes) + 1)]
        turned = [
            rope(u[edges[a] : edges[a + 1]], int(self.places[position, a]), self.theta)
            for a in range(len(self.axes))
        ]
        return np.concatenate([*turned, u[edges[-1] :]])

    def sees(self, i: int, j: int) -> bool:
        """Whether query i sees key j: as a neighbour in the row, or as one of its block."""
        if self.documents is not None and not self.documents[i] == self.documents[j] > 0:
            return False
        if self.blocks is not None and self.blocks[i] == self.blocks[j] >= 0:
            return True
        near = self.window is None or abs(i - j) < self.window
        return near and (j <= i or not self.causal)

    def bias(self, head: int, heads: int) -> Callable[[int, int], float]:
        if self.alibi is None:
            return lambda i, j: 0.0
        return alibi_bias(head, heads, square_root=self.alibi == "sqrt")


def one_head(
    q: list[Array],
    k: list[Array],
    v: list[Array],
    scale: float,
    sees: Callable[[int, int], bool],
    bias: Callable[[int, int], float],
) -> list[Array]:
    """Softmax attention of one head: T queries and keys (C,), T values (C_v,); 0 if i sees none."""
    out = []
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if sees(i, j)]
        scores = [float(q[i] @ k[j]) * scale + bias(i, j) for j in seen]
        top = max(scores, default=0.0)
        weights = [math.exp(s - top) for s in scores]
        total = sum(weights)
        mixed = np.zeros_like(v[0])
        for w, j in zip(weights, seen, strict=True):
            mixed = mixed + (w / total) * v[j]
        out.append(mixed)
    return out


def gated(head_out: list[Array], x: Array, w_h: Array | None) -> list[Array]:
    """o_h <- sigmoid(w_h . x_i) o_h, one scalar a head and position; w_h (D,)."""
    if w_h is None:
        return head_out
    return [o / (1.0 + math.exp(-float(x[i] @ w_h))) for i, o in enumerate(head_out)]


def mfa_paper(
    x: Array, S_q: Array, Q: Array, S_k: Array, S_v: Array, Os: Array, positions: Positions
) -> Array:
    """O_i = sum_c ( sum_j softmax_j( (x_i S_q Q_c)(x_j S_k)^T / sqrt(C) ) x_j S_v ) O_c^T.

    x (T, D); S_q, S_k, S_v (D, C); Q (m, C, C); Os (m, D, C). Returns (T, D).
    """
    heads, C = Q.shape[0], S_k.shape[1]
    k = [positions.rotate(x_j @ S_k, j) for j, x_j in enumerate(x)]
    v = [x_j @ S_v for x_j in x]
    out = np.zeros_like(x)
    for c in range(heads):
        q = [positions.rotate(x_i @ S_q @ Q[c], i) for i, x_i in enumerate(x)]
        bias = positions.bias(c, heads)
        o = one_head(q, k, v, 1.0 / math.sqrt(C), positions.sees, bias)
        for i in range(len(x)):
            out[i] += o[i] @ Os[c].T
    return out


def mfa_released(
    x: Array,
    W_dq: Array,
    norm: Array | None,
    W_uq: Array,
    W_k: Array,
    W_v: Array | None,
    W_o: Array,
    positions: Positions,
    *,
    eps: float,
    N: Array | None = None,
    alpha: Array | None = None,
    gate: Array | None = None,
    q_norm: Array | None = None,
    k_norm: Array | None = None,
) -> Array:
    """The released form: x W_dq -> RMSNorm -> per-head up-projection; one key and one value head.

    x (T, D); W_dq (D, R); norm (R,) or None for no norm; W_uq (m, R, C); W_k, W_v (D, C);
    W_o (m, C, D). W_v = None reuses the key before rotation: v_j = k_j + alpha * (k_j N) with
    N (C, C) and alpha (C,), or v_j = k_j where N is None (plain key reuse).
    gate (D, m); q_norm, k_norm (C,): RMSNorm of each head's query and of the key before rotation
    (a reused value is taken before k_norm too: k_j = x_j S_k).
    """
    heads, _, C = W_uq.shape
    keys = [x_j @ W_k for x_j in x]
    if W_v is not None:
        v = [x_j @ W_v for x_j in x]
    elif N is not None:
        v = [k_j + alpha * (k_j @ N) for k_j in keys]
    else:
        v = keys
    if k_norm is not None:
        keys = [rms_norm(k_j, k_norm, eps) for k_j in keys]
    k = [positions.rotate(k_j, j) for j, k_j in enumerate(keys)]

    out = np.zeros_like(x)
    for c in range(heads):
        q = []
        for i, x_i in enumerate(x):
            latent = x_i @ W_dq
            if norm is not None:
                latent = rms_norm(latent, norm, eps)
            q_i = latent @ W_uq[c]
            if q_norm is not None:
                q_i = rms_norm(q_i, q_norm, eps)
            q.append(positions.rotate(q_i, i))
        o = one_head(q, k, v, C**-0.5, positions.sees, positions.bias(c, heads))
        o = gated(o, x, None if gate is None else gate[:, c])
        for i in range(len(x)):
            out[i] += o[i] @ W_o[c]
    return out


def gqa(
    x: Array,
    W_q: Array,
    W_k: Array,
    W_v: Array,
    W_o: Array,
    positions: Positions,
    *,
    eps: float = 1e-6,
    gate: Array | None = None,
    q_norm: Array | None = None,
    k_norm: Array | None = None,
) -> Array:
    """Multi-head attention, m query heads in g groups: head c reads key/value head c // (m / g).

    x (T, D); W_q (m, D, C); W_k, W_v (g, D, C); W_o (m, C, D); gate (D, m); q_norm, k_norm (C,).
    """
    heads, _, C = W_q.shape
    per_group = heads // W_k.shape[0]
    out = np.zeros_like(x)
    for c in range(heads):
        group = c // per_group
        q, k, v = [], [], []
        for i, x_i in enumerate(x):
            q_i, k_i = x_i @ W_q[c], x_i @ W_k[group]
            if q_norm is not None:
                q_i = rms_norm(q_i, q_norm, eps)
            if k_norm is not None:
                k_i = rms_norm(k_i, k_norm, eps)
            q.append(positions.rotate(q_i, i))
            k.append(positions.rotate(k_i, i))
            v.append(x_i @ W_v[group])
        o = one_head(q, k, v, C**-0.5, positions.sees, positions.bias(c, heads))
        o = gated(o, x, None if gate is None else gate[:, c])
        for i in range(len(x)):
            out[i] += o[i] @ W_o[c]
    return out


def mla(
    x: Array,
    W_dq: Array | None,
    q_norm: Array | None,
    W_uq: Array,
    W_dkv: Array,
    kv_norm: Array,
    W_kr: Array,
    W_uk: Array,
    W_uv: Array,
    W_o: Array,
    positions: Positions,
    *,
    rope_dims: int,
    eps: float,
    gate: Array | None = None,
) -> Array:
    """Multi-head latent attention with the decoupled rotary key, nothing absorbed.

    x (T, D); W_dq (D, R_q), q_norm (R_q,), W_uq (m, R_q, n + r): each head's query is n entries
    without position followed by r = rope_dims rotated ones (W_dq None: W_uq is (m, D, n + r));
    W_dkv (D, R), kv_norm (R,); W_kr (D, r), the rotated key part all heads share; W_uk (m, R, n);
    W_uv (m, R, C_v); W_o (m, C_v, D); gate (D, m). Scores are scaled by 1 / sqrt(n + r).
    """
    heads = W_uq.shape[0]
    n = W_uq.shape[2] - rope_dims
    c_kv = [rms_norm(x_j @ W_dkv, kv_norm, eps) for x_j in x]
    k_rope = [positions.rotate(x_j @ W_kr, j) for j, x_j in enumerate(x)]
    out = np.zeros_like(x)
    for h in range(heads):
        q, k, v = [], [], []
        for i, x_i in enumerate(x):
            c_q = x_i if W_dq is None else rms_norm(x_i @ W_dq, q_norm, eps)
            q_i = c_q @ W_uq[h]
            q.append(np.concatenate([q_i[:n], positions.rotate(q_i[n:], i)]))
            k.append(np.concatenate([c_kv[i] @ W_uk[h], k_rope[i]]))
            v.append(c_kv[i] @ W_uv[h])
        o = one_head(q, k, v, (n + rope_dims) ** -0.5, positions.sees, positions.bias(h, heads))
        o = gated(o, x, None if gate is None else gate[:, h])
        for i in range(len(x)):
            out[i] += o[i] @ W_o[h]
    return out
