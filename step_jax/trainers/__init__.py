"""The training loops, found in one table. Importing it imports none of them.

A loop is a module (or a Python file of yours) with

- ``Config``: a frozen dataclass with ``run: RunConfig``, ``parallel: MeshConfig`` and
  ``loop: Literal["its name"]``, by which its recipes are known;
- ``program(config, sharding) -> Program``: what it compiles, without data or devices;
- ``run(config, force=False) -> dict``: trains, and returns what it came to;
- ``phases(config, sharding) -> tuple[Phase, ...]``, if it runs programs between its steps: for its
  plan.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from step_jax.core.errors import ConfigError

#: command -> (module, help line)
LOOPS: dict[str, tuple[str, str]] = {
    "pretrain": ("step_jax.trainers.pretrain", "train a language model from a configuration file"),
    "sft": ("step_jax.trainers.sft", "fine-tune a language model on conversations"),
    "rl": ("step_jax.trainers.rl.loop", "reinforcement learning on verifiable problems"),
    "preference": (
        "step_jax.trainers.preference",
        "tune a language model on pairs of answers, or on good and bad ones",
    ),
    "reward": ("step_jax.trainers.reward", "train a reward model on pairs of answers"),
    "diffusion": (
        "step_jax.trainers.diffusion.flow_matching",
        "train a diffusion transformer on captioned pictures and clips",
    ),
    "video-preference": (
        "step_jax.trainers.diffusion.preference",
        "tune a diffusion transformer on pairs of its own clips",
    ),
    "video-rl": (
        "step_jax.trainers.diffusion.rl",
        "tune a diffusion transformer by rewards of its own clips",
    ),
    "vae": ("step_jax.trainers.diffusion.vae", "train a video autoencoder on clips"),
}
DEFAULT = "pretrain"


class Loop(Protocol):
    """What a loop's module has."""

    Config: type
    program: Callable[..., Any]
    run: Callable[..., dict[str, float]]


def is_file(name: str) -> bool:
    """Whether a loop is named by its file."""
    return name.endswith(".py")


def find_loop(name: str) -> Loop:
    """The loop of a command, or of a Python file.

    Raises:
      ConfigError: there is none, or the file lacks a part of one.
    """
    if name in LOOPS:
        return importlib.import_module(LOOPS[name][0])
    if not is_file(name):
        close = difflib.get_close_matches(name, LOOPS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"no loop {name!r}{hint}; there are: {', '.join(LOOPS)}, or a .py file")
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"the loop {name} is no file")
    spec = importlib.util.spec_from_file_location(f"step_jax_loop_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    if missing := [part for part in ("Config", "program", "run") if not hasattr(module, part)]:
        raise ConfigError(f"{name} is no loop: it lacks {', '.join(missing)}")
    return module
