"""SentencePiece tokenizer: training, loading, and a round trip that is exact for any text."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from step_jax.core.errors import ConfigError, DataError
from step_jax.core.files import write_whole

PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
# SentencePiece writes a space as this character, so a literal one would come back as a space.
_SPACE_MARK = "\u2581"
_SPACE_MARK_BYTES = tuple(f"<0x{byte:02X}>" for byte in _SPACE_MARK.encode())
_CHUNK_CHARS = 32 * 1024  # the trainer takes text in pieces of at most this length


class Tokenizer:
    """A SentencePiece model.

    Attributes:
      vocab_size: number of pieces.
      pad_id, bos_id, eos_id: control ids. A model without a start piece uses its end piece;
        a model without a pad piece pads with 0 (padding never carries loss).
      hash: SHA-256 of the model file, hex.
    """

    def __init__(self, model: bytes, name: str = "tokenizer"):
        """Reads a serialised model; raises `DataError` if it is none."""
        import sentencepiece

        if not model:
            raise DataError(f"{name} is not a SentencePiece model: it is empty")
        self.model = model
        self.hash = hashlib.sha256(model).hexdigest()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size: int = self._processor.vocab_size()
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            raise DataError(f"{name} is not a SentencePiece model: {error}") from error
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise DataError(f"{name} has no end-of-text piece (eos), which separates documents")
        bos, pad = self._processor.bos_id(), self._processor.pad_id()
        self.bos_id: int = bos if bos >= 0 else self.eos_id
        self.pad_id: int = pad if pad >= 0 else 0
        ids = [self._processor.piece_to_id(piece) for piece in _SPACE_MARK_BYTES]
        self._has_bytes = all(self._processor.is_byte(i) for i in ids)
        self._space_mark_ids = np.array(ids, np.int32)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Loads a ``.model`` file; raises `DataError` with the remedy if that fails."""
        path = Path(path).expanduser()
        try:
            return cls(path.read_bytes(), name=str(path))
        except OSError as error:
            raise DataError(
                f"tokenizer {path} cannot be read ({error.strerror}). Give the path of a "
                "SentencePiece .model file, or `data.tokenizer: train`"
            ) from error

    def save(self, path: str | Path) -> None:
        """Writes the model file (``tokenizer.model`` in a folder), whole or not at all."""
        path = Path(path)
        write_whole(path if path.suffix else path / "tokenizer.model", self.model)

    def require(self, expected_hash: str, owner: str) -> None:
        """Raises `DataError` unless this is the tokenizer that ``owner`` was made with."""
        if self.hash != expected_hash:
            raise DataError(
                f"the tokenizer does not match {owner}: {owner} was made with tokenizer "
                f"{expected_hash[:16]}, this one is {self.hash[:16]} ({self.vocab_size} pieces). "
                "Set data.tokenizer to the tokenizer.model kept with that run"
            )

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 (n,), without control ids."""
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[np.ndarray]:
        """Token ids of each text, int32 (n_i,), on ``threads`` threads (default: all cores)."""
        threads = threads or os.cpu_count() or 1
        marked = self._has_bytes and any(_SPACE_MARK in t for t in texts)
        if not marked:
            return self._encode(list(texts), threads)
        parts = [text.split(_SPACE_MARK) for text in texts]
        encoded = iter(self._encode([part for text in parts for part in text], threads))
        return [self._join_marked([next(encoded) for _ in text]) for text in parts]

    def _encode(self, texts: list[str], threads: int) -> list[np.ndarray]:
        return self._processor.encode(texts, return_type="numpy", num_threads=threads)

    def _join_marked(self, parts: list[np.ndarray]) -> np.ndarray:
        joined = [parts[0]]
        for part in parts[1:]:
            joined += [self._space_mark_ids, part]
        return np.concatenate(joined)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; control ids give nothing, broken UTF-8 gives U+FFFD."""
        return self._processor.decode(np.asarray(list(ids), np.int64).tolist())

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text piece by piece as ids arrive; holds back a character until it is whole."""
        pending: list[int] = []
        for token in ids:
            pending.append(int(token))
            text = self.decode(pending)
            if text and (not text.endswith("\ufffd") or len(pending) > 4):
                yield text
                pending = []
        if pending:
            yield self.decode(pending)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
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
                yield from (chunk.replace(_SPACE_MARK, " ") for chunk in _chunks(text))
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
    return Tokenizer(model.getvalue())


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
