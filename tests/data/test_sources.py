import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_jax.core.errors import DataError
from step_jax.data import Source
from step_jax.data.files import Skip, list_files
from step_jax.data.sources import Document, read_file
from step_jax.data.split import Choice, choose, split_documents
from step_jax.data.texts import Texts

TEXTS = ["one\n", "two \u4e16", "", "{not json", "five"]


def read(path, **options):
    files, skips = list_files(Source(path=str(path), **options))
    texts = Texts(options.get("text_field", "text"))
    items = [item for file in files for item in read_file(file, texts, 1000)]
    documents = [item for item in items if isinstance(item, Document)]
    return documents, skips + [item for item in items if isinstance(item, Skip)]


def jsonl(texts, field="text"):
    return "".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)).encode()


def write_array_record(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:2")
    for record in records:
        writer.write(record)
    writer.close()


def write(path: Path, texts, field="text"):
    table = pa.table({"id": list(range(len(texts))), field: texts})
    if path.name.endswith(".jsonl"):
        path.write_bytes(jsonl(texts, field))
    elif path.name.endswith(".jsonl.zst"):
        with pa.output_stream(str(path), compression="zstd") as out:
            out.write(jsonl(texts, field))
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(jsonl(texts, field)))
    elif path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    else:
        write_array_record(path, [t.encode() for t in texts])


RECORD_FILES = ["d.jsonl", "d.jsonl.zst", "d.jsonl.gz", "d.parquet", "d.arrow", "d.arrayrecord"]


@pytest.mark.parametrize("name", RECORD_FILES)
def test_record_files(tmp_path, name):
    write(tmp_path / name, TEXTS)
    documents, skips = read(tmp_path / name)
    assert [d.text for d in documents] == [t for t in TEXTS if t]
    assert [(s.reason, s.bad) for s in skips] == [("empty", False)]
    first = 1 if "jsonl" in name else 0
    assert [d.name for d in documents] == [f"{name}:{first + i}" for i in (0, 1, 3, 4)]


@pytest.mark.parametrize("name", RECORD_FILES[:5])
def test_record_files_with_another_field(tmp_path, name):
    write(tmp_path / name, ["a"], field="content")
    assert read(tmp_path / name, text_field="content")[0][0].text == "a"
    line = ":1" if "jsonl" in name else ""
    with pytest.raises(DataError, match=rf"{name}{line}: no field 'text'.*'content'.*text_field"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", RECORD_FILES[1:])
def test_damaged_record_files_are_named(tmp_path, name):
    write(tmp_path / name, [f"document {i}" for i in range(50)])
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=f"{name}: cannot be read as .*(restore|remove)"):
        read(tmp_path)


def test_array_record_with_json_objects(tmp_path):
    records = [json.dumps({"text": "inside"}).encode(), b'{"other": 1}', b"plain", b"\xff\xfe"]
    write_array_record(tmp_path / "d.arrayrecord", records)
    documents, skips = read(tmp_path)
    assert [d.text for d in documents] == ["inside", '{"other": 1}', "plain"]
    assert [(s.name, s.reason, s.bad) for s in skips] == [("d.arrayrecord:3", "invalid_utf8", True)]


def test_array_record_with_flipped_bits_loses_only_some_records(tmp_path):
    path = tmp_path / "d.arrayrecord"
    write_array_record(path, [bytes(f"record {i} " * 400, "ascii") for i in range(40)])
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    documents, skips = read(tmp_path)
    assert len(documents) + len(skips) == 40
    assert skips and all(s.bad and s.reason == "corrupt" for s in skips)
    assert len(skips) <= 4


def test_bad_json_lines_are_quarantined_by_line(tmp_path):
    lines = [
        b'{"text": "good"}',
        b"{broken",
        b"[1]",
        b'{"no": 1}',
        b'{"text": 5}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"",
        b'{"text": "also good"}',
    ]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    documents, skips = read(tmp_path)
    assert [d.text for d in documents] == ["good", "also good"]
    assert all(s.bad for s in skips)
    assert [(s.name, s.reason) for s in skips] == [
        ("d.jsonl:2", "invalid_json"),
        ("d.jsonl:3", "invalid_json"),
        ("d.jsonl:4", "missing_field"),
        ("d.jsonl:5", "not_text"),
        ("d.jsonl:6", "invalid_utf8"),
        ("d.jsonl:7", "invalid_utf8"),
    ]


def test_text_folder_names_what_it_leaves_out(tmp_path):
    contents = {
        "b.txt": b"text",
        "a/x.py": b"code",
        "image.png": b"\x89PNG\0\1",
        "late.txt": b"a" * 20_000 + b"\0",
        "latin1.txt": b"caf\xe9",
        "empty.txt": b"",
        ".hidden/y.txt": b"no",
        "__pycache__/z.txt": b"no",
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    documents, skips = read(tmp_path)
    assert [d.name for d in documents] == ["a/x.py", "b.txt"]
    assert {s.name: s.reason for s in skips} == {
        "image.png": "binary",
        "late.txt": "binary",
        "latin1.txt": "invalid_utf8",
        "empty.txt": "empty",
        "gone.txt": "unreadable",
    }


def test_format_text_reads_any_file_as_text(tmp_path):
    write(tmp_path / "d.jsonl", ["a"])
    documents, _ = read(tmp_path, format="text")
    assert documents[0].text == '{"id": 0, "text": "a"}\n'


def test_long_documents_are_cut_at_a_character(tmp_path):
    (tmp_path / "long.txt").write_text("\u4e16" * 500)
    (document,), _ = read(tmp_path)
    assert document.text == "\u4e16" * 333
    assert document.truncated_bytes == 1500 - 999


def test_path_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match="does not exist.*data.path.*python:stdlib"):
        read(tmp_path / "nothing")


def test_folder_without_files(tmp_path):
    with pytest.raises(DataError, match="holds no text"):
        read(tmp_path)


def test_standard_library_is_code_without_tests():
    files, _ = list_files(Source(path="python:stdlib"))
    names = [f.name for f in files]
    assert len(names) > 300 and "json/decoder.py" in names
    assert all(n.endswith(".py") for n in names)
    assert not any(n.startswith(("test/", "site-packages/", "encodings/")) for n in names)


DOCUMENTS = st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=60, unique=True)


@given(DOCUMENTS, st.randoms(use_true_random=False), st.floats(0.01, 0.5))
def test_heldout_split_does_not_depend_on_the_order(texts, random, fraction):
    def held(order):
        documents = (Document(str(i), text) for i, text in enumerate(order))
        documents = list(documents)
        marked = list(split_documents(documents, fraction, choose(documents, fraction)))
        assert [d.text for d, _ in marked] == order
        return {d.text for d, h in marked if h}

    shuffled = list(texts)
    random.shuffle(shuffled)
    assert held(texts) == held(shuffled)
    assert held(texts)


def test_heldout_fraction_is_met():
    documents = [Document(str(i), f"text {i}") for i in range(20_000)]
    assert choose(documents, 0.02) == Choice()  # none is needed beyond the rule
    held = sum(h for _, h in split_documents(documents, 0.02, Choice()))
    assert 330 < held < 470  # 400 expected, standard deviation 20
    assert not any(h for _, h in split_documents(documents, 0.0, choose(documents, 0.0)))


def test_one_document_gives_its_last_lines():
    text = "".join(f"line {i}\n" for i in range(100))
    choice = choose([Document("x", text)], 0.1)
    (train, a), (held, b) = split_documents([Document("x", text)], 0.1, choice)
    assert (a, b) == (False, True)
    assert train.text + held.text == text
    assert train.text.endswith("\n") and 0.05 < len(held.text) / len(text) <= 0.1
