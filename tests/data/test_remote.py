"""Texts in an object store, and what is prepared of them kept there."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest

from step_jax.core.errors import ConfigError, DataError
from step_jax.core.storage import Objects
from step_jax.data import cache, making
from step_jax.data.cache import prepare
from step_jax.data.config import DataConfig
from step_jax.data.parts import FILES, Work
from step_jax.data.remote import copy_source, obtain, publish
from tests.data.conftest import text_of
from tests.object_stores import store

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards boil some odd juice".split()


@pytest.fixture(scope="module")
def bucket():
    with store("gs") as url:
        yield url


@pytest.fixture
def place(bucket, request) -> Objects:
    return Objects.at(f"{bucket}/{request.node.originalname}")


def test_a_copy_follows_its_objects_and_takes_again_only_what_has_changed(place, tmp_path):
    place.write("a.txt", b"one")
    place.write("deep/b.txt", b"two")
    copy = tmp_path / "copy"
    copy_source(place, copy)
    before = (copy / "deep/b.txt").stat()
    place.write("a.txt", b"three")
    copy_source(place, copy)
    assert (copy / "a.txt").read_bytes() == b"three"
    assert (copy / "deep/b.txt").stat().st_mtime_ns == before.st_mtime_ns
    place.delete(["deep/b.txt"])
    copy_source(place, copy)
    assert not (copy / "deep/b.txt").exists()
    copy_source(place / "a.txt", tmp_path / "other" / "a.txt")  # a single object
    assert (tmp_path / "other" / "a.txt").read_bytes() == b"three"
    with pytest.raises(DataError, match="no object of that name"):
        copy_source(place / "none", tmp_path / "none")


def test_a_prepared_folder_is_there_whole_or_not_at_all(place, tmp_path, monkeypatch):
    made = tmp_path / "made"
    made.mkdir()
    (made / "large.bin").write_bytes(bytes(range(250)))
    (made / "empty.bin").write_bytes(b"")
    monkeypatch.setattr("step_jax.data.remote._PART_BYTES", 100)
    publish(made, place)
    assert len([name for name in place.list() if name.startswith("large.bin/")]) == 3
    assert obtain(place, tmp_path / "got")
    for name in os.listdir(made):
        assert (tmp_path / "got" / name).read_bytes() == (made / name).read_bytes()
    whole, second = place.read("whole.json"), place.read("large.bin/00001")
    for name, damaged in [
        ("large.bin/00001", second[:-1]),
        ("large.bin/00001", bytes(100)),
        ("whole.json", whole.replace(b"large.bin", b"../out")),
        ("whole.json", whole[:-9]),
    ]:
        undamaged = place.read(name)
        place.write(name, damaged)
        assert not obtain(place, tmp_path / "again")
        place.write(name, undamaged)
    place.delete(["whole.json"])  # killed before it was written
    assert not obtain(place, tmp_path / "again")
    assert sorted(os.listdir(tmp_path)) == ["got", "made"]


def test_a_second_machine_copies_tokens_and_tokenizer_instead_of_making_them(
    place, tmp_path, monkeypatch
):
    rng = np.random.default_rng(0)
    for i in range(20):
        (place / "texts").write(f"{i}.txt", " ".join(rng.choice(WORDS, 60)).encode())
    config = DataConfig(
        path=str(place / "texts"), cache_dir=str(place / "cache"), vocab_size=300,
        heldout_fraction=0.2,
    )  # fmt: skip
    digests, said = [], []
    for machine in ("first", "second"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        said.append([])
        prepared = prepare(config, said[-1].append)
        digests.append((prepared.caches[0].digest, prepared.tokenizer.hash))
    assert digests[0] == digests[1]
    made = [sum("tokenising" in s or "training a" in s for s in lines) for lines in said]
    assert made == [2, 0]
    with pytest.raises(ConfigError, match="known are gs:// and s3://"):
        prepare(DataConfig(path="ftp://somewhere/texts"))


def test_machines_share_the_parts_that_a_store_keeps(place, tokenizer_path, tmp_path, monkeypatch):
    for i in range(12):
        (place / "texts").write(f"{i}.txt", text_of(i, 9).encode())
    config = DataConfig(
        path=str(place / "texts"), cache_dir=str(place / "cache"), tokenizer=tokenizer_path,
        heldout_fraction=0.2,
    )  # fmt: skip
    monkeypatch.setattr(cache, "PART_BYTES", 1000)
    made, make = {"first": [], "second": [], "third": []}, Work.make

    def on(machine: str, most: int = 100):
        def counted(self, part, folder):
            if len(made[machine]) == most:
                raise KeyboardInterrupt  # the machine is lost
            made[machine].append(part.index)
            make(self, part, folder)

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        monkeypatch.setattr(making, "gethostname", lambda: machine)
        monkeypatch.setattr(Work, "make", counted)
        said: list[str] = []
        return prepare(config, said.append, workers=1).caches[0], said

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(Objects, "delete", lambda *_: None)  # nor says that it is
        on("first", 2)

    def sleep(seconds):  # until patience is at its end
        monkeypatch.setattr(making, "_PATIENCE_S", -1e6)

    clock = SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr(making, "time", clock)
    monkeypatch.setattr(making, "_PATIENCE_S", 1e6)
    second, said = on("second")
    parts = len(made["first"] + made["second"])
    assert parts > 4 and sorted(made["first"] + made["second"]) == list(range(parts))
    assert "2 of" in said[0] and any("waiting for 1 of" in s for s in said)
    for machine in ("third", "first"):  # with everything there, and with something of its own
        made[machine].clear()
        again, _ = on(machine)
        assert not made[machine] and again.digest == second.digest
    for name in FILES:
        assert (second.directory / name).read_bytes() == (again.directory / name).read_bytes()


def test_a_claim_of_a_part_holds_for_as_long_as_its_host_may_be_at_work(place):
    def claimed(content, size=10**6) -> bool:
        place.write("claim", json.dumps(content).encode())
        return making._claimed(place, size)

    assert making._claimed(place, 10**6)  # nobody has it
    assert making._claimed(place, 10**6)  # this host has, but no process of it is at work
    other = {"host": "another", "since": time.time()}
    assert not claimed(other)
    assert claimed(other | {"since": time.time() - 62})
    assert not claimed(other | {"since": time.time() - 62}, 100 * 2**20)  # takes longer
    for damaged in (other | {"since": "long ago"}, {}, []):
        assert claimed(damaged)
