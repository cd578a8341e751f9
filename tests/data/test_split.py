"""What is held out: contents, over all sources of a run together."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from step_jax.data import DataConfig, Source, prepare
from step_jax.data.split import choose, content_hash

from .conftest import text_of


@pytest.fixture
def config(tokenizer_path, tmp_path) -> DataConfig:
    return DataConfig(
        tokenizer=tokenizer_path, heldout_fraction=0.02, cache_dir=str(tmp_path / "cache")
    )


def folder(path, texts):
    path.mkdir()
    for i, text in enumerate(texts):
        (path / f"{i}.txt").write_text(text)
    return str(path)


def sides(config):
    """(texts trained on, texts held out) of all sources, each as a list."""
    tokenizer, caches = prepare(config)
    return [
        [
            tokenizer.decode(documents.tokens[a : b - 1])
            for documents in split
            for a, b in itertools.pairwise(documents.offsets)
        ]
        for split in ([c.train for c in caches], [c.heldout for c in caches])
    ]


def few(count: int) -> list[str]:
    """Texts of which none falls on the held-out side by itself."""
    texts = (text_of(i, 3) for i in range(1000))
    above = (text for text in texts if content_hash(text) >= 0.05 * 2**64)
    return sorted(itertools.islice(above, count), key=content_hash)


def test_copies_of_the_document_that_a_small_source_holds_out_are_held_out(config, tmp_path):
    first, *rest = few(5)
    path = folder(tmp_path / "a", [first, *rest, first, rest[0]])
    train, held = sides(dataclasses.replace(config, path=path))
    assert held == [first, first] and sorted(train) == sorted([*rest, rest[0]])


def test_what_one_source_holds_out_no_other_source_trains_on(config, tmp_path):
    small = folder(tmp_path / "small", few(3))
    large = folder(tmp_path / "large", [text_of(i, 4) for i in range(200)] + few(3))
    for order in ([small, large], [large, small]):
        sources = tuple(Source(path) for path in order)
        train, held = sides(dataclasses.replace(config, sources=sources))
        assert held.count(few(3)[0]) == 2 and not set(train) & set(held)
    alone, _ = sides(dataclasses.replace(config, path=large))
    assert few(3)[0] in alone  # it was the other source that held it out


def test_a_book_and_its_copy_in_another_source_end_at_the_same_line(config, tmp_path):
    book = text_of(7, 200)
    sources = (
        Source(folder(tmp_path / "book", [book])),
        Source(folder(tmp_path / "library", [text_of(i, 4) for i in range(100, 300)] + [book])),
    )
    train, held = sides(dataclasses.replace(config, sources=sources))
    tail = [text for text in held if book.endswith(text)]
    assert len(tail) == 2 and tail[0] == tail[1]
    assert not any(tail[0] in text for text in train)


def test_copies_of_one_document_alone_give_the_same_last_lines(config, tmp_path):
    book = text_of(7, 200)
    train, held = sides(dataclasses.replace(config, path=folder(tmp_path / "a", [book, book])))
    assert len(train) == len(held) == 2 and len(set(train)) == len(set(held)) == 1
    assert train[0] + held[0] == book


def test_a_single_document_that_hashes_to_the_held_out_side_is_still_trained_on(config, tmp_path):
    book = next(t for t in (text_of(i, 50) for i in range(9999)) if content_hash(t) < 2**64 * 0.02)
    train, held = sides(dataclasses.replace(config, path=folder(tmp_path / "a", [book])))
    assert train[0] + held[0] == book


def test_documents_that_are_equal_once_cut_stay_together(config, tmp_path):
    start, *others = (text_of(i, 40)[:500] for i in range(8))
    path = folder(tmp_path / "a", [start + "one", start + "two", start, *others])
    config = dataclasses.replace(config, path=path, max_document_bytes=500, heldout_fraction=0.4)
    train, held = sides(config)
    assert (train + held).count(start) == 3 and not set(train) & set(held)


def test_choice_reads_no_further_than_it_must():
    from step_jax.data.sources import Document

    def documents():
        for i in itertools.count():
            assert i < 5000
            yield Document(str(i), f"text {i}")

    assert choose(documents(), 0.02).to_json() == [[], []]


def test_choice_is_remembered(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, path=folder(tmp_path / "a", few(5)))
    first = prepare(config).caches[0]
    monkeypatch.setattr("step_jax.data.cache.choose", None)  # it is not made again
    assert prepare(config).caches[0].directory == first.directory
