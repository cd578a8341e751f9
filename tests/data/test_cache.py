import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from step_jax.core.errors import ConfigError, DataError, DiskFullError
from step_jax.data import DataConfig, Source, Stage, Tokenizer, parts, prepare


@pytest.fixture
def config(corpus, tokenizer_path, tmp_path) -> DataConfig:
    return DataConfig(
        path=str(corpus),
        tokenizer=tokenizer_path,
        heldout_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )


def replace(config, **changes):
    return DataConfig(**{**config.__dict__, **changes})


def test_cache_holds_every_document_once(config, corpus):
    tokenizer, (tokens,) = prepare(config)
    texts = []
    for split in (tokens.train, tokens.heldout):
        assert split.tokens.dtype == np.uint16
        for start, end in zip(split.offsets, split.offsets[1:], strict=False):
            assert split.tokens[end - 1] == tokenizer.eos_id
            texts.append(tokenizer.decode(split.tokens[start : end - 1]))
    assert sorted(texts) == sorted(p.read_text() for p in corpus.rglob("*.txt"))
    counters = tokens.counters
    assert counters["files"] == counters["documents"] + counters["heldout_documents"] == 60
    assert counters["bytes"] + counters["heldout_bytes"] == sum(len(t.encode()) for t in texts)
    assert counters["tokens"] == len(tokens.train.tokens)
    held = "".join(texts[len(tokens.train.offsets) - 1 :])
    assert bytes(tokens.heldout_raw).decode() == held
    assert tokens.heldout_bytes.sum() == len(held.encode())


def test_cache_is_reused_until_a_content_or_option_changes(config, corpus):
    messages = []
    _, (first,) = prepare(config, messages.append)
    _, (again,) = prepare(config, messages.append)
    assert len(messages) == 1 and again.directory == first.directory
    os.utime(corpus / "a" / "1.txt", (1, 1))
    _, (touched,) = prepare(config, messages.append)
    assert len(messages) == 1 and touched.directory == first.directory
    (corpus / "a" / "1.txt").write_text("other words\n")
    _, (changed,) = prepare(config, messages.append)
    assert len(messages) == 2 and changed.digest != first.digest
    _, (more,) = prepare(replace(config, heldout_fraction=0.4), messages.append)
    assert len(messages) == 3 and len(more.heldout_bytes) > len(changed.heldout_bytes)


def test_a_failure_leaves_no_corpus_behind(config, monkeypatch):
    def fail(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(parts._Writer, "finish", fail)
        with pytest.raises(DiskFullError, match="data.cache_dir"):
            prepare(config)
    assert not list(config.cache_path.glob("tokens-*"))
    assert not [path for path in config.cache_path.glob("parts-*/*") if path.is_dir()]
    prepare(config)


def test_remains_of_a_killed_process_are_cleared(config):
    _, (first,) = prepare(config)
    shutil.rmtree(first.directory)
    stale = config.cache_path / f".{first.directory.name}.{socket.gethostname()}.999999"
    stale.mkdir()
    (stale / "train.bin").write_bytes(b"half")
    prepare(config)
    assert not stale.exists() and not list(config.cache_path.glob("parts-*"))


def test_concurrent_preparation_builds_once(config):
    messages: list[str] = []
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(prepare(config, messages.append)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len({r.caches[0].digest for r in results}) == 1
    assert sum(m.startswith("tokenising") for m in messages) == 1


def test_trained_tokenizer_is_kept(config):
    messages = []
    trained = replace(config, tokenizer="train", vocab_size=330)
    first, _ = prepare(trained, messages.append)
    second, _ = prepare(trained, messages.append)
    assert first.hash == second.hash and first.vocab_size == 330
    assert sum(m.startswith("training a tokenizer") for m in messages) == 1
    other, _ = prepare(replace(trained, vocab_size=320))
    assert other.vocab_size == 320


def test_whatever_is_kept_beside_the_tokens_is_made_again_if_it_is_damaged(config, tmp_path):
    """A flipped bit as well, which leaves a tokenizer or a list that can be read."""
    trained = replace(config, tokenizer="train", vocab_size=330)
    tokenizer, (cache,) = prepare(trained)
    kept = [*(tmp_path / "cache").glob("*.json"), *(tmp_path / "cache").glob("tokenizer-*/*")]
    kept += (tmp_path / "cache").glob("tokenizer-*/.*.json")
    assert {p.name.partition("-")[0] for p in kept} >= {"files", "split", "tokenizer.model"}
    for path in kept:
        whole = path.read_bytes()
        bits = [(len(whole) * i // 8, 1 << i % 8) for i in range(8)]
        flipped = [whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :] for at, bit in bits]
        for damaged in (*flipped, whole[: len(whole) // 2], bytes(len(whole)), b"", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            again, (other,) = prepare(trained)
            assert again.hash == tokenizer.hash and other.directory == cache.directory
            assert path.name.startswith("files") or path.read_bytes() == whole


def test_skipped_files_are_named_at_every_start(config, corpus):
    (corpus / "image.png").write_bytes(b"\x89PNG\0")
    (corpus / "empty.txt").touch()
    for _ in range(2):  # from the files, and from the cache
        messages: list[str] = []
        _, (tokens,) = prepare(config, messages.append)
        assert messages[-1] == (f"{corpus}: left out 1 binary, 1 empty, named in {tokens.skipped}")
    lines = [json.loads(x) for x in tokens.skipped.read_text().splitlines()]
    assert {line["name"]: line["reason"] for line in lines} == {
        "image.png": "binary",
        "empty.txt": "empty",
    }
    assert tokens.counters["skipped_binary"] == tokens.counters["skipped_empty"] == 1
    assert tokens.counters["records_bad"] == 0


def test_bad_records_within_and_beyond_the_budget(config, tmp_path):
    path = tmp_path / "d.jsonl"
    good = [json.dumps({"text": f"document {i}"}) for i in range(20)]
    path.write_text("\n".join([*good, "{broken", '{"text": 3}']))
    _, (tokens,) = prepare(replace(config, path=str(path), max_bad_records=2))
    assert tokens.counters["records_bad"] == 2
    with pytest.raises(DataError, match=r"more than 1 bad records.*d\.jsonl:21: invalid_json"):
        prepare(replace(config, path=str(path), max_bad_records=1, heldout_fraction=0.1))
    with pytest.raises(DataError, match=r"more than 1 bad records.*named in .*skipped-.*jsonl"):
        prepare(replace(config, path=str(path), max_bad_records=1))  # written under the larger one


@pytest.mark.parametrize("trained", [True, False])
def test_folder_without_text(config, tmp_path, trained):
    folder = tmp_path / "binaries"
    folder.mkdir()
    (folder / "x.bin").write_bytes(b"\0\1")
    changes = {"path": str(folder)} | ({"tokenizer": "train"} if trained else {})
    with pytest.raises(DataError, match=r"holds no text \(x\.bin: binary.*Point data\.path"):
        prepare(replace(config, **changes))


def test_all_held_out(config, tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"text {i}")
    with pytest.raises(DataError, match="every document was held out.*heldout_fraction"):
        prepare(replace(config, path=str(folder), heldout_fraction=0.999999))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "x", "sources": (Source("y"),)}, "path and sources"),
        ({"text_field": "x", "sources": (Source("y"),)}, "text_field belong to path"),
        ({"format": "text", "sources": (Source("y"),)}, "text_field belong to path"),
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"heldout_fraction": 1.0}, "heldout_fraction is 1.0"),
        ({"max_document_bytes": 0}, "max_document_bytes"),
        ({"vocab_size": 100}, "vocab_size is 100"),
        ({"stages": (Stage((1.0, 2.0)),)}, r"stages\[0\].weights has 2 entries for 1 sources"),
        ({"stages": (Stage((-1.0,)),)}, "weights must be >= 0"),
        ({"stages": (Stage((1.0,), until_step=5),)}, "the last has none"),
        (
            {"stages": (Stage((1.0,), 5), Stage((1.0,), 5), Stage((1.0,)))},
            r"stages\[1\].until_step is 5; it must be above 5",
        ),
    ],
)
def test_configuration_that_cannot_work(changes, message):
    with pytest.raises(ConfigError, match=message):
        prepare(DataConfig(**changes))


def test_import_is_cheap():
    heavy = ["jax", "grain", "pyarrow", "sentencepiece", "array_record", "orbax"]
    code = f"import sys, step_jax.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_loaded_tokenizer_is_the_one_used(config, tokenizer):
    used, _ = prepare(config)
    assert isinstance(used, Tokenizer) and used.hash == tokenizer.hash
