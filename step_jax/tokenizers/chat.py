"""Chat templates: conversations as text, and which of it the assistant said.

A template is a program that somebody else wrote. It runs in a process of its own
(`template_worker.py`): Jinja's sandbox, limits on memory, output and template size, and an end by
force when it takes too long, which no check inside the same process could promise.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from step_jax.core.errors import DataError
from step_jax.tokenizers.base import Tokenizer, digest

ROLES = ("system", "developer", "user", "assistant", "tool")
BUILT_IN = ("chatml", "plain")
MAX_TEMPLATE_CHARACTERS = 512 * 1024
MAX_OUTPUT_CHARACTERS = 16 * 2**20
MAX_SECONDS = 10.0  # of a processor; on a busy machine that takes longer
_PATIENCE = 20  # times as long at most
MAX_BYTES = 2**29
_WORKER = Path(__file__).with_name("template_worker.py")

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
        self._worker = _Worker()

    @classmethod
    def of(cls, source: str | None, variables: Mapping[str, str], name: str) -> ChatTemplate | None:
        return None if source is None else cls(source, variables, name)

    @classmethod
    def built_in(cls, which: str, tokenizer: Tokenizer) -> ChatTemplate:
        """``chatml`` (needs its two tokens) or ``plain`` (needs an end token only).

        Raises:
          DataError: there is no such template, or the tokenizer has not what it writes.
        """
        if which not in BUILT_IN:
            raise DataError(f"there is no chat template {which!r}; there are {', '.join(BUILT_IN)}")
        if which == "chatml":
            ends = ("<|im_start|>", "<|im_end|>")
            lacking = [text for text in ends if len(tokenizer.encode(text, special=True)) != 1]
        else:
            lacking = [] if tokenizer.eos_id is not None else ["an end-of-text token"]
        if lacking:
            raise DataError(
                f"{tokenizer.name} has not what the chat template {which} writes: "
                f"{' and '.join(lacking)}"
            )
        source = Path(__file__).with_name("templates") / f"{which}.jinja"
        return cls(source.read_text(encoding="utf-8"), cls.variables_of(tokenizer), which)

    @staticmethod
    def variables_of(tokenizer: Tokenizer) -> dict[str, str]:
        """What a template may refer to of a tokenizer whose files may not name it."""
        names = {i: text for text, i in tokenizer.special.items()}
        ids = (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
        return {role: names[i] for role, i in ids if i in names}

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
        reply = self._worker.ask(request, f"{record}: {self.name}")
        if "error" in reply:
            raise DataError(f"{record}: {self.name} failed: {reply['error']}")
        return reply["text"], [(a, b) for a, b in reply["spans"]], reply["marked"]


class Taught(NamedTuple):
    """A conversation for training: ids int32 (n,), and bool (n,): said by the assistant."""

    ids: np.ndarray
    said: np.ndarray


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    record: str = "the conversation",
    **options: Any,
) -> list[Taught]:
    """A conversation for training: mostly one sequence, several where `ChatTemplate.answers`, whose
    ``options`` these are, gives several texts.

    The ids before an answer are those that whoever asks for it encodes: where a token would reach
    from the one into the other, the text is cut. An answer ends with its stop token; the line end
    that templates write after it is not part of it, since nobody will ask for it.

    Raises:
      DataError: as `ChatTemplate.answers`; or an answer has no stop token at its end, or a text
        cannot be cut where the tokenizer joins it.
    """
    texts = template.answers(messages, record=record, **options)
    return [_encode(tokenizer, text, answers, f"{record}: {template.name}")
            for text, answers in texts]  # fmt: skip


def encode_answer(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    record: str = "the conversation",
    **options: Any,
) -> Taught:
    """A conversation up to its last answer and the stop token of that, of which alone ``said`` is.

    The ids and what is refused are those of `encode_chat`: two answers to the same messages begin
    with the same ids, those of whoever asks.
    """
    text, answers = template.answers(messages, record=record, **options)[-1]
    ids, said = _encode(tokenizer, text, answers[-1:], f"{record}: {template.name}")
    end = np.flatnonzero(said)[-1] + 1
    return Taught(ids[:end], said[:end])


def _encode(tokenizer: Tokenizer, text: str, answers: list[Answer], what: str) -> Taught:
    ids, place = _read_apart(tokenizer, text, [answer.start for answer in answers], what)
    start, end = place[:, 0], np.maximum(place[:, 1], place[:, 0] + 1)
    said = np.zeros(len(ids), bool)
    for answer in answers:
        inside = np.zeros(0, np.int64)
        for first, last in answer.spans:
            inside = np.flatnonzero((start < last) & (end > first))
            stops = inside[np.isin(ids[inside], tokenizer.stop_ids)]
            if stops.size and not text[end[stops[-1]] : last].strip():
                inside = inside[inside <= stops[-1]]
            said[inside] = True
        if not inside.size or ids[inside[-1]] not in tokenizer.stop_ids:
            raise DataError(
                f"{what} ends an answer with none of the stop tokens {list(tokenizer.stop_ids)}: a "
                "model would not learn to end. Name the token that ends an answer in the "
                "tokenizer's generation_config.json (eos_token_id), or use another template"
            )
    if said[0]:
        raise DataError(f"{what} begins with an answer, before which there is no token")
    return Taught(ids, said)


def encode_request(
    tokenizer: Tokenizer, messages: Sequence[Message], record: str = "the conversation"
) -> list[int]:
    """Token ids of a conversation that the model shall answer, with the tokenizer's own template.

    Raises:
      DataError: it has none, or as `ChatTemplate.render`.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"{tokenizer.name} has no chat template: its model was not trained on conversations "
            "here. `step-jax sft` makes one that was"
        )
    text = tokenizer.chat_template.render(messages, add_generation_prompt=True, record=record)
    return tokenizer.encode(text, special=True).tolist()


def end_of_answer(tokenizer: Tokenizer, template: ChatTemplate) -> int | None:
    """The special token that ends an answer, None if it is other text.

    Raises:
      DataError: the template cannot write one question and its answer.
    """
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ((text, (answer,)),) = template.answers(talk, record="one question and its answer")
    ids, place = tokenizer.encode_spans(text)
    last = answer.spans[-1][1]
    special = np.flatnonzero(np.isin(ids, list(tokenizer.special.values())))
    inside = [i for i in special if answer.start <= place[i, 0] < last]
    if not inside or text[place[inside[-1], 1] : last].strip():
        return None
    return int(ids[inside[-1]])


def _read_apart(
    tokenizer: Tokenizer, text: str, starts: list[int], what: str
) -> tuple[np.ndarray, np.ndarray]:
    """`Tokenizer.encode_spans`, where the text up to every start has the ids that it has alone."""
    pieces, begun = [], 0
    ids, place = tokenizer.encode_spans(text)
    for start in starts:
        before, where = tokenizer.encode_spans(text[begun:start])
        n = len(before)
        if np.array_equal(ids[:n], before) and (n == len(ids) or place[n, 0] >= start):
            continue
        pieces.append((before, where + begun))
        begun = start
        ids, place = tokenizer.encode_spans(text[begun:])
        place = place + begun
    pieces.append((ids, place))
    ids, place = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    if len(pieces) > 1 and tokenizer.decode(ids) != tokenizer.decode(tokenizer.encode(text, True)):
        raise DataError(
            f"{what} begins an answer within a token, where {tokenizer.name} cannot cut the text "
            "and keep it. Use a template that writes a line end or a control token there"
        )
    return ids, place


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


class _Worker:
    """The process that runs templates, started when first asked and after every failure."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy in another process starts its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def ask(self, request: str, what: str) -> dict[str, Any]:
        """The reply to a request; raises `DataError` if there is none in time."""
        with self._lock:
            if (
                self._process is None
                or self._owner != os.getpid()
                or self._process.poll() is not None
            ):
                self._process, self._owner = _start(), os.getpid()
                weakref.finalize(self, _stop, self._process, self._owner)
            try:
                reply = _exchange(self._process, request.encode() + b"\n", MAX_SECONDS)
            except TimeoutError:
                problem = f"did not end within {MAX_SECONDS:.0f} s"
            except (OSError, EOFError):
                problem = f"needed more than {MAX_BYTES // 2**20} MiB of memory, or crashed"
            else:
                return json.loads(reply)
            _stop(self._process, self._owner)
            self._process = None
        raise DataError(f"{what} {problem}: the chat template may not be meant for this")


def _start() -> subprocess.Popen[bytes]:
    limits = [str(MAX_BYTES), str(MAX_OUTPUT_CHARACTERS)]
    # -P keeps this folder off the path; of the environment nothing but the path is handed on.
    return subprocess.Popen(
        [sys.executable, "-P", str(_WORKER), *limits],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={k: v for k, v in os.environ.items() if k in ("PYTHONPATH", "PATH", "SYSTEMROOT")},
    )


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner == os.getpid():  # a forked copy has the pipes, but not the process
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _worked(pid: int) -> float:
    """Processor seconds of a process; those of a clock where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _exchange(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> bytes:
    """Writes a line and reads one. Raises TimeoutError when the process has worked for so many
    seconds, and EOFError if it has ended."""
    assert process.stdin and process.stdout
    into, out = process.stdin.fileno(), process.stdout.fileno()
    os.set_blocking(into, False)
    started, worked = time.monotonic(), _worked(process.pid)
    deadline, reply = started + seconds, bytearray()
    while not reply.endswith(b"\n"):
        left = deadline - time.monotonic()
        readable, writable, _ = select.select([out], [into] if request else [], [], max(left, 0))
        if left <= 0 or not (readable or writable):
            left = seconds - (_worked(process.pid) - worked)
            if left <= 0 or time.monotonic() - started > _PATIENCE * seconds:
                raise TimeoutError
            deadline = time.monotonic() + left
            continue
        if writable:
            request = request[os.write(into, request[:65536]) :]
        if readable:
            got = os.read(out, 65536)
            if not got:
                raise EOFError
            reply += got
    return bytes(reply)
