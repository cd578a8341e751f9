"""Conversations as tokens: what a model is asked, and which tokens the assistant said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from step_jax.core.errors import DataError
from step_jax.tokenizers.base import Tokenizer
from step_jax.tokenizers.template import Answer, ChatTemplate, Message

BUILT_IN = ("chatml", "plain")


def built_in(which: str, tokenizer: Tokenizer) -> ChatTemplate:
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
    return ChatTemplate(source.read_text(encoding="utf-8"), variables_of(tokenizer), which)


def variables_of(tokenizer: Tokenizer) -> dict[str, str]:
    """What a template may refer to of a tokenizer whose files may not name it."""
    names = {i: text for text, i in tokenizer.special.items()}
    ids = (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
    return {role: names[i] for role, i in ids if i in names}


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
