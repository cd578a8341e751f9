"""What can be wrong with a checkpoint."""

from __future__ import annotations

from step_jax.core.errors import CheckpointError


class CorruptCheckpoint(CheckpointError):
    """Files of a step are missing, damaged, or were never part of it."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint holds another state than the program expects."""


class NonFiniteState(CheckpointError):
    """The state holds NaN or infinity and was therefore not committed."""
