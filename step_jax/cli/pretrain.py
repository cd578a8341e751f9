"""``step-jax pretrain FILE.yaml [--force] [--group.key VALUE ...]``."""

from __future__ import annotations

from step_jax.core.command_line import load_config


def main(argv: list[str]) -> None:
    from step_jax.runs.device_memory import DoesNotFit
    from step_jax.trainers import pretrain

    loaded = load_config(
        pretrain.PretrainConfig,
        [word for word in argv if word != "--force"],
        prog="step-jax pretrain",
        description="Train a language model from a folder of text. --force tries a step that needs "
        "more memory than a device has.",
    )
    try:
        pretrain.run(loaded.config, force="--force" in argv)
    except DoesNotFit as error:
        from step_jax.planning import report

        raise DoesNotFit(report.overflow(loaded.config, error)) from error
