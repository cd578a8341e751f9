"""Profiler windows: a trace of a few steps, readable by XProf, TensorBoard and Perfetto."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from step_jax.core.errors import ConfigError


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps to trace.

    start_step: the first traced step; null traces nothing. The first steps compile.
    steps: how many steps to trace.
    """

    start_step: int | None = None
    steps: int = 3

    def validate(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps}: a profile needs at least one step")
        if self.start_step is not None and self.start_step < 0:
            raise ConfigError(f"start_step={self.start_step} is negative")

    def check(self, total_steps: int) -> None:
        """Raises ConfigError unless the window lies within a run of ``total_steps`` steps."""
        if self.start_step is not None and self.start_step + self.steps > total_steps:
            raise ConfigError(
                f"run.profile traces steps {self.start_step} to {self.start_step + self.steps - 1},"
                f" and the last step of the run is {total_steps - 1}: lower run.profile.start_step"
                " or run.profile.steps"
            )


class ProfilerWindow:
    """Starts and stops the JAX profiler at the configured steps; costs nothing without them."""

    def __init__(self, config: ProfileConfig, directory: Path):
        self.config = config
        self.directory = directory
        self._active = False
        self._done = config.start_step is None

    def before_step(self, step: int) -> None:
        """Start the trace if its window begins. A resumed run does not trace a window again that
        lies behind it."""
        start = self.config.start_step
        if self._done or self._active or start is None or step < start:
            return
        if step >= start + self.config.steps:
            self._done = True
            return
        import jax

        jax.profiler.start_trace(str(self.directory))
        self._active = True

    def after_step(self, step: int, outputs: object = None) -> bool:
        """Stop the trace behind its last step, once ``outputs`` (arrays) are computed.

        Returns:
          Whether a trace was finished now.
        """
        start = self.config.start_step
        if not self._active or start is None or step < start + self.config.steps - 1:
            return False
        import jax

        jax.block_until_ready(outputs)
        self.close()
        return True

    def close(self) -> None:
        """Write a trace that is still open."""
        if self._active:
            import jax

            jax.profiler.stop_trace()
            self._active, self._done = False, True
