"""What a tokenizer is to the rest of the library, whatever file it comes from."""

from __future__ import annotations

import abc
import functools
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from step_jax.core.errors import DataError
from step_jax.core.files import write_whole
from step_jax.tokenizers.template import ChatTemplate

#: Every file that a folder of a tokenizer may hold; the first two are the tokenizers themselves.
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
#: The environment variable that says how many threads encode: that of the tokenizers library.
ENCODING_THREADS = "RAYON_NUM_THREADS"
SPACE_MARK = "\u2581"  # what SentencePiece and its relatives write for a space
_BROKEN = "\ufffd"
_MOST_BYTES = 4  # of a character: as many tokens may pass until it is whole
# Texts on which tokenizers are known to lose something: runs and kinds of white space, ligatures,
# wide and half-wide forms, case, accents, unseen scripts, control and invisible characters.
_PROBES = (
    "a  b",
    " a",
    "a ",
    "a\tb",
    "a\n\n b\r\n",
    "Aa\u00c5\u00e9",
    "x\u00b2 \ufb01",
    "\uff21\uff71",
    "1\u2044\u00bd",
    "a\u00a0b\u3000c",
    "\ufeffa\u200bb\u200d",
    "\u4e16\u754c \u1200\U0001f9ec",
    "\u05d0\u0301\u0627\u064e",
    "\x01\x7f\0",
    "1 .'s n't , !",
    "<s></s>[CLS]<|endoftext|>",
)


class Tokenizer(abc.ABC):
    """Text to ids and back. Ids that stand for no text (control tokens) decode to nothing.

    Attributes:
      name: where it comes from, for messages.
      files: name -> content of the files that it was read from and that `save` writes.
      vocab_size: 1 + the largest id, the rows that an embedding needs.
      bos_id, eos_id: the tokens named for the begin and the end of a text, None where it has none.
      prefix_ids: the tokens that its files put before a text; often bos, often none.
      pad_id: 0 where it has none (padding never carries loss).
      stop_ids: every token that ends a text when a model writes; ``eos_id`` first.
      special: text of a special token -> its id.
      hash: SHA-256, hex, of what decides the ids of a text and of bos, eos, pad and the
        token before a document.
      chat_template: how it renders a conversation, None where it does not say.
    """

    name: str
    files: Mapping[str, bytes]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    prefix_ids: tuple[int, ...]
    pad_id: int
    stop_ids: tuple[int, ...]
    special: Mapping[str, int]
    hash: str
    chat_template: ChatTemplate | None

    def __reduce__(self) -> tuple:
        return type(self), (dict(self.files), self.name)

    @abc.abstractmethod
    def _encode(self, texts: Sequence[str], special: bool) -> list[np.ndarray]: ...

    @abc.abstractmethod
    def _encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]: ...

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of ids of the vocabulary."""

    @abc.abstractmethod
    def _declared_loss(self) -> str | None:
        """What the file itself says that it changes in a text."""

    @property
    def start_id(self) -> int | None:
        """The token before a document: what the files put before a text, or else eos, which ended
        the document before it in the stream that such a model was trained on."""
        return self.prefix_ids[-1] if self.prefix_ids else self.eos_id

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Token ids of a text, int32 (n,); nothing is put before or after them.

        Args:
          special: read special tokens that are written out in the text, as a rendered
            conversation needs. False reads them as the plain text that they are in a document.

        Raises:
          DataError: a character that cannot be encoded, or is not in a closed vocabulary.
        """
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[np.ndarray]:
        """Token ids of each text, int32 (n_i,), on all cores, or as many threads as the environment
        (``ENCODING_THREADS``) says; see `encode`."""
        texts = list(texts)
        for text in texts:
            _check_text(text)
        return self._encode(texts, special)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that a model is to go on from, after `prefix_ids`, as transformers
        has them. An empty text begins a document: with `start_id`, where there is one."""
        start = () if self.start_id is None or self.prefix_ids or text else (self.start_id,)
        return [*self.prefix_ids, *start, *self.encode(text).tolist()]

    def encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """``encode(text, special=True)``, and the characters of each token: int32 (n, 2).

        Tokens that share a character, such as its bytes, all begin and end with it.
        """
        _check_text(text)
        return self._encode_spans(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; control ids and ids that are no token's give nothing, broken UTF-8
        gives U+FFFD."""
        return self._decode([i for i in map(int, ids) if 0 <= i < self.vocab_size])

    def decode_continuation(self, prompt_ids: Iterable[int], ids: Iterable[int]) -> str:
        """The text that ``ids`` add to ``prompt_ids``: decoded alone they would lose the space
        that tokenizers with a dummy prefix take from the first word."""
        stream = TextStream(self.decode, prompt_ids)
        return stream.push(ids) + stream.end()

    def stream(self, ids: Iterable[int], prompt_ids: Iterable[int] = ()) -> Iterator[str]:
        """Text piece by piece as ids arrive; holds back a character until it is whole."""
        stream = TextStream(self.decode, prompt_ids)
        for token in ids:
            if text := stream.push([token]):
                yield text
        if text := stream.end():
            yield text

    @property
    def lossless(self) -> bool:
        """Whether ``decode(encode(x))`` is ``as_read(x)`` for every text that it encodes."""
        return self.lossy is None

    @functools.cached_property
    def lossy(self) -> str | None:
        """What is lost of a text, None for nothing."""
        if declared := self._declared_loss():
            return declared
        for probe in _PROBES:
            back = self._round_trip(probe)
            if back is not None and back != (expected := self.as_read(probe)):
                return f"it reads {expected!r} as {back!r}"
        return None

    def as_read(self, text: str) -> str:
        """What the ids of a text stand for: the text, but for two changes that keep its sense.

        Some tokenizers compose accents first (Unicode NFC, as Qwen's do), and to some U+2581 is a
        space. Bytes of a text are to be counted after this.
        """
        if self._mark_is_space and SPACE_MARK in text:
            text = text.replace(SPACE_MARK, " ")
        return unicodedata.normalize("NFC", text) if self._composes else text

    @functools.cached_property
    def _mark_is_space(self) -> bool:
        return self._round_trip(f"a{SPACE_MARK}a") == "a a"

    @functools.cached_property
    def _composes(self) -> bool:
        return self._round_trip("ae\u0301") == "a\u00e9"

    def _round_trip(self, text: str) -> str | None:
        """None where the text is refused, which is no loss."""
        try:
            return self.decode(self.encode(text))
        except DataError:
            return None

    def _borders(self) -> list[int | None]:
        """What the hash says of special tokens: bos, eos and pad, and the token before a document
        unless it is the first that there is of them."""
        ids = [self.bos_id, self.eos_id, self.pad_id]
        usual = self.eos_id if self.bos_id is None else self.bos_id
        return ids if self.start_id == usual else [*ids, self.start_id]

    def require(self, expected_hash: str, owner: str) -> None:
        """Raises `DataError` unless this is the tokenizer that ``owner`` was made with."""
        if self.hash != expected_hash:
            raise DataError(
                f"the tokenizer does not match {owner}: {owner} was made with tokenizer "
                f"{expected_hash[:16]}, this one is {self.hash[:16]} ({self.vocab_size} tokens). "
                "Set data.tokenizer to the tokenizer folder kept with that run"
            )

    def save(self, folder: str | Path) -> None:
        """Writes the files of the tokenizer, each whole or not at all; those of another go."""
        folder = Path(folder)
        for name, content in self.files.items():
            write_whole(folder / name, content)
        for name in set(FILES) - set(self.files):
            (folder / name).unlink(missing_ok=True)

    def document_borders(self) -> tuple[int, int]:
        """The tokens before (`start_id`) and after (``eos_id``) a document; raises `DataError`
        where there is none to separate documents with."""
        if self.eos_id is None or self.start_id is None:
            raise DataError(
                f"{self.name} has no end-of-text token (eos), which separates documents. In a "
                "Hugging Face folder tokenizer_config.json or generation_config.json names it: "
                "give the folder with these files"
            )
        return self.start_id, self.eos_id


class TextStream:
    """The text of tokens as they come, each character given once it is whole.

    Few tokens are decoded at a time: those since the last whole piece of text and that piece,
    which tells whether a space before the next word counts. The pieces joined are the text of all
    tokens, but for the number of U+FFFD that broken bytes give.
    """

    def __init__(self, decode: Callable[[Iterable[int]], str], before: Iterable[int] = ()):
        self._decode = decode
        self._before, self._new = [int(i) for i in before], []  # type: list[int], list[int]
        self._shown = _whole(decode(self._before))

    def push(self, ids: Iterable[int]) -> str:
        """What can be shown now, perhaps nothing."""
        self._new += map(int, ids)
        text = self._decode(self._before + self._new)
        if text.endswith(_BROKEN) and len(self._new) < _MOST_BYTES:
            return ""
        whole = _whole(text)
        given = text[self._shown : whole]
        self._shown = max(self._shown, whole)
        if given and whole == len(text):
            self._before, self._new = self._new, []
            self._shown = len(self._decode(self._before))
        return given

    def end(self) -> str:
        """What was held back."""
        return self._decode(self._before + self._new)[self._shown :]


def _whole(text: str) -> int:
    """Characters of a text before the bytes of one that is not whole yet."""
    return len(text) - min(_MOST_BYTES - 1, len(text) - len(text.rstrip(_BROKEN)))


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.start + 20]
        raise DataError(
            f"character {error.start} of the text is {text[error.start]!r}, half of a surrogate "
            f"pair or a byte that is not UTF-8, near {near!r}: a tokenizer reads Unicode text only"
        ) from error
