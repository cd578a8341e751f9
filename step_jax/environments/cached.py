"""Rounds over conclusions that a model came to before, as a task: what ``step-jax solve`` wrote."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from step_jax.core.errors import DataError
from step_jax.environments.pacore import Cached, CoordinatedProblems, CoordinatedRound
from step_jax.environments.problems import Problem, Problems, Task, sides
from step_jax.environments.replies import Thinking
from step_jax.environments.rewards import VerifierKind
from step_jax.environments.verifiers import Verifier


@dataclass(frozen=True)
class Coordinated(Task):
    """One round of coordinated reasoning (PaCoRe, arXiv 2601.05593): a question with conclusions of
    earlier replies, some of them wrong.

    path: ``samples.jsonl`` of ``step-jax solve``.
    checked_by: the verifier of the answers.
    rounds: what a round looks like, and which are worth learning from.
    """

    path: str
    checked_by: VerifierKind
    rounds: CoordinatedRound = CoordinatedRound()
    kind: ClassVar[str] = "coordinated"

    @property
    def verifier(self) -> Verifier:
        return self.checked_by

    @property
    def thinking(self) -> Thinking | None:
        """The marks of a reply's thought, as its verifier reads them."""
        return getattr(self.checked_by, "thinking", None)

    def open(self, heldout_fraction: float) -> Problems:
        """Raises `DataError`: no samples, a line that is none, or no problem left to train on."""
        cached = list(self.read().values())
        train, heldout = sides(cached, [one.problem.content for one in cached], heldout_fraction)
        if not train:
            raise DataError(f"{self.path}: none of {len(cached)} problems is left to train on")
        return CoordinatedProblems(train, heldout, self.rounds)

    def read(self) -> dict[str, Cached]:
        """Content -> the problem with all conclusions that were sampled for it."""
        problems: dict[str, Problem] = {}
        said: dict[str, list[tuple[str, bool]]] = defaultdict(list)
        solved: dict[str, list[tuple[str | None, str]]] = defaultdict(list)
        for where, record in self._records():
            try:
                problem = Problem(
                    *(record[key] for key in ("problem", "question", "record", "content", "answer"))
                )
                conclusion, right = record["conclusion"], bool(record["right"])
                reply = record["reply"]
            except (KeyError, TypeError) as error:
                raise DataError(
                    f"{where} is no sample of step-jax solve: it lacks {error}"
                ) from error
            problems.setdefault(problem.content, problem)
            if conclusion:
                said[problem.content].append((conclusion, right))
                if right:
                    thought = None if self.thinking is None else self.thinking.thought(reply)
                    solved[problem.content].append((thought, conclusion))
        if not said:
            raise DataError(f"{self.path} holds no conclusion of a reply")
        return {
            content: Cached(
                problems[content],
                conclusions=tuple(text for text, _ in pairs),
                correct=tuple(right for _, right in pairs),
                solutions=tuple(solved[content]),
            )
            for content, pairs in said.items()
        }

    def _records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        try:
            lines = Path(self.path).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            where = f"{self.path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where} is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{where} is {type(record).__name__}, not an object")
            yield where, record
