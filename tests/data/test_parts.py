"""Parts of a corpus: cut alike, made by anybody, damaged and made again: always the same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from step_jax.core.errors import DataError
from step_jax.data import ConversationConfig, DataConfig, cache, corpus, files, making, prepare
from step_jax.data.config import Source
from step_jax.data.files import list_files
from step_jax.data.parts import FILES, Work, cut_parts
from step_jax.data.sources import read_file
from step_jax.data.spans import WHOLE, cut
from step_jax.data.texts import Texts

from .conftest import text_of


def replace(config, **changes) -> DataConfig:
    return dataclasses.replace(config, **changes)


@pytest.fixture
def config(corpus, tokenizer_path, tmp_path) -> DataConfig:
    return DataConfig(
        path=str(corpus), tokenizer=tokenizer_path, heldout_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(cache, "PART_BYTES", 1500)


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The parts that this process makes."""
    indices, make = [], Work.make

    def counted(self, part, folder):
        indices.append(part.index)
        make(self, part, folder)

    monkeypatch.setattr(Work, "make", counted)
    return indices


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name[0] != "."}


# --- Cutting -------------------------------------------------------------------------------------


def write(path: Path, texts: list[str]) -> None:
    table = pa.table({"text": texts})
    if path.suffix == ".jsonl":
        lines = [json.dumps({"text": text}) for text in texts]
        path.write_text("\n\n".join(lines[:7]) + "\n" + "\n".join(lines[7:]))
    elif path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=4)
    elif path.name == "stream.arrow":
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table, max_chunksize=5)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, table.schema) as stream:
            stream.write_table(table, max_chunksize=5)
    else:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(path), "group_size:3")
        for text in texts:
            writer.write(text.encode())
        writer.close()


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.parquet", "stream.arrow", "file.arrow", "a.arrayrecord"]
)
@pytest.mark.parametrize("most", [1, 700, 2500])
def test_spans_of_a_file_are_its_records_each_once_and_by_the_same_names(name, most, tmp_path):
    write(tmp_path / name, [text_of(i, 1 + i % 5) for i in range(23)])
    ((file,), _) = list_files(Source(str(tmp_path / name)))
    spans = cut(file, most)
    assert len(spans) >= {1: 6, 700: 3, 2500: 1}[most]
    read = [item for span in spans for item in read_file(file, Texts(), 10**6, span)]
    assert read == list(read_file(file, Texts(), 10**6)) and len(read) == 23


def test_what_cannot_be_entered_in_the_middle_stays_whole(tmp_path):
    (tmp_path / "book.txt").write_text(text_of(0, 50))
    (tmp_path / "a.jsonl.gz").write_bytes(os.urandom(3000))
    (tmp_path / "b.parquet").write_bytes(os.urandom(3000))  # damaged: the reader says so
    found, _ = list_files(Source(str(tmp_path)))
    assert [cut(file, 100) for file in found] == [[WHOLE]] * 3


def test_a_source_is_cut_into_parts_of_about_a_size_or_into_the_most_there_may_be(corpus):
    found, _ = list_files(Source(str(corpus)))
    parts = cut_parts(found, 1500, 100)
    assert [file for part in parts for file, _ in part.sections] == found
    assert all(part.size <= 1500 for part in parts) and len(parts) > 10
    assert len({part.name for part in parts}) == len(parts)
    assert len(cut_parts(found, 1500, 3)) <= 4


# --- The same bytes, whoever makes them ----------------------------------------------------------


def test_a_corpus_is_the_same_bytes_however_it_is_cut_and_whoever_makes_it(
    config, tmp_path, monkeypatch, made
):
    (whole,) = prepare(config).caches
    assert made == [0]
    content = bytes_of(whole.directory)
    monkeypatch.setattr(cache, "PART_BYTES", 1500)
    alone = prepare(replace(config, cache_dir=str(tmp_path / "alone")), workers=1).caches[0]
    parts = len(made) - 1
    said: list[str] = []
    monkeypatch.setattr(making, "_LINE_S", 0.0)
    monkeypatch.setattr(making, "_LINE_SHARE", 0.0)
    together = prepare(
        replace(config, cache_dir=str(tmp_path / "together")), said.append, workers=2
    ).caches[0]
    assert parts > 10 and len(made) == 1 + parts  # two other processes made them all
    assert bytes_of(together.directory) == bytes_of(alone.directory)
    for name in FILES:
        assert (alone.directory / name).read_bytes() == content[name]
    assert alone.digest == whole.digest and alone.counters == whole.counters
    lines = [line for line in said if "tokens/s" in line]
    assert len(lines) == parts - 1 and f"{parts - 1} of {parts} parts, " in lines[-1]
    assert lines[-1].endswith(" s left")


def test_conversations_of_one_file_are_the_same_bytes_however_it_is_cut(
    tokenizer_path, tmp_path, monkeypatch, made
):
    lines = [json.dumps({"prompt": f"{i}?", "completion": text_of(i, 1)}) for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    found = []
    for name, size in (("whole", 10**6), ("cut", 900)):
        monkeypatch.setattr(cache, "PART_BYTES", size)
        config = ConversationConfig(
            path=str(tmp_path / "chats.jsonl"), tokenizer=tokenizer_path, heldout_fraction=0.1,
            cache_dir=str(tmp_path / name),
        )  # fmt: skip
        found += prepare(config, workers=1).caches
    whole, parts = found
    assert len(made) > 4 and parts.digest == whole.digest and parts.counters == whole.counters
    for name in FILES:
        assert (parts.directory / name).read_bytes() == (whole.directory / name).read_bytes()
    state, bounds = hashlib.sha256(), whole.train.offsets
    for first, stop in itertools.pairwise(bounds):
        state.update(whole.train.tokens[first:stop].tobytes())
        state.update(whole.train.said[first:stop].tobytes())
    state.update(np.diff(bounds).tobytes())
    assert whole.digest == state.hexdigest()


def test_the_digest_is_that_of_the_tokens_and_of_the_documents_lengths(config, small_parts):
    (made,) = prepare(config).caches
    lengths = np.diff(made.train.offsets)
    assert (
        made.digest == hashlib.sha256(made.train.tokens.tobytes() + lengths.tobytes()).hexdigest()
    )


def test_helpers_that_die_are_replaced_by_the_process_that_started_them(
    config, small_parts, made, monkeypatch
):
    started = making._Helper.__init__

    def dying(self, work, place, threads):
        started(self, work, place, threads)
        os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr(making._Helper, "__init__", dying)
    prepare(config, workers=2)
    assert sorted(made) == list(range(len(made))) and len(made) > 10


def test_an_error_in_a_helper_is_the_error_of_the_preparation(config, corpus, small_parts):
    for i in range(3):
        (corpus / f"records{i}.jsonl").write_text('{"text": "good"}\n' + "{broken\n" * (i + 1))
    with pytest.raises(DataError, match=r"more than 1 bad records.*jsonl:2: invalid_json"):
        prepare(replace(config, max_bad_records=1), workers=2)
    # 1, 2 and 3 of them: no part has more than 5 alone
    with pytest.raises(
        DataError, match=r"more than 5 bad records.*records\d.jsonl:2: invalid_json"
    ):
        prepare(replace(config, max_bad_records=5), workers=1)
    (fine,) = prepare(replace(config, max_bad_records=6), workers=1).caches
    assert fine.counters["records_bad"] == 6


# --- Killed, and gone on with --------------------------------------------------------------------

KILLED = """
import os, pickle, signal, sys
from step_jax.data import cache, prepare
from step_jax.data.parts import Work, _Writer

cache.PART_BYTES, left = 1500, int(sys.argv[1])
finish = _Writer.finish

def dying(self):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(self)

_Writer.finish = dying
prepare(pickle.loads(bytes.fromhex(sys.argv[2])), workers=1)
"""


def test_a_kill_loses_the_part_under_way_and_no_other(config, small_parts, made):
    words = [sys.executable, "-c", KILLED, "6", pickle.dumps(config).hex()]
    assert subprocess.run(words).returncode == -signal.SIGKILL
    assert not list(config.cache_path.glob("tokens-*"))
    said: list[str] = []
    (resumed,) = prepare(config, said.append, workers=1).caches
    parts = len(made) + 6
    assert said[0].endswith(f"(60 files, 6 of {parts} parts are there)")
    (straight,) = prepare(replace(config, cache_dir=str(config.cache_path) + "2"), workers=1).caches
    assert len(made) == 6 + 2 * (parts - 6)
    assert bytes_of(resumed.directory) == bytes_of(straight.directory)


def test_a_part_that_is_damaged_before_all_are_there_is_made_again(
    config, small_parts, made, monkeypatch
):
    join, parts = cache.join, []

    def damaging(folders, directory, about):
        if not parts:
            parts.extend(folders)
            flip(folders[3] / "train.bin", 5)
            (folders[5] / "part.json").unlink()
        join(folders, directory, about)

    monkeypatch.setattr(cache, "join", damaging)
    (mended,) = prepare(config, workers=1).caches
    assert sorted(made)[:9] == [0, 1, 2, 3, 3, 4, 5, 5, 6]
    assert corpus.damaged(mended.directory, anew=True) == set()


# --- Damage to what is finished ------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << at % 8
    path.write_bytes(content)


def touched(path: Path, how: str, rng) -> None:
    content = path.read_bytes()
    if how == "flip":
        flip(path, int(rng.integers(len(content))))
    elif how == "cut":
        path.write_bytes(content[: int(rng.integers(len(content)))])
    elif how == "longer":
        path.write_bytes(content + b"\0")
    else:
        path.unlink()


def test_damage_to_any_file_is_found_before_use_and_only_its_parts_are_made_again(
    config, corpus, monkeypatch, made, tokenizer
):
    (corpus / "image.png").write_bytes(b"\0")  # that something is left out
    monkeypatch.setattr(cache, "PART_BYTES", 5000)
    (first,) = prepare(config, tokenizer=tokenizer, workers=1).caches
    parts, whole = len(made), bytes_of(first.directory)
    rng = np.random.default_rng(0)
    for name in (*FILES, "meta.json"):
        if not whole[name]:
            continue  # of conversations only
        for how in ("flip", "cut", "longer", "gone"):
            made.clear()
            touched(first.directory / name, how, rng)
            said: list[str] = []
            (again,) = prepare(config, said.append, tokenizer, workers=1).caches
            assert bytes_of(again.directory) == whole, (name, how)
            np.testing.assert_array_equal(again.train.tokens, first.train.tokens)
            if name == "meta.json":
                assert len(made) == parts
            elif how in ("flip", "longer"):
                assert len(made) == 1 and "is damaged in 1 of" in said[0]
            else:
                assert made


def test_a_corpus_is_read_again_only_when_a_file_has_changed(config, monkeypatch):
    monkeypatch.setattr(files, "_SETTLED_NS", -(10**18))
    prepare(config)
    read = []
    checksum_of = corpus.checksum_of
    monkeypatch.setattr(
        corpus, "checksum_of", lambda *words: read.append(words) or checksum_of(*words)
    )
    (first,) = prepare(config).caches
    assert not read
    prepare(config, verify=True)
    assert len(read) == len(FILES)
    read.clear()
    times = (first.directory / "train.bin").stat()
    flip(first.directory / "train.bin", 0)
    os.utime(first.directory / "train.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    (again,) = prepare(config).caches
    assert len(read) == 2 * len(FILES) and again.digest == first.digest


# --- Several hosts -------------------------------------------------------------------------------


HOST = """
import os, pathlib, pickle, sys, time
from step_jax.data import cache, making, prepare
from step_jax.data.parts import Work

name, other = sys.argv[1:3]
cache.PART_BYTES, cache.gethostname, making._POLL_S = 1500, lambda: name, 0.01
config, make = pickle.loads(bytes.fromhex(sys.argv[3])), Work.make

def counted(self, part, folder):
    log = config.cache_path / f"made-by-{name}"
    first = not log.exists()
    with open(log, "a") as stream:
        print(part.index, file=stream)
    while first and not log.with_name(f"made-by-{other}").exists():
        time.sleep(0.01)  # both shall be at work at once
    make(self, part, folder)

Work.make = counted
print(prepare(config, workers=1).caches[0].digest)
"""


def test_hosts_with_a_common_cache_share_the_work(config, small_parts, made, tmp_path):
    """Two processes that the locks of one host do not keep apart."""
    words = [sys.executable, "-c", HOST]
    hosts = [
        subprocess.Popen([*words, *names, pickle.dumps(config).hex()], stdout=subprocess.PIPE)
        for names in (("a", "b"), ("b", "a"))
    ]
    digests = {host.communicate(timeout=120)[0].decode().strip() for host in hosts}
    shares = [(config.cache_path / f"made-by-{name}").read_text().split() for name in "ab"]
    (alone,) = prepare(replace(config, cache_dir=str(tmp_path / "alone")), workers=1).caches
    assert digests == {alone.digest} and all(shares)
    assert sorted(map(int, shares[0] + shares[1])) == sorted(made)
    assert not list(config.cache_path.glob("parts-*"))
