"""Runs that go on with another number of hosts: each sample once, as logs of all rows show."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from step_jax.core.command_line import load_config
from step_jax.core.errors import ConfigError
from step_jax.data import ConversationConfig, DataConfig, PreferenceConfig, Source, Stage, prepare
from step_jax.data.dataset import TextDataset
from step_jax.data.preferences import PreferenceDataset, Preferences
from step_jax.launch import ranks
from step_jax.trainers.pretrain import Config

from .conftest import WORDS, text_of

ROOT = Path(__file__).parents[2]
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


# --- Real processes ------------------------------------------------------------------------------

#: Writes down every batch that a loop takes, and ends rank 0 by a signal at a step.
LOGGED = """
import hashlib, json, os, sys
from step_jax.cli.main import main
from step_jax.data.dataset import BatchIterator

path, at, signal = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rank = int(os.environ.get("JAX_PROCESS_ID", 0))
log = open(f"{path}-{rank}.jsonl", "w")
begin, take = BatchIterator.__init__, BatchIterator.__next__

def __init__(self, dataset, *more):
    self.dataset = dataset
    begin(self, dataset, *more)

def __next__(self):
    step, batch = self.step, take(self)
    samples = [column.tolist() for column in self.dataset.samples(step)]
    rows = [hashlib.sha256(row.tobytes()).hexdigest() for row in batch["targets"]]
    print(json.dumps([step, samples, rows]), file=log, flush=True)
    if step == at and rank == 0:
        os.kill(os.getpid(), signal)
    return batch

BatchIterator.__init__, BatchIterator.__next__ = __init__, __next__
sys.exit(main(sys.argv[4:]))
"""
RECIPE = """
run: {{directory: {folder}/run, checkpoint: {{every_steps: 3}}, logging: {{sinks: []}}}}
model:
  width: 16
  layers:
    - repeat: 1
      blocks:
        - attention: {{kind: mfa, heads: 2, head_dim: 8}}
          mlp: {{kind: swiglu, hidden: 32}}
training: {{steps: 40, batch_size: 6}}
data:
  sources: [{{path: {folder}/one, weight: 2}}, {{path: {folder}/two, weight: 1}}]
  stages:
    - {{weights: [2, 1], until_step: 9}}
    - {{weights: [0, 1], until_step: 13}}
    - {{weights: [1, 1]}}
  packing: fit
  tokenizer: {tokenizer}
  sequence_length: 64
  cache_dir: {folder}/cache
optimizer: {{kind: adamw, learning_rate: 1e-2, schedule: {{kind: constant}}}}
parallel: {{fsdp: 1, data: -1}}
evaluation: {{every_steps: 0}}
sample: {{tokens: 0}}
"""


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_run_of_two_then_one_then_three_processes_takes_every_sample_once(
    tokenizer_path, tmp_path
):
    for name, base, count in (("one", 0, 40), ("two", 1000, 25)):
        (tmp_path / name).mkdir()
        for i in range(base, base + count):
            (tmp_path / name / f"{i}.txt").write_text(text_of(i, 1 + i % 9))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path, tokenizer=tokenizer_path))
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    # stopped as a cluster asks for it; killed, so that it goes on from a checkpoint; to the end
    starts = ((2, 11, signal.SIGTERM, 42), (1, 22, signal.SIGKILL, 137), (3, -1, 0, 0))
    taken: dict[int, list] = {}
    begins = []
    for k, (count, at, number, code) in enumerate(starts):
        words = [sys.executable, "-c", LOGGED, str(tmp_path / f"log{k}"), str(at), str(number)]
        words += ["pretrain", str(recipe)]
        with ranks.Signals() as signals:
            assert ranks.run(words, count, signals, environment).code == code
        logs = [(tmp_path / f"log{k}-{i}.jsonl").read_text().splitlines() for i in range(count)]
        of_step = [[json.loads(line) for line in lines] for lines in zip(*logs, strict=True)]
        for hosts in of_step:
            (step,) = {host[0] for host in hosts}
            rows = [row for host in hosts for row in host[2]]
            spans = sorted(tuple(span) for host in hosts for span in zip(*host[1], strict=True))
            if step in taken:  # after a kill: again, and the same
                assert taken[step] == [spans, rows]
            taken[step] = [spans, rows]
        begins.append(of_step[0][0][0])
    assert sorted(taken) == list(range(40)) and begins[0] == 0
    assert 11 <= begins[1] < begins[2] < 22  # all agree to stop some steps after one is told
    config = load_config(Config, [str(recipe)]).config.data
    alone = TextDataset.build(config, batch_size=ROWS)
    log = [taken[step][0] for step in range(40)]
    lost, repeated, whole = lost_and_repeated(log, alone)
    assert (lost, repeated) == (0, 0) and whole >= 2
    for step in range(40):
        rows = [hashlib.sha256(row.tobytes()).hexdigest() for row in alone.batch(step)["targets"]]
        assert sorted(taken[step][1]) == sorted(rows)
        assert log[step] == sorted(zip(*alone.samples(step), strict=True))
