"""What a run held out stays what it is scored on: written once, checked, never made again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from step_jax.core.errors import DataError
from step_jax.data import DataConfig, Heldout, Source, TextDataset
from step_jax.tokenizers.sentencepiece import train_sentencepiece

from .conftest import text_of


@pytest.fixture
def dataset(corpus, tokenizer_path, tmp_path) -> TextDataset:
    config = DataConfig(
        sources=(Source(str(corpus / "a")), Source(str(corpus / "b"))),
        tokenizer=tokenizer_path,
        sequence_length=32,
        heldout_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )
    return TextDataset.build(config, batch_size=2)


def assert_equal(a: Heldout, b: Heldout):
    assert (a.bos_id, a.pad_id, a.tokenizer) == (b.bos_id, b.pad_id, b.tokenizer)
    assert len(a.corpora) == len(b.corpora)
    for one, other in zip(a._arrays().values(), b._arrays().values(), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_what_was_saved_is_what_is_loaded(dataset, tmp_path):
    folder = tmp_path / "run" / "heldout"
    for part in (dataset.heldout, dataset.heldout.subset(30), dataset.heldout.subset(0)):
        part.save(folder)  # over the one before
        loaded = Heldout.load(folder, dataset.tokenizer)
        assert_equal(loaded, part)
        assert loaded.compressed_bits_per_byte() == part.compressed_bits_per_byte()
        for one, other in zip(loaded.batches(2, 32), part.batches(2, 32), strict=True):
            np.testing.assert_array_equal(one["targets"], other["targets"])
    assert [path.name for path in folder.parent.iterdir()] == ["heldout"]


def test_every_damage_is_named(dataset, tmp_path):
    good, folder = tmp_path / "good", tmp_path / "heldout"
    dataset.heldout.save(good)
    names = sorted(path.name for path in good.iterdir())
    assert len(names) == 9
    for name in names:
        content = (good / name).read_bytes()
        flipped = bytearray(content)
        flipped[len(flipped) // 2] ^= 1
        for damaged in (None, b"", content[:-1], bytes(flipped), content + b" "):
            if damaged == content + b" " and name == "meta.json":
                continue  # a space after JSON is no damage
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(good, folder)
            if damaged is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(damaged)
            with pytest.raises(DataError, match="held-out documents in .* are damaged"):
                Heldout.load(folder, dataset.tokenizer)


def test_a_file_of_another_version_and_another_tokenizer_are_refused(dataset, tmp_path):
    with pytest.raises(DataError, match="there are no held-out documents in .*heldout"):
        Heldout.load(tmp_path / "heldout", dataset.tokenizer)
    dataset.heldout.save(tmp_path / "heldout")
    other = train_sentencepiece([text_of(s, 30) for s in range(20)], vocab_size=330)
    with pytest.raises(DataError, match="tokenizer does not match the held-out documents in"):
        Heldout.load(tmp_path / "heldout", other)


def test_a_save_that_fails_leaves_the_old_documents(dataset, tmp_path, monkeypatch):
    folder = tmp_path / "heldout"
    dataset.heldout.save(folder)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("step_jax.data.heldout.write_synced", fail)
    with pytest.raises(OSError, match="No space left"):
        dataset.heldout.subset(30).save(folder)
    assert_equal(Heldout.load(folder, dataset.tokenizer), dataset.heldout)
    assert not list(tmp_path.glob(".heldout*"))


def test_a_run_goes_on_with_what_it_held_out_when_it_began(dataset, tmp_path):
    folder = tmp_path / "heldout"
    assert dataset.heldout.kept(folder, dataset.tokenizer, write=False) is dataset.heldout
    assert not folder.exists()
    first = dataset.heldout.kept(folder, dataset.tokenizer, write=True)
    later = dataset.heldout.subset(30)  # as if documents were gone
    assert_equal(later.kept(folder, dataset.tokenizer, write=True), first)
    meta = json.loads((folder / "meta.json").read_text())["held_out"]
    assert meta["tokenizer"] == dataset.tokenizer.hash
