"""Which problems, how they are checked, and which of them are held out: one group of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from step_jax.core.errors import ConfigError
from step_jax.environments.arithmetic import Addition, ChainSum, Countdown
from step_jax.environments.cached import Coordinated
from step_jax.environments.files import FileTask
from step_jax.environments.gym import GymTask
from step_jax.environments.pool import Pool, PoolConfig
from step_jax.environments.problems import Problems
from step_jax.environments.rewards import VerifierKind
from step_jax.environments.verifiers import Verifier

TaskKind = Addition | ChainSum | Countdown | GymTask | FileTask | Coordinated


@dataclass(frozen=True)
class TaskConfig:
    """Problems and their verifier.

    task: where problems come from.
    verifier: how replies are scored; null for the task's own way.
    heldout_fraction: share of the problems kept for evaluation, chosen by a hash of what they say.
    workers: the processes that verify.
    """

    task: TaskKind
    verifier: VerifierKind | None = None
    heldout_fraction: float = 0.1
    workers: PoolConfig = PoolConfig()

    def validate(self):
        if not 0 < self.heldout_fraction < 1:
            raise ConfigError(f"heldout_fraction is {self.heldout_fraction}; it must be in (0, 1)")

    @property
    def checked_by(self) -> Verifier:
        return self.verifier or self.task.verifier

    def open(self) -> Problems:
        """The problems, the first of which has what the verifier reads.

        Raises:
          StepError: they cannot be had, or not be verified.
        """
        problems = self.task.open(self.heldout_fraction)
        first = problems.train(0, 0)
        self.checked_by.check(first.record, first.name)
        return problems

    def pool(self) -> Pool:
        """Processes that hold the verifier. Raises `ConfigError` if it cannot be loaded."""
        return Pool(self.checked_by, self.workers)
