"""Problems as pure functions of a seed and an index, and the held-out ones apart by what they say.

A problem is held out when a hash of its *content* falls below a threshold, as documents are
(`data/split.py`): so no seed and no index of training ever gives a problem that is evaluated on,
in whatever order they are drawn.
"""

from __future__ import annotations

import abc
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from step_jax.core.errors import ConfigError, DataError
from step_jax.data.packing import derive_key, permutation
from step_jax.data.sources import Document
from step_jax.data.split import choose, content_hash, split_documents
from step_jax.environments.replies import Thinking
from step_jax.environments.verifiers import Verifier

#: drawn problems that may fall on the wrong side one after the other
_MOST_DRAWN = 10_000


@dataclass(frozen=True)
class Problem:
    """One problem.

    name: where it comes from: what was drawn, or file and line.
    question: what a model is asked; the prompt of a model that knows no chat template.
    record: what its verifier is given.
    content: what makes it the same problem as another, however it is written.
    answer: a right conclusion; None where only the verifier knows one when it sees it.
    thought: how to get to the answer, worked out; None where nobody has written it.
    """

    name: str
    question: str
    record: Mapping[str, Any]
    content: str
    answer: str | None = None
    thought: str | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question as a conversation that is to be answered."""
        return [{"role": "user", "content": self.question}]

    def solved(self, thinking: Thinking | None) -> dict[str, list[dict[str, str]]]:
        """The conversation with its worked solution, as ``step-jax sft`` reads it.

        Between the usual marks the thought is one to the chat template, which writes them; with
        others it is part of what is said, so that what is learned is what the verifier reads.

        Raises:
          DataError: the problem has no answer.
        """
        said = {"role": "assistant", "content": self.reply(thinking)}
        if thinking == Thinking() and self.thought is not None:
            said |= {"content": self._solution(), "reasoning_content": self.thought}
        return {"messages": [*self.messages, said]}

    def reply(self, thinking: Thinking | None) -> str:
        """The worked solution as a reply. Raises `DataError` if the problem has no answer."""
        answer = self._solution()
        return answer if thinking is None else thinking.write(self.thought, answer)

    def _solution(self) -> str:
        if self.answer is None:
            raise DataError(f"{self.name} has no worked answer, only a verifier")
        return self.answer


class Problems(abc.ABC):
    """The problems of a task, in two sides that share none."""

    @abc.abstractmethod
    def train(self, seed: int, index: int) -> Problem:
        """The problem at a place of the endless order of a seed."""

    @abc.abstractmethod
    def heldout(self, count: int) -> list[Problem]:
        """The first problems of the held-out side, each another one; the same for every seed.

        Raises:
          DataError: there are not so many.
        """


class Task(abc.ABC):
    """What a task has, be it of the union ``TaskKind`` or of your own: a frozen dataclass."""

    kind: ClassVar[str]

    @property
    @abc.abstractmethod
    def verifier(self) -> Verifier:
        """How replies are scored unless a recipe says otherwise."""

    @abc.abstractmethod
    def open(self, heldout_fraction: float) -> Problems:
        """Its problems, of which about that share is held out."""


class Drawn(Problems):
    """Problems that are made up, each from random numbers of its own."""

    def __init__(self, draw: Callable[[random.Random], Problem], heldout_fraction: float):
        _check_fraction(heldout_fraction)
        self._draw, self._threshold = draw, int(heldout_fraction * 2**64)

    def train(self, seed: int, index: int) -> Problem:
        return self._search(False, "train", seed, index)

    def heldout(self, count: int) -> list[Problem]:
        found: dict[str, Problem] = {}
        place = 0
        while len(found) < count:
            problem = self._search(True, "heldout", place)
            found.setdefault(problem.content, problem)
            place += 1
            if place > 20 * count + 100:
                raise DataError(
                    f"{count} held-out problems are asked for, and {place} draws gave only "
                    f"{len(found)} that differ: {problem.name} has few. Ask for fewer, hold out a "
                    "larger share, or make the task larger"
                )
        return list(found.values())

    def _search(self, held: bool, *place: object) -> Problem:
        """The first problem of a side among those that a place draws."""
        for attempt in range(_MOST_DRAWN):
            problem = self._draw(random.Random(derive_key(*place, attempt)))
            if (content_hash(problem.content) < self._threshold) == held:
                return problem
        side = "held out" if held else "left to train on"
        raise DataError(
            f"of {_MOST_DRAWN:,} problems that were drawn none is {side}: {problem.name} has few "
            "different ones. Change the share that is held out, or make the task larger"
        )


def sides[T](
    items: Sequence[T], contents: Sequence[str], heldout_fraction: float
) -> tuple[list[T], list[T]]:
    """(what is trained on, what is held out), each by its content alone."""
    _check_fraction(heldout_fraction)
    documents = [Document(str(i), content) for i, content in enumerate(contents)]
    choice = choose(documents, heldout_fraction, may_be_cut=False)
    found: tuple[list[T], list[T]] = ([], [])
    for document, held in split_documents(documents, heldout_fraction, choice):
        found[held].append(items[int(document.name)])
    return found


class Listed(Problems):
    """Problems that were written down; training goes through them in another order each time."""

    def __init__(self, problems: Sequence[Problem], heldout_fraction: float, name: str):
        """Raises `DataError` if a side has none."""
        contents = [one.content for one in problems]
        self._train, self._heldout = sides(problems, contents, heldout_fraction)
        self._name = name
        if not self._train:
            raise DataError(
                f"{name}: none of its {len(problems)} problems is left to train on; hold out less"
            )
        self._order = functools.lru_cache(2)(
            lambda seed, epoch: permutation(len(self._train), derive_key(seed, "problems", epoch))
        )

    def train(self, seed: int, index: int) -> Problem:
        epoch, place = divmod(index, len(self._train))
        return self._train[self._order(seed, epoch)[place]]

    def heldout(self, count: int) -> list[Problem]:
        ranked = sorted(self._heldout, key=lambda problem: content_hash(problem.content))
        found = list({problem.content: problem for problem in ranked}.values())
        if len(found) < count:
            raise DataError(
                f"{self._name}: {count} held-out problems are asked for, and {len(found)} are held "
                "out: ask for fewer, or hold out a larger share"
            )
        return found[:count]


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ConfigError(f"the held-out share of problems is {fraction}; it must be in (0, 1)")
