"""The verifier of mathematical answers, math-verify's (``pip install math-verify``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from step_jax.core.errors import ConfigError, DataError
from step_jax.environments.replies import Thinking, conclusion
from step_jax.environments.verifiers import Record, Verifier, accepted


@dataclass(frozen=True)
class Math(Verifier):
    r"""1 if math-verify finds the conclusion equal to an answer: LaTeX, sets, intervals, equations.

    An answer is LaTeX or plain mathematics, with or without ``$`` or ``\boxed{}``.
    """

    thinking: Thinking | None = Thinking()
    kind: ClassVar[str] = "math"

    def load(self) -> None:
        try:
            import math_verify  # noqa: F401
        except ImportError:
            raise ConfigError(
                "the verifier math needs math-verify: pip install math-verify"
            ) from None

    def score(self, reply: str, record: Record) -> float:
        from math_verify import parse, verify

        said = conclusion(reply, self.thinking)
        if not said:
            return 0.0
        # The pool's deadline holds, so the library's own alarms are off.
        found = parse(said, parsing_timeout=None)
        for answer in accepted(record):
            expected = parse(answer, parsing_timeout=None) or parse(
                f"${answer}$", parsing_timeout=None
            )
            if not expected:
                raise DataError(f"math-verify cannot read the answer {answer!r:.60}")
            if found and verify(expected, found, timeout_seconds=None):
                return 1.0
        return 0.0
