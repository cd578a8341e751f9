"""``step-jax pretrain FILE.yaml [--group.key VALUE ...]``."""

from __future__ import annotations

from step_jax.core.command_line import load_config


def main(argv: list[str]) -> None:
    from step_jax.trainers import pretrain

    loaded = load_config(
        pretrain.PretrainConfig,
        argv,
        prog="step-jax pretrain",
        description="Train a language model from a folder of text.",
    )
    pretrain.run(loaded.config)
