"""``step-jax reinforce FILE.yaml [--group.key VALUE ...]``."""

from __future__ import annotations

from step_jax.core.command_line import load_config


def main(argv: list[str]) -> None:
    from step_jax.trainers.rl import reinforce

    loaded = load_config(
        reinforce.ReinforceConfig,
        argv,
        prog="step-jax reinforce",
        description="Teach a decoder to sort digits by policy gradients.",
    )
    reinforce.run(loaded.config)
