"""Attention kinds, one file each. A new kind: its file, and its name in the union below."""

from __future__ import annotations

from dataclasses import replace

from step_jax.core.spec import count
from step_jax.models.layers.attention.mfa import MFA
from step_jax.models.layers.attention.mha import MHA
from step_jax.models.layers.attention.mla import MLA
from step_jax.models.layers.initialisation import FanIn

AttentionKind = MHA | MFA | MLA

__all__ = ["MFA", "MHA", "MLA", "AttentionKind", "equal_parameter_heads"]


def equal_parameter_heads(attention: AttentionKind, width: int, like: AttentionKind) -> int:
    """How many heads give ``attention`` the parameter count nearest to that of ``like``.

    For MFA with D = r C beside MHA this is round((4r^2 - 3r) / (r + 1)) (arXiv 2412.19255,
    table 1): 26 at r = 8. Every kind's count is affine in its heads, so two evaluations do.
    """

    def parameters(heads: int, kind=attention) -> int:
        return count(replace(kind, heads=heads).specs(width, FanIn()))

    target = parameters(like.heads, like)
    per_head = parameters(2) - parameters(1)
    return max(1, round((target - (parameters(1) - per_head)) / per_head))
