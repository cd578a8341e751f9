"""What a reply consists of: a thought, the mark that closes it, and the conclusion."""

from __future__ import annotations

import re
from dataclasses import dataclass

from step_jax.core.errors import ConfigError

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.M | re.S)


@dataclass(frozen=True)
class Thinking:
    """The marks around a thought.

    open: what begins it; empty if a reply begins within its thought, because the prompt holds the
      mark or there is none.
    close: what ends it.
    """

    open: str = "<think>"
    close: str = "</think>"

    def validate(self):
        if not self.close:
            raise ConfigError("close is empty: nothing would tell a thought from its conclusion")
        if self.open == self.close:
            raise ConfigError(f"open and close are both {self.open!r}; they must differ")

    def conclusion(self, reply: str) -> str | None:
        """What stands after the last close, stripped; None of a thought that was never closed.

        A reply without any mark is its own conclusion, unless it began within its thought.
        """
        _, closed, after = reply.rpartition(self.close)
        if not closed and (not self.open or self.open in reply):
            return None
        return after.strip()

    def thought(self, reply: str) -> str | None:
        """What stands before the last close, without what opened it; None of a reply without."""
        before, closed, _ = reply.rpartition(self.close)
        return before.removeprefix(self.open) if closed else None

    def write(self, thought: str | None, conclusion: str) -> str:
        """The reply of a thought and a conclusion."""
        if thought is None:
            return conclusion if self.open else self.close + conclusion
        return f"{self.open}{thought}{self.close}{conclusion}"

    def well_formed(self, reply: str) -> bool:
        """Whether a reply is one thought between its marks and a conclusion, and nothing else."""
        thought, closed, conclusion = reply.strip().partition(self.close)
        if not closed or self.close in conclusion or not conclusion.strip():
            return False
        if not self.open:
            return True
        before, opened, inside = thought.partition(self.open)
        return bool(opened) and not before and self.open not in inside + conclusion


def conclusion(reply: str, thinking: Thinking | None) -> str | None:
    """`Thinking.conclusion`; the whole reply, stripped, where nothing thinks."""
    return reply.strip() if thinking is None else thinking.conclusion(reply)


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, braces balanced; None if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begun = 0, start + len("\\boxed{")
    for i in range(begun - 1, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begun:i]
    return None


def program(text: str) -> str:
    """The last block of code between fences; the text itself where there are none."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text
