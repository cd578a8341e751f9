"""Arithmetic of a diffusion transformer, counted from its parameter table.

A multiply-add is two operations; see ``models.flops`` for what is counted.
"""

from __future__ import annotations

import math

from step_jax.core.spec import count
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.patches import Sizes, grid


def forward_flops(c: VideoDiT, tokens: int) -> float:
    """Operations of one sample of so many tokens, forward, its text included at full length.

    Every token meets the weights of the layers but for the keys and values of cross-attention,
    which meet the states of the text; attention is over all pairs.
    """
    a, D = c.attention, c.width
    states = sum(t.tokens for t in c.text)
    inner = a.heads * a.head_dim
    of_text = 2 * D * inner if c.text else 0
    per_layer = count(c.trunk.block_specs(c.trunk.groups[0].blocks[0]), roles=("matrix",))
    weights = tokens * (per_layer - of_text) + states * of_text
    scores = sum(a.score_and_value_widths()) * a.heads * tokens**2 + 2 * inner * tokens * states
    ends = tokens * count(c.specs().head_DP) + tokens * count(c.specs().patch_PD)
    embedders = (1 + len(c.scalars)) * count(c.specs().time, roles=("matrix",)) + 6 * D * D
    text = sum(t.matmul_flops(D) for t in c.text)
    return 2.0 * (c.depth * (weights + scores) + ends + embedders) + text


def train_flops(c: VideoDiT, tokens: int) -> float:
    """Forward, and twice that for the gradients of activations and weights."""
    return 3.0 * forward_flops(c, tokens)


def tokens_of(c: VideoDiT, size: Sizes) -> int:
    """Patches of latents of (frames, height, width)."""
    return math.prod(grid(size, c.patch))
