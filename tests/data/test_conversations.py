"""Conversations as data: what is learned of them, what is refused, how they lie in rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from step_jax.core.errors import ConfigError, DataError
from step_jax.data import ConversationConfig, Heldout, Source, TextDataset, prepare
from step_jax.tokenizers.chat import encode_request
from step_jax.tokenizers.files import chat_tokenizer, load_tokenizer
from tests.data.conftest import WORDS


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def talk(i: int) -> dict:
    """Conversations of one to three turns, all different."""
    words = [WORDS[(i * 5 + j) % len(WORDS)] for j in range(8)]
    messages = [{"role": "system", "content": "be brief"}] if i % 4 == 0 else []
    for turn in range(1 + i % 3):
        thought = {"reasoning_content": f"{words[turn]} it is"} if i % 2 else {}
        messages += [user(f"{words[turn]} {i}?"), assistant(" ".join(words[turn:5]), **thought)]
    return {"messages": messages, "id": i}


def write(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return path
    table = pa.Table.from_pylist(records)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=7)
    else:
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table, max_chunksize=5)
    return path


@pytest.fixture(scope="module")
def config(tokenizer_path, tmp_path_factory) -> ConversationConfig:
    root = tmp_path_factory.mktemp("conversations")
    return ConversationConfig(
        path=str(write(root / "chats" / "a.jsonl", [talk(i) for i in range(60)]).parent),
        tokenizer=tokenizer_path,
        sequence_length=256,
        heldout_fraction=0.1,
        cache_dir=str(root / "cache"),
    )


def replace(config, **changes):
    return ConversationConfig(**{**config.__dict__, **changes})


@pytest.fixture(scope="module")
def dataset(config) -> TextDataset:
    return TextDataset.build(config, batch_size=4)


def segments(batch):
    """(inputs, targets, weights, positions) of every conversation of a batch."""
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            inside = batch["segments"][row] == segment
            names = ("tokens", "targets", "weights", "positions")
            yield tuple(batch[name][row][inside] for name in names)


def epoch(dataset, start=0):
    """The conversations of one epoch of a single source, last batch included."""
    steps = -(-dataset.rows_per_epoch // dataset.batch_size)
    return [one for step in range(start, start + steps) for one in segments(dataset.batch(step))]


def test_what_the_assistant_said_is_learned_and_nothing_else(dataset):
    tokenizer, seen = dataset.tokenizer, {}
    for inputs, targets, weights, positions in epoch(dataset):
        ids = np.append(inputs[:1], targets)
        np.testing.assert_array_equal(inputs, ids[:-1])
        np.testing.assert_array_equal(positions, np.arange(len(inputs)))
        seen[tokenizer.decode(ids)] = tokenizer.decode(targets[weights == 1]), ids, weights
    template, texts = tokenizer.chat_template, []
    for i in range(60):
        messages = talk(i)["messages"]
        text = template.render(messages).replace("</s>", "").removesuffix("\n\n")
        found = next((v for t, v in seen.items() if t.startswith(text)), None)
        if found is None:
            continue  # held out
        said, ids, weights = found
        answers = [m for m in messages if m["role"] == "assistant"]
        thoughts = [m.get("reasoning_content") for m in answers]
        assert said == "".join(
            (f" <think>{thought}</think>" if thought else "") + f" {m['content']}"
            for m, thought in zip(answers, thoughts, strict=True)
        )
        assert (ids[1:][weights == 1] == tokenizer.eos_id).sum() == len(answers)
        # before every answer the model has seen what generation is given
        for k in (k for k, m in enumerate(messages) if m["role"] == "assistant"):
            asked = encode_request(tokenizer, messages[:k])
            np.testing.assert_array_equal(ids[: len(asked)], asked)
            assert weights[len(asked) - 1] == 1 and weights[len(asked) - 2] == 0
        texts.append(text)
    assert len(texts) == len(seen) >= 50


def test_every_answer_token_is_learned_once_an_epoch_for_every_number_of_processes(config):
    whole = TextDataset.build(config, batch_size=4, seed=3)
    parts = [
        TextDataset.build(config, batch_size=4, seed=3, process_index=i, process_count=2)
        for i in range(2)
    ]
    steps = -(-whole.rows_per_epoch // 4)
    for step in (0, steps - 1):
        halves = [part.batch(step) for part in parts]
        for name, array in whole.batch(step).items():
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), array)
    counters = whole.counters()
    assert whole.tokens_learned == counters["tokens_learned"] < whole.tokens_per_epoch
    assert counters["tokens_dropped"] == counters["cuts_per_epoch"] == 0
    rows = np.concatenate([whole.batch(step)["weights"] for step in range(steps)])
    assert rows[: whole.rows_per_epoch].sum() == counters["tokens_learned"]
    # the same order from its step alone
    again = TextDataset.build(config, batch_size=4, seed=3)
    np.testing.assert_array_equal(again.batch(7)["targets"], whole.batch(7)["targets"])
    other = TextDataset.build(config, batch_size=4, seed=4)
    assert np.any(other.batch(0)["targets"] != whole.batch(0)["targets"])


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_tables_give_what_lines_give(config, dataset, tmp_path, name):
    """Also where a table writes null for a key that a message lacks."""
    path = write(tmp_path / name, [talk(i) for i in range(60)])
    _, (cache,) = prepare(replace(config, path=str(path)))
    (lines,) = dataset._caches
    for mine, theirs in ((cache.train, lines.train), (cache.heldout, lines.heldout)):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_prompt_and_its_completion_are_one_turn(config, tmp_path):
    pairs = [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(9)]
    turns = [{"messages": [user(f"{i}?"), assistant(f"{i}!")]} for i in range(9)]
    paths = [write(tmp_path / f"{n}.jsonl", r) for n, r in (("a", pairs), ("b", turns))]
    (a,), (b,) = (prepare(replace(config, path=str(path))).caches for path in paths)
    assert a.digest == b.digest and a.counters["documents"] + a.counters["heldout_documents"] == 9


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ASK, SAY = user("two?"), assistant("2")


MALFORMED = [
    ({"messages": []}, "has no messages"),
    ({"messages": "hello"}, "is a str; it must be a list"),
    ({"messages": [SAY]}, "message 0: assistant stands at the beginning, where .*user belongs"),
    ({"messages": [ASK, ASK, SAY]}, "message 1: user stands after user, where assistant bel"),
    ({"messages": [ASK, SAY, SAY]}, "message 2: assistant stands after assistant"),
    ({"messages": [ASK, {"role": "system", "content": "x"}, SAY]}, "message 1: system stands"),
    ({"messages": [ASK, {"role": "tool", "content": "x"}]}, "tool stands after user"),
    ({"messages": [ASK, assistant("", tool_calls=[CALL]), ASK, SAY]},
     "message 2: user stands after assistant that calls tools, where tool belongs"),
    ({"messages": [ASK]}, "ends with a message of user, which nobody answers"),
    ({"messages": [ASK, assistant(" \n")]}, "message 1: assistant says nothing"),
    ({"messages": [user(""), SAY]}, "message 0: user says nothing"),
    ({"messages": [ASK, assistant(None)]}, "message 1: content is missing"),
    ({"messages": [ASK, assistant("2", weight=0)]}, "'weight' of assistant is not read: every"),
    ({"messages": [ASK, assistant("2", thinking="x")]}, "write it as reasoning_content"),
    ({"messages": [user("x") | {"reasoning_content": "y"}, SAY]}, "of user is not read"),
    ({"messages": [ASK, SAY | {"reasoning_content": ["y"]}]}, "reasoning_content must be text"),
    ({"messages": [ASK | {"content": [{"type": "text", "text": "x"}]}, SAY]}, "list of parts"),
    ({"messages": [ASK | {"role": "bot"}, SAY]}, "role is 'bot'"),
    ({"messages": [ASK, SAY], "images": ["x"]}, "has 'images', which is not read"),
    ({"messages": [ASK, SAY], "prompt": "x"}, "has messages and prompt or completion"),
    ({"prompt": [ASK], "completion": [SAY]}, "must be text; give lists as messages"),
    ({"messages": [ASK, assistant("2</s>")]}, "message 1 has the control token '</s>' in its"),
    ({"messages": [ASK, assistant("", tool_calls=[
        {"function": {"name": "add", "arguments": {"a": None}}}])]}, "arguments hold null"),
    ({"text": "x"}, "no field 'messages', nor"),
]  # fmt: skip


@pytest.fixture(scope="module")
def malformed(config, tmp_path_factory):
    """What was left out of a file with all of them, by its line."""
    records = [talk(0), *(record for record, _ in MALFORMED), talk(1)]
    path = write(tmp_path_factory.mktemp("malformed") / "d.jsonl", records)
    here = replace(config, path=str(path), heldout_fraction=0.0, max_bad_records=2)
    with pytest.raises(DataError, match=r"more than 2 bad records.*d.jsonl:2: .*has no messages"):
        prepare(here)
    _, (cache,) = prepare(replace(here, max_bad_records=len(MALFORMED)))
    assert cache.counters["documents"] == 2
    return {(skip := json.loads(line))["name"]: skip for line in open(cache.skipped)}


@pytest.mark.parametrize("number", range(len(MALFORMED)), ids=[m for _, m in MALFORMED])
def test_a_malformed_conversation_is_quarantined_by_its_line(malformed, number):
    skip = malformed[f"d.jsonl:{number + 2}"]
    assert skip["bad"] and re.search(MALFORMED[number][1], skip["detail"]), skip


def test_calls_of_tools_are_learned_and_their_answers_are_not(config, tmp_path):
    messages = [ASK, assistant("", tool_calls=[CALL]), {"role": "tool", "content": "four"}, SAY]
    record = {"messages": messages, "tools": [{"type": "function", "function": {"name": "add"}}]}
    path = write(tmp_path / "d.jsonl", [record])
    tokenizer, (cache,) = prepare(replace(config, path=str(path), heldout_fraction=0.0))
    ids, said = np.asarray(cache.train.tokens), np.asarray(cache.train.said, bool)
    assert tokenizer.decode(ids[said]) == (
        ' <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call> 2'
    )
    assert "four" in tokenizer.decode(ids) and "Tools: [" in tokenizer.decode(ids)


def test_one_that_is_too_long_is_refused_skipped_or_cut_and_said(config, tmp_path):
    long = {"messages": [user("hello"), assistant("the quick brown fox " * 30)]}
    asks = {"messages": [user("the quick brown fox " * 60), assistant("no")]}
    short = [{"messages": [user(str(i)), SAY]} for i in range(2)]
    path = write(tmp_path / "d.jsonl", [short[0], long, asks, short[1]])
    here = replace(config, path=str(path), heldout_fraction=0.0, sequence_length=128)
    with pytest.raises(DataError, match="d.jsonl:2 has .* tokens; a row has 128: raise data.seq"):
        prepare(here)
    messages: list[str] = []
    _, (cache,) = prepare(replace(here, too_long="skip"), messages.append)
    assert cache.counters["documents"] == cache.counters["skipped_too_long"] == 2
    assert "left out 2 too long" in messages[-1] and not cache.counters["records_bad"]
    tokenizer, (cache,) = prepare(replace(here, too_long="truncate"), messages.append)
    # of the long question nothing would be left to learn
    assert cache.counters["documents"] == 3 and cache.counters["skipped_too_long"] == 1
    cut = cache.counters["tokens_truncated"]
    assert f"cut at data.sequence_length ({cut:,} tokens less)" in messages[-1] and cut > 50
    assert max(np.diff(cache.train.offsets)) == 129
    # one that just fits is whole
    _, (exact,) = prepare(replace(here, sequence_length=128 + cut + 400))
    assert exact.counters["documents"] == 4


def test_what_is_held_out_is_scored_on_its_answers_and_kept_with_them(config, dataset, tmp_path):
    heldout = dataset.heldout
    assert heldout.documents > 1
    total = sum(batch["weights"].sum() for batch in heldout.batches(4, 256))
    assert total == heldout.tokens < sum(len(c.tokens) for c in heldout.corpora)
    trained = {dataset.tokenizer.decode(targets) for _, targets, *_ in epoch(dataset)}
    for batch in heldout.batches(4, 256):
        assert not trained & {dataset.tokenizer.decode(t) for _, t, *_ in segments(batch)}
    text = bytes(np.concatenate(heldout.raws)).decode()
    assert len(text.encode()) == heldout.bytes and "User:" not in text and "it is" in text
    heldout.save(tmp_path / "kept")
    loaded = Heldout.load(tmp_path / "kept", dataset.tokenizer)
    for a, b in zip(loaded.batches(4, 256), heldout.batches(4, 256), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    some = loaded.subset(1)
    assert some.documents == 1 and 0 < some.tokens < loaded.tokens
    assert sum(batch["weights"].sum() for batch in some.batches(4, 256)) == some.tokens


def test_copies_of_a_conversation_stay_on_one_side_whatever_lies_beside_them(config, tmp_path):
    records = [talk(i) | {"id": i + n * 100} for n in range(2) for i in range(40)]
    path = write(tmp_path / "d.jsonl", records)
    _, (cache,) = prepare(replace(config, path=str(path)))
    assert cache.counters["heldout_documents"] % 2 == cache.counters["documents"] % 2 == 0
    sides = [
        {s.tokens[a:b].tobytes() for a, b in zip(s.offsets, s.offsets[1:], strict=False)}
        for s in (cache.train, cache.heldout)
    ]
    assert not sides[0] & sides[1]


def test_one_conversation_alone_is_trained_on_whole(config, tmp_path):
    path = write(tmp_path / "d.jsonl", [talk(0)])
    _, (cache,) = prepare(replace(config, path=str(path), heldout_fraction=0.001))
    assert (cache.counters["documents"], cache.counters["heldout_documents"]) == (1, 0)


def test_another_template_makes_other_tokens(config, tmp_path):
    _, (plain,) = prepare(config)
    own = tmp_path / "mine.jinja"
    own.write_text(
        "{% for m in messages %}{{ m.role }} {{ m.reasoning_content or '' }} {{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    tokenizer, (mine,) = prepare(replace(config, chat_template=str(own)))
    assert mine.digest != plain.digest and mine.directory != plain.directory
    assert tokenizer.chat_template.source == own.read_text()
    with pytest.raises(DataError, match="none.jinja cannot be read .*data.chat_template"):
        prepare(replace(config, chat_template="none.jinja"))
    own.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match="a bad record|bad records.*none of the stop tokens"):
        prepare(replace(config, chat_template=str(own), max_bad_records=2))


def test_a_tokenizer_is_trained_on_what_is_said(config, tmp_path):
    tokenizer, _ = prepare(replace(config, tokenizer="train", vocab_size=310))
    assert tokenizer.vocab_size == 310 and tokenizer.chat_template is not None
    assert len(tokenizer.encode('"role": "assistant"')) > 12  # no piece of the JSON around it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": "split"}, "packed whole and apart"),
        ({"isolate": False}, "packed whole and apart"),
        ({"text_field": "content"}, "leave text_field out"),
        ({"path": None, "sources": (Source("x", format="text"),)}, "and format: text"),
    ],
)
def test_what_conversations_cannot_be_is_refused(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        prepare(replace(config, **changes))


def test_files_that_are_no_records_are_left_out_by_name(config, tmp_path):
    write(tmp_path / "chats" / "a.jsonl", [talk(i) for i in range(3)])
    (tmp_path / "chats" / "README.md").write_text("three conversations")
    _, (cache,) = prepare(replace(config, path=str(tmp_path / "chats")))
    assert cache.counters["skipped_not_records"] == 1


def test_a_template_is_kept_with_the_tokenizer_and_ends_what_it_writes(tokenizer, tmp_path):
    golden = load_tokenizer(Path(__file__).parents[1] / "golden/chat_tokenizer")
    bare = type(golden)({"tokenizer.json": golden.files["tokenizer.json"],
                         "generation_config.json": b'{"eos_token_id": 0}'}, "bare")  # fmt: skip
    assert bare.stop_ids == (0,)
    made = chat_tokenizer(bare, "chatml")
    assert made.stop_ids == (0, 2) and made.eos_id == 0 and made.hash == bare.hash
    made.save(tmp_path / "kept")
    kept = load_tokenizer(tmp_path / "kept")
    messages = [user("a"), assistant("b")]
    assert kept.chat_template.render(messages) == made.chat_template.render(messages)
    assert chat_tokenizer(kept, "auto") is kept
    plain = chat_tokenizer(bare, "auto")  # its end token is named nowhere but by its id
    assert plain.chat_template.render(messages).endswith("b<|endoftext|>\n\n")
    assert chat_tokenizer(golden, "auto") is golden
