"""Documents made of the tokens of tokenizers that were not trained here."""

import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import normalizers

from step_jax.core.errors import DataError
from step_jax.data import DataConfig, TextDataset, prepare
from step_jax.tokenizers.huggingface import character_tokenizer
from tests.tokenizers.made import byte_level, ours

ENDS = {"eos_token": "<|endoftext|>"}


@pytest.fixture
def data(tmp_path):
    """(configuration for a tokenizer, the texts: accents apart, a special token in words)."""
    texts = [f"cafe\u0301 {i} <|endoftext|> the  fox\n" for i in range(20)]
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / f"texts/{i}.txt").write_text(text, encoding="utf-8")

    def config(tokenizer, **options) -> DataConfig:
        tokenizer.save(tmp_path / "kept")
        return DataConfig(
            path=str(tmp_path / "texts"),
            tokenizer=str(tmp_path / "kept"),
            cache_dir=str(tmp_path / "cache"),
            heldout_fraction=0.3,
            sequence_length=64,
            **options,
        )

    return config, texts


def test_documents_begin_and_end_with_eos_where_there_is_no_bos(data):
    config, texts = data
    tokenizer = ours(byte_level(), tokenizer_config=ENDS)
    dataset = TextDataset.build(config(tokenizer, packing="fit"), batch_size=2)
    (cache,) = prepare(config(tokenizer)).caches
    ends = cache.train.offsets[1:] - 1
    assert (cache.train.tokens[ends] == tokenizer.eos_id).all()
    # one that stands in a text is text, and ends no document
    assert np.count_nonzero(cache.train.tokens == tokenizer.eos_id) == len(ends)
    first = dataset.batch(0)
    assert (first["tokens"][first["positions"] == 0] == tokenizer.eos_id).all()
    assert dataset.heldout.bos_id == tokenizer.eos_id and dataset.heldout.lossy is None


def test_bytes_are_those_of_the_text_as_the_tokenizer_reads_it(data):
    config, texts = data
    tokenizer = ours(byte_level(normalizers.NFC()), tokenizer_config=ENDS)
    heldout = TextDataset.build(config(tokenizer), batch_size=2).heldout
    composed = {unicodedata.normalize("NFC", text).encode() for text in texts}
    (raw,), (counts,) = heldout.raws, heldout.bytes_of
    borders = np.cumsum([0, *counts])
    kept = {raw[a:b].tobytes() for a, b in zip(borders, borders[1:], strict=False)}
    assert kept and kept < composed
    assert heldout.documents == len(kept) and heldout.bytes == sum(map(len, kept))


def test_a_tokenizer_that_loses_text_is_refused_unless_asked_for(data):
    config, _ = data
    lower = ours(byte_level(normalizers.Lowercase()), tokenizer_config=ENDS)
    with pytest.raises(DataError, match="(?s)kept loses part of the text: .*Lowercase.*lossy_toke"):
        prepare(config(lower))
    dataset = TextDataset.build(config(lower, lossy_tokenizer=True), batch_size=2)
    assert "Lowercase" in dataset.heldout.lossy and "Lowercase" in dataset.heldout.subset(1).lossy


def test_a_tokenizer_without_an_end_makes_no_documents(data):
    config, _ = data
    with pytest.raises(DataError, match="kept has no end-of-text token .eos., which separates"):
        prepare(config(ours(byte_level())))
    with pytest.raises(DataError, match="no end-of-text token"):
        prepare(config(character_tokenizer("ab")))


def test_a_trained_tokenizer_is_kept_as_a_folder(data, tmp_path):
    config, _ = data
    trained = replace(config(ours(byte_level())), tokenizer="train", vocab_size=300)
    tokenizer, _ = prepare(trained)
    (folder,) = (tmp_path / "cache").glob("tokenizer-*")
    assert (folder / "tokenizer.model").read_bytes() == tokenizer.files["tokenizer.model"]
