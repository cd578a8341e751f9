"""Parallel coordinated reasoning (PaCoRe, arXiv 2601.05593): answers made from other answers.

A round asks the question together with conclusions of the round before, in an order that a seed
draws. Here is what a round looks like, and one round as a problem to be trained on;
`inference/test_time.py` runs several.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from step_jax.core.errors import ConfigError, DataError
from step_jax.data.packing import derive_key
from step_jax.environments.problems import Problem, Problems

_MOST_DRAWN = 1000

_PROMPT = """{question}

Here are {count} answers that others came to. Any of them may be wrong.

{references}
Weigh them, work out what is still open, and give one final answer of your own."""


@dataclass(frozen=True)
class Round:
    """How a question and conclusions become a prompt.

    prompt: with ``{question}``, ``{count}`` and ``{references}``.
    reference: one conclusion, with ``{number}`` (from 1) and ``{text}``.
    """

    prompt: str = _PROMPT
    reference: str = "Answer {number}:\n{text}\n\n"

    def validate(self):
        for name, text, keys in (
            ("prompt", self.prompt, ("{question}", "{references}")),
            ("reference", self.reference, ("{text}",)),
        ):
            if lacking := [key for key in keys if key not in text]:
                raise ConfigError(f"{name} lacks {lacking[0]}, which stands for what it is made of")
        try:
            self.ask("q", ["r"], 0)
        except (KeyError, ValueError, IndexError) as error:
            raise ConfigError(f"a key in braces that nothing is known of: {error}") from error

    def ask(self, question: str, conclusions: Sequence[str | None], *key: object) -> str:
        """The prompt; without conclusions it is the question.

        Args:
          conclusions: of earlier replies; None, of replies without one, is left out.
          key: decides the order of the others, together with them and the question.
        """
        said = [text for text in conclusions if text]
        if not said:
            return question
        random.Random(derive_key(*key, question, *said)).shuffle(said)
        references = "".join(
            self.reference.format(number=i, text=text) for i, text in enumerate(said, 1)
        )
        return self.prompt.format(question=question, count=len(said), references=references)


@dataclass(frozen=True)
class Cached:
    """A problem and conclusions that were sampled for it before, with which of them are right.

    solutions: thoughts and conclusions of right replies; a thought is None where there was none.
    """

    problem: Problem
    conclusions: tuple[str, ...]
    correct: tuple[bool, ...]
    solutions: tuple[tuple[str | None, str], ...] = ()


@dataclass(frozen=True)
class CoordinatedRound:
    """One round as a problem: a question with cached conclusions.

    round: what it looks like.
    messages: the least and the most conclusions that are drawn.
    accuracy: the least and the most of them that may be right, as shares: where most are, a vote is
      enough and there is nothing to learn.
    """

    round: Round = Round()
    messages: tuple[int, int] = (16, 24)
    accuracy: tuple[float, float] = (0.0, 0.75)

    def validate(self):
        if not 1 <= self.messages[0] <= self.messages[1]:
            raise ConfigError(
                f"messages is {list(self.messages)}; it must be the least and the most"
            )
        if not 0 <= self.accuracy[0] <= self.accuracy[1] <= 1:
            raise ConfigError(f"accuracy is {list(self.accuracy)}; it must be two shares in [0, 1]")

    def problem(self, cached: Cached, seed: int, index: int) -> Problem | None:
        """The problem of a place, a function of its arguments; None if it is too easy or too hard,
        or fewer conclusions are there than must be drawn. Its worked solution is a right reply to
        the question alone, where there was one: what to fine-tune a model on that never read a
        round."""
        rng = random.Random(derive_key(seed, "coordinated", index))
        count = rng.randint(*self.messages)
        if count > len(cached.conclusions):
            return None
        chosen = rng.sample(range(len(cached.conclusions)), count)
        share = sum(cached.correct[i] for i in chosen) / count
        if not self.accuracy[0] <= share <= self.accuracy[1]:
            return None
        conclusions = [cached.conclusions[i] for i in chosen]
        question = self.round.ask(cached.problem.question, conclusions, seed, index)
        thought, answer = rng.choice(cached.solutions) if cached.solutions else (None, None)
        return replace(cached.problem, question=question, answer=answer, thought=thought)


class CoordinatedProblems(Problems):
    """Rounds over cached conclusions, as problems: with `SingleTurn` an environment."""

    def __init__(
        self, train: Sequence[Cached], heldout: Sequence[Cached], rounds: CoordinatedRound
    ):
        """
        Raises:
          DataError: a problem stands on both sides.
        """
        self._train, self._heldout, self._rounds = train, heldout, rounds
        if both := {c.problem.content for c in train} & {c.problem.content for c in heldout}:
            raise DataError(f"{len(both)} problems are trained on and held out: {min(both)!r:.60}")

    def train(self, seed: int, index: int) -> Problem:
        rng = random.Random(derive_key(seed, "cached", index))
        for attempt in range(_MOST_DRAWN):
            cached = self._train[rng.randrange(len(self._train))]
            problem = self._rounds.problem(cached, seed, index * _MOST_DRAWN + attempt)
            if problem is not None:
                return problem
        low, high = self._rounds.accuracy
        raise DataError(
            f"of {_MOST_DRAWN:,} drawn sets of conclusions none has a share of right ones from "
            f"{low:g} to {high:g}: sample more conclusions, or ask for less"
        )

    def heldout(self, count: int) -> list[Problem]:
        """Of the first problems that have enough conclusions, with those that are drawn, however
        many are right."""
        most = self._rounds.messages[1]
        enough = [cached for cached in self._heldout if len(cached.conclusions) >= most]
        if count > len(enough):
            raise DataError(
                f"{count} held-out problems are asked for, of {len(enough)} with the {most} "
                f"conclusions that may be drawn ({len(self._heldout) - len(enough)} have fewer)"
            )
        every = replace(self._rounds, accuracy=(0.0, 1.0))
        made = (every.problem(cached, 0, i) for i, cached in enumerate(enough[:count]))
        return [problem for problem in made if problem is not None]
