"""Documents that are conversations: of their tokens those are learned that the assistant said.

A record has ``messages`` (and ``tools``), or ``prompt`` and ``completion``: one question and its
answer. Its document is JSON of the two, as they are given to the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from step_jax.core.errors import DataError
from step_jax.data.files import Skip
from step_jax.data.sources import Document, Encoded
from step_jax.tokenizers.base import Tokenizer
from step_jax.tokenizers.chat import Taught, encode_chat
from step_jax.tokenizers.template import check_messages

#: what else a record may have would change what is said or learned, and nothing here reads it
UNREAD = (
    "system",
    "functions",
    "function_call",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "images",
    "audios",
    "videos",
)
_FIRST = ("system", "developer")
#: role -> keys of its messages beside role and content
_KEYS = {
    "assistant": {"reasoning_content", "tool_calls"},
    "tool": {"name", "tool_call_id"},
}
_HINTS = {
    "reasoning": "write it as reasoning_content",
    "thinking": "write it as reasoning_content",
    "weight": "every answer is learned; leave out conversations with answers that shall not be",
}


@dataclass(frozen=True)
class Conversations:
    """Records of conversations; see `sources.Records`.

    sequence_length: places of a row: a conversation must fit in one.
    too_long: what becomes of one that does not.
    """

    sequence_length: int
    too_long: Literal["refuse", "skip", "truncate"]
    may_be_cut = False
    fields = ("messages", "tools", "prompt", "completion", *UNREAD)
    key = ("conversations",)

    def lacking(self, fields: Collection[str]) -> str | None:
        if "messages" in fields or {"prompt", "completion"} <= set(fields):
            return None
        return (
            f"no field 'messages', nor 'prompt' and 'completion'; the fields are {list(fields)}. A "
            "conversation is a list of messages with role and content, or one prompt and its "
            "completion"
        )

    def document(self, record: Mapping[str, Any], name: str) -> Document | Skip:
        record = {key: value for key, value in record.items() if value is not None}
        try:
            if unread := [key for key in UNREAD if key in record]:
                raise DataError(f"{name} has {unread[0]!r}, which is not read: leave it out")
            messages = check_conversation(_messages(record, name), name)
        except DataError as error:
            return Skip(name, "bad_conversation", str(error).removeprefix(name), bad=True)
        content = {"messages": messages, "tools": record.get("tools")}
        return Document(name, json.dumps(content, ensure_ascii=False))

    def file(self, text: str, name: str) -> Document | Skip:
        return Skip(name, "not_records", "a conversation is a record of JSONL, Parquet or Arrow")

    def words(self, document: Document) -> str:
        """What is said, without the template, which is not known before there is a tokenizer."""
        parts = []
        for message in json.loads(document.text)["messages"]:
            parts += [message.get("reasoning_content"), message.get("content")]
        return "\n".join(part for part in parts if part)

    def tokens_key(self, tokenizer: Tokenizer) -> list[Any]:
        template = tokenizer.chat_template
        assert template is not None  # see `tokenizers.files.chat_tokenizer`
        return [template.hash, tokenizer.stop_ids, self.sequence_length, self.too_long]

    def encode(
        self, documents: Sequence[Document], tokenizer: Tokenizer
    ) -> list[list[Encoded] | Skip]:
        """Each conversation rendered by the tokenizer's template, mostly as one sequence.

        Raises:
          DataError: one is too long, and that is to be refused.
        """
        return [self._encode(document, tokenizer) for document in documents]

    def _encode(self, document: Document, tokenizer: Tokenizer) -> list[Encoded] | Skip:
        template, content = tokenizer.chat_template, json.loads(document.text)
        assert template is not None
        try:
            check_controls(content["messages"], tokenizer, document.name)
            taught = encode_chat(
                tokenizer, template, content["messages"], tools=content["tools"],
                record=document.name,
            )  # fmt: skip
        except DataError as error:
            detail = str(error).removeprefix(document.name)
            return Skip(document.name, "bad_conversation", detail, bad=True)
        made = [self._fitted(one, tokenizer) for one in taught]
        if all(one is not None for one in made):
            return [one for one in made if one is not None]
        tokens = max(len(one.ids) for one in taught)
        detail = f"{tokens:,} tokens; a row has {self.sequence_length:,}"
        if self.too_long == "refuse":
            raise DataError(
                f"{document.name} has {detail}: raise data.sequence_length, or set data.too_long "
                "to skip or truncate"
            )
        return Skip(document.name, "too_long", detail)

    @property
    def _most(self) -> int:
        """Tokens of what fits in a row. The first one is no target: n have n - 1 places."""
        return self.sequence_length + 1

    def _fitted(self, taught: Taught, tokenizer: Tokenizer) -> Encoded | None:
        """None for what is too long."""
        length = self._most
        ids, said = taught.ids[:length], taught.said[:length]
        cut = len(taught.ids) - len(ids)
        if (cut and self.too_long != "truncate") or not said.any():
            return None
        return Encoded(ids, tokenizer.decode(ids[said]).encode(), said, cut)


def _messages(record: Mapping[str, Any], name: str) -> Any:
    if "messages" in record:
        if "prompt" in record or "completion" in record:
            raise DataError(f"{name} has messages and prompt or completion: keep one of them")
        return record["messages"]
    pair = [record.get("prompt"), record.get("completion")]
    if not all(isinstance(text, str) for text in pair):
        raise DataError(f"{name}: prompt and completion must be text; give lists as messages")
    return [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def check_conversation(messages: Any, name: str) -> list[dict[str, Any]]:
    """The messages of a conversation that can be learned, without keys that hold nothing.

    Tables give every message the keys of all, with null in those that it lacks.

    Raises:
      DataError: something that would be lost, or learned as it is not meant; names the record, the
        message and what would do.
    """
    messages = check_messages(messages, name)
    messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
    for i, message in enumerate(messages):
        where = f"{name}, message {i}"
        _check_order(messages[i - 1] if i else None, message, where)
        _check_message(message, where)
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{name} ends with a message of {messages[-1]['role']}, which nobody answers: it must "
            "end with one of the assistant"
        )
    return messages


def _check_order(before: Mapping[str, Any] | None, message: Mapping[str, Any], where: str) -> None:
    role = message["role"]
    last = None if before is None else before["role"]
    may_follow = {
        None: (*_FIRST, "user"),
        "system": (*_FIRST, "user"),
        "developer": (*_FIRST, "user"),
        "user": ("assistant",),
        "assistant": ("tool",) if before and before.get("tool_calls") else ("user",),
        "tool": ("tool", "assistant"),
    }[last]
    if role not in may_follow:
        place = "at the beginning" if last is None else f"after {last}"
        called = " that calls tools" if before and before.get("tool_calls") else ""
        raise DataError(
            f"{where}: {role} stands {place}{called}, where {' or '.join(may_follow)} belongs"
        )


def _check_message(message: Mapping[str, Any], where: str) -> None:
    role, content = message["role"], message.get("content", "")
    known = {"role", "content"} | _KEYS.get(role, set())
    if unknown := sorted(map(str, set(message) - known)):
        hint = _HINTS.get(unknown[0], "leave it out if it means nothing")
        raise DataError(f"{where}: {unknown[0]!r} of {role} is not read: {hint}")
    if not isinstance(content, str):
        raise DataError(f"{where}: content is a list of parts; it must be text")
    if not isinstance(message.get("reasoning_content", ""), str):
        raise DataError(f"{where}: reasoning_content must be text")
    if not content.strip() and not message.get("tool_calls") and role != "tool":
        raise DataError(f"{where}: {role} says nothing")
    for call in message.get("tool_calls", ()):
        arguments = call.get("function", call).get("arguments")
        if isinstance(arguments, Mapping) and None in arguments.values():
            raise DataError(
                f"{where}: a call's arguments hold null. Tables give every call the arguments of "
                "all, so give them as JSON text, or without those that are not passed"
            )


def check_controls(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, name: str) -> None:
    """A control token that is written out would be read as one, and end what it stands in."""
    for i, message in enumerate(messages):
        text = f"{message.get('content', '')}\n{message.get('reasoning_content', '')}"
        if found := next((token for token in tokenizer.special if token in text), None):
            raise DataError(
                f"{name}, message {i} has the control token {found!r} in its text, where it would "
                "not be text: take it out"
            )
