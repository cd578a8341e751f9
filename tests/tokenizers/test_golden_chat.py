"""Ids, texts, renderings and masks are those of transformers (tests/golden/make_chat_golden.py)."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from step_jax.tokenizers.chat import encode_chat
from step_jax.tokenizers.files import load_tokenizer
from step_jax.tokenizers.template import ChatTemplate

FOLDER = Path(__file__).parents[1] / "golden/chat_tokenizer"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture(scope="module")
def golden():
    return load_tokenizer(FOLDER)


@pytest.mark.parametrize("case", EXPECTED["texts"], ids=lambda case: repr(case["text"][:9]))
def test_ids_and_text_are_those_of_transformers(golden, case):
    assert golden.encode(case["text"], special=True).tolist() == case["ids"]
    assert golden.encode(case["text"]).tolist() == case["plain"]
    assert golden.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize("case", EXPECTED["chats"])
def test_conversations_and_masks_are_those_of_transformers(golden, case):
    template = ChatTemplate(case["template"], golden.chat_template.variables)
    text = template.render(case["messages"], **case["options"])
    assert text == case["text"]
    assert golden.encode(text, special=True).tolist() == case["ids"]
    if case["assistant"] is not None and not case["options"].get("add_generation_prompt"):
        # the template writes no call's name, which would be refused if the text lacked it
        messages = json.loads(json.dumps(case["messages"]).replace('"name": "add"', '"name": "a"'))
        ((ids, said),) = encode_chat(golden, template, messages, **case["options"])
        # nothing is learned after the last answer
        assert ids.tolist() == case["ids"][: len(ids)]
        assert not any(case["assistant"][len(ids) :])
        np.testing.assert_array_equal(said, np.array(case["assistant"][: len(ids)], bool))


def test_special_tokens_are_found_in_all_files(golden):
    assert (golden.bos_id, golden.eos_id, golden.pad_id) == (None, 2, 0)
    assert golden.start_id == 2 and golden.stop_ids == (2, 0)
    assert golden.special == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert golden.chat_template.variables["eos_token"] == "<|im_end|>"
    assert golden.lossless and golden.as_read("e\u0301") == "\u00e9"


def test_the_example_of_the_page_works_as_written(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/tokenizers.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "checkpoint").symlink_to(FOLDER)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert names["text"] == "the <|im_end|> of a document" and names["answer"] == "4"
    tokenizer = names["tokenizer"]
    assert tokenizer.decode(names["ids"][names["said"]]) == "4"
    assert names["ids"][names["said"]][-1] == tokenizer.eos_id
