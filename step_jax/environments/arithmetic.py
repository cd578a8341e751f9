"""Small tasks of whole numbers, for models that start from nothing: short prompts, worked steps.

Their text is digits and ``+ - * / ( ) = ; # , :``, so a tokenizer of characters is enough. The
thought stands before ``#``, the answer behind it: ``47+85=`` is answered ``7+5=12;1+4+8=13#132``.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from step_jax.core.errors import ConfigError
from step_jax.environments.problems import Drawn, Problem, Problems, Task
from step_jax.environments.replies import Thinking
from step_jax.environments.verifiers import Exact, Expression, Verifier

COMPACT = Thinking(open="", close="#")


@dataclass(frozen=True)
class Addition(Task):
    """The sum of two numbers, worked out column by column with what is carried.

    digits: the least and the most digits of a number; how many is drawn first, each alike.
    thinking: the marks of a reply.
    """

    digits: tuple[int, int] = (1, 3)
    thinking: Thinking = COMPACT
    kind: ClassVar[str] = "addition"

    def validate(self):
        _check_range("digits", self.digits, 1)

    @property
    def verifier(self) -> Verifier:
        return Exact(self.thinking)

    def open(self, heldout_fraction: float) -> Problems:
        return Drawn(self.draw, heldout_fraction)

    def draw(self, rng: random.Random) -> Problem:
        a, b = (_number(rng, self.digits) for _ in range(2))
        return Problem(
            name=self.kind,
            question=f"{a}+{b}=",
            record={"answer": str(a + b)},
            content=f"{min(a, b)}+{max(a, b)}",  # the same sum the other way round is no other
            answer=str(a + b),
            thought=";".join(_columns(a, b)),
        )


def _columns(a: int, b: int) -> Iterator[str]:
    """Each column from the right: what is carried, the digits, their sum."""
    carried = 0
    while a or b or carried:
        a, x = divmod(a, 10)
        b, y = divmod(b, 10)
        if not (a or b or x or y):  # only what is carried is left: it is its own column's sum
            return
        total = carried + x + y
        yield f"{carried}+{x}+{y}={total}" if carried else f"{x}+{y}={total}"
        carried = total // 10


@dataclass(frozen=True)
class ChainSum(Task):
    """A chain of additions and subtractions, worked out from left to right.

    terms: the least and the most numbers.
    digits: of each number, the least and the most.
    operators: what may stand between two of them.
    thinking: the marks of a reply.
    """

    terms: tuple[int, int] = (2, 4)
    digits: tuple[int, int] = (1, 2)
    operators: Literal["+", "-", "+-"] = "+-"
    thinking: Thinking = COMPACT
    kind: ClassVar[str] = "chain_sum"

    def validate(self):
        _check_range("terms", self.terms, 2)
        _check_range("digits", self.digits, 1)

    @property
    def verifier(self) -> Verifier:
        return Exact(self.thinking)

    def open(self, heldout_fraction: float) -> Problems:
        return Drawn(self.draw, heldout_fraction)

    def draw(self, rng: random.Random) -> Problem:
        terms = [_number(rng, self.digits) for _ in range(rng.randint(*self.terms))]
        text, total, steps = str(terms[0]), terms[0], []
        for term in terms[1:]:
            operator = rng.choice(self.operators)
            value = total + term if operator == "+" else total - term
            steps.append(f"{total}{operator}{term}={value}")
            text, total = f"{text}{operator}{term}", value
        return Problem(
            name=self.kind,
            question=f"{text}=",
            record={"answer": str(total)},
            content=text,
            answer=str(total),
            thought=";".join(steps),
        )


@dataclass(frozen=True)
class Countdown(Task):
    """Numbers of which an expression is to be made that has a given value, worked out by search.

    The thought goes through pairs in a fixed order, depth first, and writes down each value that
    it makes: ``5,5,8:17=`` is answered ``5+5=10;8+10=18;10-8=2;8*10=80;5*5=25;8+25=33;25-8=17``
    and ``#5*5-8``. Whole values above 0 only.

    numbers: how many there are.
    largest: of the numbers.
    target: the least and the most.
    operators: that may be used.
    steps: the most that a thought may have; problems that need more are not given.
    thinking: the marks of a reply.
    """

    numbers: int = 3
    largest: int = 12
    target: tuple[int, int] = (1, 60)
    operators: Literal["+-", "+-*", "+-*/"] = "+-*"
    steps: int = 40
    thinking: Thinking = COMPACT
    kind: ClassVar[str] = "countdown"

    def validate(self):
        if not 2 <= self.numbers <= 6:
            raise ConfigError(f"numbers is {self.numbers}; it must be from 2 to 6")
        if self.largest < 2 or self.steps < 1:
            raise ConfigError("largest must be at least 2, steps at least 1")
        _check_range("target", self.target, 1)

    @property
    def verifier(self) -> Verifier:
        return Expression(self.thinking)

    def open(self, heldout_fraction: float) -> Problems:
        return Drawn(self.draw, heldout_fraction)

    def draw(self, rng: random.Random) -> Problem:
        reached: dict[int, tuple[str, int]] = {}
        while not reached:
            numbers = sorted(rng.randint(1, self.largest) for _ in range(self.numbers))
            steps: list[str] = []
            for value, text in _values([(n, str(n)) for n in numbers], self.operators, steps):
                if len(steps) > self.steps:
                    break
                if self.target[0] <= value <= self.target[1]:
                    reached.setdefault(value, (text, len(steps)))
        target = rng.choice(sorted(reached))
        found, count = reached[target]
        content = f"{','.join(map(str, numbers))}:{target}"
        return Problem(
            name=self.kind,
            question=f"{content}=",
            record={"numbers": numbers, "target": target},
            content=content,
            answer=found,
            thought=";".join(steps[:count]),
        )


_Term = tuple[int, str]


def _values(terms: list[_Term], operators: str, steps: list[str]) -> Iterator[tuple[int, str]]:
    """Every value of an expression of all terms, with the expression, in the order of the search.

    Each value that is made, also on the way, is added to ``steps`` first.
    """
    for i, j in itertools.combinations(range(len(terms)), 2):
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        for operator in operators:
            made = _made(terms[i], terms[j], operator)
            if made is None:
                continue
            value, (a, b), text = made
            steps.append(f"{a}{operator}{b}={value}")
            if rest:
                yield from _values([*rest, (value, text)], operators, steps)
            else:
                yield value, text


def _made(first: _Term, second: _Term, operator: str) -> tuple[int, tuple[int, int], str] | None:
    """(value, its two numbers, larger first where the order matters, expression) of two terms."""
    if operator in "-/" and first[0] < second[0]:
        first, second = second, first
    (a, left), (b, right) = first, second
    match operator:
        case "+":
            value = Fraction(a + b)
        case "-":
            value = Fraction(a - b)
        case "*":
            value = Fraction(a * b)
        case _:
            value = Fraction(a, b)
    if value.denominator != 1 or value <= 0:
        return None
    if operator in "*/":
        left, right = (f"({x})" if not x.isdigit() else x for x in (left, right))
    elif operator == "-" and not right.isdigit():
        right = f"({right})"
    return int(value), (a, b), f"{left}{operator}{right}"


def _number(rng: random.Random, digits: tuple[int, int]) -> int:
    count = rng.randint(*digits)
    return rng.randint(10 ** (count - 1) if count > 1 else 0, 10**count - 1)


def _check_range(name: str, bounds: tuple[int, int], least: int) -> None:
    if not least <= bounds[0] <= bounds[1]:
        raise ConfigError(
            f"{name} is {list(bounds)}; it must be the least (from {least}) and the most"
        )
