"""Text that a model is scored on as a whole: every document of a file or folder."""

from __future__ import annotations

import numpy as np

from step_jax.core.errors import DataError
from step_jax.data import DataConfig, Heldout, Tokenizer
from step_jax.data.corpus import Documents
from step_jax.data.files import Skip, list_files
from step_jax.data.sources import Document, read_file
from step_jax.data.texts import Texts


def whole_corpus(data: DataConfig, tokenizer: Tokenizer) -> tuple[Heldout, list[Skip]]:
    """All documents of ``data`` in memory, none kept for training, and what was left out.

    Raises:
      DataError: there is no text.
    """
    documents: list[Document] = []
    skips: list[Skip] = []
    for source in data.resolved_sources:
        texts = Texts(source.text_field)
        files, left_out = list_files(source)
        skips += left_out
        for file in files:
            for item in read_file(file, texts, data.max_document_bytes):
                if isinstance(item, Document):
                    documents.append(item)
                else:
                    skips.append(item)
    if not documents:
        paths = ", ".join(source.path for source in data.resolved_sources)
        raise DataError(f"there is no text to evaluate in {paths} ({len(skips)} files left out)")
    encoded = [part for parts in Texts().encode(documents, tokenizer) for part in parts]
    offsets = np.cumsum([0, *(len(part.ids) for part in encoded)], dtype=np.int64)
    heldout = Heldout(
        corpora=(Documents(np.concatenate([part.ids for part in encoded]), offsets),),
        raws=(np.frombuffer(b"".join(part.text for part in encoded), np.uint8),),
        bytes_of=(np.array([len(part.text) for part in encoded], np.int64),),
        bos_id=tokenizer.document_borders()[0],
        pad_id=tokenizer.pad_id,
        lossy=tokenizer.lossy,
        tokenizer=tokenizer.hash,
    )
    return heldout, skips
