import itertools
import json

import numpy as np
import pytest

from step_jax.core.errors import ConfigError, DataError
from step_jax.data import DataConfig, Source, Stage, TextDataset

from .conftest import text_of


@pytest.fixture(scope="module")
def config(tokenizer_path, tmp_path_factory) -> DataConfig:
    root = tmp_path_factory.mktemp("data")
    for name, base, count in [("one", 0, 50), ("two", 1000, 30)]:
        (root / name).mkdir()
        for i in range(count):
            (root / name / f"{i}.txt").write_text(text_of(base + i, 2 + i % 9))
    return DataConfig(
        sources=(Source(str(root / "one"), 3.0), Source(str(root / "two"), 1.0)),
        tokenizer=tokenizer_path,
        sequence_length=64,
        heldout_fraction=0.1,
        cache_dir=str(root / "cache"),
    )


@pytest.fixture(scope="module")
def single(config) -> DataConfig:
    return replace(config, sources=(), path=config.sources[0].path)


def replace(config, **changes):
    return DataConfig(**{**config.__dict__, **changes})


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


def test_batch_layout(config):
    batch = TextDataset.build(config, batch_size=8).batch(0)
    for name in ("tokens", "targets", "segments", "positions"):
        assert batch[name].shape == (8, 64) and batch[name].dtype == np.int32
    assert batch["weights"].shape == (8, 64) and batch["weights"].dtype == np.float32


@pytest.mark.parametrize("packing", ["split", "fit"])
@pytest.mark.parametrize("processes", [2, 4])
def test_global_batch_is_the_same_for_every_number_of_processes(config, packing, processes):
    config = replace(config, packing=packing)
    whole = TextDataset.build(config, batch_size=8, seed=3)
    parts = [
        TextDataset.build(config, batch_size=8, seed=3, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    for step in (0, 7, 123):
        slices = [part.batch(step) for part in parts]
        assert len(slices[0]["tokens"]) == 8 // processes
        joined = {n: np.concatenate([s[n] for s in slices]) for n in slices[0]}
        assert_equal(joined, whole.batch(step))


@pytest.mark.parametrize("packing", ["split", "fit"])
def test_each_epoch_has_every_token_once_and_another_order(single, packing):
    dataset = TextDataset.build(replace(single, packing=packing), batch_size=1, seed=5)
    rows = dataset.rows_per_epoch
    corpus = np.sort(dataset._caches[0].train.tokens)
    orders = []
    for epoch in range(2):
        batches = [dataset.batch(epoch * rows + i) for i in range(rows)]
        targets = np.concatenate([b["targets"][b["weights"] == 1] for b in batches])
        np.testing.assert_array_equal(np.sort(targets), corpus)
        orders.append(targets)
    assert (orders[0] != orders[1]).any()
    assert dataset.tokens_per_epoch == len(corpus)


def test_batches_span_the_epoch_border(single):
    one = TextDataset.build(single, batch_size=1, seed=5)
    eight = TextDataset.build(single, batch_size=8, seed=5)
    assert one.rows_per_epoch % 8
    for step in range(2 * one.rows_per_epoch // 8 + 1):
        rows = [one.batch(step * 8 + i) for i in range(8)]
        joined = {n: np.concatenate([r[n] for r in rows]) for n in rows[0]}
        assert_equal(eight.batch(step), joined)


def test_restore_goes_on_and_seeds_differ(config):
    dataset = TextDataset.build(config, batch_size=4, seed=1)
    running = dataset.iterate()
    first = [next(running) for _ in range(12)]
    assert running.step == 12
    running.close()
    fresh = TextDataset.build(config, batch_size=4, seed=1).iterate(start_step=5)
    for step in range(5, 12):
        assert fresh.step == step
        assert_equal(next(fresh), first[step])
    assert fresh.wait_seconds >= 0
    fresh.close()
    other = TextDataset.build(config, batch_size=4, seed=2).batch(0)
    assert (other["tokens"] != first[0]["tokens"]).any()


def test_any_step_can_be_read_in_any_order(single):
    dataset = TextDataset.build(single, batch_size=4)
    steps = [0, 10**9, 3, 10**6, 0, 500]
    kept = {step: dataset.batch(step) for step in steps}
    for step in reversed(steps):
        assert_equal(dataset.batch(step), kept[step])


def owners(dataset, step):
    """Which source each row of a batch comes from, by its tokens."""
    result = []
    batch = dataset.batch(step)
    streams = [c.train.tokens.astype(np.int32).tobytes() for c in dataset._caches]
    for targets, segments in zip(batch["targets"], batch["segments"], strict=True):
        run = targets[segments == np.bincount(segments[segments > 0]).argmax()].tobytes()
        result.append([run in stream for stream in streams].index(True))
    return result


def test_mixture_follows_weights_and_stages(config):
    stages = (Stage((3.0, 1.0), until_step=10), Stage((0.0, 1.0), until_step=15), Stage((1.0, 1.0)))
    dataset = TextDataset.build(replace(config, stages=stages), batch_size=4)
    counts = [np.bincount(owners(dataset, s), minlength=2) for s in range(20)]
    assert np.sum(counts[:10], 0).tolist() == [30, 10]
    assert np.sum(counts[10:15], 0).tolist() == [0, 20]
    assert np.sum(counts[15:], 0).tolist() == [10, 10]
    plain = TextDataset.build(config, batch_size=4)
    for step in (0, 9):  # the same until the stages part
        assert_equal(plain.batch(step), dataset.batch(step))
    assert plain.epochs(8) == [24 / plain._corpora[0].rows, 8 / plain._corpora[1].rows]


def test_check_accepts_the_same_data_and_a_changed_future(config):
    dataset = TextDataset.build(config, batch_size=4, seed=1)
    saved = json.loads(json.dumps(dataset.fingerprint))
    dataset.check(saved, step=10)
    parts = TextDataset.build(config, batch_size=4, seed=1, process_index=1, process_count=2)
    parts.check(saved, step=10)
    stages = (Stage((3.0, 1.0), until_step=10), Stage((1.0, 5.0)))
    changed = TextDataset.build(replace(config, stages=stages), batch_size=4, seed=1)
    changed.check(saved, step=10)
    with pytest.raises(DataError, match="weights before this step are not the same"):
        changed.check(saved, step=11)


@pytest.mark.parametrize(
    ("changes", "options", "name"),
    [
        ({"sequence_length": 32}, {}, "sequence_length was 64 and is 32"),
        ({"packing": "fit"}, {}, "packing was split and is fit"),
        ({"isolate": False}, {}, "isolate was True and is False"),
        ({"heldout_fraction": 0.3}, {}, "stages was"),
        ({}, {"seed": 2}, "seed was 1 and is 2"),
        ({}, {"batch_size": 2}, "batch_size was 4 and is 2"),
    ],
)
def test_check_names_what_differs(config, changes, options, name):
    saved = TextDataset.build(config, batch_size=4, seed=1).fingerprint
    options = {"batch_size": 4, "seed": 1} | options
    dataset = TextDataset.build(replace(config, **changes), **options)
    with pytest.raises(DataError, match=f"do not go on where.*step 7 stopped: {name}"):
        dataset.check(saved, step=7)


def test_check_names_both_tokenizers(config):
    saved = TextDataset.build(config, batch_size=4).fingerprint
    dataset = TextDataset.build(replace(config, tokenizer="train", vocab_size=320), batch_size=4)
    hashes = f"(?s){saved['tokenizer'][:16]}.*{dataset.tokenizer.hash[:16]}"
    with pytest.raises(DataError, match=hashes):
        dataset.check(saved, step=1)


def test_counters_account_for_every_token(config):
    for packing in ("split", "fit"):
        dataset = TextDataset.build(replace(config, packing=packing), batch_size=4)
        counters = dataset.counters()
        places = counters["rows_per_epoch"] * 64
        assert counters["tokens"] == places - counters["padding_per_epoch"]
        assert counters["tokens"] == dataset.tokens_per_epoch
        assert counters["tokens_dropped"] == counters["bytes_truncated"] == 0
        assert counters["documents"] + counters["heldout_documents"] == 80


def test_a_source_that_no_weight_draws_from_is_not_read(config, single):
    used = replace(config, sources=(config.sources[0], Source("/nowhere/at/all", 0.0)))
    trained = {"tokenizer": "train", "vocab_size": 320}
    for changes in ({}, trained):
        one = TextDataset.build(replace(single, **changes), batch_size=4)
        two = TextDataset.build(replace(used, **changes), batch_size=4)
        assert two.tokenizer.hash == one.tokenizer.hash
        assert two.counters() == one.counters() and two.heldout.bytes == one.heldout.bytes
        assert two.tokens_per_epoch == one.tokens_per_epoch and len(two.epochs(5)) == 1
        assert_equal(two.batch(3), one.batch(3))
    with pytest.raises(DataError, match="too small"):
        TextDataset.build(used, batch_size=10_000)


def test_a_source_of_weight_zero_that_a_stage_draws_from_is_read(config):
    first, second = (
        replace_source(source, weight)
        for source, weight in zip(config.sources, (1.0, 0.0), strict=True)
    )
    stages = (Stage((1.0, 0.0), until_step=5), Stage((0.0, 1.0)))
    dataset = TextDataset.build(
        replace(config, sources=(first, second), stages=stages), batch_size=4
    )
    assert owners(dataset, 4) == [0] * 4 and owners(dataset, 5) == [1] * 4
    late = replace(config, sources=(first, second), stages=(Stage((0.0, 1.0)),))
    trained = TextDataset.build(replace(late, tokenizer="train", vocab_size=320), batch_size=4)
    assert trained.tokenizer.vocab_size == 320  # of the text that is used, whatever its weight


def replace_source(source, weight):
    return Source(source.path, weight)


def test_a_source_that_is_read_many_times_is_named_with_its_epochs(config):
    dataset = TextDataset.build(config, batch_size=4)
    rows = dataset._corpora[0].rows
    assert dataset.notes(rows // 3 * 4) == []  # 4 epochs: three of four rows are of the first
    first, second = dataset.notes(100 * rows // 3)
    assert first.startswith(f"{config.sources[0].path} is read 1") and "times over" in first
    assert second.startswith(config.sources[1].path)


def test_corpus_smaller_than_a_batch(single):
    with pytest.raises(DataError, match="too small: .* rows of 64.*lower the batch size"):
        TextDataset.build(single, batch_size=10_000)


def test_batch_that_does_not_divide(single):
    with pytest.raises(ConfigError, match="batch size 6 does not divide among 4 processes"):
        TextDataset.build(single, batch_size=6, process_count=4)


@pytest.mark.parametrize("length", [16, 64, 1000])
@pytest.mark.parametrize("processes", [1, 2])
def test_heldout_batches_score_each_token_once(config, length, processes):
    heldout = TextDataset.build(config, batch_size=4).heldout
    streams = [
        list(heldout.batches(4, length, process_index=i, process_count=processes))
        for i in range(processes)
    ]
    assert len({len(s) for s in streams}) == 1
    batches = list(itertools.chain(*streams))
    assert all(b["tokens"].shape == (4 // processes, length) for b in batches)
    targets = np.concatenate([b["targets"][b["weights"] == 1] for b in batches])
    expected = np.concatenate([c.tokens for c in heldout.corpora])
    np.testing.assert_array_equal(np.sort(targets), np.sort(expected))
    assert len(targets) == heldout.tokens


def test_heldout_is_not_trained_on(config):
    dataset = TextDataset.build(config, batch_size=4)
    decode = dataset.tokenizer.decode
    for cache in dataset._caches:
        texts = [
            {decode(split.tokens[a : b - 1]) for a, b in itertools.pairwise(split.offsets)}
            for split in (cache.train, cache.heldout)
        ]
        assert texts[1] and not texts[0] & texts[1]


def test_heldout_subset_has_whole_documents_and_their_bytes(config):
    dataset = TextDataset.build(config, batch_size=4)
    heldout = dataset.heldout
    part = heldout.subset(heldout.tokens // 2)
    assert heldout.tokens // 2 <= part.tokens < heldout.tokens
    assert part.tokens == sum(b["weights"].sum() for b in part.batches(2, 64))
    texts = []
    for corpus in part.corpora:
        for a, b in itertools.pairwise(corpus.offsets):
            assert corpus.tokens[b - 1] == dataset.tokenizer.eos_id
            texts.append(dataset.tokenizer.decode(corpus.tokens[a : b - 1]))
    assert part.documents == len(texts)
    assert part.bytes == sum(len(t.encode()) for t in texts)
    assert b"".join(bytes(raw) for raw in part.raws).decode() == "".join(texts)
    assert heldout.subset(10**9).bytes == heldout.bytes


def test_compression_of_heldout_bytes(config):
    heldout = TextDataset.build(config, batch_size=4).heldout
    sizes = heldout.compressed_bits_per_byte()
    import gzip
    import lzma

    data = b"".join(bytes(raw) for raw in heldout.raws)
    assert len(data) == heldout.bytes
    assert sizes["gzip"] == len(gzip.compress(data, 9)) * 8 / len(data)
    assert sizes["xz"] == len(lzma.compress(data)) * 8 / len(data)


def test_one_file_is_enough(config, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(text_of(3, 400))
    single = replace(config, sources=(), path=str(path))
    dataset = TextDataset.build(single, batch_size=2)
    assert 0.05 < dataset.heldout.bytes / path.stat().st_size <= 0.1


def test_nothing_held_out(single):
    heldout = TextDataset.build(replace(single, heldout_fraction=0.0), batch_size=2).heldout
    for part in (heldout, heldout.subset(100)):
        assert part.documents == part.bytes == part.tokens == 0
        assert list(part.batches(2, 64)) == [] and part.compressed_bits_per_byte() == {}
