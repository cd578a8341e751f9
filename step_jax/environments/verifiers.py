"""Verifiers: pure functions from a reply and what is known of its problem to a score.

A verifier is a frozen dataclass. It runs in worker processes (`pool.py`), which import this module
and no JAX. Its record is what a task says of a problem: ``answer``, the accepted text or a list of
them, unless a verifier names something else.
"""

from __future__ import annotations

import abc
import ast
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from step_jax.core import checks
from step_jax.core.errors import DataError
from step_jax.environments.replies import Thinking, boxed, conclusion

Record = Mapping[str, Any]

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:(?<=\d)\.\d*|\.\d+|(?<=\d))(?:[eE][-+]?\d{1,3})?"
    r"(?:\s*/\s*\d+)?(?![\w])"
)
_MOST_CHARACTERS = 1000  # of a number or an expression: arithmetic on it must end at once
_MOST_BITS = 4000  # of a value on the way
_LARGEST = 1e300


class Verifier(abc.ABC):
    """What a verifier has, be it of the union ``VerifierKind`` or of your own.

    Your own must be importable by name, since a worker process imports it.
    """

    kind: ClassVar[str]

    @property
    def confined(self) -> bool:
        """Whether its process may only read and compute (`system_calls.confine`): True unless it
        must start processes or talk to others."""
        return True

    def load(self) -> None:  # noqa: B027
        """Imports what is slow to import, once in each process and before any deadline."""

    def check(self, record: Record, name: str) -> None:
        """Raises `DataError` for a record with which no reply could be scored."""
        accepted(record, name)

    @abc.abstractmethod
    def score(self, reply: str, record: Record) -> float:
        """Of the whole reply as the model wrote it, mostly from 0 to 1."""

    def scores(self, reply: str, record: Record) -> dict[str, float]:
        """Name -> what it adds to the reward: one entry, but for a sum."""
        return {self.kind: float(self.score(reply, record))}


def accepted(record: Record, name: str = "the record") -> list[str]:
    """The answers of a record. Raises `DataError` if there is none."""
    answer = record.get("answer")
    answers = answer if isinstance(answer, list | tuple) else [answer]
    texts = [one.strip() for one in answers if isinstance(one, str) and one.strip()]
    if not answers or len(texts) < len(answers):
        raise DataError(
            f"{name}: answer is {answer!r:.60}; it must be text that is not empty, or a list of "
            "texts of which any is right"
        )
    return texts


@dataclass(frozen=True)
class Exact(Verifier):
    """1 if the conclusion is one of the answers, letter by letter.

    thinking: the marks that are taken off first; null if replies are conclusions only.
    ignore_case: whether capitals may differ.
    """

    thinking: Thinking | None = Thinking()
    ignore_case: bool = False
    kind: ClassVar[str] = "exact"

    def score(self, reply: str, record: Record) -> float:
        said = conclusion(reply, self.thinking)
        if said is None:
            return 0.0
        answers = accepted(record)
        if self.ignore_case:
            said, answers = said.casefold(), [one.casefold() for one in answers]
        return float(said in answers)


@dataclass(frozen=True)
class Numeric(Verifier):
    r"""1 if the last number of the conclusion is an answer's.

    Numbers may have commas between thousands, an exponent, or be a fraction of two; where there is
    a ``\boxed{}``, only what is in it counts. They are compared exactly, but for ``relative``.

    relative: how much of the answer the number may be away from it.
    """

    thinking: Thinking | None = Thinking()
    relative: float = 0.0
    kind: ClassVar[str] = "numeric"

    def validate(self):
        checks.at_least(self, relative=0)

    def check(self, record: Record, name: str) -> None:
        for answer in accepted(record, name):
            if last_number(answer) is None:
                raise DataError(f"{name}: the answer {answer!r:.60} holds no number")

    def score(self, reply: str, record: Record) -> float:
        said = conclusion(reply, self.thinking)
        value = None if said is None else last_number(said)
        if value is None:
            return 0.0
        answers = [last_number(answer) for answer in accepted(record)]
        return float(any(self._equal(value, one) for one in answers if one is not None))

    def _equal(self, value: Fraction, answer: Fraction) -> bool:
        return abs(value - answer) <= Fraction(self.relative) * abs(answer)


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; None if there is none, or one too long to mean it."""
    inside = boxed(text)
    found = _NUMBER.findall((text if inside is None else inside)[-_MOST_CHARACTERS:])
    if not found:
        return None
    above, _, below = found[-1].replace(",", "").partition("/")
    if below and not int(below):
        return None
    return Fraction(above.strip()) / (Fraction(below.strip()) if below else 1)


@dataclass(frozen=True)
class Format(Verifier):
    """1 if a reply is one thought between its marks and then a conclusion; knows no answer."""

    thinking: Thinking = Thinking()
    kind: ClassVar[str] = "format"

    def check(self, record: Record, name: str) -> None:
        pass

    def score(self, reply: str, record: Record) -> float:
        return float(self.thinking.well_formed(reply))


@dataclass(frozen=True)
class Expression(Verifier):
    """1 if the conclusion is an expression of each of the numbers once that makes the target.

    The record has ``numbers`` (whole) and ``target``. An expression has numbers, ``+ - * /`` and
    brackets; what stands after a ``=`` is not looked at.
    """

    thinking: Thinking | None = Thinking()
    kind: ClassVar[str] = "expression"

    def check(self, record: Record, name: str) -> None:
        numbers, target = record.get("numbers"), record.get("target")
        if not isinstance(numbers, list | tuple) or not all(isinstance(n, int) for n in numbers):
            raise DataError(f"{name}: numbers are {numbers!r:.60}; they must be whole numbers")
        if not isinstance(target, int):
            raise DataError(f"{name}: target is {target!r:.60}; it must be a whole number")

    def score(self, reply: str, record: Record) -> float:
        said = conclusion(reply, self.thinking)
        if said is None:
            return 0.0
        try:
            value, numbers = evaluate(said.partition("=")[0])
        except ValueError:
            return 0.0
        used = Counter(numbers) == Counter(Fraction(n) for n in record["numbers"])
        return float(used and value == record["target"])


def evaluate(text: str) -> tuple[Fraction, list[Fraction]]:
    """The exact value of an expression of numbers, ``+ - * /`` and brackets, and its numbers.

    Raises:
      ValueError: it is none, it divides by 0, or it is too long.
    """
    text = text.strip().replace("\u00d7", "*").replace("\u00f7", "/").replace("\u2212", "-")
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"{len(text)} characters; an expression may have {_MOST_CHARACTERS}")
    if not re.fullmatch(r"[-+*/().\d\s]+", text) or "**" in text or "//" in text:
        raise ValueError("an expression has numbers, + - * / and brackets")
    numbers: list[Fraction] = []
    try:
        return _value(ast.parse(text, mode="eval").body, numbers), numbers
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("it is no expression, or too deep a one") from error


def _value(node: ast.expr, numbers: list[Fraction]) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number):
            if not abs(number) < _LARGEST:
                raise ValueError("a number is too large")
            numbers.append(Fraction(str(number)))
            return numbers[-1]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, numbers)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, numbers)
        case ast.BinOp(left=left, op=op, right=right):
            value = _operated(_value(left, numbers), op, _value(right, numbers))
            if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MOST_BITS:
                raise ValueError("a value is too large")
            return value
    raise ValueError("an expression has numbers, + - * / and brackets")


def _operated(a: Fraction, op: ast.operator, b: Fraction) -> Fraction:
    match op:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
        case ast.Div() if b:
            return a / b
    raise ValueError("it divides by 0")
