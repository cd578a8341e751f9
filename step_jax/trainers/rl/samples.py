"""Answers of a policy while they are written, and when they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from step_jax.inference.requests import Completion, Request, StopReason


@dataclass(frozen=True)
class Sample:
    """An answer, or the part of it that is written.

    Attributes:
      index: of its problem. sample: which of the problem's answers it is.
      tokens, logprobs, versions, chosen: of the answer so far, see ``inference.requests``.
      finish: why it ended; None if it has not.
      reward: None until it is verified.
      routing: see ``Completion.routing``.
    """

    index: int
    sample: int
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    versions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    chosen: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    finish: StopReason | None = None
    reward: float | None = None
    routing: tuple[np.ndarray, ...] = ()

    def gone_on(self, done: Completion) -> Sample:
        """With what was written since."""
        chosen = np.asarray(done.chosen)
        chosen[: len(self.chosen)] = self.chosen
        return replace(
            self,
            tokens=np.asarray(done.tokens, np.int32),
            logprobs=np.asarray(done.logprobs, np.float32),
            versions=np.asarray(done.versions, np.int32),
            chosen=chosen,
            finish=None if done.reason == "unfinished" else done.reason,
            # of what is gone on with, they are those of its next reading
            routing=() if done.reason == "unfinished" else done.routing,
        )

    def request(self, prompt: Sequence[int], most: int, name: tuple[int, ...]) -> Request:
        """What goes on with it, to ``most`` tokens."""
        return Request(
            prompt,
            most,
            name,
            written=self.tokens.tolist(),
            logprobs=self.logprobs,
            versions=self.versions,
        )

    @property
    def begin(self) -> int:
        """Where its last turn begins."""
        told = np.flatnonzero(~self.chosen)
        return int(told[-1]) + 1 if len(told) else 0

    @property
    def turns(self) -> int:
        """How often the policy spoke."""
        told = np.flatnonzero(~self.chosen)
        return 1 + int(np.sum(np.diff(told, prepend=-2) > 1))

    def told(self, ids: Sequence[int], version: int, most: int) -> Sample:
        """It goes on after tokens that the policy did not choose; without room for them and one
        more among ``most`` it has come to its ``length``, and nothing."""
        more = len(ids)
        if len(self.tokens) + more >= most:
            return replace(self, finish="length", reward=0.0)
        return replace(
            self,
            tokens=np.append(self.tokens, np.asarray(ids, np.int32)),
            logprobs=np.append(self.logprobs, np.zeros(more, np.float32)),
            versions=np.append(self.versions, np.full(more, version, np.int32)),
            chosen=np.append(self.chosen, np.zeros(more, bool)),
            finish=None,
            routing=(),
        )


class Batch(NamedTuple):
    """Answers of a batch, group by group, and figures of how they were written."""

    samples: list[Sample]
    figures: dict[str, float]
