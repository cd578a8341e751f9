"""``step-jax LOOP FILE.yaml [--force] [--group.key VALUE ...]``, for every loop of the table."""

from __future__ import annotations

from typing import Any

from step_jax.core.command_line import load_config


def main(name: str, argv: list[str]) -> None:
    from step_jax.runs.device_memory import DoesNotFit
    from step_jax.trainers import find_loop

    loop = find_loop(name)
    loaded: Any = load_config(
        loop.Config, [word for word in argv if word != "--force"], prog=f"step-jax {name}",
        description=f"{loop.Config.__doc__}\n\n--force tries a step that needs more memory than a "
        "device has.",
    )  # fmt: skip
    try:
        loop.run(loaded.config, force="--force" in argv)
    except DoesNotFit as error:
        from step_jax.planning import report

        raise DoesNotFit(report.overflow(loop, loaded.config, error)) from error
