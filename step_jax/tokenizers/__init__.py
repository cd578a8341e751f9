"""Tokenizers."""

from pathlib import Path

from step_jax.tokenizers.sentencepiece import Tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder or a file."""
    path = Path(path)
    return Tokenizer.load(path / "tokenizer.model" if path.is_dir() else path)
