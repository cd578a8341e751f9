"""Profiler windows: a trace of a few steps, readable by XProf, TensorBoard and Perfetto."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from step_jax.core.errors import ConfigError


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps to trace.

    start_step: the first traced step, none if it is null. The first steps compile.
    steps: how many steps to trace, from that one on or when SIGUSR1 comes.
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
    """Starts and stops the JAX profiler at the configured steps, and for as many steps whenever it
    is asked to; costs nothing otherwise."""

    def __init__(self, config: ProfileConfig, directory: Path):
        self.config = config
        self.directory = directory
        self._asked = False
        self._end: int | None = None  # of the trace under way: the first step that is not in it

    @contextmanager
    def asked_by_signal(self) -> Iterator[None]:
        """Within it SIGUSR1 asks for a trace, in a process whose main thread enters it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(*_: object) -> None:
            self._asked = True

        before = signal.signal(signal.SIGUSR1, ask)
        try:
            yield
        finally:
            # None: the handler before ours was not installed from Python, so it is unknown here.
            signal.signal(signal.SIGUSR1, signal.SIG_DFL if before is None else before)

    def before_step(self, step: int) -> None:
        """Start the trace if its window begins. A resumed run does not trace a window again that
        lies behind it."""
        start, steps = self.config.start_step, self.config.steps
        if self._end is not None:
            return
        if self._asked:
            self._asked, end = False, step + steps
        elif start is not None and start <= step < start + steps:
            end = start + steps
        else:
            return
        import jax

        jax.profiler.start_trace(str(self.directory))
        self._end = end

    def after_step(self, step: int, outputs: object = None) -> bool:
        """Stop the trace behind its last step, once ``outputs`` (arrays) are computed.

        Returns:
          Whether a trace was finished now.
        """
        if self._end is None or step < self._end - 1:
            return False
        import jax

        jax.block_until_ready(outputs)
        self.close()
        return True

    def close(self) -> None:
        """Write a trace that is still open."""
        if self._end is not None:
            import jax

            jax.profiler.stop_trace()
            self._end = None
