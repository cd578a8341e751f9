"""What is checked: one kernel at one shape, with the inputs on which a fault shows.

Shape suffixes: none of its own.

Inputs are made so that what must not be read is seen when it is. Where a kernel promises to ignore
what lies in its arguments that is NaN; where the numbers only have to be finite (padding behind
documents, slots of a cache that were never written) it is ``HUGE``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from step_jax.ops import registry

#: What finite numbers that nobody may look at are; exact in bfloat16.
HUGE = 2.0**13

#: Relative error that a kernel may have in any row of a result, by the dtype of its inputs: four
#: roundings to bfloat16. A product of float32 that a matrix unit rounded to bfloat16 or TF32 on its
#: way would be off by 2^-11 at least.
_BOUNDS = {"bfloat16": 2.0**-7, "float32": 2.0**-13}
#: Gradients that are differences of nearly equal numbers: of attention, through its softmax.
_OF_DIFFERENCES = ("dq", "dk")


def bound(dtype: str, result: str) -> float:
    """The error that a result may have in its worst row."""
    return _BOUNDS[dtype] * (8 if result in _OF_DIFFERENCES else 1)


class Case(Protocol):
    """One kernel at one shape. A case is a frozen dataclass: its ``repr`` names it.

    operation: whose implementation is checked.
    """

    operation: ClassVar[registry.Operation]

    @property
    def implementation(self) -> str:
        """Of the operation; a kernel."""

    @property
    def dtype(self) -> str:
        """Of the inputs."""

    def shapes(self) -> str:
        """The shape in words, for people."""

    def draw(self, key) -> tuple:
        """The inputs, a tuple of arrays; traced."""

    def results(self, implementation: str, device: jax.Device) -> Callable[..., dict[str, Any]]:
        """Inputs -> the results and gradients by name, by any implementation of the operation."""

    def reference(self) -> Callable[..., dict[str, Any]]:
        """The same in float32, by another way."""

    def operations(self) -> float:
        """Multiply-adds, counted twice, that the results need; masked ones do not count."""

    def traffic(self) -> float:
        """Bytes that must be read from main memory where that is what takes the time; else 0."""

    def at_work(self, tokens: int) -> Case:
        """The same as a run on rows of ``tokens`` asks for it, nothing awkward: to be timed."""


def kernel_name(case: Case) -> str:
    return f"{case.operation.name} {case.implementation}"


def normal(key, number: int, shape, dtype="float32"):
    """Normal numbers, others for every ``number``."""
    return jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32).astype(dtype)
