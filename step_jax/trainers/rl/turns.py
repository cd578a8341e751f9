"""Answers of several turns: a reply that calls tools is told what they gave, and goes on.

An answer stays one text: what was told stands in it as tokens that the policy did not choose.
"""

from __future__ import annotations

import itertools
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils

from step_jax.environments.dialogue import Dialogue
from step_jax.environments.problems import Problem
from step_jax.environments.tools import Tools
from step_jax.tokenizers.base import Tokenizer
from step_jax.trainers.rl.samples import Sample

#: of an answer: see ``Request.name``
Name = tuple[int, ...]


class Turns:
    """The tools of a run; use it in a ``with`` statement. The first process calls them."""

    def __init__(self, tools: Tools, tokenizer: Tokenizer, at_once: int = 16):
        """Raises ConfigError for a tokenizer whose chat template cannot go on after a reply, or a
        tool that cannot run here."""
        for tool in tools.tools:
            tool.load()
        self._tools = tools
        self._dialogue = Dialogue(tokenizer, "tool", tools.described())
        self._threads = ThreadPoolExecutor(at_once, "tool")
        self._pending: dict[Name, Future[list[int]]] = {}

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *exc):
        self._threads.shutdown(cancel_futures=True)

    def begin(self, problem: Problem) -> list[int]:
        """The prompt's tokens of a problem."""
        return self._dialogue.begin(problem.messages)

    def ask(self, name: Name, sample: Sample, reply: str) -> bool:
        """Whether an answer that stopped goes on; its tools are called meanwhile.

        Args:
          reply: its last turn in words.
        """
        if sample.finish != "stop" or sample.turns >= self._tools.most_turns:
            return False
        if not self._dialogue.goes_on(sample.tokens.tolist()):
            return False
        if not (calls := self._tools.calls(reply)):
            return False
        self._pending[name] = self._threads.submit(self._answered, calls)
        return True

    def _answered(self, calls: list[str]) -> list[int]:
        said = [{"role": "tool", "content": self._tools.answer(call)} for call in calls]
        return self._dialogue.follow(said)

    def told(self) -> dict[Name, list[int]]:
        """Of all that asked since the last call, the tokens that follow up to the next reply; the
        same on every process, each of which must call it."""
        told = {name: answer.result() for name, answer in sorted(self._pending.items())}
        self._pending = {}
        return _from_the_first(told) if jax.process_count() > 1 else told


def _from_the_first(told: dict[Name, list[int]]) -> dict[Name, list[int]]:
    """What the first process was told, on every one."""
    first = jax.process_index() == 0
    rows = [(*name, len(ids)) for name, ids in told.items()]
    shape = np.asarray([len(rows), len(rows[0]) if rows else 0], np.int32)
    heads = np.zeros(multihost_utils.broadcast_one_to_all(shape), np.int32)
    if first and rows:
        heads[:] = rows
    heads = multihost_utils.broadcast_one_to_all(heads)
    flat = np.zeros(heads[:, -1].sum() if len(heads) else 0, np.int32)
    if first:
        flat[:] = np.fromiter(itertools.chain.from_iterable(told.values()), np.int32)
    flat = multihost_utils.broadcast_one_to_all(flat)
    ends = np.cumsum(heads[:, -1])
    return {
        tuple(map(int, head[:-1])): flat[end - head[-1] : end].tolist()
        for head, end in zip(heads, ends, strict=True)
    }
