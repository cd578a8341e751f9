"""Judged answers as data: how pairs and verdicts lie in rows, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from step_jax.core.errors import ConfigError, DataError
from step_jax.data import PreferenceConfig
from step_jax.data.preferences import PreferenceDataset, preference_schema
from step_jax.data.schema import check
from step_jax.tokenizers.chat import encode_request
from tests.data.conftest import WORDS
from tests.data.test_conversations import assistant, user, write


def pair(i: int) -> dict:
    """Answers of unlike lengths, all different."""
    words = [WORDS[(i * 5 + j) % len(WORDS)] for j in range(8)]
    chosen, rejected = " ".join(words[: 2 + i % 5]), f"no {words[1 + i % 3]}"
    return {"prompt": f"{words[0]} {i}?", "chosen": chosen, "rejected": rejected}


def verdict(i: int) -> dict:
    record = pair(i)
    return {
        "prompt": record["prompt"],
        "completion": record["chosen" if i % 3 else "rejected"],
        "label": bool(i % 3),
    }


@pytest.fixture(scope="module")
def config(tokenizer_path, tmp_path_factory) -> PreferenceConfig:
    root = tmp_path_factory.mktemp("preferences")
    return PreferenceConfig(
        path=str(write(root / "pairs.jsonl", [pair(i) for i in range(40)])),
        tokenizer=tokenizer_path,
        sequence_length=64,
        heldout_fraction=0.1,
        cache_dir=str(root / "cache"),
    )


@pytest.fixture(scope="module")
def dataset(config) -> PreferenceDataset:
    return PreferenceDataset.build(config, batch_size=4)


@pytest.fixture(scope="module")
def verdicts(config, tmp_path_factory) -> PreferenceDataset:
    path = write(tmp_path_factory.mktemp("v") / "v.jsonl", [verdict(i) for i in range(40)])
    here = replace(config, path=str(path), examples_per_row=2)
    return PreferenceDataset.build(here, verdicts=True, batch_size=4)


def examples(batch):
    """For each example ((ids, ids that are said) of its two sides, what else is said of it)."""
    for row, k in zip(*np.nonzero(batch["judged"]), strict=True):
        sides = []
        for side in range(2):
            text = {n: batch[n][row, side] for n in ("tokens", "targets", "weights", "positions")}
            inside = batch["segments"][row, side] == k + 1
            ids, targets, weights, positions = (a[inside] for a in text.values())
            np.testing.assert_array_equal(ids[1:], targets[:-1])
            np.testing.assert_array_equal(positions, np.arange(len(ids)))
            assert weights[-1] == 0  # the last token is there to be read, and predicts nothing
            sides.append((ids, targets[weights == 1]))
        yield sides, {n: batch[n][row, k] for n in ("good", "number") if n in batch}


def epoch(dataset):
    steps = -(-dataset.rows_per_epoch // dataset.batch_size)
    return [one for step in range(steps) for one in examples(dataset.batch(step))]


def test_a_pair_is_two_answers_to_the_same_tokens_each_with_its_end(dataset):
    tokenizer, seen = dataset.tokenizer, set()
    by_prompt = {pair(i)["prompt"]: pair(i) for i in range(40)}
    for (chosen, rejected), _ in epoch(dataset):
        prompt = tokenizer.decode(chosen[0]).split("User: ")[1].split("\n")[0]
        asked = encode_request(tokenizer, [user(prompt)])
        for (ids, said), name in ((chosen, "chosen"), (rejected, "rejected")):
            np.testing.assert_array_equal(ids[: len(asked)], asked)
            np.testing.assert_array_equal(ids[len(asked) :], said)
            assert said[-1] == tokenizer.eos_id
            assert tokenizer.decode(said).strip() == by_prompt[prompt][name]
        seen.add(prompt)
    counters = dataset.counters()
    assert len(seen) == counters["examples"] == 40 - counters["heldout_examples"] >= 30
    assert counters["heldout_examples"] > 0 and "documents" not in counters


def test_packing_and_processes_change_which_row_holds_a_pair_and_nothing_else(config, dataset):
    check(dataset.schema, dataset.batch(0))
    packed = PreferenceDataset.build(replace(config, examples_per_row=3), batch_size=4)
    assert packed.rows_per_epoch < dataset.rows_per_epoch == packed.counters()["examples"]
    assert max(b["judged"].sum(1).max() for b in map(packed.batch, range(3))) == 2  # long ones

    def known(dataset):
        return sorted(
            tuple(tuple(a.tolist()) for side in sides for a in side)
            for sides, _ in epoch(dataset)
        )  # fmt: skip

    alone, together = known(dataset), known(packed)
    assert set(alone) == set(together)
    halves = [
        PreferenceDataset.build(config, batch_size=4, process_index=i, process_count=2)
        for i in range(2)
    ]
    for name, whole in dataset.batch(3).items():
        both = np.concatenate([half.batch(3)[name] for half in halves])
        np.testing.assert_array_equal(both, whole)


@pytest.mark.parametrize("source", [0, 1])
def test_a_sweep_visits_every_example_once_for_every_number_of_processes(config, source):
    here = replace(config, examples_per_row=3)
    whole = PreferenceDataset.build(here, batch_size=4)
    parts = [
        PreferenceDataset.build(here, batch_size=4, process_index=i, process_count=2)
        for i in range(2)
    ]
    visited = []
    for (batch, which_BK), *halves in zip(
        whole.sweep(source), *(part.sweep(source) for part in parts), strict=True
    ):
        visited += which_BK[which_BK >= 0].tolist()
        np.testing.assert_array_equal(which_BK >= 0, batch["judged"] > 0)
        for name, array in batch.items():
            joined = np.concatenate([half[name] for half, _ in halves])
            np.testing.assert_array_equal(joined, array)
        for _, which in halves:
            np.testing.assert_array_equal(which, which_BK)
    assert sorted(visited) == list(range(whole.sources[source].number))


def test_a_reference_stands_beside_its_own_example(dataset):
    dataset.reference = [
        np.stack([np.arange(s.number), -np.arange(s.number)], 1).astype(np.float32)
        for s in dataset.sources
    ]
    try:
        check(dataset.schema, dataset.batch(0))
        for batch, which_BK in dataset.sweep(0):
            here = batch["judged"] > 0
            np.testing.assert_array_equal(batch["reference"][:, 0][here], which_BK[here])
            np.testing.assert_array_equal(batch["reference"][:, 1][here], -which_BK[here])
    finally:
        dataset.reference = None


def test_a_verdict_stands_beside_the_answer_to_another_prompt(verdicts):
    tokenizer, found = verdicts.tokenizer, {}
    for sides, more in epoch(verdicts):
        (ids, said), (other, unrelated) = sides
        prompt = ids[: len(ids) - len(said)]
        np.testing.assert_array_equal(other[: len(prompt)], prompt)
        np.testing.assert_array_equal(other[len(prompt) :], unrelated)
        text = tokenizer.decode(prompt).split("User: ")[1].split("\n")[0]
        found[text] = tokenizer.decode(said).strip(), tokenizer.decode(unrelated), more["good"]
    records = [verdict(i) for i in range(40) if verdict(i)["prompt"] in found]
    assert len(records) == len(found) >= 30
    assert 0 < sum(record["label"] for record in records) < len(records)
    for record, following in zip(records, records[1:] + records[:1], strict=True):
        answer, unrelated, good = found[record["prompt"]]
        assert (answer, bool(good)) == (record["completion"], record["label"])
        assert unrelated.strip() == following["completion"]
    batch = verdicts.batch(0)
    check(preference_schema(4, verdicts.config, verdicts=True, reference=False), batch)
    np.testing.assert_array_equal(batch["number"], np.arange(8).reshape(4, 2))


def prepared(config, path, records, **more):
    here = replace(config, path=str(write(path, records)), heldout_fraction=0.0)
    return PreferenceDataset.build(here, batch_size=1, **more)


def test_texts_messages_and_whole_conversations_say_the_same_in_lines_and_tables(config, tmp_path):
    texts = [pair(i) for i in range(9)]
    messages = [
        {
            "prompt": [user(r["prompt"])],
            "chosen": [assistant(r["chosen"])],
            "rejected": [assistant(r["rejected"])],
        }
        for r in texts
    ]
    whole = [{side: [*r["prompt"], *r[side]] for side in ("chosen", "rejected")} for r in messages]
    beside = [r | {"prompt": t["prompt"]} for r, t in zip(whole, texts, strict=True)]
    digests = {
        prepared(config, tmp_path / name, records).sources[0].digest
        for name, records in (
            ("a.jsonl", texts),
            ("b.jsonl", messages),
            ("c.parquet", whole),
            ("d.parquet", beside),
        )
    }
    assert len(digests) == 1
    nothing_held_out = prepared(config, tmp_path / "a.jsonl", texts)
    assert list(nothing_held_out.sweep(1)) == []


def test_of_a_long_conversation_the_last_answer_alone_is_looked_at(config, tmp_path):
    before = [user("the fox?"), assistant("jumps"), user("and the dog?")]
    record = {"prompt": before, "chosen": "is lazy", "rejected": "runs"}
    ((chosen, rejected), _), = epoch(prepared(config, tmp_path / "a.jsonl", [record]))  # fmt: skip
    decode = prepared(config, tmp_path / "a.jsonl", [record]).tokenizer.decode
    assert decode(chosen[1]).strip() == "is lazy" and decode(rejected[1]).strip() == "runs"
    assert "jumps" in decode(chosen[0])


GOOD = {"prompt": "two?", "chosen": "2", "rejected": "3"}
MALFORMED = [
    ({"prompt": "two?", "chosen": "2", "rejected": "2"}, "chosen and rejected are the same: not"),
    ({"prompt": "two?", "chosen": "2", "rejected": None}, "rejected is missing"),
    ({"prompt": "two?", "chosen": "2", "rejected": " "}, "rejected, message 1: assistant says no"),
    ({"prompt": "", "chosen": "2", "rejected": "3"}, "chosen, message 0: user says nothing"),
    ({"prompt": "two?", "chosen": "2", "rejected": 3}, "rejected is a int; it must be a list"),
    ({"chosen": [assistant("2")], "rejected": [assistant("3")]}, "chosen has no prompt: give one"),
    (
        {"chosen": [user("a?"), assistant("2")], "rejected": [user("b?"), assistant("3")]},
        "answer unlike prompts; they may differ in their last",
    ),
    (
        {"prompt": "a?", "chosen": [user("b?"), assistant("2")], "rejected": "3"},
        "chosen is a conversation that does not begin with the prompt",
    ),
    ({"prompt": "two?", "chosen": [user("2")], "rejected": "3"}, "chosen is a conversation that d"),
    (GOOD | {"chosen": "2</s>"}, "message 1 has the control token '</s>' in its text"),
    (GOOD | {"images": ["x"]}, "has 'images', which is not read"),
    ({"prompt": "two?", "completion": "2"}, "no field 'chosen' and 'rejected'"),
]


def test_a_malformed_pair_is_quarantined_by_its_line(config, tmp_path):
    records = [GOOD, *(record for record, _ in MALFORMED)]
    with pytest.raises(DataError, match=r"more than 2 bad records.*a.jsonl:2: bad_preference"):
        prepared(replace(config, max_bad_records=2), tmp_path / "a.jsonl", records)
    made = prepared(config, tmp_path / "a.jsonl", records)
    assert made.counters()["examples"] == 1
    (left_out,) = made.skipped_paths
    skips = {(skip := json.loads(line))["name"]: skip for line in open(left_out)}
    for number, (_, message) in enumerate(MALFORMED):
        skip = skips[f"a.jsonl:{number + 2}"]
        assert skip["bad"] and re.search(re.escape(message), skip["detail"]), (message, skip)


def test_answers_that_a_template_makes_one_are_no_pair(config, dataset, tmp_path):
    trims = tmp_path / "trims.jinja"
    source = dataset.tokenizer.chat_template.source
    trims.write_text(source.replace("' ' + content if content", "' ' + content | trim if content"))
    here = replace(config, chat_template=str(trims))
    made = prepared(here, tmp_path / "a.jsonl", [GOOD, GOOD | {"rejected": "2 "}])
    (skip,) = map(json.loads, open(made.skipped_paths[0]))
    assert skip["name"] == "a.jsonl:2" and "are the same text once" in skip["detail"]


def test_a_verdict_is_true_or_false_and_nothing_else(config, tmp_path):
    records = [verdict(1), *(verdict(2) | {"label": label} for label in (1, "good", None))]
    made = prepared(config, tmp_path / "v.jsonl", records, verdicts=True)
    skips = [json.loads(line) for line in open(made.skipped_paths[0])]
    assert [skip["name"] for skip in skips] == ["v.jsonl:2", "v.jsonl:3", "v.jsonl:4"]
    assert all("it must be true (good) or false" in skip["detail"] for skip in skips)


def test_a_file_of_another_kind_is_refused_as_a_whole(config, dataset, verdicts):
    with pytest.raises(DataError, match=r"pairs.jsonl:1: no field 'completion' and 'label'"):
        PreferenceDataset.build(config, batch_size=1, verdicts=True)
    with pytest.raises(DataError, match=r"v.jsonl:1: no field 'chosen' and 'rejected'.*A pair has"):
        PreferenceDataset.build(verdicts.config, batch_size=1)


def test_what_has_no_room_is_refused_skipped_or_cut_and_said(config, tmp_path):
    long = GOOD | {"chosen": "the quick brown fox " * 20}
    asks = GOOD | {"prompt": "the quick brown fox " * 20}
    alike = GOOD | {"chosen": "the quick brown fox " * 20, "rejected": "the quick brown fox " * 21}
    path = tmp_path / "a.jsonl"
    with pytest.raises(DataError, match=r"a.jsonl:1 has .* of the prompt; one of the two texts"):
        prepared(config, path, [long, GOOD])
    made = prepared(replace(config, too_long="skip"), path, [long, asks, alike, GOOD])
    counters = made.counters()
    assert (counters["examples"], counters["skipped_too_long"]) == (1, 2)
    assert counters["skipped_no_room"] == 1  # its prompt alone fills the row
    made = prepared(replace(config, too_long="truncate"), path, [long, asks, alike, GOOD])
    counters = made.counters()
    # of the long question nothing would be left, of the like answers nothing to prefer
    assert (counters["examples"], counters["skipped_too_long"]) == (2, 1)
    assert max(len(sides[0][0]) for sides, _ in epoch(made)) == 64


def test_more_examples_than_a_row_has_tokens_are_refused(config):
    with pytest.raises(ConfigError, match="examples_per_row is 65; it must be at least 1, and no"):
        replace(config, examples_per_row=65).validate()
