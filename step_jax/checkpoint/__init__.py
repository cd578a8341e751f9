"""Verified asynchronous checkpoints. See docs/checkpoints.md.

Importing this package imports neither JAX nor Orbax; both come with the first `Checkpointer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from step_jax.checkpoint.config import CheckpointConfig
from step_jax.checkpoint.errors import (
    CheckpointMismatch,
    CorruptCheckpoint,
    NonFiniteState,
)
from step_jax.checkpoint.manifest import verify

if TYPE_CHECKING:
    from step_jax.checkpoint.checkpointer import Checkpointer

__all__ = [
    "CheckpointConfig",
    "CheckpointMismatch",
    "Checkpointer",
    "CorruptCheckpoint",
    "NonFiniteState",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "Checkpointer":
        from step_jax.checkpoint.checkpointer import Checkpointer

        return Checkpointer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
