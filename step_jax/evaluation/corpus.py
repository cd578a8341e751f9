"""Text that a model is scored on as a whole: every document of a file or folder."""

from __future__ import annotations

import numpy as np

from step_jax.core.errors import DataError
from step_jax.data import DataConfig, Heldout, Tokenizer
from step_jax.data.cache import Documents
from step_jax.data.files import Skip, list_files
from step_jax.data.sources import Document, read_file


def whole_corpus(data: DataConfig, tokenizer: Tokenizer) -> tuple[Heldout, list[Skip]]:
    """All documents of ``data`` in memory, none kept for training, and what was left out.

    Raises:
      DataError: there is no text.
    """
    texts: list[str] = []
    skips: list[Skip] = []
    for source in data.resolved_sources:
        files, left_out = list_files(source)
        skips += left_out
        for file in files:
            for item in read_file(file, source.text_field, data.max_document_bytes):
                if isinstance(item, Document):
                    texts.append(tokenizer.as_read(item.text))
                else:
                    skips.append(item)
    if not texts:
        paths = ", ".join(source.path for source in data.resolved_sources)
        raise DataError(f"there is no text to evaluate in {paths} ({len(skips)} files left out)")
    start_id, end_id = tokenizer.document_borders()
    encoded = [np.append(ids, end_id) for ids in tokenizer.encode_batch(texts)]
    raw = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    heldout = Heldout(
        corpora=(Documents(np.concatenate(encoded), offsets),),
        raws=(np.frombuffer(b"".join(raw), np.uint8),),
        bytes_of=(np.array([len(text) for text in raw], np.int64),),
        bos_id=start_id,
        pad_id=tokenizer.pad_id,
        lossy=tokenizer.lossy,
        tokenizer=tokenizer.hash,
    )
    return heldout, skips
