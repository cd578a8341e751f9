"""What can be wrong with a checkpoint."""

from __future__ import annotations

import errno

from step_jax.core.errors import CheckpointError, DiskFullError, StepError


class CorruptCheckpoint(CheckpointError):
    """Files of a step are missing, damaged, or were never part of it."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint holds another state than the program expects."""


class NonFiniteState(CheckpointError):
    """The state holds NaN or infinity and was therefore not committed."""


_KINDS = {
    "disk_full": DiskFullError,
    "non_finite": NonFiniteState,
    "corrupt": CorruptCheckpoint,
    "other": CheckpointError,
}


def kind_of(error: BaseException) -> str:
    """The name under which a failure travels to the other processes."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DiskFullError):
            return "disk_full"
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return "disk_full"
        # TensorStore reports the operating system's error as text only.
        if "No space left on device" in str(seen) or "Disk quota exceeded" in str(seen):
            return "disk_full"
        seen = seen.__cause__ or seen.__context__
    for kind, cls in _KINDS.items():
        if isinstance(error, cls) and kind != "other":
            return kind
    return "other"


def from_kind(kind: str, message: str) -> StepError:
    """The exception for a failure that another process (or thread) reported."""
    return _KINDS[kind](message)
