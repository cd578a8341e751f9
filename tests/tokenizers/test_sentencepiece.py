import io
import json
import re

import numpy as np
import pytest
import sentencepiece
from hypothesis import assume, example, given
from hypothesis import strategies as st

from step_jax.core.errors import ConfigError, DataError
from step_jax.data import train_tokenizer
from step_jax.tokenizers.files import load_tokenizer
from step_jax.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece
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


def trained(**options) -> SentencePieceTokenizer:
    """A model as `spm_train` makes it with these options."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text_of(s, 30) for s in range(20)),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        **{"vocab_size": 340, "byte_fallback": True, "model_type": "bpe"} | options,
    )
    return SentencePieceTokenizer({"tokenizer.model": model.getvalue()}, "other.model")


EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    ("options", "lossy"),
    [
        (EXACT, None),
        (EXACT | {"add_dummy_prefix": False}, None),
        ({}, r"normaliser \(nmt_nfkc\) rewrites characters"),
        (EXACT | {"normalization_rule_name": "nfkc"}, r"normaliser \(nfkc\)"),
        (EXACT | {"remove_extra_whitespaces": True}, "drops spaces"),
        (EXACT | {"byte_fallback": False, "vocab_size": 60}, "it reads"),
    ],
)
def test_what_a_model_loses_is_found(options, lossy):
    tokenizer = trained(**options)
    assert tokenizer.lossless == (lossy is None)
    assert lossy is None or re.search(lossy, tokenizer.lossy)


@pytest.fixture(scope="module")
def dummy_prefix():
    return trained(**EXACT)


@given(st.one_of(TEXT, CODE))
@example(" a\u2581 b")
@example("\u2581")
def test_round_trip_is_exact_with_a_dummy_prefix_too(dummy_prefix, text):
    assert dummy_prefix.decode(dummy_prefix.encode(text)) == text
    assert "".join(dummy_prefix.stream(dummy_prefix.encode(text))) == text


@given(st.one_of(TEXT, CODE), st.one_of(TEXT, CODE))
@example("fox", " fox")
def test_a_continuation_keeps_its_space(dummy_prefix, prompt, text):
    whole = dummy_prefix.encode(prompt + text)
    cut = len(dummy_prefix.encode(prompt))
    head = dummy_prefix.decode(whole[:cut])
    assume(not head.endswith("\ufffd"))
    assert head + dummy_prefix.decode_continuation(whole[:cut], whole[cut:]) == prompt + text


def test_special_tokens_are_read_only_where_asked_for(dummy_prefix):
    text = "<s>a fox</s>\u2581 b"
    ids = dummy_prefix.encode(text, special=True)
    bos, eos = dummy_prefix.bos_id, dummy_prefix.eos_id
    assert ids[0] == bos and np.count_nonzero(ids == eos) == 1
    assert dummy_prefix.decode(ids) == "a fox\u2581 b"
    assert not {bos, eos} & set(dummy_prefix.encode(text).tolist())
    assert dummy_prefix.special["</s>"] == eos and dummy_prefix.stop_ids == (eos,)


def test_spans_are_the_characters_of_each_token(dummy_prefix, tokenizer):
    text = "<s>a  fox\u4e16</s>\u2581 b"
    for model in (dummy_prefix, tokenizer):
        ids, spans = model.encode_spans(text)
        np.testing.assert_array_equal(ids, model.encode(text, special=True))
        assert ids.dtype == spans.dtype == np.int32
        covered = [text[a:b] for a, b in spans]
        assert "".join(covered) == text.replace("\u2581", 3 * "\u2581")
        assert covered[0] == "<s>" and "</s>" in covered


def test_half_a_surrogate_pair_and_strange_ids(tokenizer):
    with pytest.raises(DataError, match=r"character 1 of the text is '\\ud800'"):
        tokenizer.encode("a\ud800")
    assert tokenizer.decode([-1, 10**6, *tokenizer.encode("fox")]) == "fox"


def test_configuration_beside_a_model(dummy_prefix, tmp_path):
    dummy_prefix.save(tmp_path)
    config = {"chat_template": "{{ eos_token }}", "pad_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_id == loaded.eos_id and loaded.hash != dummy_prefix.hash
    assert loaded.chat_template.render([{"role": "user", "content": "x"}]) == "</s>"
    config = {"added_tokens_decoder": {"340": {"content": "<|im_end|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="adds token 340 '<|im_end|>'.*needs a tokenizer.json"):
        load_tokenizer(tmp_path)


def test_prompts_begin_with_bos_unless_the_configuration_says_otherwise(dummy_prefix, tmp_path):
    bos, ids = dummy_prefix.bos_id, dummy_prefix.encode("a fox").tolist()
    assert dummy_prefix.encode_prompt("a fox") == [bos, *ids]
    assert dummy_prefix.encode_prompt("") == [bos] and dummy_prefix.start_id == bos
    dummy_prefix.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    plain = load_tokenizer(tmp_path)
    assert plain.encode_prompt("a fox") == ids and plain.start_id == plain.eos_id
    assert plain.hash != dummy_prefix.hash  # documents begin with another token


def test_a_model_without_start_or_end():
    tokenizer = trained(**EXACT, bos_id=-1)
    assert tokenizer.bos_id is None and tokenizer.start_id == tokenizer.eos_id
    assert tokenizer.prefix_ids == () and tokenizer.encode_prompt("") == [tokenizer.eos_id]
    endless = trained(**EXACT, bos_id=-1, eos_id=-1)
    assert endless.eos_id is None and endless.stop_ids == ()
    with pytest.raises(DataError, match="other.model has no end-of-text token"):
        endless.document_borders()
