import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from step_jax.core.errors import ConfigError, DataError
from step_jax.data import train_tokenizer
from step_jax.tokenizers.files import load_tokenizer
from step_jax.tokenizers.sentencepiece import train_sentencepiece
from tests.data.conftest import text_of

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
CODE = st.text(st.sampled_from(" \t\n\r\u2581\u00a0\u3000\ufeff\0<>/sfox0123"))


@given(st.one_of(TEXT, CODE))
@example("  def f():\n\treturn  '\u2581'\r\n\n")
@example("</s><pad><unk><0x0A>")
@example("")
def test_round_trip_is_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.stream(ids)) == text
    controls = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    assert not controls & set(ids.tolist())


def test_batch_equals_one_by_one(tokenizer):
    texts = [text_of(1, 3), "", "a\u2581b", "\u2581", text_of(2, 5)]
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_streaming_holds_back_half_characters(tokenizer):
    ids = tokenizer.encode("a\u4e16b")  # not in the vocabulary: three byte pieces
    assert list(tokenizer.stream(ids)) == ["a", "\u4e16", "b"]
    assert "".join(tokenizer.stream(ids[:-2])) == tokenizer.decode(ids[:-2])


def test_training_is_deterministic(tokenizer):
    again = train_sentencepiece([text_of(s, 30) for s in range(20)], vocab_size=340)
    assert again.hash == tokenizer.hash
    assert tokenizer.vocab_size == 340


def test_pieces_hold_indentation_and_line_ends(tokenizer):
    assert len(tokenizer.encode("        ")) < 8
    assert len(tokenizer.encode("1234")) == 4  # digits stand alone


def test_save_load_and_require(tokenizer, tokenizer_path):
    loaded = load_tokenizer(tokenizer_path)
    assert loaded.hash == tokenizer.hash
    loaded.require(tokenizer.hash, "the checkpoint")
    with pytest.raises(DataError, match=f"(?s)0123456789abcdef.*{tokenizer.hash[:16]}"):
        loaded.require("0123456789abcdef" * 4, "the checkpoint")


@pytest.mark.parametrize("content", [b"garbage", b"\0" * 64])
def test_what_is_no_model(tmp_path, content):
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.model is not a SentencePiece model"):
        load_tokenizer(path)


def test_missing_model(tmp_path):
    with pytest.raises(
        DataError, match="none.model cannot be read .No such file.*data.tokenizer: train"
    ):
        load_tokenizer(tmp_path / "none.model")


def test_vocabulary_that_does_not_fit_the_text():
    with pytest.raises(ConfigError, match=r"too large for this corpus, which supports at most \d+"):
        train_sentencepiece(["some words"], vocab_size=4096)
    rare = "".join(map(chr, range(0x4E00, 0x5000)))
    with pytest.raises(ConfigError, match=r"too small.*at least 7\d\d"):
        train_sentencepiece([rare], vocab_size=300)


def test_train_tokenizer_from_files(corpus, tmp_path):
    out = tmp_path / "new"
    trained = train_tokenizer([str(corpus / "a"), str(corpus / "b")], out, vocab_size=330)
    assert load_tokenizer(out).hash == trained.hash
    assert trained.vocab_size == 330
