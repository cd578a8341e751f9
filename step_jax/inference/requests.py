"""What the engine is asked to write, and what it wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from step_jax.core import checks
from step_jax.core.errors import ConfigError, DataError

#: Why a text ended: a ``stop`` token, its own budget (``length``), a full ``context``; or the
#: engine's run ended before it did (``unfinished``).
StopReason = Literal["stop", "length", "context", "unfinished"]

#: How many tokens a request's stop ids, a close and a forced text may have: rows keep so many.
MARKS = 16


@dataclass(frozen=True)
class Thought:
    """A first part of an answer with a budget of its own: what is written until it is closed.

    Attributes:
      close: token ids; the thought ends when the policy has written them one after the other.
      most: tokens after which the close is not waited for: ``forced`` is written instead.
      least: tokens before which neither the close's last token nor a stop token is chosen where it
        would end the thought (the budget forcing of s1, arXiv 2501.19393).
      forced: what is written at the cap; ``close`` if empty. No choices of the policy: see
        ``Completion.chosen``.
    """

    close: tuple[int, ...]
    most: int
    least: int = 0
    forced: tuple[int, ...] = ()

    def __post_init__(self):
        checks.at_least(self, most=0, least=0)
        if self.least > self.most:
            raise ConfigError(f"a thought of at least {self.least} tokens, at most {self.most}")
        if not 0 < len(self.close) <= MARKS or len(self.forced) > MARKS:
            raise ConfigError(
                f"the close of a thought has 1 to {MARKS} tokens and what is forced at most "
                f"{MARKS}, not {len(self.close)} and {len(self.forced)}"
            )

    @property
    def ending(self) -> tuple[int, ...]:
        """What is written at the cap."""
        return self.forced or self.close

    def length(self, written: Sequence[int]) -> int | None:
        """How many of the written tokens are the thought with its close; None if it is open."""
        k = len(self.close)
        for n in range(k, min(len(written), self.most) + 1):
            if tuple(written[n - k : n]) == self.close:
                return n
        end = self.most + len(self.ending)
        return end if len(written) >= end else None

    def forced_places(self, written: Sequence[int]) -> slice:
        """Which of the written tokens were forced."""
        length = self.length(written)
        by_itself = length is not None and length <= self.most
        return slice(0, 0) if by_itself else slice(self.most, self.most + len(self.ending))


@dataclass(frozen=True)
class Request:
    """A text to go on with.

    Attributes:
      prompt: token ids.
      max_new_tokens: the most that is written, after the thought if there is one.
      name: numbers, each below 2**32, that the draws are named by, for example (step, prompt,
        sample). What is written depends on them, on the seed and on the text alone.
      written: the first tokens of the answer, where it was begun before (``Completion.carried``);
        they count as new tokens, and ``logprobs`` and ``versions`` belong to them.
      stop_ids: tokens that end this text, besides the engine's.
      thought: how the answer begins.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    name: tuple[int, ...]
    written: Sequence[int] = ()
    logprobs: Any = field(default=(), compare=False)
    versions: Any = field(default=(), compare=False)
    stop_ids: tuple[int, ...] = ()
    thought: Thought | None = None

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"prompt {'/'.join(map(str, self.name))}"

    def check(self, vocab: int, max_length: int) -> None:
        """Refuses what cannot be written.

        Raises:
          DataError: a prompt without a token, or longer than ``max_length``; a token that the
            vocabulary has not; a name that is none; a carried text whose parts differ in length.
        """
        tokens = len(self.prompt) + len(self.written)
        if not len(self.prompt):
            raise DataError(
                f"{self.label} has no token, and the tokenizer none to begin with: write something"
            )
        if tokens > max_length:
            raise DataError(
                f"{self.label} has {tokens} tokens, more than the context of {max_length} tokens: "
                "shorten it"
            )
        marks = (
            *self.stop_ids,
            *(self.thought.close + self.thought.forced if self.thought else ()),
        )
        for what, ids in (("token", self.prompt), ("token", self.written), ("mark", marks)):
            if (bad := outside(ids, vocab)) is not None:
                raise DataError(
                    f"{self.label} has the {what} {bad}, outside the vocabulary of {vocab} tokens: "
                    "was it made with another tokenizer?"
                )
        if any(not 0 <= number < checks.SEEDS for number in self.name):
            raise DataError(f"the name {self.name} is not of numbers from 0 to {checks.SEEDS - 1}")
        if self.max_new_tokens < 1:
            raise DataError(f"{self.label} asks for {self.max_new_tokens} new tokens, not for any")
        lengths = len(self.written), len(self.logprobs), len(self.versions)
        if len(set(lengths)) > 1:
            raise DataError(
                f"{self.label} goes on after {lengths[0]} tokens with {lengths[1]} "
                f"log-probabilities and {lengths[2]} versions"
            )


def outside(ids: Sequence[int], vocab: int) -> int | None:
    """The first of the ids that is no token of the vocabulary."""
    return next((int(i) for i in ids if not 0 <= i < vocab), None)


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
      request: what it answers.
      tokens: of the answer, what the request had ``written`` included, and the stop token.
      logprobs: float32, of each token as ``sampling.sample`` defines it; 0 where it was forced.
      versions: int32, of the parameters that wrote each token.
      reason: why it ended.
      routing: with ``Engine(keep_routing=True)`` the decisions of a mixture's routers: for every
        stack of layers that has one int32 (L, T, K), for all T tokens of the text but the last. Of
        tokens that were read again under newer parameters they are those of that reading.
    """

    request: Request
    tokens: list[int]
    logprobs: np.ndarray
    versions: np.ndarray
    reason: StopReason
    routing: tuple[np.ndarray, ...] = ()

    @property
    def chosen(self) -> np.ndarray:
        """bool: which tokens the policy chose; the others were forced at a thought's cap."""
        chosen = np.ones(len(self.tokens), bool)
        if self.request.thought is not None:
            chosen[self.request.thought.forced_places(self.tokens)] = False
        return chosen

    def carried(self) -> Request:
        """The request that goes on after what is written, under the same name."""
        return dataclasses.replace(
            self.request,
            written=tuple(self.tokens),
            logprobs=self.logprobs,
            versions=self.versions,
        )


@dataclass
class Text:
    """A request while it is written.

    Attributes:
      tokens: of the answer so far, what the request had ``written`` included.
      logprobs: of pieces of them; routing: the same, see ``Completion``.
    """

    request: Request
    tokens: list[int]
    logprobs: list[np.ndarray]
    routing: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    @classmethod
    def of(cls, request: Request) -> Text:
        carried = np.asarray(request.logprobs, np.float32)
        return cls(request, [int(token) for token in request.written], [carried])

    @property
    def ids(self) -> tuple[int, ...]:
        return (*map(int, self.request.prompt), *self.tokens)

    def limit(self, longest: int) -> int:
        """Length of the text at which it ends; while its thought is open the ``longest``."""
        r = self.request
        thought = 0 if r.thought is None else r.thought.length(self.tokens)
        if thought is None:
            return longest
        return min(longest, len(r.prompt) + thought + r.max_new_tokens)

    def stopped(self, stops: Set[int]) -> bool:
        """Whether the policy ended it with one of the tokens."""
        if not self.tokens or self.tokens[-1] not in stops:
            return False
        thought, last = self.request.thought, len(self.tokens) - 1
        places = (
            range(0) if thought is None else range(last + 1)[thought.forced_places(self.tokens)]
        )
        return last not in places

    def reason(self) -> StopReason:
        """Why it ended, if not by a stop token."""
        r = self.request
        thought = 0 if r.thought is None else r.thought.length(self.tokens)
        spent = thought is not None and len(self.tokens) >= thought + r.max_new_tokens
        return "length" if spent else "context"

    def completion(self, reason: StopReason, version: int) -> Completion:
        carried = np.asarray(self.request.versions, np.int32)
        new = np.full(len(self.tokens) - len(carried), version, np.int32)
        return Completion(
            self.request,
            self.tokens,
            np.concatenate(self.logprobs),
            np.concatenate([carried, new]),
            reason,
            tuple(np.concatenate(parts, axis=1) for parts in zip(*self.routing, strict=True)),
        )
