"""More tokens for better answers: votes, the best of several, thinking budgets, coordinated rounds.

All of it stands on one function that samples (:class:`Sampler`), and counts every token that was
written on the way. How accuracy grows with them is measured by `evaluation/accuracy.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.environments.pacore import Round
from step_jax.environments.replies import Thinking, conclusion
from step_jax.inference.generate import StopReason


@dataclass(frozen=True)
class ThinkingBudget:
    """How long a policy may, and must, think (arXiv 2501.19393), as an engine carries it out.

    Tokens are counted from the first of a reply, or from the mark that opens a thought if it writes
    one. What the engine puts in is not the policy's choice: it has no log-probability and is
    masked in a trajectory, and it counts as a token.

    least: as long as fewer were thought, a ``close`` that the policy writes is taken back and
      ``extension`` stands in its place. Of a stop token the same.
    most: the token after so many is ``close``, whatever the policy would have written; null for no
      end. Then it answers.
    extension: what makes a policy go on.
    answer: tokens after the close before the reply is cut; null for no end.
    thinking: the marks.
    """

    least: int = 0
    most: int | None = None
    extension: str = "Wait"
    answer: int | None = None
    thinking: Thinking = Thinking()

    def validate(self):
        checks.at_least(self, least=0, most=1, answer=1)
        if self.most is not None and self.least > self.most:
            raise ConfigError(f"least is {self.least}, most is {self.most}: nothing is in between")
        if self.least and not self.extension:
            raise ConfigError("least asks for longer thoughts, and extension is empty")


@dataclass(frozen=True)
class Reply:
    """What was sampled: the text without its stop token, and what it cost with it."""

    text: str
    tokens: int
    finish: StopReason = "stop"


class Sampler(Protocol):
    """Samples replies; the same arguments give the same ones."""

    def __call__(
        self, prompts: Sequence[str], n: int, *, seed: int, budget: ThinkingBudget | None = None
    ) -> list[list[Reply]]:
        """n replies to each prompt. A prompt is what a user asks (a policy that chats is asked it
        in its template), or the text to go on from."""
        ...


@dataclass(frozen=True)
class Chosen:
    """What came of all that was sampled for a prompt.

    answer: None if no reply had one.
    tokens: of everything that was written on the way.
    """

    answer: str | None
    tokens: int


def vote(answers: Sequence[str | None], weights: Sequence[float] | None = None) -> str | None:
    """The answer with the most votes, or the most weight; of equal ones the first. None does not
    vote, and is the result where nobody does."""
    total: dict[str, float] = {}
    for i, answer in enumerate(answers):
        if answer is not None:
            total[answer] = total.get(answer, 0.0) + (1.0 if weights is None else weights[i])
    return max(total, key=lambda answer: total[answer], default=None)


#: how good a reply to a prompt is thought to be
Judge = Callable[[str, Reply], float]


@dataclass(frozen=True)
class Ways:
    """The ways to spend tokens, all with one sampler.

    thinking: the marks of a reply; None if replies are conclusions only.
    budget: of each reply.
    """

    sample: Sampler
    seed: int
    thinking: Thinking | None = Thinking()
    budget: ThinkingBudget | None = None

    def self_consistency(self, prompts: Sequence[str], n: int) -> list[Chosen]:
        """The answer that most of n replies give (arXiv 2203.11171)."""
        return self._chosen(prompts, n, lambda _, answers, __: vote(answers))

    def weighted_vote(self, prompts: Sequence[str], n: int, judge: Judge) -> list[Chosen]:
        """The answer whose replies are together judged best."""

        def choose(prompt: str, answers: list[str | None], row: list[Reply]) -> str | None:
            return vote(answers, [judge(prompt, reply) for reply in row])

        return self._chosen(prompts, n, choose)

    def best_of_n(self, prompts: Sequence[str], n: int, judge: Judge) -> list[Chosen]:
        """The answer of the reply that is judged best among those that have one."""

        def choose(prompt: str, answers: list[str | None], row: list[Reply]) -> str | None:
            said = [i for i, answer in enumerate(answers) if answer is not None]
            return answers[max(said, key=lambda i: judge(prompt, row[i]))] if said else None

        return self._chosen(prompts, n, choose)

    def coordinated(
        self, prompts: Sequence[str], widths: Sequence[int], look: Round | None = None
    ) -> list[Chosen]:
        """Rounds of replies, each of which reads the conclusions of the round before.

        PaCoRe (arXiv 2601.05593): ``widths`` (16, 4) are 16 replies to the question, 4 to the
        question and 16 conclusions, and at last one to the question and 4. No thought is handed on.

        Args:
          look: what a round looks like.

        Raises:
          ConfigError: a round without replies.
        """
        if not widths or min(widths) < 1:
            raise ConfigError(f"rounds have widths {list(widths)}; each must have a reply at least")
        look = look or Round()
        said: list[list[str | None]] = [[] for _ in prompts]
        spent = [0] * len(prompts)
        for number, width in enumerate((*widths, 1)):
            pairs = zip(prompts, said, strict=True)
            asked = [look.ask(prompt, known, self.seed, number) for prompt, known in pairs]
            rows = self.sample(asked, width, seed=self.seed + number, budget=self.budget)
            said = [self._answers(row) for row in rows]
            spent = [before + _tokens(row) for before, row in zip(spent, rows, strict=True)]
        return [Chosen(row[0], tokens) for row, tokens in zip(said, spent, strict=True)]

    def _chosen(
        self,
        prompts: Sequence[str],
        n: int,
        choose: Callable[[str, list[str | None], list[Reply]], str | None],
    ) -> list[Chosen]:
        rows = self.sample(prompts, n, seed=self.seed, budget=self.budget)
        return [
            Chosen(choose(prompt, self._answers(row), row), _tokens(row))
            for prompt, row in zip(prompts, rows, strict=True)
        ]

    def _answers(self, replies: Sequence[Reply]) -> list[str | None]:
        """The conclusions; None of replies that have none, or an empty one."""
        return [conclusion(reply.text, self.thinking) or None for reply in replies]


def _tokens(replies: Sequence[Reply]) -> int:
    return sum(reply.tokens for reply in replies)
