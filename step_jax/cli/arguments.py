"""Command lines that start with an artifact."""

from __future__ import annotations

from step_jax.core.errors import ConfigError


def artifact_and_options(argv: list[str], prog: str) -> tuple[str, list[str]]:
    """The artifact that a command line names first, and the rest of it.

    Raises:
      ConfigError: none is named (and no help asked for).
    """
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    if any(word in ("-h", "--help") for word in argv):
        return "", argv
    raise ConfigError(
        f"{prog} needs an artifact first (RUN, RUN@STEP or hf:PATH): {prog} runs/mine"
    )
