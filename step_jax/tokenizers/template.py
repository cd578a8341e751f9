"""Chat templates: conversations as text, and which of it the assistant said."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from step_jax.core.digest import digest
from step_jax.core.errors import DataError
from step_jax.tokenizers.template_process import TemplateProcess

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_TEMPLATE_CHARACTERS = 512 * 1024

_THOUGHT = re.compile("</?think>")  # which templates take off a content and write anew

Message = Mapping[str, Any]


class Answer(NamedTuple):
    """Where an answer stands in a text.

    start: of what a model is to write, in characters.
    spans: what of it is learned, in characters.
    """

    start: int
    spans: list[tuple[int, int]]


class ChatTemplate:
    """A Jinja chat template, with the variables and functions that transformers gives it.

    Attributes:
      source: the template.
      variables: what it may refer to beside the messages: ``bos_token``, ``eos_token``, ...
      hash: SHA-256, hex, of both.
    """

    def __init__(self, source: str, variables: Mapping[str, str], name: str = "chat template"):
        """Nothing is run yet. Raises `DataError` for an overlong template."""
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise DataError(
                f"{name}: the chat template has {len(source):,} characters; at most "
                f"{MAX_TEMPLATE_CHARACTERS:,} are accepted"
            )
        self.source, self.variables, self.name = source, dict(variables), name
        self.hash = digest(source.encode(), sorted(self.variables.items()))
        self._process = TemplateProcess()

    @classmethod
    def of(cls, source: str | None, variables: Mapping[str, str], name: str) -> ChatTemplate | None:
        return None if source is None else cls(source, variables, name)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        record: str = "the conversation",
        **variables: Any,
    ) -> str:
        """The conversation as text, control tokens written out: to be encoded with ``special``.

        Args:
          messages: ``role`` and ``content`` each, ``tool_calls`` where there are any.
          add_generation_prompt: end with what the assistant's answer begins with.
          record: where the conversation comes from, for messages.
          variables: further variables of the template; JSON values.

        Raises:
          DataError: a message that is none, or a template that fails, does what is not allowed, or
            exceeds a limit.
        """
        messages = check_messages(messages, record)
        options = {"add_generation_prompt": add_generation_prompt, "tools": tools} | variables
        return self._run(messages, options, record)[0]

    def answers(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        record: str = "the conversation",
        **variables: Any,
    ) -> list[tuple[str, list[Answer]]]:
        """Texts that teach every answer once, each with its answers in their order.

        An answer is what its message adds to `render` of the messages before it with
        ``add_generation_prompt``, which is what a model is given that shall write it; of that, what
        the template marks with ``{% generation %}`` if it has such blocks. One text holds all
        answers, unless the template writes an answer in another way once others follow it
        (thoughts that are dropped): a text then ends with it, and the next one begins anew. What
        follows the last answer is in none.

        Raises:
          DataError: as `render`; or there is no saying which part is an answer, or the template
            leaves part of it out.
        """
        messages = check_messages(messages, record)
        options = {"add_generation_prompt": False, "tools": tools} | variables
        asking = options | {"add_generation_prompt": True}
        made: list[tuple[str, list[Answer]]] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked, *_ = self._run(messages[:i], asking, record)
            text, marks, marked = self._run(messages[: i + 1], options, record, mark=True)
            start = len(asked)
            spans = marks if marked else [(start, len(text))]
            answer = Answer(start, [(max(a, start), b) for a, b in spans if b > start])
            self._check(message, asked, text, answer, f"{record}, message {i}")
            before = made.pop()[1] if made and text.startswith(made[-1][0]) else []
            made.append((text, [*before, answer]))
        return made

    def _check(self, message: Message, asked: str, text: str, answer: Answer, where: str) -> None:
        """Raises `DataError` unless all of the message, and nothing before it, is the answer."""
        if not text.startswith(asked):
            raise DataError(
                f"{where}: {self.name} asks for an answer with {asked[-40:]!r}, but writes this "
                "one in another way, so what the assistant said cannot be told apart. Use a "
                "template whose add_generation_prompt is what its answers begin with"
            )
        said = "".join(text[a:b] for a, b in answer.spans)
        for part in _said_in(message):
            if part not in said:
                raise DataError(
                    f"{where}: {self.name} leaves out {part[:40]!r}, which would not be learned. "
                    "Use a template that writes it (and marks it, if it has generation blocks)"
                )

    def _run(
        self, messages: list[dict], options: dict, record: str, mark: bool = False
    ) -> tuple[str, list[tuple[int, int]], bool]:
        """(text, spans of generation blocks, whether the template has such blocks)."""
        context = {**self.variables, "documents": None, **options, "messages": messages}
        try:
            request = json.dumps({"source": self.source, "context": context, "mark": mark})
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{record} has a value that is no JSON value: {error}") from error
        reply = self._process.ask(request, f"{record}: {self.name}")
        if "error" in reply:
            raise DataError(f"{record}: {self.name} failed: {reply['error']}")
        return reply["text"], [(a, b) for a, b in reply["spans"]], reply["marked"]


def _said_in(message: Message) -> list[str]:
    """The parts of an answer that its text must have, without the white space around them."""
    parts = [message.get("reasoning_content"), message.get("content")]
    parts += [call.get("function", call).get("name") for call in message.get("tool_calls") or ()]
    texts = (text for part in parts if isinstance(part, str) for text in _THOUGHT.split(part))
    return [text.strip() for text in texts if text.strip()]


def check_messages(messages: Any, record: str) -> list[dict[str, Any]]:
    """The messages as dictionaries; raises `DataError` naming the record, message and key."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise DataError(f"{record} is a {type(messages).__name__}; it must be a list of messages")
    if not messages:
        raise DataError(f"{record} has no messages")
    for i, message in enumerate(messages):
        where = f"{record}, message {i}"
        if not isinstance(message, Mapping):
            raise DataError(f"{where} is a {type(message).__name__}; it must have role and content")
        if message.get("role") not in ROLES:
            raise DataError(
                f"{where}: role is {message.get('role')!r}; it must be one of {', '.join(ROLES)}"
            )
        _check_content(message, where)
        _check_calls(message, where)
    return [dict(message) for message in messages]


def _check_content(message: Message, where: str) -> None:
    content = message.get("content")
    if isinstance(content, str):
        return
    if content is None:
        if message["role"] == "assistant" and message.get("tool_calls"):
            return
        raise DataError(f"{where}: content is missing; only an assistant's call of tools has none")
    if not isinstance(content, list):
        raise DataError(
            f"{where}: content is a {type(content).__name__}; it must be text or a list of parts"
        )
    for j, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise DataError(f"{where}, part {j} is {part!r:.60}; it must have a `type`")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise DataError(f"{where}, part {j}: a part of type text must have its `text`")


def _check_calls(message: Message, where: str) -> None:
    calls = message.get("tool_calls")
    if calls is None:
        return
    if not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls is a {type(calls).__name__}; it must be a list")
    for j, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}, call {j} is {call!r:.60}; it must have the function's name")
