import json
import subprocess
import sys

import pytest

from step_jax.core.errors import DataError
from step_jax.tokenizers.files import load_tokenizer
from step_jax.tokenizers.huggingface import HuggingFaceTokenizer
from step_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.tokenizers.made import byte_level, ours

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n"


@pytest.fixture
def folder(tmp_path):
    config = {"eos_token": "<|im_end|>", "chat_template": "old"}
    ours(byte_level(), tokenizer_config=config, generation_config={"eos_token_id": [0]}).save(
        tmp_path
    )
    return tmp_path


def test_every_kind_comes_back_from_its_folder_and_from_its_file(folder, tokenizer, tmp_path):
    loaded = load_tokenizer(folder)
    assert isinstance(loaded, HuggingFaceTokenizer) and loaded.stop_ids == (2, 0)
    alone = load_tokenizer(folder / "tokenizer.json")
    assert alone.eos_id is None and alone.encode("fox").tolist() == loaded.encode("fox").tolist()
    tokenizer.save(tmp_path / "sp")
    for path in (tmp_path / "sp", tmp_path / "sp/tokenizer.model"):
        loaded = load_tokenizer(path)
        assert isinstance(loaded, SentencePieceTokenizer) and loaded.hash == tokenizer.hash
    (tmp_path / "sp/tokenizer.model").rename(tmp_path / "sp/other.model")
    assert load_tokenizer(tmp_path / "sp").hash == tokenizer.hash


def test_saving_replaces_another_tokenizer(folder, tokenizer):
    (folder / "weights.bin").write_bytes(b"kept")
    tokenizer.save(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.model", "weights.bin"]


def test_a_template_of_its_own_file_comes_first(folder):
    assert load_tokenizer(folder).chat_template.source == "old"
    (folder / "chat_template.json").write_text('{"chat_template": "older file"}')
    assert load_tokenizer(folder).chat_template.source == "older file"
    (folder / "chat_template.jinja").write_text("new")
    assert load_tokenizer(folder).chat_template.source == "new"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match="chat_template.jinja is not UTF-8"):
        load_tokenizer(folder)


def test_a_template_changes_no_ids_and_no_identity(folder):
    before = load_tokenizer(folder).hash
    (folder / "chat_template.jinja").write_text("new")
    assert load_tokenizer(folder).hash == before
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<|im_end|>"}))
    assert load_tokenizer(folder).hash != before


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"],
)
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n", "is empty"), (POINTER, "Git LFS.*git lfs pull")],
)
def test_files_that_hold_nothing_are_refused(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=f"(?s){name}.*{message}"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"neither tokenizer.json nor a .model file \(found: nothing\)"),
        (["config.json", "a.safetensors"], "found: a.safetensors, config.json"),
        (["vocab.json", "merges.txt"], "has vocab.json, but no tokenizer.json.*save_pretrained"),
        (["x.tiktoken"], "has x.tiktoken, but no"),
        (["a.model", "b.model"], "several SentencePiece models .a.model, b.model.: name one"),
    ],
)
def test_a_folder_without_a_tokenizer_says_what_it_has(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_what_is_no_tokenizer_at_all(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="notes.txt is no tokenizer. Give a SentencePiece .model"):
        load_tokenizer(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="nowhere does not exist.*data.tokenizer: train"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "folder.model").mkdir()
    with pytest.raises(DataError, match="neither"):
        load_tokenizer(tmp_path / "folder.model")


def test_importing_and_loading_sentencepiece_brings_neither_package_of_the_other_kinds():
    code = (
        "import sys, step_jax; step_jax.load_tokenizer; step_jax.Tokenizer\n"
        "import step_jax.tokenizers.huggingface, step_jax.tokenizers.chat\n"
        "assert not {'tokenizers', 'jinja2', 'sentencepiece', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
