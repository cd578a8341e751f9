"""Judged answers as data: pairs of a better and a worse one, or single ones found good or bad.

A record of a pair has ``prompt``, ``chosen`` and ``rejected``: texts, or lists of messages; or the
last two alone as whole conversations that differ in their last message. A record of a verdict has
``prompt``, ``completion`` and ``label`` (true or false).

An *example* is two texts: the chosen and the rejected answer after their prompt; of a verdict the
answer after its own prompt, and the answer of the next example of the source after it, which is
unrelated (see ``training.losses.preference.Verdicts``). A row has two halves of T tokens, and the
two texts of an example stand at the same place of both.

Shape suffixes: B rows, S the two sides of an example, T tokens of a half, K examples of a row, N
examples of a source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash

from step_jax.core.errors import DataError
from step_jax.data.cache import Prepared, prepare
from step_jax.data.config import PreferenceConfig
from step_jax.data.conversations import (
    UNREAD,
    Conversations,
    check_controls,
    check_conversation,
)
from step_jax.data.corpus import Documents, TokenCache
from step_jax.data.dataset import TextDataset
from step_jax.data.files import Skip
from step_jax.data.heldout import row_slice
from step_jax.data.packing import Batch, FitPlan, Pieces
from step_jax.data.schema import Field, Schema
from step_jax.data.sources import Document, Encoded
from step_jax.tokenizers.base import Tokenizer
from step_jax.tokenizers.chat import Taught, encode_answer
from step_jax.tokenizers.template import check_messages

_NOTHING = Encoded(np.zeros(0, np.int32), b"", np.zeros(0, bool))
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Preferences(Conversations):
    """Records of judged answers; see `sources.Records`.

    verdicts: single answers with a label, instead of pairs.
    """

    verdicts: bool = False

    @property
    def fields(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self._needed, "tools", *(("prompt",) if not self.verdicts else ()), *UNREAD)

    @property
    def key(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("verdicts" if self.verdicts else "pairs",)

    @property
    def _needed(self) -> tuple[str, ...]:
        return ("prompt", "completion", "label") if self.verdicts else _SIDES

    def lacking(self, fields: Collection[str]) -> str | None:
        lacks = [name for name in self._needed if name not in fields]
        if not lacks:
            return None
        what = (
            "A verdict has prompt, completion and label (true: good)"
            if self.verdicts
            else "A pair has prompt, chosen and rejected, or the last two as whole conversations"
        )
        return f"no field {' and '.join(map(repr, lacks))}; the fields are {list(fields)}. {what}"

    def document(self, record: Mapping[str, Any], name: str) -> Document | Skip:
        record = {key: value for key, value in record.items() if value is not None}
        try:
            if unread := [key for key in UNREAD if key in record]:
                raise DataError(f"{name} has {unread[0]!r}, which is not read: leave it out")
            content = _verdict(record, name) if self.verdicts else _pair(record, name)
        except DataError as error:
            return Skip(name, "bad_preference", str(error).removeprefix(name), bad=True)
        content["tools"] = record.get("tools")
        return Document(name, json.dumps(content, ensure_ascii=False))

    def file(self, text: str, name: str) -> Document | Skip:
        return Skip(name, "not_records", "a judged answer is a record of JSONL, Parquet or Arrow")

    def words(self, document: Document) -> str:
        first, *others = json.loads(document.text)["texts"]
        messages = [*first, *(messages[-1] for messages in others)]
        parts = [m.get(key) for m in messages for key in ("reasoning_content", "content")]
        return "\n".join(part for part in parts if part)

    def _encode(self, document: Document, tokenizer: Tokenizer) -> list[Encoded] | Skip:
        """Two sequences an example; a good answer stands first and a bad one second, alone."""
        template, content = tokenizer.chat_template, json.loads(document.text)
        assert template is not None  # see `tokenizers.files.chat_tokenizer`
        name, taught = document.name, []
        try:
            for messages in content["texts"]:
                check_controls(messages, tokenizer, name)
                taught.append(
                    encode_answer(
                        tokenizer, template, messages, tools=content["tools"], record=name
                    )
                )
            if len(taught) == 2 and np.array_equal(taught[0].ids, taught[1].ids):
                raise DataError(
                    f"{name}: chosen and rejected are the same text once {template.name} has "
                    "rendered them: nothing is to be preferred"
                )
        except DataError as error:
            return Skip(name, "bad_preference", str(error).removeprefix(name), bad=True)
        made = [self._fitted(one, tokenizer) for one in taught]
        cut = [one.ids for one in made if one is not None]
        if len(cut) < len(made) or (len(made) == 2 and np.array_equal(cut[0], cut[1])):
            return self._too_long(name, taught)
        if content.get("good") is None:
            return [one for one in made if one is not None]
        (alone,) = (one for one in made if one is not None)
        return [alone, _NOTHING] if content["good"] else [_NOTHING, alone]

    def _too_long(self, name: str, taught: Sequence[Taught]) -> Skip:
        longest = max(taught, key=lambda one: len(one.ids))
        given = int(np.argmax(longest.said))
        detail = (
            f"{len(longest.ids):,} tokens, {given:,} of them of the prompt; one of the two texts "
            f"of a row has {self.sequence_length:,}"
        )
        if self.too_long == "refuse":
            raise DataError(
                f"{name} has {detail}: raise data.sequence_length, or set data.too_long to skip "
                "or truncate"
            )
        return Skip(name, "no_room" if given >= self.sequence_length else "too_long", detail)

    @property
    def _most(self) -> int:
        return self.sequence_length  # the last token is an input too: rewards are read there


def _pair(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    texts = [_conversation(record, record.get(side), f"{name}, {side}") for side in _SIDES]
    chosen, rejected = texts
    if chosen[:-1] != rejected[:-1]:
        raise DataError(
            f"{name}: chosen and rejected answer unlike prompts; they may differ in their last "
            "message only"
        )
    if chosen == rejected:
        raise DataError(f"{name}: chosen and rejected are the same: nothing is to be preferred")
    return {"texts": texts}


def _verdict(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    good = record.get("label")
    if not isinstance(good, bool):
        raise DataError(f"{name}: label is {good!r}; it must be true (good) or false")
    answer = record.get("completion")
    return {"texts": [_conversation(record, answer, f"{name}, completion")], "good": good}


def _conversation(record: Mapping[str, Any], answer: Any, where: str) -> list[dict[str, Any]]:
    """Prompt and answer as one conversation, checked."""
    if answer is None:
        raise DataError(f"{where} is missing")
    said = _messages(answer, "assistant", where)
    asked = record.get("prompt")
    if asked is not None:
        before = _messages(asked, "user", f"{where}, prompt")
        if len(said) == 1 and said[0]["role"] == "assistant":
            said = before + said
        elif said[:-1] != before:
            raise DataError(
                f"{where} is a conversation that does not begin with the prompt: give the answer "
                "alone, or the whole conversation"
            )
    elif len(said) == 1:
        raise DataError(f"{where} has no prompt: give one, or the whole conversation")
    return check_conversation(said, where)


def _messages(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages = check_messages(value, where)
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


class Examples(NamedTuple):
    """The examples of a source, each of two runs of tokens.

    Attributes:
      tokens, said: of the texts as they lie in the cache; see `cache.Documents`.
      parts_NS22: int64, the runs that make up each side's text: (start, end) of the prompt with
        what stands in it, and of the answer.
      good_N: of verdicts, which answers are good; None for pairs.
      offsets: int64 (N + 1,), borders of the examples in places of rows.
    """

    tokens: np.ndarray
    said: np.ndarray
    parts_NS22: np.ndarray
    good_N: np.ndarray | None
    offsets: np.ndarray

    @classmethod
    def of(cls, documents: Documents, config: PreferenceConfig, verdicts: bool) -> Examples:
        T, K = config.sequence_length, config.examples_per_row
        said = np.zeros(0, np.uint8) if documents.said is None else documents.said
        starts, ends = np.asarray(documents.offsets[:-1]), np.asarray(documents.offsets[1:])
        places = np.append(np.flatnonzero(said), len(said))
        # where the first answer token of each text stands; of an empty one, in no text
        answers = places[np.searchsorted(places, starts)] if len(starts) else starts
        good_N = None
        if verdicts:
            kept = np.flatnonzero(ends > starts)
            good_N = (kept % 2 == 0).astype(np.float32)
            starts, answers, ends = starts[kept], answers[kept], ends[kept]
            room = T - (answers - starts)  # the unrelated answer's end is cut where it must be
            first, last = np.roll(answers, -1), np.roll(ends, -1)
            last = first + np.minimum(last - first, room)
            own = np.stack([starts, answers, answers, ends], 1)
            other = np.stack([starts, answers, first, last], 1)
            parts = np.stack([own, other], 1)
        else:
            parts = np.stack([starts, answers, answers, ends], 1)
        parts_NS22 = parts.reshape(-1, 2, 2, 2)
        lengths_NS = (parts_NS22[..., 1] - parts_NS22[..., 0]).sum(2)
        taken_N = np.maximum(lengths_NS.max(1, initial=0), -(-T // K))  # so no more than K fit
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(taken_N, dtype=np.int64)])
        return cls(documents.tokens, said, parts_NS22, good_N, offsets)

    @property
    def given(self) -> int:
        """Tokens that begin an example and are inputs only; see `packing.make_plan`."""
        return 0

    @property
    def number(self) -> int:
        return len(self.parts_NS22)

    @property
    def pairs(self) -> int:
        """Places that the examples take, of both halves."""
        return 2 * int(self.offsets[-1])

    @property
    def learned(self) -> int:
        return int(self.said.sum(dtype=np.int64))

    @property
    def held(self) -> int:
        """Tokens of all texts together."""
        return int((self.parts_NS22[..., 1] - self.parts_NS22[..., 0]).sum())

    @property
    def digest(self) -> str:
        """Of everything that decides how likely the texts are to a model."""
        state = xxhash.xxh3_128()
        for array in (self.tokens, self.said, self.parts_NS22):
            state.update(np.ascontiguousarray(array))
        return state.hexdigest()


class PreferenceDataset(TextDataset):
    """Batches of judged answers, a pure function of (configuration, seed, step).

    Attributes:
      verdicts: whether examples are single answers with a label.
      heldout_examples: of each source, what training never sees.
      reference: of each source, then of each source's held-out ones: float32 (N, S), the
        log-probabilities of the two answers under the reference policy; None without one.
    """

    config: PreferenceConfig

    def __init__(
        self, config: PreferenceConfig, prepared: Prepared, *, verdicts: bool = False, **more: Any
    ):
        self.verdicts = verdicts
        super().__init__(config, prepared, **more)
        self.heldout_examples = [
            Examples.of(cache.heldout, config, verdicts) for cache in prepared.caches
        ]
        self.reference: list[np.ndarray] | None = None

    def _units(self, cache: TokenCache) -> Any:
        return Examples.of(cache.train, self.config, self.verdicts)

    @classmethod
    def build(  # type: ignore[override]
        cls,
        config: PreferenceConfig,
        *,
        verdicts: bool = False,
        tokenizer: Tokenizer | None = None,
        report: Callable[[str], None] = lambda message: None,
        **rows: int,
    ) -> PreferenceDataset:
        """As `TextDataset.build`, whose ``rows`` these are; of pairs or of verdicts."""
        row_slice(rows["batch_size"], rows.get("process_index", 0), rows.get("process_count", 1))
        records = Preferences(config.sequence_length, config.too_long, verdicts)
        prepared = prepare(config, report, tokenizer, records)
        return cls(config, prepared, verdicts=verdicts, **rows)

    @property
    def sources(self) -> list[Examples]:
        """Of each source what is trained on, then what is held out of each."""
        return [corpus.documents for corpus in self._corpora] + self.heldout_examples

    @property
    def schema(self) -> Schema:
        return preference_schema(
            self.batch_size, self.config, self.verdicts, self.reference is not None
        )

    def counters(self) -> dict[str, int]:
        """See `TextDataset.counters`; ``examples`` stand in the place of documents."""
        total = super().counters()
        trained = self.sources[: len(self._corpora)]
        for name in ("documents", "heldout_documents", "cuts_per_epoch", "tokens_dropped"):
            total.pop(name, None)
        total["examples"] = sum(examples.number for examples in trained)
        total["heldout_examples"] = sum(examples.number for examples in self.heldout_examples)
        places = 2 * self.rows_per_epoch * self.config.sequence_length
        total["padding_per_epoch"] = places - sum(examples.held for examples in trained)
        return total

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of ``step``, see `preference_schema`."""
        batch = self._empty(self._high - self._low)
        for k, _, slots, pieces in self._pieces(step):
            self._lay(batch, slots, pieces, k)
        return self._numbered(batch, self._low)

    def sweep(self, source: int) -> Iterator[tuple[Batch, np.ndarray]]:
        """Every example of one of ``sources`` once.

        Yields:
          (this process's rows of a batch, int64 (rows of the whole batch, K): which examples stand
          there, -1 for none)
        """
        examples, rows = self.sources[source], self.batch_size
        plan = FitPlan(examples.offsets, self.config.sequence_length, 0)
        for first in range(0, plan.rows, rows):
            batch = self._empty(rows)
            chosen = np.arange(first, min(first + rows, plan.rows))
            which_BK = self._lay(batch, np.arange(len(chosen)), plan.pieces(chosen), source)
            batch = {name: a[self._low : self._high] for name, a in batch.items()}
            yield self._numbered(batch, self._low), which_BK

    def _empty(self, rows: int) -> Batch:
        """A batch of padding."""
        schema = preference_schema(rows, self.config, self.verdicts, self.reference is not None)
        batch = {name: np.zeros(f.shape, f.dtype) for name, f in schema.items()}
        for name in ("tokens", "targets"):
            batch[name] += self.tokenizer.pad_id
        return batch

    def _numbered(self, batch: Batch, first: int) -> Batch:
        if self.verdicts:
            rows, K = batch["judged"].shape
            batch["number"] = (first * K + np.arange(rows * K, dtype=np.int32)).reshape(rows, K)
        return batch

    def _lay(self, batch: Batch, slots: np.ndarray, pieces: Pieces, source: int) -> np.ndarray:
        """Writes the examples of pieces into the rows ``slots``; which, as `sweep` says it."""
        examples = self.sources[source]
        which_P = np.searchsorted(examples.offsets, pieces.start, side="right") - 1
        which_BK = np.full(batch["judged"].shape, -1, np.int64)
        rows_P = slots[pieces.slot]
        for row, offset, i in zip(rows_P, pieces.offset, which_P, strict=True):
            k = int((which_BK[row] >= 0).sum())
            which_BK[row, k] = i
            batch["judged"][row, k] = 1
            for side in range(2):
                runs = [slice(*run) for run in examples.parts_NS22[i, side]]
                ids = np.concatenate([examples.tokens[run] for run in runs])
                said = np.concatenate([examples.said[run] for run in runs])
                place = slice(offset, offset + len(ids))
                batch["tokens"][row, side, place] = ids
                batch["targets"][row, side, place][:-1] = ids[1:]
                batch["weights"][row, side, place][:-1] = said[1:]
                batch["segments"][row, side, place] = k + 1
                batch["positions"][row, side, place] = np.arange(len(ids))
            if examples.good_N is not None:
                batch["good"][row, k] = examples.good_N[i]
            if self.reference is not None:
                batch["reference"][row, :, k] = self.reference[source][i]
        return which_BK


def preference_schema(
    rows: int, config: PreferenceConfig, verdicts: bool, reference: bool
) -> Schema:
    """What a batch of judged answers is.

    ``tokens``, ``targets``, ``segments``, ``positions`` int32 and ``weights`` float32 (B, S, T):
    two halves of packed text, in which segment k + 1 is example k and ``weights`` is 1 where the
    target is of the answer. The last token of an answer is an input, too. ``judged`` (B, K): 1 for
    an example, 0 for padding. Of verdicts ``good`` (B, K) and ``number`` int32 (B, K), the place of
    the example in the whole batch; with a reference policy ``reference`` (B, S, K), the answers'
    log-probabilities under it.
    """
    T, K = config.sequence_length, config.examples_per_row
    text, judged = (rows, 2, T), (rows, K)
    of_text, of_judged = ("batch", None, "sequence"), ("batch", None)
    names = ("tokens", "targets", "segments", "positions")
    schema = {name: Field(of_text, text, "int32") for name in names}
    schema |= {"weights": Field(of_text, text), "judged": Field(of_judged, judged)}
    if verdicts:
        schema["good"] = Field(of_judged, judged)
        schema["number"] = Field(of_judged, judged, "int32")
    if reference:
        schema["reference"] = Field(("batch", None, None), (rows, 2, K))
    return schema
