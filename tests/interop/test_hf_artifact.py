"""A folder of Hugging Face as an artifact: where its texts begin and end, in and out."""

from __future__ import annotations

import json

import pytest

from step_jax.cli.main import main
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.interop.artifacts import load_artifact
from tests.interop import hf_folders
from tests.tokenizers.made import byte_level, ours

CHAT = {"eos_token": "<|im_end|>", "bos_token": None, "add_bos_token": False}  # as Qwen has it


@pytest.fixture(scope="module")
def tokenizer():
    return ours(byte_level(), tokenizer_config=CHAT)


@pytest.mark.thorough
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_every_stop_token_is_read_and_written_back(tmp_path, tokenizer, file):
    """<|im_end|> (2) ends a turn, <|endoftext|> (0) a document."""
    g = hf_folders.small()
    folder = hf_folders.write_folder(tmp_path / "in", g)
    tokenizer.save(folder)
    named = {"bos_token_id": 0, "eos_token_id": [2, 0, 5], "pad_token_id": 0}
    before = json.loads((folder / file).read_text()) if file == "config.json" else {}
    (folder / file).write_text(json.dumps(before | named))
    sharding = Sharding.build(MeshConfig(fsdp=-1))
    artifact = load_artifact(f"hf:{folder}", sharding, arrays=False)
    assert artifact.tokenizer.stop_ids == (2, 0, 5)
    assert artifact.tokenizer.encode_prompt("fox") == tokenizer.encode("fox").tolist()
    assert main(["export", f"hf:{folder}", str(tmp_path / "out")]) == 0
    for written in ("config.json", "generation_config.json"):
        keys = json.loads((tmp_path / "out" / written).read_text())
        assert keys["eos_token_id"] == [2, 0, 5]
    again = load_artifact(f"hf:{tmp_path / 'out'}", sharding, arrays=False)
    assert again.tokenizer.stop_ids == (2, 0, 5)
    assert again.tokenizer.encode_prompt("fox") == tokenizer.encode("fox").tolist()
