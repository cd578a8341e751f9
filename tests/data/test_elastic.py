"""Runs that go on with another number of hosts: each sample once, as logs of all rows show."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest

from step_jax.core.errors import ConfigError
from step_jax.data import ConversationConfig, DataConfig, PreferenceConfig, Source, Stage, prepare
from step_jax.data.dataset import TextDataset
from step_jax.data.preferences import PreferenceDataset, Preferences

from .conftest import WORDS, text_of

ROWS, SEED = 6, 3
WEIGHTS = (Stage((2.0, 1.0), until_step=9), Stage((0.0, 1.0), until_step=13), Stage((1.0, 1.0)))
#: hosts of a run, and the step after which their number changes
PHASES = ((2, 7), (1, 10), (3, 17), (6, 21), (2, 30))


def sentence(i: int) -> str:
    return " ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(2 + i % 5)) + f" {i}"


def chat(i: int) -> dict:
    turns = [{"role": "user", "content": f"{sentence(i)}?"}]
    return {"messages": [*turns, {"role": "assistant", "content": sentence(i + 1)}]}


def pair(i: int) -> dict:
    return {"prompt": f"{i}?", "chosen": sentence(i), "rejected": sentence(i + 2)}


@pytest.fixture(scope="module")
def datasets(tokenizer_path, tmp_path_factory):
    """A function (kind) -> a function (process, processes) -> the dataset of that process."""
    root = tmp_path_factory.mktemp("elastic")

    def corpus(kind: str, name: str, base: int, count: int) -> Source:
        folder = root / f"{kind}-{name}"
        folder.mkdir()
        for i in range(base, base + count):
            if kind in ("chats", "pairs"):
                record = chat(i) if kind == "chats" else pair(i)
                (folder / f"{i}.jsonl").write_text(json.dumps(record))
            else:
                (folder / f"{i}.txt").write_text(text_of(i, 1 + i % 6))
        return Source(str(folder))

    @functools.cache
    def of(kind: str):
        one = {"chats": ConversationConfig, "pairs": PreferenceConfig}.get(kind, DataConfig)
        more = {"packing": kind} if one is DataConfig else {}
        config = one(
            sources=(corpus(kind, "one", 0, 30), corpus(kind, "two", 1000, 20)), stages=WEIGHTS,
            tokenizer=tokenizer_path, sequence_length=64, heldout_fraction=0.1,
            cache_dir=str(root / "cache"), **more,
        )  # fmt: skip
        if one is PreferenceConfig:
            config = dataclasses.replace(config, examples_per_row=3, sequence_length=128)
            records = Preferences(config.sequence_length, config.too_long)
            prepared, cls = prepare(config, records=records), PreferenceDataset
        else:
            prepared, cls = prepare(config), TextDataset

        def at(index: int, count: int) -> TextDataset:
            where = {"process_index": index, "process_count": count}
            return cls(config, prepared, batch_size=ROWS, seed=SEED, **where)

        return at

    return of


def log_of(at, phases) -> list[list[tuple[int, ...]]]:
    """For each step what the rows of its batch are made of, over all hosts of that step."""
    log, saved = [], None
    for hosts, until in phases:
        here = [at(i, hosts) for i in range(hosts)]
        if saved is not None:
            here[0].check(json.loads(saved), len(log))
        for step in range(len(log), until):
            samples = [host.samples(step) for host in here]
            log.append(sorted(zip(*map(np.concatenate, zip(*samples, strict=True)), strict=True)))
        saved = json.dumps(here[0].fingerprint)
    return log


def lost_and_repeated(log, dataset) -> tuple[int, int, int]:
    """(targets lost, repeated, whole epochs looked at); of an epoch under way none can be lost."""
    lost = repeated = whole = 0
    for k, corpus in enumerate(dataset._corpora):
        offsets, given = corpus.documents.offsets, corpus.documents.given
        targets = np.ones(offsets[-1], np.int64)
        if given:
            targets[offsets[:-1]] = 0  # what the others stand after
        epochs = int(dataset.mixture.counts(len(log) * ROWS)[k]) // corpus.rows
        read = np.zeros((epochs + 1, offsets[-1]), np.int64)
        for step in log:
            for _, _, source, epoch, document, start, length in step:
                if source == k:
                    first = offsets[document] + start
                    read[epoch, first : first + length] += 1
        lost += int((targets > read[:epochs]).sum())
        repeated += int((read > targets).sum())
        whole += epochs
    return lost, repeated, whole


@pytest.mark.parametrize("kind", ["split", "fit", "chats", "pairs"])
def test_no_sample_is_lost_or_repeated_when_the_number_of_hosts_changes(datasets, kind):
    at = datasets(kind)
    alone = at(0, 1)
    log = log_of(at, PHASES)
    lost, repeated, whole = lost_and_repeated(log, alone)
    assert (lost, repeated) == (0, 0) and whole >= 4
    assert log == log_of(at, ((1, PHASES[-1][1]),))
    # and it is told when one is: a step is taken twice, and the next is left out
    assert lost_and_repeated([*log[:5], log[4], *log[6:]], alone)[:2] > (0, 0)


@pytest.mark.parametrize("kind", ["split", "fit"])
def test_the_log_says_what_is_in_the_batch(datasets, kind):
    at = datasets(kind)
    for host in (at(0, 1), at(1, 3)):
        for step in (0, 12, 29):
            batch, samples = host.batch(step), host.samples(step)
            for row, offset, k, _, document, start, length in zip(*samples, strict=True):
                documents = host._corpora[k].documents
                first = documents.offsets[document] + start
                assert first + length <= documents.offsets[document + 1]
                np.testing.assert_array_equal(
                    batch["targets"][row - host._low, offset : offset + length],
                    documents.tokens[first : first + length],
                )
            assert samples.length.sum() == batch["weights"].sum()


def test_a_batch_that_hosts_do_not_divide_is_refused_with_what_would_do(datasets):
    with pytest.raises(ConfigError, match="6 does not divide among 4 .* positive multiple of 4"):
        datasets("split")(0, 4)
