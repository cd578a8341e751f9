"""What every place is given to run, and what it makes of it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from step_jax.core.errors import EXITS, ConfigError, exit_of
from step_jax.launch.supervisor import Restarts

#: Names in Kubernetes, of which pods make longer ones: NAME-slice-0-63.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
RECIPE = "recipe.yaml"
_SIGNAL_CODES = range(129, 193)  # of Linux's 64 signals


@dataclass(frozen=True)
class Job:
    """A recipe, made ready to run somewhere.

    Attributes:
      name: of the job and its files.
      loop: the command of its training loop, or the loop's file.
      recipe: the whole configuration, as YAML.
      environment: variable -> value.
      restarts: see ``Restarts``.
      grace_s: seconds between SIGTERM and SIGKILL, enough for a step and a save.
      folder: where the rendered files lie, absolute.
    """

    name: str
    loop: str
    recipe: str
    environment: Mapping[str, str]
    restarts: Restarts
    grace_s: int
    folder: Path

    def words(self, recipe: str | Path) -> list[str]:
        """The command of one process whose recipe lies there."""
        return ["step-jax", self.loop, str(recipe)]

    def supervised(self, recipe: str | Path, count: int = 1, python: str = "python") -> list[str]:
        """The same with a supervisor on its machine, where nothing else goes by exit codes."""
        words = [python, "-m", "step_jax.launch.local", str(count)]
        words += ["--restarts", str(self.restarts.budget)]
        words += ["--backoff", f"{self.restarts.backoff_s:g}"]
        return [*words, "--", *self.words(recipe)]


@dataclass(frozen=True)
class Rendered:
    """Files for a cluster and how it is given them.

    Attributes:
      files: name -> text; they are written to the job's folder.
      submit: the command that submits them.
      after: what to say then: how to watch it and how to end it.
      foreground: whether that command is the run itself.
    """

    files: dict[str, str]
    submit: list[str]
    after: str
    foreground: bool = False

    def text(self) -> str:
        """All of it, as ``--dry-run`` prints it."""
        parts = [f"# --- {name}\n{text.rstrip()}\n" for name, text in self.files.items()]
        return "\n".join([*parts, f"# --- submit\n{shlex.join(self.submit)}"])


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"the name {name!r} must be of a-z, 0-9 and -, start with a letter, end without a - "
            "and have at most 40 characters; `name:` in the target file sets another"
        )


def name_of(recipe: str) -> str:
    """A job's name from its recipe's file."""
    return re.sub(r"[^a-z0-9]+", "-", Path(recipe).stem.lower()).strip("-")[:40].rstrip("-")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(document: Any) -> str:
    """YAML with keys in their order and texts of several lines as they stand."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=100)


def exports(environment: Mapping[str, str]) -> str:
    """Lines of a shell script that set variables."""
    return "\n".join(f"export {k}={shlex.quote(v)}" for k, v in environment.items())


def codes(again: str) -> list[int]:
    """Exit codes of one class, ascending, those of every signal among them."""
    return [c for c in sorted({*EXITS, *_SIGNAL_CODES}) if exit_of(c).again == again]
