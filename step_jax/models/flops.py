"""Arithmetic of a decoder, counted from its parameter table.

A multiply-add is two operations. Counted are the products that a model needs, whatever an
implementation does beside them: recomputation (remat) and masked scores are not work.
"""

from __future__ import annotations

from step_jax.core.spec import count
from step_jax.models.layers.block import Block
from step_jax.models.text.decoder import Decoder


def mean_keys(length: int, window: int | None) -> float:
    """Keys that a causal query sees, on average over a row of ``length`` tokens."""
    window = length if window is None else min(window, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def attention_core_flops(block: Block, length: int) -> float:
    """Operations of one token's scores and weighted values, forward, in rows of ``length``."""
    score, value = block.attention.score_and_value_widths()
    keys = mean_keys(length, block.attention.window)
    return 2.0 * block.attention.heads * (score + value) * keys


def forward_flops_per_token(c: Decoder, length: int) -> float:
    """Operations of one token's forward pass in rows of ``length`` tokens.

    Weights count two operations per token each (the output head once more for every head of
    multi-token prediction, embeddings not at all, of a mixture those of the experts that a token is
    sent to), attention by its heads, widths and the keys a
    causal or windowed query sees. Rows packed with several documents need less than is counted.
    """
    head = c.vocab * c.width
    matrices = count(c.specs(), roles=("matrix", "router"), active=True)
    total = 2.0 * (matrices + head)
    total += sum(s.repeat * attention_core_flops(s.block, length) for s in c.trunk.walk())
    if c.mtp is not None:
        total += c.mtp.heads * (2.0 * head + attention_core_flops(c.mtp.block, length))
    return total


def train_flops_per_token(c: Decoder, length: int) -> float:
    """Forward, and twice that for the gradients of activations and weights."""
    return 3.0 * forward_flops_per_token(c, length)
