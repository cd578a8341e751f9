"""Run directories as a loop leaves them, without running one."""

from __future__ import annotations

from pathlib import Path

from step_jax.checkpoint import Checkpointer
from step_jax.checkpoint.artifact import Description, Part


def save_run(
    path: Path, model, params, tokenizer, context: int, *, step: int, average=None
) -> None:
    """A float32 model of pretraining at ``step``; ``average`` is that of its parameters."""
    learner = {"params": params} | ({} if average is None else {"average": average})
    held = Description(
        "pretrain",
        {"model": Part(model, average=average is not None)},
        {"tokenizer": tokenizer.hash},
        context=context,
        dtype="float32",
    )
    with Checkpointer(path / "checkpoints") as checkpointer:
        checkpointer.save(step, {"learners": {"model": learner}}, {"artifact": held.plain()})
    tokenizer.save(path / "tokenizer")
