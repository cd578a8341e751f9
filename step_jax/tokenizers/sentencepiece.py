"""SentencePiece: models as they come, and training one whose round trip is exact for any text."""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from step_jax.core.digest import digest
from step_jax.core.errors import ConfigError, DataError
from step_jax.core.hardware import cores
from step_jax.tokenizers.base import ENCODING_THREADS, SPACE_MARK, Tokenizer
from step_jax.tokenizers.special_tokens import SpecialTokens
from step_jax.tokenizers.template import ChatTemplate

PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
# The model would write a literal space mark as a space, so it is written as these bytes.
_SPACE_MARK_BYTES = tuple(f"<0x{byte:02X}>" for byte in SPACE_MARK.encode())
_CHUNK_CHARS = 32 * 1024  # the trainer takes text in pieces of at most this length


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, with the configuration beside it if there is one; see `Tokenizer`."""

    def __init__(self, files: Mapping[str, bytes], name: str = "tokenizer"):
        """Reads a serialised model (``tokenizer.model``); raises `DataError` if it is none."""
        self.name, self.files = name, dict(files)
        model = files["tokenizer.model"]
        self._processor = _processor(model, name)
        self.vocab_size = self._processor.vocab_size()
        tokens = SpecialTokens.read(files, name)
        self._check_added(tokens)
        controls = (i for i in range(self.vocab_size) if self._processor.is_control(i))
        self.special = {self._processor.id_to_piece(i): i for i in controls}
        own = (self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id())
        bos, eos, pad = (i if i >= 0 else None for i in own)
        self.bos_id = tokens.id_of("bos", self._id_of, name, bos)
        self.eos_id = tokens.id_of("eos", self._id_of, name, eos)
        self.pad_id = tokens.id_of("pad", self._id_of, name, pad) or 0
        self.prefix_ids = ()
        if self.bos_id is not None and tokens.adds_bos is not False:
            self.prefix_ids = (self.bos_id,)
        self.stop_ids = tokens.stops(self.eos_id, self.vocab_size, name)
        ids = self._borders()
        self.hash = digest(model) if ids == [bos, eos, pad or 0] else digest(model, ids)
        named = {
            f"{role}_token": self._processor.id_to_piece(i)
            for role, i in zip(("bos", "eos", "pad"), (bos, eos, pad), strict=True)
            if i is not None
        }
        self.chat_template = ChatTemplate.of(tokens.template, {**named, **tokens.named}, name)
        mark_ids = [self._processor.piece_to_id(piece) for piece in _SPACE_MARK_BYTES]
        self._has_bytes = all(self._processor.is_byte(i) for i in mark_ids)
        self._mark_ids = np.array(mark_ids, np.int32)

    def _id_of(self, piece: str) -> int | None:
        found = self._processor.piece_to_id(piece)
        return found if self._processor.id_to_piece(found) == piece else None

    def _check_added(self, tokens: SpecialTokens) -> None:
        for content, (i, _) in tokens.added.items():
            if self._id_of(content) != i:
                raise DataError(
                    f"{self.name}: tokenizer_config.json adds token {i} {content!r} to what "
                    "tokenizer.model has, which needs a tokenizer.json: "
                    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers "
                    "writes one"
                )

    @functools.cached_property
    def _inner(self):
        """The model for a part of a text that is not its beginning: without the dummy prefix.

        Two serialised messages one after the other are merged, the later one's fields winning;
        this one is ``normalizer_spec { add_dummy_prefix: false }``.
        """
        return _processor(self.files["tokenizer.model"] + b"\x1a\x02\x18\x00", self.name)

    def _encode(self, texts: Sequence[str], special: bool) -> list[np.ndarray]:
        threads = 1
        if len(texts) > 1:
            threads = int(os.environ.get(ENCODING_THREADS, 0)) or cores()
        border = self._border(special)
        if border is None or not any(border.search(text) for text in texts):
            return self._processor.encode(texts, return_type="numpy", num_threads=threads)
        parts = [border.split(text) for text in texts]  # text, border, text, border, text
        # Strings are encoded in two calls, so that many texts are spread over the threads.
        first = self._processor.encode(
            [p[0] for p in parts], return_type="numpy", num_threads=threads
        )
        others = [part for p in parts for part in p[2::2]]
        rest = iter(self._inner.encode(others, return_type="numpy", num_threads=threads))
        return [
            np.concatenate([ids, *(a for b in p[1::2] for a in (self._border_ids(b), next(rest)))])
            for ids, p in zip(first, parts, strict=True)
        ]

    def _encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        border = self._border(special=True)
        parts = border.split(text) if border else [text]
        ids, spans, at = [], [], 0
        for i, part in enumerate(parts):
            if i % 2:
                found = self._border_ids(part)
                ids.append(found)
                spans.append(np.tile(np.array([[0, len(part)]], np.int32), (len(found), 1)) + at)
            else:
                mapped = (self._inner if i else self._processor).encode(
                    part, return_type="offset_mapping"
                )
                ids.append(np.array(mapped["ids"], np.int32))
                spans.append(np.array(mapped["offsets"], np.int32).reshape(-1, 2) + at)
            at += len(part)
        return np.concatenate(ids), np.concatenate(spans)

    def _border(self, special: bool) -> re.Pattern[str] | None:
        """What is not left to the model: special tokens if asked for, and the space mark."""
        texts = sorted(self.special, key=len, reverse=True) if special else []
        texts += [SPACE_MARK] if self._has_bytes else []
        return re.compile(f"({'|'.join(map(re.escape, texts))})") if texts else None

    def _border_ids(self, text: str) -> np.ndarray:
        return self._mark_ids if text == SPACE_MARK else np.array([self.special[text]], np.int32)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def _declared_loss(self) -> str | None:
        spec = _fields(_fields(self.files["tokenizer.model"]).get(3, b""))  # normalizer_spec
        if spec.get(2):  # precompiled_charsmap
            rule = bytes(spec.get(1, b"")).decode(errors="replace") or "of its own"
            return f"its normaliser ({rule}) rewrites characters"
        if spec.get(4, 1):  # remove_extra_whitespaces
            return "it drops spaces at the ends of a text and where several follow each other"
        return None


def _processor(model: bytes, name: str):
    import sentencepiece

    if not model:
        raise DataError(f"{name} is not a SentencePiece model: it is empty")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise DataError(f"{name} is not a SentencePiece model: {error}") from error


def _fields(message: bytes) -> dict[int, Any]:
    """Field number -> last value of a serialised protocol buffer: bytes, or int of a varint.

    Enough for a model's normaliser, without the protobuf package.
    """
    fields: dict[int, Any] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            fields[number] = varint()
        else:
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            fields[number] = message[at : at + size]
            at += size
    return fields


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Trains a byte-fallback BPE model on texts; the same texts give the same bytes.

    Nothing is normalised and whitespace is kept, so decode(encode(x)) == x. Whole documents
    (not lines) are the trainer's sentences, so that pieces such as ``":\\n"`` can form:
    on the Python standard library 3.5 bytes a token against 3.3 with a newline piece.

    Raises:
      ConfigError: the vocabulary is too large or too small for the text.
    """
    import sentencepiece

    model = io.BytesIO()
    failures: list[Exception] = []

    def sentences() -> Iterator[str]:
        try:
            for text in texts:
                yield from (chunk.replace(SPACE_MARK, " ") for chunk in _chunks(text))
        except Exception as error:  # the trainer would turn it into a RuntimeError of its own
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            max_sentence_length=4 * _CHUNK_CHARS + 4,
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        if failures:
            raise failures[0] from None
        raise ConfigError(_training_failure(str(error), vocab_size)) from error
    return SentencePieceTokenizer({"tokenizer.model": model.getvalue()})


def _training_failure(message: str, vocab_size: int) -> str:
    if "too high" in message:
        limit = re.search(r"<= *(\d+)", message)
        most = f"at most {limit.group(1)}" if limit else "a smaller vocabulary"
        return (
            f"data.vocab_size {vocab_size} is too large for this corpus, which supports {most}. "
            "Lower data.vocab_size, or give more text"
        )
    if "smaller than required_chars" in message:
        needed = re.search(r"required_chars\. *\d+ vs (\d+)", message)
        least = f"at least {needed.group(1)}" if needed else "more"
        return (
            f"data.vocab_size {vocab_size} is too small for the characters of this corpus: set it "
            f"to {least}"
        )
    return f"training a tokenizer of {vocab_size} pieces failed: {message[:400]}"


def _chunks(text: str) -> Iterator[str]:
    """Cuts a long text at line ends, else anywhere: the trainer drops overlong sentences."""
    start = 0
    while start < len(text):
        end = min(start + _CHUNK_CHARS, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
