"""``step-jax flow-matching FILE.yaml [--group.key VALUE ...]``."""

from __future__ import annotations

from step_jax.core.command_line import load_config


def main(argv: list[str]) -> None:
    from step_jax.trainers.diffusion import flow_matching

    loaded = load_config(
        flow_matching.FlowMatchingConfig,
        argv,
        prog="step-jax flow-matching",
        description="Learn to draw digits by class with flow matching.",
    )
    flow_matching.run(loaded.config)
