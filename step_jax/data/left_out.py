"""What a source left out, in words: for reports and errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from step_jax.core.errors import DataError
from step_jax.data.config import DataConfig, Source


def in_words(counters: Mapping[str, int], skipped: Path) -> str:
    """What was left out of a source, in words; empty if nothing was."""
    reasons = [
        f"{count:,} {name.removeprefix('skipped_').replace('_', ' ')}"
        for name, count in counters.items()
        if name.startswith("skipped_") and count
    ]
    parts = []
    if reasons:
        parts.append(f"left out {', '.join(reasons)}, named in {skipped}")
    if cut := counters.get("documents_truncated"):
        parts.append(
            f"{cut:,} documents cut at data.max_document_bytes "
            f"({counters['bytes_truncated']:,} bytes less)"
        )
    if cut := counters.get("tokens_truncated"):
        parts.append(f"conversations cut at data.sequence_length ({cut:,} tokens less)")
    return "; ".join(parts)


def too_many_bad(source: Source, config: DataConfig, which: str) -> DataError:
    """The error for more unreadable records than are allowed; ``which`` says which they are."""
    return DataError(
        f"{source.path}: more than {config.max_bad_records} bad records (data.max_bad_records). "
        f"{which}. Repair the file, or raise the limit to go on without them"
    )


def no_text(source: Source, left_out: str) -> str:
    """The words for a source without a document; ``left_out``: what of it was, in words."""
    reasons = left_out or "no documents in its files"
    return (
        f"data path {source.path!r} holds no text ({reasons}). Point data.path at text files, "
        "JSONL, Parquet, Arrow or ArrayRecord files with a text field"
    )
