"""Rewards: weighted sums of named scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from step_jax.core.errors import ConfigError
from step_jax.environments.code import Code
from step_jax.environments.gym import ReasoningGym
from step_jax.environments.mathematics import Math
from step_jax.environments.verifiers import Exact, Expression, Format, Numeric, Record, Verifier

SingleVerifier = Exact | Numeric | Format | Expression | Math | ReasoningGym | Code


@dataclass(frozen=True)
class Term:
    """A part of a reward: what a verifier gives, times ``weight``."""

    verifier: SingleVerifier
    weight: float = 1.0

    def validate(self):
        if not math.isfinite(self.weight):
            raise ConfigError(f"weight is {self.weight}; it must be finite")


@dataclass(frozen=True)
class WeightedSum(Verifier):
    """The sum of several verifiers' scores, each times its weight and told by its name.

    terms: name -> verifier and weight.
    """

    terms: dict[str, Term] = field(default_factory=dict)
    kind: ClassVar[str] = "sum"

    def validate(self):
        if not self.terms:
            raise ConfigError("terms is empty: a reward of nothing teaches nothing")

    @property
    def confined(self) -> bool:
        return all(term.verifier.confined for term in self.terms.values())

    def load(self) -> None:
        for term in self.terms.values():
            term.verifier.load()

    def check(self, record: Record, name: str) -> None:
        for term in self.terms.values():
            term.verifier.check(record, name)

    def score(self, reply: str, record: Record) -> float:
        return sum(self.scores(reply, record).values())

    def scores(self, reply: str, record: Record) -> dict[str, float]:
        return {
            name: term.weight * float(term.verifier.score(reply, record))
            for name, term in self.terms.items()
        }


VerifierKind = SingleVerifier | WeightedSum
