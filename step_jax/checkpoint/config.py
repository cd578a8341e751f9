"""Checkpoint settings. This file must stay free of JAX: configuration loads before devices."""

import dataclasses

from step_jax.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the training state is saved and which saved steps are kept."""

    every_steps: int = 500
    """Save after every this many optimizer steps."""
    keep: int = 2
    """Keep this many of the newest steps; 2 or more leave a fall-back if one gets damaged."""
    keep_every: int = 0
    """Also keep, for ever, every step that this number divides, a multiple of ``every_steps``; 0
    keeps none."""
    max_failures: int = 3
    """Stop the run after this many failed saves in a row (disk full, non-finite state)."""

    def __post_init__(self) -> None:
        least = {"every_steps": 1, "keep": 1, "keep_every": 0, "max_failures": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(
                    f"checkpoint.{name} must be at least {bound}, got {getattr(self, name)}"
                )
        if self.keep_every % self.every_steps:
            raise ConfigError(
                f"checkpoint.keep_every is {self.keep_every} and would find few of the steps that "
                f"are saved: use a multiple of checkpoint.every_steps, {self.every_steps}"
            )
