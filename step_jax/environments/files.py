"""Problems from files: records with a question and its answer."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from step_jax.core import checks
from step_jax.core.errors import ConfigError, DataError
from step_jax.data.config import Source
from step_jax.data.files import Skip, list_files, list_skips
from step_jax.data.sources import Document, read_file
from step_jax.environments.problems import Listed, Problem, Problems, Task
from step_jax.environments.rewards import VerifierKind
from step_jax.environments.verifiers import Verifier

_MOST_BYTES = 2**24


@dataclass(frozen=True)
class FileTask(Task):
    """The records of JSONL, Parquet, Arrow or ArrayRecord files, or of a folder of them.

    path: the file or folder.
    checked_by: the verifier of the answers.
    question: the field with what is asked.
    answer: the field with the answer; null for records that have none (programs, say).
    answer_mark: what stands before the answer in its field, after how to get there: ``####`` of
      GSM8K. Empty if the field is the answer alone.
    fields: what else the verifier reads of a record (``tests``, say).
    max_bad_records: records that cannot be read or verified before an error.
    """

    path: str
    checked_by: VerifierKind
    question: str = "question"
    answer: str | None = "answer"
    answer_mark: str = ""
    fields: tuple[str, ...] = ()
    max_bad_records: int = 100
    kind: ClassVar[str] = "file"

    def validate(self):
        checks.at_least(self, max_bad_records=0)
        if self.answer is None and self.answer_mark:
            raise ConfigError("answer_mark is set, but answer names no field that it could be in")

    @property
    def verifier(self) -> Verifier:
        return self.checked_by

    def open(self, heldout_fraction: float) -> Problems:
        """Raises `DataError`: no problems, a damaged file, or too many bad records, by name."""
        problems, skips = self.read()
        bad = [skip for skip in skips if skip.bad]
        if len(bad) > self.max_bad_records:
            raise DataError(
                f"{self.path}: {len(bad)} bad records, max_bad_records is {self.max_bad_records}: "
                f"{list_skips(bad)}"
            )
        if not problems:
            raise DataError(f"{self.path} holds no problem: {list_skips(skips) or 'no record'}")
        return Listed(problems, heldout_fraction, self.path)

    def read(self) -> tuple[list[Problem], list[Skip]]:
        """Every problem in the order of the files, and what was left out by file and line."""
        files, skips = list_files(Source(self.path))
        records, problems = _Records(self), []
        for file in files:
            for item in read_file(file, records, _MOST_BYTES):
                if isinstance(item, Skip):
                    skips.append(item)
                else:
                    problems.append(Problem(item.name, **json.loads(item.text)))
        return problems, skips


@dataclass(frozen=True)
class _Records:
    """Records of problems; see `data.sources.Readable`. A document is JSON of a `Problem`."""

    task: FileTask
    may_be_cut = False

    @property
    def fields(self) -> tuple[str, ...]:
        named = (self.task.question, self.task.answer, *self.task.fields)
        return tuple(name for name in named if name is not None)

    def lacking(self, fields: Collection[str]) -> str | None:
        lacks = [name for name in self.fields if name not in fields]
        if not lacks:
            return None
        return f"no field {lacks[0]!r}; the fields are {list(fields)}: name the one that is meant"

    def document(self, record: Mapping[str, Any], name: str) -> Document | Skip:
        try:
            problem = self._problem(record, name)
            self.task.checked_by.check(problem["record"], name)
        except DataError as error:
            return Skip(name, "bad_problem", str(error).removeprefix(name).lstrip(":, "), bad=True)
        return Document(name, json.dumps(problem, ensure_ascii=False))

    def _problem(self, record: Mapping[str, Any], name: str) -> dict[str, Any]:
        task = self.task
        question = record[task.question]
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{name}: {task.question} is {question!r:.60}; it must be text")
        known: dict[str, Any] = {key: _without_null(record[key]) for key in task.fields}
        thought = answer = None
        if task.answer is not None:
            answer = record[task.answer]
            if isinstance(answer, int | float) and not isinstance(answer, bool):
                answer = str(answer)
            if task.answer_mark and isinstance(answer, str):
                thought, mark, answer = answer.rpartition(task.answer_mark)
                if not mark:
                    raise DataError(f"{name}: {task.answer} lacks the mark {task.answer_mark!r}")
                thought = thought.strip()
            known["answer"] = answer.strip() if isinstance(answer, str) else answer
            answer = known["answer"] if isinstance(answer, str) else None
        return {
            "question": question,
            "record": known,
            "content": " ".join(question.split()),
            "answer": answer,
            "thought": thought,
        }

    def file(self, text: str, name: str) -> Document | Skip:
        return Skip(name, "not_records", "a problem is a record of JSONL, Parquet or Arrow")


def _without_null(value: Any) -> Any:
    """Tables give every entry the keys of all, with null in those that it lacks."""
    if isinstance(value, Mapping):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return value
