"""Environments: what a policy reads, and what becomes of its replies, turn by turn.

An environment keeps nothing: an episode is a value that goes in and comes out, so it can be saved
half finished, and many can be under way at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from step_jax.environments.pool import Pool, Score
from step_jax.environments.problems import Problem, Problems

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Episode:
    """A conversation about a problem.

    messages: all so far; the policy is to answer the last one.
    turns: replies so far.
    """

    problem: Problem
    messages: tuple[Message, ...]
    turns: int = 0


@dataclass(frozen=True)
class Step:
    """What came of a reply.

    episode: with the reply and what the environment answered.
    messages: what it answered; empty once the episode is done.
    score: of the whole episode, once it is done.
    """

    episode: Episode
    messages: tuple[Message, ...] = ()
    score: Score | None = None

    @property
    def done(self) -> bool:
        return self.score is not None

    @property
    def reward(self) -> float:
        return 0.0 if self.score is None else self.score.total


class Environment(Protocol):
    """What an environment has."""

    def reset(self, seed: int, index: int) -> Episode:
        """The beginning of an episode, a function of its arguments."""
        ...

    def step(self, episode: Episode, reply: str) -> Step:
        """What becomes of a reply as the policy wrote it, without its stop token."""
        ...


@dataclass(frozen=True)
class SingleTurn:
    """A question, and a reply that is scored."""

    problems: Problems
    pool: Pool

    def reset(self, seed: int, index: int) -> Episode:
        problem = self.problems.train(seed, index)
        return Episode(problem, tuple(problem.messages))

    def step(self, episode: Episode, reply: str) -> Step:
        score = self.pool.submit(reply, episode.problem.record).result()
        return Step(answered(episode, reply), score=score)


def answered(episode: Episode, reply: str, *messages: Message) -> Episode:
    """An episode after a reply and what was said to it."""
    said = {"role": "assistant", "content": reply}
    return replace(episode, messages=(*episode.messages, said, *messages), turns=episode.turns + 1)


def step_all(
    environment: Environment, episodes: Sequence[Episode], replies: Sequence[str], at_once: int = 16
) -> list[Step]:
    """The steps of several episodes, in their order; verifiers and tools work side by side."""
    pairs = list(zip(episodes, replies, strict=True))
    with ThreadPoolExecutor(at_once, "episode") as threads:
        return list(threads.map(lambda pair: environment.step(*pair), pairs))
