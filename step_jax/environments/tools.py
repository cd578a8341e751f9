"""An environment with tools: a reply may call some, is told what they gave, and goes on.

A call is ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` in the conclusion of a reply,
as the templates ``chatml`` and ``plain`` (and Qwen's and Hermes') write it. What is wrong with a
call is told to the policy, as the tool's reply.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.environments import sandbox
from step_jax.environments.episodes import Episode, Step, answered
from step_jax.environments.pool import Pool
from step_jax.environments.problems import Problems
from step_jax.environments.replies import Thinking, conclusion
from step_jax.environments.sandbox import Limits
from step_jax.environments.verifiers import evaluate

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.S)
_LONGEST = 2000  # characters of what a tool tells


@dataclass(frozen=True)
class Calculator:
    """Evaluates an expression of numbers, ``+ - * /`` and brackets, exactly."""

    kind: ClassVar[str] = "calculator"
    argument: ClassVar[str] = "expression"
    about: ClassVar[str] = "The exact value of an expression of numbers, + - * / and brackets."

    def load(self) -> None:
        """There is nothing to load."""

    def call(self, text: str) -> str:
        try:
            return str(evaluate(text)[0])
        except ValueError as error:
            return f"error: {error}"


@dataclass(frozen=True)
class Python:
    """Runs a program in the sandbox and tells what it printed; nothing is kept between calls."""

    limits: Limits = Limits()
    kind: ClassVar[str] = "python"
    argument: ClassVar[str] = "program"
    about: ClassVar[str] = "Runs a Python program, and gives what it prints."

    def load(self) -> None:
        sandbox.require(self.limits.memory_mib)

    def call(self, text: str) -> str:
        ran = sandbox.run(text, limits=self.limits)
        if ran.good:
            return ran.out
        if ran.end == "exit":
            return f"{ran.out}error: {ran.err.strip().rpartition(chr(10))[2] or f'code {ran.code}'}"
        ends = {"timeout": "it took too long", "output": "it printed too much"}
        return f"{ran.out}error: {ends.get(ran.end, f'it ended by signal {ran.code}')}"


ToolKind = Calculator | Python


@dataclass(frozen=True)
class Tools:
    """Which tools there are and how often they may be used.

    tools: of different kinds.
    most_turns: replies of an episode; the last one is scored whether it calls or not.
    thinking: the marks of a reply: what is thought calls nothing.
    """

    tools: tuple[ToolKind, ...] = (Calculator(),)
    most_turns: int = 4
    thinking: Thinking | None = Thinking()

    def validate(self):
        checks.at_least(self, most_turns=1)
        kinds = [tool.kind for tool in self.tools]
        if len(set(kinds)) < len(kinds) or not kinds:
            raise ConfigError(f"tools are {kinds}; they must be one or more, of different kinds")

    def described(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them: JSON schemas of functions."""
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.kind,
                    "description": tool.about,
                    "parameters": {
                        "type": "object",
                        "properties": {tool.argument: {"type": "string"}},
                        "required": [tool.argument],
                    },
                },
            }
            for tool in self.tools
        ]

    def calls(self, reply: str) -> list[str]:
        """The texts of the calls in a reply, in their order."""
        return _CALL.findall(conclusion(reply, self.thinking) or "")

    def answer(self, call: str) -> str:
        """What the called tool tells, or what is wrong with the call."""
        by_kind = {tool.kind: tool for tool in self.tools}
        try:
            asked = json.loads(call)
        except (ValueError, RecursionError) as error:
            return f"error: the call is no JSON: {error}"
        if not isinstance(asked, Mapping) or asked.get("name") not in by_kind:
            return f"error: a call has the name of a tool, one of {', '.join(by_kind)}"
        tool, arguments = by_kind[asked["name"]], asked.get("arguments")
        text = arguments.get(tool.argument) if isinstance(arguments, Mapping) else None
        if not isinstance(text, str):
            return f"error: {tool.kind} takes the argument {tool.argument}, which is text"
        told = tool.call(text)
        return told if len(told) <= _LONGEST else f"{told[:_LONGEST]}... ({len(told):,} characters)"


@dataclass(frozen=True)
class ToolUse:
    """A question that may be answered with the help of tools; the last reply is scored."""

    problems: Problems
    pool: Pool
    tools: Tools = Tools()

    def reset(self, seed: int, index: int) -> Episode:
        problem = self.problems.train(seed, index)
        return Episode(problem, tuple(problem.messages))

    def step(self, episode: Episode, reply: str) -> Step:
        calls = self.tools.calls(reply)
        if calls and episode.turns + 1 < self.tools.most_turns:
            told = [{"role": "tool", "content": self.tools.answer(call)} for call in calls]
            return Step(answered(episode, reply, *told), tuple(told))
        score = self.pool.submit(reply, episode.problem.record).result()
        return Step(answered(episode, reply), score=score)
