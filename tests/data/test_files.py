"""Which files a source has, what is in them, and what is left out of it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from step_jax.core.errors import ConfigError, DataError
from step_jax.data import DataConfig, Source, files, parts, prepare
from step_jax.data.files import list_files
from step_jax.runs.metrics_log import MetricsLog
from step_jax.runs.run_directory import RunDirectory

from .conftest import text_of


@pytest.fixture
def config(corpus, tokenizer_path, tmp_path) -> DataConfig:
    return DataConfig(path=str(corpus), tokenizer=tokenizer_path, cache_dir=str(tmp_path / "cache"))


def names_and_skips(path, **options):
    found, skips = list_files(Source(str(path), **options))
    return [file.name for file in found], {skip.name: skip.reason for skip in skips}


def trained_text(config) -> str:
    tokenizer, caches = prepare(config)
    return "".join(tokenizer.decode(c.train.tokens) for c in caches)


# --- Contents ------------------------------------------------------------------------------------


def test_sources_with_files_of_equal_name_size_and_time_have_their_own_tokens(config, tmp_path):
    roots = []
    for letter in "ab":
        root = tmp_path / letter
        root.mkdir()
        for i in range(4):
            (root / f"{i}.txt").write_text(f"{letter} in file {i}\n")
            os.utime(root / f"{i}.txt", (1, 1))
        roots.append(root)
    sources = tuple(Source(str(root)) for root in roots)
    config = dataclasses.replace(config, path=None, sources=sources, heldout_fraction=0.0)
    first, second = prepare(config).caches
    assert first.directory != second.directory and first.digest != second.digest
    assert trained_text(config).count("b in file") == 4


def remember_at_once(monkeypatch):
    monkeypatch.setattr(files, "_SETTLED_NS", -(10**18))


def test_a_file_edited_in_place_with_its_size_and_time_kept_is_read_again(
    config, corpus, monkeypatch
):
    remember_at_once(monkeypatch)
    path = corpus / "a" / "1.txt"
    assert "zzzz" not in trained_text(dataclasses.replace(config, heldout_fraction=0.0))
    stat = path.stat()
    path.write_text("z" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert "zzzz" in trained_text(dataclasses.replace(config, heldout_fraction=0.0))


def test_only_files_that_changed_are_read_to_know_their_contents(config, corpus, monkeypatch):
    remember_at_once(monkeypatch)
    read = []
    digest = files._digest
    monkeypatch.setattr(files, "_digest", lambda file: read.append(file.name) or digest(file))
    prepare(config)
    assert len(read) == 60
    prepare(config)
    assert len(read) == 60
    (corpus / "a" / "1.txt").write_text("other words")
    prepare(config)
    assert read[60:] == ["a/1.txt"]


def test_a_file_that_may_change_within_a_tick_of_the_clock_is_read_again(config, monkeypatch):
    read = []
    digest = files._digest
    monkeypatch.setattr(files, "_digest", lambda file: read.append(file.name) or digest(file))
    prepare(config)
    prepare(config)
    assert len(read) == 120


@pytest.mark.parametrize("content", [b"", b"[", b"[[1]]", b'{"a": 1}'])
def test_a_damaged_memory_of_contents_is_made_again(config, content):
    first = prepare(config).caches[0]
    for path in config.cache_path.glob("*.json"):
        path.write_bytes(content)
    assert prepare(config).caches[0].directory == first.directory


def test_a_file_that_changes_while_it_is_read_is_an_error(config, corpus, monkeypatch):
    real = parts.read_file

    def read(file, *options):
        yield from real(file, *options)
        if file.name == "a/1.txt":
            file.path.write_text("more words than before " * 9)

    monkeypatch.setattr(parts, "read_file", read)
    with pytest.raises(DataError, match=r"a/1\.txt was changed while it was read"):
        prepare(dataclasses.replace(config, heldout_fraction=0.0))
    assert not list(config.cache_path.glob("tokens-*"))


# --- Links ---------------------------------------------------------------------------------------


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for path in (root / "real" / "a.txt", outside / "deep" / "b.txt"):
        path.parent.mkdir(parents=True)
        path.write_text("text")
    (root / "elsewhere").symlink_to(outside)
    (root / "again").symlink_to(root / "real")  # sorts before the folder itself
    (root / "real" / "circle").symlink_to(root)
    (outside / "back").symlink_to(outside / "deep")
    names, skips = names_and_skips(root)
    assert names == ["elsewhere/deep/b.txt", "real/a.txt"]
    assert skips == dict.fromkeys(["again", "elsewhere/back", "real/circle"], "linked_again")


def test_a_link_to_itself_and_a_folder_without_permission_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "closed").mkdir()
    (tmp_path / "self").symlink_to(tmp_path / "self")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):  # the tests may run as root, who may read anything
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert names_and_skips(tmp_path) == (["a.txt"], {"closed": "unreadable", "self": "unreadable"})


# --- What is no text -----------------------------------------------------------------------------


def save_to_disk(folder, rows: int, shards: int = 1):
    """The layout of ``datasets.Dataset.save_to_disk``."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for name in [*names, "cache-1234.arrow"]:
        table = pa.table({"text": [f"{name} row {i}" for i in range(rows)]})
        with pa.OSFile(str(folder / name), "wb") as out, pa.ipc.new_stream(out, table.schema) as s:
            s.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text('{"description": "", "features": {}}')


@pytest.mark.parametrize("format", ["auto", "arrow"])
def test_a_saved_hugging_face_data_set_gives_its_rows_and_nothing_else(tmp_path, format):
    root = tmp_path / "saved"
    for split in ("train", "test"):
        save_to_disk(root / split, rows=3, shards=2)
    (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (root / "state.json").write_text('{"this": "is a document of somebody"}')
    (root / "dataset_info.json").write_text("so is this")
    names, skips = names_and_skips(root, format=format)
    shards = [f"{s}/data-0000{i}-of-00002.arrow" for s in ("test", "train") for i in (0, 1)]
    assert names == ["dataset_info.json", "state.json", *shards][:2] + shards
    assert skips == dict.fromkeys(
        ["dataset_dict.json"]
        + [
            f"{split}/{name}"
            for split in ("test", "train")
            for name in ("dataset_info.json", "state.json", "cache-1234.arrow")
        ],
        "metadata",
    )


def test_a_saved_data_set_that_lacks_a_file_is_an_error(tmp_path):
    save_to_disk(tmp_path / "saved", rows=3, shards=2)
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"names data-00001-of-00002\.arrow, which is not there"):
        list_files(Source(str(tmp_path / "saved")))


def test_runs_and_caches_inside_the_corpus_are_left_out_by_name(config, corpus):
    config = dataclasses.replace(config, cache_dir=str(corpus / "cache"))
    before = prepare(config).caches[0]
    with RunDirectory(corpus / "runs" / "mine") as run:
        assert names_and_skips(corpus)[1]["runs/mine"] == "run_directory"  # just begun
        MetricsLog(run.metrics).append("note", 0, {"text": "some words"})
        run.write_config("data: {}\n")
    (corpus / "runs" / "mine" / "lock").unlink()  # as in a copy
    names, skips = names_and_skips(corpus)
    assert len(names) == 60
    assert skips == {"cache": "token_cache", "runs/mine": "run_directory"}
    messages: list[str] = []
    after = prepare(config, messages.append).caches[0]
    assert after.directory == before.directory
    assert "left out 1 run directory, 1 token cache, named in" in messages[-1]
    (corpus / "cache" / files.CACHE_TAG).unlink()  # a cache of before it had a tag
    assert f"cache/{after.directory.name}" in names_and_skips(corpus)[1]


def test_a_corpus_with_a_file_called_lock_is_no_run(tmp_path):
    (tmp_path / "poems").mkdir()
    for name in ("lock", "key.txt"):
        (tmp_path / "poems" / name).write_text("text")
    assert names_and_skips(tmp_path) == (["poems/key.txt", "poems/lock"], {})


def test_a_run_directory_is_no_corpus(tmp_path):
    for name in ("lock", "metrics.jsonl", "text.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=r"is a run directory \(it has lock, metrics.jsonl\)"):
        list_files(Source(str(tmp_path)))


# --- Names ---------------------------------------------------------------------------------------


def test_file_names_that_are_not_utf8_are_read_and_named(config, tmp_path):
    root = os.fsencode(tmp_path / "odd")
    os.mkdir(root)
    os.mkdir(root + b"/\xfe")
    contents = {b"/\xfe/caf\xe9.txt": text_of(1, 9).encode(), b"/\xff.txt": text_of(2, 9).encode()}
    contents |= {b"/\xfd.txt": b"caf\xe9", b"/b\xff.jsonl": b'{"text": "a line"}\nbroken'}
    for name, content in contents.items():
        with open(root + name, "wb") as stream:
            stream.write(content)
    table = pa.table({"text": ["a row"]})
    for name, write in (("p.parquet", pq.write_table), ("a.arrow", write_arrow), ("z", write_zst)):
        write(table, str(tmp_path / name))
        ending = b".jsonl.zst" if name == "z" else os.fsencode(name[1:])
        shutil.move(tmp_path / name, os.fsdecode(root + b"/\xff" + ending))
    messages: list[str] = []
    for tokenizer, size in ((config.tokenizer, 4096), ("train", 300)):
        odd = dataclasses.replace(
            config, path=str(tmp_path / "odd"), tokenizer=tokenizer, vocab_size=size
        )
        tokens = prepare(odd, messages.append).caches[0]
        assert tokens.counters["documents"] + tokens.counters["heldout_documents"] == 6
    "\n".join(messages).encode()  # they can be printed
    skips = [json.loads(line) for line in tokens.skipped.read_text().splitlines()]
    assert [(s["name"], s["reason"]) for s in skips] == [
        ("b\\xff.jsonl:2", "invalid_json"),
        ("\\xfd.txt", "invalid_utf8"),
    ]


def write_arrow(table, path):
    with pa.OSFile(path, "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)


def write_zst(table, path):
    with pa.output_stream(path, compression="zstd") as out:
        out.write(b'{"text": "a packed line"}\n')


def test_an_array_record_file_with_an_odd_name_must_be_renamed(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.arrayrecord", "wb") as stream:
        stream.write(b"anything")
    with pytest.raises(DataError, match=r"\\xff\.arrayrecord: .* rename the file"):
        prepare(DataConfig(path=str(tmp_path), cache_dir=str(tmp_path / "cache")))


def test_a_path_that_no_file_can_keep_is_refused(config):
    with pytest.raises(ConfigError, match=r"'texts\\\\xff' is not UTF-8"):
        prepare(dataclasses.replace(config, path="texts\udcff"))
