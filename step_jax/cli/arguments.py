"""Command lines that start with an artifact, or name recipes of any loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from step_jax.core import yaml_strict
from step_jax.core.command_line import load_config, split
from step_jax.core.errors import ConfigError
from step_jax.trainers import DEFAULT, Loop, find_loop, is_file


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


def loop_of(files: list[str], overrides: list[str]) -> str | None:
    """What the last of the files or flags that says so names as the loop."""
    nodes = [yaml_strict.load_yaml(Path(file)).entries.get("loop") for file in files]
    named = [node.text for node in nodes if isinstance(node, yaml_strict.Scalar)]
    named += [words[0] for flag, words in split(overrides).flags if flag == "loop" and words]
    return named[-1] if named else None


def load_recipe(files: list[str], overrides: list[str], prog: str) -> tuple[Loop, Any]:
    """(loop, configuration) of a recipe, whose key ``loop`` names the loop or its file."""
    name = loop_of(files, overrides)
    loop = find_loop(name or DEFAULT)
    if name and is_file(name):  # what the file calls itself is what its configuration knows
        overrides = [*overrides, "--loop", getattr(loop.Config, "loop", name)]
    try:
        return loop, load_config(loop.Config, [*files, *overrides], prog=prog).config
    except ConfigError as error:
        if name:
            raise
        raise ConfigError(f"{error}\n(read as of {DEFAULT}: the recipe has no `loop:`)") from None
