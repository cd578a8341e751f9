"""More tokens for better answers: votes, the best of several, thinking budgets, coordinated rounds.

All of it stands on one function that samples (:class:`Sampler`), and counts every token that was
written on the way. How accuracy grows with them is measured by `evaluation/accuracy.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from step_jax.core import checks
from step_jax.core.errors import ConfigError, DataError
from step_jax.environments.pacore import Round
from step_jax.environments.replies import Thinking, conclusion
from step_jax.inference.engine import Engine, bucket
from step_jax.inference.requests import Request, StopReason, Thought
from step_jax.tokenizers.base import Tokenizer

#: what may stand before the close of a thought, to see that it is always the same tokens
_BEFORE = ("7", "a", ")", ".", " ", "\n", "\u00e9")


@dataclass(frozen=True)
class ThinkingBudget:
    """How long a policy may, and must, think (arXiv 2501.19393); the engine's `Thought` in words.

    most: tokens of a thought after which its close is written, whatever the policy would write.
    least: tokens before which the policy can neither close its thought nor end its text.
    last_words: what is written before a close that was not the policy's.
    thinking: the marks.
    """

    most: int
    least: int = 0
    last_words: str = ""
    thinking: Thinking = Thinking()

    def validate(self):
        checks.at_least(self, least=0, most=1)
        if self.least > self.most:
            raise ConfigError(f"least is {self.least}, most is {self.most}: nothing is in between")

    def thought(self, tokenizer: Tokenizer) -> Thought:
        """What the engine is asked for.

        Raises:
          ConfigError: the close is other tokens after other texts, so that an engine that looks for
            tokens would miss it.
        """
        close, found = self.thinking.close, set[tuple[int, ...]]()
        for before in _BEFORE:
            try:
                ids, begun = (tokenizer.encode(text, special=True).tolist()
                              for text in (before + close, before))  # fmt: skip
            except DataError:  # of a closed vocabulary: it cannot stand there
                continue
            found.add(tuple(ids[len(begun) :]) if ids[: len(begun)] == begun else ())
        (ids,) = found if len(found) == 1 else ((),)
        if not ids:
            raise ConfigError(
                f"{tokenizer.name} joins {close!r} with what stands before it, so the end of a "
                "thought cannot be told by its tokens: use a close that is a token of its own"
            )
        words = tokenizer.encode(self.last_words, special=True).tolist() if self.last_words else ()
        return Thought(ids, self.most, self.least, (*words, *ids))


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
class EngineSampler:
    """A `Sampler` of an engine and parameters for it.

    engine_for: (tokens) -> an engine for texts of so many; it is asked for powers of two, since
      nobody knows before how long the conclusions are that a round is told of.
    encode: the ids of a prompt.
    max_new_tokens: of a reply, after its thought if there is a budget.
    """

    engine_for: Callable[[int], Engine]
    params: Any
    tokenizer: Tokenizer
    encode: Callable[[str], Sequence[int]]
    max_new_tokens: int

    def __call__(
        self, prompts: Sequence[str], n: int, *, seed: int, budget: ThinkingBudget | None = None
    ) -> list[list[Reply]]:
        thought = None if budget is None else budget.thought(self.tokenizer)
        requests = [
            Request(self.encode(prompt), self.max_new_tokens, (seed, p, i), thought=thought)
            for p, prompt in enumerate(prompts)
            for i in range(n)
        ]
        longest = max((len(request.prompt) for request in requests), default=0)
        room = (
            longest
            + self.max_new_tokens
            + (0 if thought is None else thought.most + len(thought.ending))
        )
        replies: list[list[Reply | None]] = [[None] * n for _ in prompts]
        for done in self.engine_for(bucket(room)).run(self.params, requests):
            _, p, i = done.request.name
            text = self.tokenizer.decode_continuation(done.request.prompt, done.tokens)
            replies[p][i] = Reply(text, len(done.tokens), done.reason)
        return [[reply for reply in row if reply is not None] for row in replies]


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
