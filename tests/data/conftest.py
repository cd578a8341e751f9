from pathlib import Path

import pytest

from step_jax.data import Tokenizer
from step_jax.tokenizers.sentencepiece import train_sentencepiece

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box with care".split()


def text_of(seed: int, lines: int) -> str:
    """Some text that differs with the seed."""
    rows = []
    for i in range(lines):
        words = [WORDS[(seed * 7 + i * 5 + j * (1 + seed % 3)) % len(WORDS)] for j in range(6)]
        rows.append(f"{'    ' * (i % 3)}{' '.join(words)} {seed}.{i}")
    return "\n".join(rows) + "\n"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_sentencepiece([text_of(s, 30) for s in range(20)], vocab_size=340)


@pytest.fixture(scope="session")
def tokenizer_path(tokenizer, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return str(path)


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder of 60 small text files in two subfolders."""
    root = tmp_path / "texts"
    for i in range(60):
        path = root / ("a" if i % 2 else "b") / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text_of(i, 2 + i % 9))
    return root
