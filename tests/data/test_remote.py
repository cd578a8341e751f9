"""Texts in an object store, and what is prepared of them kept there."""

from __future__ import annotations

import os

import numpy as np
import pytest

from step_jax.core.errors import ConfigError, DataError
from step_jax.core.storage import Objects
from step_jax.data.cache import prepare
from step_jax.data.config import DataConfig
from step_jax.data.remote import copy_source, obtain, publish
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
