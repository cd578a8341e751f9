"""Captions as a model's text inputs are given them: every distinct text once, and no text.

Shape suffixes: K texts, S tokens of a text, E width of an encoder's states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from step_jax.core.errors import DataError
from step_jax.core.text import is_utf8, printable
from step_jax.data.schema import Field
from step_jax.tokenizers.base import Tokenizer

#: What stands for a caption that is left out, and for the prompt of no prompt.
NO_TEXT = ""


class Encoded(NamedTuple):
    """Texts as one input is given them.

    Attributes:
      values: int32 tokens (K, S) or float32 states (K, S, E).
      lengths_K: tokens of each text, int32.
      made_by: hash of the tokenizer or encoder.
    """

    values: np.ndarray
    lengths_K: np.ndarray
    made_by: str


def distinct(captions: Iterable[Sequence[str]]) -> list[str]:
    """Every text once in the order of its first use, after :data:`NO_TEXT`.

    Raises:
      DataError: a clip without a caption, or one that is not UTF-8; says which.
    """
    texts = {NO_TEXT: 0}
    for i, of_clip in enumerate(captions):
        if not of_clip or not all(text.strip() for text in of_clip):
            raise DataError(f"clip {i} has no caption, or an empty one")
        for text in of_clip:
            if not is_utf8(text):
                raise DataError(f"a caption of clip {i} is not UTF-8: {printable(text)!r}")
            texts.setdefault(text, len(texts))
    return list(texts)


def hash_of(texts: Sequence[str]) -> str:
    """SHA-256, hex, of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()


def token_rows(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    tokens: int,
    report: Callable[[str], None] = lambda text: None,
) -> Encoded:
    """The token before a document and then the text's, at most ``tokens`` of them.

    Args:
      report: told what is cut off, if anything is.
    """
    start = [] if tokenizer.start_id is None else [tokenizer.start_id]
    rows = [[*start, *ids] for ids in tokenizer.encode_batch(texts)]
    cut = [i for i, row in enumerate(rows) if len(row) > tokens]
    if cut:
        worst = max(cut, key=lambda i: len(rows[i]))
        lost = tokenizer.decode([int(t) for t in rows[worst][tokens:]])
        report(
            f"{len(cut)} of {len(texts)} texts have more than {tokens} tokens and are cut; the "
            f"longest has {len(rows[worst])} and loses {printable(lost)[:200]!r}"
        )
    values, lengths = np.zeros((len(rows), tokens), np.int32), np.zeros(len(rows), np.int32)
    for i, row in enumerate(rows):
        kept = row[:tokens]
        values[i, : len(kept)], lengths[i] = kept, len(kept)
    return Encoded(values, lengths, tokenizer.hash)


class TextBank:
    """All texts of a run as each of its inputs is given them.

    Attributes:
      index: text -> its number; that of :data:`NO_TEXT` is 0.
      encoded: of each input, all texts.
      fields: input -> the array of one text.
      fingerprint: of texts, tokenizers and encoders.
    """

    def __init__(self, texts: Sequence[str], encoded: Mapping[str, Encoded]):
        """``texts`` as :func:`distinct`; ``encoded`` by input."""
        assert texts[0] == NO_TEXT
        self.index = {text: i for i, text in enumerate(texts)}
        self.encoded = dict(encoded)
        self.fields = text_fields({name: e.values.shape[1:] for name, e in encoded.items()})
        self.fingerprint: dict[str, Any] = {
            "texts": hash_of(texts),
            "made_by": {name: e.made_by for name, e in encoded.items()},
        }

    def texts(self, number: int) -> dict[str, tuple[np.ndarray, int]]:
        """Of each input, the array and the length of a text."""
        return {
            name: (e.values[number], int(e.lengths_K[number])) for name, e in self.encoded.items()
        }


def text_fields(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Field]:
    """The array of one text for each input: tokens of shape (S,), states of (S, E)."""
    return {
        name: Field((None,) * len(shape), shape, "int32" if len(shape) == 1 else "float32")
        for name, shape in shapes.items()
    }
