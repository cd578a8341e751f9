"""``step-jax LOOP FILE.yaml [--force] [--group.key VALUE ...]``, for every loop of the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from step_jax.core.command_line import load_config
from step_jax.trainers import Loop, find_loop


@dataclass(frozen=True)
class Asked:
    """A loop, its configuration, and whether to try a step that does not fit."""

    loop: Loop
    config: Any
    force: bool


def parse(name: str, argv: list[str]) -> Asked:
    loop = find_loop(name)
    loaded: Any = load_config(
        loop.Config, [word for word in argv if word != "--force"], prog=f"step-jax {name}",
        description=f"{loop.Config.__doc__}\n\n--force tries a step that needs more memory than a "
        "device has.",
    )  # fmt: skip
    return Asked(loop, loaded.config, "--force" in argv)


def run(asked: Asked) -> None:
    from step_jax.runs.device_memory import DoesNotFit

    try:
        asked.loop.run(asked.config, force=asked.force)
    except DoesNotFit as error:
        from step_jax.planning import report

        raise DoesNotFit(report.overflow(asked.loop, asked.config, error)) from error
