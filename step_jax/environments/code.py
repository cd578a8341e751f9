"""The verifier of programs: they are run in the sandbox, and what they print or return is compared.

The record has ``tests``, a list of

  {"stdin": text, "stdout": text}                   the program is run
  {"call": name, "args": [...], "result": value}    its function is called, JSON values

Each test has a sandbox of its own, which is given the input only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from step_jax.core.errors import DataError
from step_jax.environments import sandbox
from step_jax.environments.replies import Thinking, conclusion, program
from step_jax.environments.sandbox import Limits
from step_jax.environments.verifiers import Record, Verifier

_KEYS = ({"stdin", "stdout"}, {"call", "args", "result"})
_NEAR = 1e-9  # relative: numbers that are printed and read are not the same to the last bit


@dataclass(frozen=True)
class Code(Verifier):
    """1 if the program in the conclusion passes every test.

    The program is the last block of code between fences, or the whole conclusion.

    limits: of each test; the time that the pool gives a reply is for all of them together.
    partial: give the share of the tests that it passes instead.
    """

    thinking: Thinking | None = Thinking()
    limits: Limits = Limits()
    partial: bool = False
    kind: ClassVar[str] = "code"

    @property
    def confined(self) -> bool:
        return False  # it starts sandboxes

    def load(self) -> None:
        sandbox.require(self.limits.memory_mib)

    def check(self, record: Record, name: str) -> None:
        tests = record.get("tests")
        if not isinstance(tests, list | tuple) or not tests:
            raise DataError(f"{name}: tests are {tests!r:.60}; they must be a list, and not empty")
        for i, test in enumerate(tests):
            if not isinstance(test, Mapping) or set(test) not in _KEYS:
                raise DataError(
                    f"{name}, test {i} is {test!r:.60}; it must have stdin and stdout, or call, "
                    "args and result"
                )

    def score(self, reply: str, record: Record) -> float:
        said = conclusion(reply, self.thinking)
        if not said:
            return 0.0
        text, passed = program(said), 0
        for test in record["tests"]:
            good = self._passes(text, test)
            if not good and not self.partial:
                return 0.0
            passed += good
        return passed / len(record["tests"])

    def _passes(self, text: str, test: Mapping[str, Any]) -> bool:
        if "call" not in test:
            ran = sandbox.run(text, test["stdin"], self.limits)
            return ran.good and _lines(ran.out) == _lines(test["stdout"])
        ran = sandbox.run(text, json.dumps(test["args"]), self.limits, test["call"])
        try:
            return ran.good and same(json.loads(ran.out), test["result"])
        except (ValueError, RecursionError):
            return False


def _lines(text: str) -> list[str]:
    """Lines without the space at their ends and the empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def same(found: Any, expected: Any) -> bool:
    """Whether two JSON values are equal, floating-point numbers but for rounding."""
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, float) or isinstance(expected, float):
        numbers = isinstance(found, int | float) and isinstance(expected, int | float)
        return numbers and math.isclose(found, expected, rel_tol=_NEAR, abs_tol=_NEAR)
    if isinstance(found, list) and isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(found, dict) and isinstance(expected, Mapping):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    return found == expected
