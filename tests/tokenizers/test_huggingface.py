import json

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, processors

from step_jax.core.errors import ConfigError, DataError
from step_jax.tokenizers.base import TextStream
from step_jax.tokenizers.files import load_tokenizer
from step_jax.tokenizers.huggingface import character_tokenizer
from tests.tokenizers.made import TEXTS, byte_level, metaspace, ours, unigram

KINDS = {"byte level": byte_level, "metaspace": metaspace, "unigram": unigram}
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
WORDS = st.text(st.sampled_from(" \t\nfoxthequ\u2581\u4e16\u00e9\U0001f9ec<s>"))
TOKENS = [("<|im_start|>", 1), ("<|im_end|>", 2)]


@pytest.fixture(scope="module", params=KINDS)
def both(request):
    made = KINDS[request.param]()
    return made, ours(made)


@given(st.one_of(ANY_TEXT, WORDS))
@example("  the fox  \n</s><|im_end|>\u4e16")
@example("")
def test_ids_and_text_are_those_of_the_package(both, text):
    made, tokenizer = both
    made.encode_special_tokens = False
    ids = made.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, special=True).tolist() == ids
    assert tokenizer.encode_spans(text)[0].tolist() == ids
    made.encode_special_tokens = True
    plain = made.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text).tolist() == plain
    assert tokenizer.decode(plain) == made.decode(plain, skip_special_tokens=True)


@given(st.one_of(ANY_TEXT, WORDS), st.one_of(ANY_TEXT, WORDS))
@example("the", " fox")
@example("", " fox")
@example("the ", "\u4e16\u4e16 ")
def test_prompt_and_continuation_read_as_decoded_together(both, prompt, text):
    _, tokenizer = both
    whole = tokenizer.encode(prompt + text).tolist()
    cut = len(tokenizer.encode(prompt))
    head, tail = whole[:cut], whole[cut:]
    together, alone = tokenizer.decode(whole), tokenizer.decode(head)
    assume(not alone.endswith("\ufffd"))  # cut within a character
    assert alone + tokenizer.decode_continuation(head, tail) == together
    assert alone + "".join(tokenizer.stream(tail, head)) == together


def test_the_space_before_a_continuation_is_kept():
    tokenizer = ours(metaspace())
    prompt, answer = tokenizer.encode("the"), tokenizer.encode("fox")
    assert tokenizer.decode(answer) == "fox"
    assert tokenizer.decode_continuation(prompt, answer) == " fox"
    assert list(tokenizer.stream(answer, prompt)) == [" fox"]


def test_streaming_shows_whole_characters_and_decodes_few_tokens():
    tokenizer, most = ours(byte_level()), 0

    def decode(ids):
        nonlocal most
        most = max(most, len(ids))
        return tokenizer.decode(ids)

    text = "\u4e16\u754c the fox " * 50
    stream = TextStream(decode)
    pieces = [stream.push([i]) for i in tokenizer.encode(text)] + [stream.end()]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert most < 12


def test_broken_bytes_do_not_hold_a_stream_back_for_ever():
    tokenizer = ours(metaspace())
    byte = 3 + 0xFF
    stream = TextStream(tokenizer.decode)
    shown = "".join(stream.push([byte]) for _ in range(10))
    assert shown == "\ufffd" * 7 and stream.end() == "\ufffd" * 3


def test_ids_of_nothing_decode_to_nothing():
    tokenizer = ours(byte_level())
    assert tokenizer.decode([0, -1, 10**6, *tokenizer.encode("fox")]) == "fox"


def test_batches_equal_one_by_one_and_ignore_a_kept_truncation():
    made = byte_level()
    made.enable_truncation(3)
    made.enable_padding(length=9)
    tokenizer = ours(made)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize(
    ("make", "lossy"),
    [
        (byte_level, None),
        (metaspace, None),
        (lambda: byte_level(normalizers.NFC()), None),
        (lambda: byte_level(normalizers.NFKC()), "normaliser NFKC changes"),
        (lambda: byte_level(normalizers.Sequence([normalizers.Lowercase()])), "Lowercase"),
        (lambda: byte_level(normalizers.Replace("q", "k")), "Replace"),
        (unigram, "it reads"),
    ],
)
def test_what_a_tokenizer_loses_is_found(make, lossy):
    tokenizer = ours(make())
    assert tokenizer.lossless == (lossy is None)
    assert lossy is None or lossy in tokenizer.lossy


@given(st.one_of(ANY_TEXT, WORDS))
def test_a_lossless_tokenizer_gives_back_the_text_as_it_reads_it(both, text):
    _, tokenizer = both
    if tokenizer.lossless:
        assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.as_read(text)


def test_special_tokens_come_from_the_configuration_then_from_the_generation():
    made = byte_level()
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None}
    generation = {"eos_token_id": [0, 2], "bos_token_id": 1, "pad_token_id": 0}
    tokenizer = ours(made, tokenizer_config=config, generation_config=generation)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert tokenizer.stop_ids == (2, 0)
    alone = ours(made)
    assert (alone.bos_id, alone.eos_id, alone.pad_id, alone.stop_ids) == (None, None, 0, ())
    assert alone.hash != tokenizer.hash
    with pytest.raises(DataError, match="made has no end-of-text token.*tokenizer_config"):
        alone.document_borders()


TEMPLATE = processors.Sequence(
    [
        processors.ByteLevel(),
        processors.TemplateProcessing("<|im_start|> $A <|im_end|>", special_tokens=TOKENS),
    ]
)


@pytest.mark.parametrize(
    ("says", "template", "begins"),
    [
        ({}, None, False),  # a token that is named is not one that is put there
        ({}, TEMPLATE, True),
        ({"add_bos_token": False}, None, False),  # Qwen
        ({"add_bos_token": True}, None, True),  # DeepSeek
        ({"add_bos_token": False}, TEMPLATE, False),
        ({"add_bos_token": True, "bos_token": None}, None, False),
    ],
)
def test_prompts_begin_with_what_the_files_put_before_a_text(says, template, begins):
    made = byte_level()
    if template is not None:
        made.post_processor = template
    config = {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"} | says
    tokenizer = ours(made, tokenizer_config=config)
    before = [1] if begins else []
    assert tokenizer.encode_prompt("a fox") == [*before, *tokenizer.encode("a fox")]
    # documents, and the empty text that begins one, follow eos where there is nothing else
    assert tokenizer.document_borders() == ((before or [0])[0], 0)
    assert tokenizer.encode_prompt("") == (before or [0])


def test_stop_tokens_are_read_of_the_model_where_no_file_says_how_it_writes(tmp_path):
    ours(byte_level(), tokenizer_config={"eos_token": "<|im_end|>"}).save(tmp_path)
    model = {"eos_token_id": 1, "text_config": {"eos_token_id": [0, 2], "bos_token_id": 1}}
    (tmp_path / "config.json").write_text(json.dumps(model))
    assert load_tokenizer(tmp_path).stop_ids == (2, 1)
    (tmp_path / "config.json").write_text(json.dumps(model | {"eos_token_id": None}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.stop_ids == (2, 0) and tokenizer.bos_id == 1
    tokenizer.save(tmp_path / "kept")  # where there is no model beside it
    assert load_tokenizer(tmp_path / "kept").stop_ids == (2, 0)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert load_tokenizer(tmp_path).stop_ids == (2, 0) and load_tokenizer(tmp_path).bos_id is None
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": -1}')
    with pytest.raises(DataError, match="config.json, eos_token_id has -1; it must be token ids"):
        load_tokenizer(tmp_path)


def test_tokens_that_only_the_configuration_adds_are_added_under_their_ids():
    made = byte_level()
    last = made.get_vocab_size()
    decoder = {str(last): {"content": "<extra>", "special": True}}
    tokenizer = ours(made, tokenizer_config={"added_tokens_decoder": decoder})
    made.add_tokens([AddedToken("<extra>", special=True)])
    ids = made.encode("fox<extra>fox", add_special_tokens=False).ids
    assert tokenizer.encode("fox<extra>fox", special=True).tolist() == ids
    assert tokenizer.special["<extra>"] == last and tokenizer.vocab_size == last + 1
    decoder = {str(last + 5): {"content": "<extra>"}}
    with pytest.raises(DataError, match=f"'<extra>' is token {last + 5} .* and {last}"):
        ours(byte_level(), tokenizer_config={"added_tokens_decoder": decoder})


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<no>"}}, "'<no>' as eos_token"),
        ({"tokenizer_config": {"eos_token": 3}}, "made, eos_token is 3"),
        ({"tokenizer_config": []}, "tokenizer_config.json is a list"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": "y"}}}, "added_tokens_decoder.x"),
        ({"tokenizer_config": {"chat_template": 7}}, "chat_template is a int"),
        ({"tokenizer_config": {"chat_template": [{"name": "rag"}]}}, r"\['rag'\], no `default`"),
        ({"generation_config": {"eos_token_id": 9999}}, "eos_token_id 9999 is beyond"),
        ({"generation_config": {"eos_token_id": "2"}}, "eos_token_id has '2'"),
        ({"tokenizer_config": {"add_bos_token": "no"}}, "add_bos_token is 'no'; it must be true"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(configuration, message):
    with pytest.raises(DataError, match=message):
        ours(byte_level(), **configuration)


def test_half_a_surrogate_pair_is_refused_by_place(both):
    with pytest.raises(DataError, match=r"character 4 of the text is '\\udc80'"):
        both[1].encode("the \udc80 fox")


SYMBOLS = "0123456789="


def test_characters_are_the_whole_vocabulary(tmp_path):
    tokenizer = character_tokenizer(SYMBOLS)
    assert tokenizer.vocab_size == 11 and tokenizer.encode("382=238").tolist() == [
        *(3, 8, 2, 10, 2, 3, 8)
    ]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, None, 0)
    assert not tokenizer.stop_ids and not tokenizer.special and tokenizer.lossless
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.hash == tokenizer.hash and again.decode(range(11)) == SYMBOLS
    assert list(again.stream([1, 10])) == ["1", "="]
    with pytest.raises(DataError, match=r"no token for 'x' .character 2 of '1=x'"):
        again.encode("1=x")


@pytest.mark.parametrize("symbols", [[], ["ab"], "0101"])
def test_symbols_that_are_no_alphabet(symbols):
    with pytest.raises(ConfigError, match="symbol"):
        character_tokenizer(symbols)


def test_a_line_end_may_be_a_symbol():
    assert character_tokenizer("a\n ").decode([0, 1, 2]) == "a\n "


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"model": {}}',
        b"\xff\xfe",
        b"[" * 10**5,
        b'{"model": {"type": "BPE"}}',
    ],
)
def test_what_is_no_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json (is|has)"):
        load_tokenizer(tmp_path)


def test_a_truncated_tokenizer_json_is_refused(tmp_path):
    content = json.dumps(json.loads(byte_level().to_str())).encode()
    for size in range(1, len(content), len(content) // 23):
        (tmp_path / "tokenizer.json").write_bytes(content[:size])
        with pytest.raises(DataError, match="tokenizer.json is damaged"):
            load_tokenizer(tmp_path / "tokenizer.json")
