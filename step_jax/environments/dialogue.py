"""The token ids of a conversation under way: they are only ever appended to.

A policy learns from the ids that it wrote. To render its conversation again with each turn and to
encode the text would give others (another split of the same words, thoughts left out, calls written
anew), and with them another past than the one it acted in. So the ids of a reply stay as they are,
and of the template only that is taken which it writes after an answer. A template or tokenizer for
which this is another text than the whole conversation's is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from step_jax.core.errors import ConfigError
from step_jax.tokenizers.base import Tokenizer
from step_jax.tokenizers.chat import end_of_answer

Message = Mapping[str, Any]

_CALL = {"function": {"name": "f", "arguments": {"x": "1"}}}
#: conversations up to an answer, alike in nothing but their order of roles
_PASTS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"role": "user", "content": "a"},),
    ({"role": "system", "content": "Be  brief.\n"}, {"role": "user", "content": "1 + 1 = ?"}),
)
_ANSWERS: tuple[dict[str, Any], ...] = (
    {"content": "b"},
    {"content": "It is\n 2.", "reasoning_content": "one and one"},
)


class Dialogue:
    """Writes the turns of others into conversations of a tokenizer with a chat template.

    Attributes:
      stop_id: the token that ends an answer; only after it a conversation goes on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        role: Literal["tool", "user"] = "tool",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ):
        """
        Args:
          role: of those who answer the policy.
          tools: that the template is told of.

        Raises:
          ConfigError: the template changes what stood before an answer once others follow it, or
            writes something else after other answers, or the tokenizer joins the end of an answer
            with what follows; the message says what was found.
        """
        template = tokenizer.chat_template
        if template is None:
            raise ConfigError(f"{tokenizer.name} has no chat template, which turns are written by")
        stop_id = end_of_answer(tokenizer, template)
        if stop_id is None:
            raise ConfigError(
                f"{template.name} ends an answer with no special token: there is no telling where "
                "the reply of a policy ends and what follows begins"
            )
        self.stop_id = stop_id
        self._stop = next(text for text, i in tokenizer.special.items() if i == stop_id)
        self._tokenizer, self._template, self._role = tokenizer, template, role
        self._options: dict[str, Any] = {} if tools is None else {"tools": list(tools)}
        self._check()

    def begin(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation that is to be answered."""
        return self._tokenizer.encode(self._asked(messages), special=True).tolist()

    def goes_on(self, ids: Sequence[int]) -> bool:
        """Whether a reply ended as answers do, so that turns can follow it."""
        return bool(len(ids)) and ids[-1] == self.stop_id

    def follow(self, messages: Sequence[Message]) -> list[int]:
        """The ids to append after a reply that `goes_on`, up to where the next reply begins.

        What was written out as a control token by a tool or a user would be read as one: it is
        broken by a space.
        """
        harmless = [{**m, "content": self._plain(m["content"])} for m in messages]
        return self._encoded(self._after(_PASTS[0], _ANSWERS[0], harmless))

    def _asked(self, messages: Sequence[Message]) -> str:
        return self._template.render(messages, add_generation_prompt=True, **self._options)

    def _plain(self, text: str) -> str:
        special = sorted(self._tokenizer.special, key=len, reverse=True)
        pattern = "|".join(re.escape(token) for token in special if len(token) > 1)
        return re.sub(pattern, lambda m: f"{m[0][:1]} {m[0][1:]}", text) if pattern else text

    def _answer(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        said = {"role": "assistant", **answer}
        return said | {"tool_calls": [_CALL]} if self._role == "tool" else said

    def _after(
        self, past: Sequence[Message], answer: Mapping[str, Any], messages: Sequence[Message]
    ) -> str:
        """What the template writes behind the stop token of an answer once messages follow it.

        Raises ConfigError if it writes anything before it in another way.
        """
        said = [*past, self._answer(answer)]
        before = self._template.render(said, **self._options)
        whole = self._template.render(
            [*said, *messages], add_generation_prompt=True, **self._options
        )
        end = before.rindex(self._stop) + len(self._stop)
        if not whole.startswith(before[:end]):
            raise ConfigError(
                f"{self._template.name} writes a conversation in another way once a message of "
                f"{self._role} follows (thoughts left out, say): {before[-80:]!r} does not stay. "
                "Turns cannot be appended; use a template that keeps what was said"
            )
        return whole[end:]

    def _encoded(self, after: str) -> list[int]:
        ids = self._tokenizer.encode(self._stop + after, special=True).tolist()
        if not ids or ids[0] != self.stop_id:
            raise ConfigError(
                f"{self._tokenizer.name} does not read {self._stop!r} as one token before other "
                "text, so turns cannot be appended"
            )
        return ids[1:]

    def _check(self) -> None:
        reply = [{"role": self._role, "content": "3.5 and\n more"}]
        expected = self._after(_PASTS[0], _ANSWERS[0], reply)
        longer = [*_PASTS[0], self._answer(_ANSWERS[1]), *reply]
        for past in (*_PASTS, longer):
            for answer in _ANSWERS:
                found = self._after(past, answer, reply)
                if found != expected:
                    raise ConfigError(
                        f"{self._template.name} writes {found[:60]!r} after one answer and "
                        f"{expected[:60]!r} after another: turns cannot be appended"
                    )
                self._check_ids([*past, self._answer(answer)], reply, found)

    def _check_ids(self, said: Sequence[Message], reply: Sequence[Message], after: str) -> None:
        whole = self._asked([*said, *reply])
        before = self._tokenizer.encode(whole.removesuffix(after), special=True).tolist()
        if self._tokenizer.encode(whole, special=True).tolist() != before + self._encoded(after):
            raise ConfigError(
                f"{self._tokenizer.name} splits the text after an answer in another way when it "
                "stands in a conversation: turns cannot be appended"
            )
