"""Documents of plain text: all of a document is learned, between the tokens that end documents."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from step_jax.data.files import Skip
from step_jax.data.sources import Document, Encoded
from step_jax.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Texts:
    """Records whose text is in one field; see `sources.Records`."""

    text_field: str = "text"
    may_be_cut = True

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.text_field,)

    @property
    def key(self) -> list[Any]:
        return [self.text_field]

    def lacking(self, fields: Collection[str]) -> str | None:
        if self.text_field in fields:
            return None
        return (
            f"no field {self.text_field!r}; the fields are {list(fields)}. Set data.text_field to "
            "the one that holds the text (or data.format: text, to read the file as plain text)"
        )

    def document(self, record: Mapping[str, Any], name: str) -> Document | Skip:
        value = record[self.text_field]
        if not isinstance(value, str):
            detail = f"field {self.text_field!r} is {type(value).__name__}, not text"
            return Skip(name, "not_text", detail, bad=True)
        return Document(name, value)

    def file(self, text: str, name: str) -> Document | Skip:
        return Document(name, text)

    def words(self, document: Document) -> str:
        return document.text

    def tokens_key(self, tokenizer: Tokenizer) -> list[Any]:
        return []

    def encode(self, documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[Encoded]]:
        """Each document with the token that ends it."""
        _, eos_id = tokenizer.document_borders()
        texts = [tokenizer.as_read(document.text) for document in documents]
        ids = tokenizer.encode_batch(texts)
        return [
            [Encoded(np.append(tokens, np.int32(eos_id)), text.encode())]
            for text, tokens in zip(texts, ids, strict=True)
        ]
