"""Readers: from files on disk to documents, naming everything that is left out."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from step_jax.core.errors import DataError
from step_jax.data.config import PYTHON_STDLIB, Source

_EXTENSIONS = {
    ".jsonl": "jsonl",
    ".jsonl.zst": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
}
# Tests are mostly tables and doubtful bytes; encodings are generated character tables.
_STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
)
_SNIFF_BYTES = 8192


class Document(NamedTuple):
    """One document: ``name`` is its relative file name, with ``:record`` inside record files."""

    name: str
    text: str
    truncated_bytes: int = 0


class Skip(NamedTuple):
    """Something that gave no document. ``bad`` ones count against the quarantine budget."""

    name: str
    reason: str
    detail: str = ""
    bad: bool = False


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: its absolute path, its name relative to the source, its format."""

    path: Path
    name: str
    format: str
    size: int
    mtime_ns: int


def list_files(source: Source) -> tuple[list[SourceFile], list[Skip]]:
    """Files of a source in a fixed order (by relative name), and the files left out.

    Raises:
      DataError: the path does not exist, or holds no file.
    """
    stdlib = source.path == PYTHON_STDLIB
    root = Path(sysconfig.get_path("stdlib") if stdlib else source.path).expanduser()
    if not root.exists():
        raise DataError(
            f"data path {source.path!r} does not exist. Give a file or a folder of text "
            f"(data.path), or {PYTHON_STDLIB!r}, which every machine has"
        )
    skips: list[Skip] = []
    files: list[SourceFile] = []
    for path, name in [(root, root.name)] if root.is_file() else _walk(root, stdlib):
        try:
            stat = path.stat()
        except OSError as error:
            skips.append(Skip(name, "unreadable", error.strerror or str(error)))
            continue
        if stat.st_size == 0:
            skips.append(Skip(name, "empty"))
            continue
        kind = _format_of(path) if source.format == "auto" else source.format
        files.append(SourceFile(path, name, kind, stat.st_size, stat.st_mtime_ns))
    if not files:
        raise DataError(
            f"data path {source.path!r} holds no text: {len(skips)} empty or unreadable files "
            "and no other. Point data.path at a folder with text files"
        )
    return files, skips


def _walk(root: Path, stdlib: bool) -> list[tuple[Path, str]]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            d
            for d in folders
            if not (d.startswith(".") or d == "__pycache__" or (stdlib and d in _STDLIB_LEFT_OUT))
        ]
        for name in names:
            if not name.startswith(".") and (not stdlib or name.endswith(".py")):
                path = Path(folder) / name
                found.append((path, path.relative_to(root).as_posix()))
    return sorted(found, key=lambda item: item[1])


def _format_of(path: Path) -> str:
    for extension, kind in _EXTENSIONS.items():
        if path.name.lower().endswith(extension):
            return kind
    return "text"


def read_file(
    file: SourceFile, text_field: str, max_document_bytes: int
) -> Iterator[Document | Skip]:
    """Documents of one file in file order, and what was left out in their place.

    Raises:
      DataError: a record file that is damaged as a whole, or whose first record has no
        text field (that is a wrong setting, not a bad record).
    """
    for item in _READERS[file.format](file, text_field):
        yield _limit(item, max_document_bytes) if isinstance(item, Document) else item


def _limit(document: Document, max_bytes: int) -> Document | Skip:
    if not document.text:
        return Skip(document.name, "empty")
    try:
        size = len(document.text.encode())
    except UnicodeEncodeError:  # a lone surrogate, written as an escape in JSON
        return Skip(document.name, "invalid_utf8", "lone surrogate", bad=True)
    if size <= max_bytes:
        return document
    kept = document.text.encode()[:max_bytes].decode(errors="ignore")
    return Document(document.name, kept, size - len(kept.encode()))


def _read_text(file: SourceFile, text_field: str) -> Iterator[Document | Skip]:
    try:
        with open(file.path, "rb") as stream:
            head = stream.read(_SNIFF_BYTES)
            if b"\0" in head:
                yield Skip(file.name, "binary", "holds NUL bytes")
                return
            data = head + stream.read()
    except OSError as error:
        yield Skip(file.name, "unreadable", error.strerror or str(error))
        return
    if b"\0" in data:
        yield Skip(file.name, "binary", "holds NUL bytes")
        return
    try:
        yield Document(file.name, data.decode())
    except UnicodeDecodeError as error:
        yield Skip(file.name, "invalid_utf8", f"{error.reason} at byte {error.start}")


def _read_jsonl(file: SourceFile, text_field: str) -> Iterator[Document | Skip]:
    number = 0
    try:
        with _open_lines(file.path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _json_record(line, f"{file.name}:{number}", text_field, number == 1)
    except DataError:
        raise
    except Exception as error:  # the decompressors raise types of their own
        raise _damaged(file, f"after line {number}: {error}") from error


def _open_lines(path: Path):
    if path.name.lower().endswith(".zst"):
        # Not the `zstandard` package: it takes a truncated file for a shorter one, silently.
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    return open(path, "rb")


def _json_record(line: bytes, name: str, field: str, first: bool) -> Document | Skip:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return Skip(name, "invalid_utf8", str(error.reason), bad=True)
    except (ValueError, RecursionError) as error:
        return Skip(name, "invalid_json", str(error)[:200], bad=True)
    if not isinstance(record, dict):
        return Skip(name, "invalid_json", "not an object", bad=True)
    if field not in record:
        if first:
            raise DataError(_no_field(name, field, list(record)))
        return Skip(name, "missing_field", f"no field {field!r}", bad=True)
    return _text_value(record[field], name, field)


def _text_value(value: object, name: str, field: str) -> Document | Skip:
    if not isinstance(value, str):
        detail = f"field {field!r} is {type(value).__name__}, not text"
        return Skip(name, "not_text", detail, bad=True)
    return Document(name, value)


def _no_field(name: str, field: str, fields: list[str]) -> str:
    return (
        f"{name}: no field {field!r}; the fields are {fields}. Set data.text_field to the one "
        "that holds the text (or data.format: text, to read the file as plain text)"
    )


def _damaged(file: SourceFile, detail: object) -> DataError:
    return DataError(
        f"{file.path}: cannot be read as {file.format}: {detail}. The file is damaged or not of "
        "this format: restore or remove it, or set the format of the source"
    )


def _read_parquet(file: SourceFile, text_field: str) -> Iterator[Document | Skip]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file.path)
        columns = table.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error
    if text_field not in columns:
        raise DataError(_no_field(file.name, text_field, columns))
    row = 0
    with table:
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            try:
                values = table.read_row_group(group, columns=[text_field])[text_field]
                items = [_text_value(v.as_py(), "", text_field) for v in values]
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                items = [Skip("", "corrupt", f"row group {group}: {error}", bad=True)] * count
            for item in items:
                yield item._replace(name=f"{file.name}:{row}")
                row += 1


def _read_arrow(file: SourceFile, text_field: str) -> Iterator[Document | Skip]:
    """Arrow IPC, stream or file layout: what Hugging Face `Dataset.save_to_disk` writes."""
    import pyarrow as pa

    row = 0
    try:
        with pa.memory_map(str(file.path)) as stream:
            if stream.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(stream)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                stream.seek(0)
                batches = reader = pa.ipc.open_stream(stream)
            if text_field not in reader.schema.names:
                raise DataError(_no_field(file.name, text_field, reader.schema.names))
            for batch in batches:
                for value in batch.column(text_field):
                    yield _text_value(value.as_py(), f"{file.name}:{row}", text_field)
                    row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(file, f"after row {row}: {error}") from error


def _read_array_record(file: SourceFile, text_field: str) -> Iterator[Document | Skip]:
    """Records are UTF-8 text, or JSON objects that have ``text_field``."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(file.path))
        count = reader.num_records()
        if not reader.ok():  # a damaged footer shows as "no records" until the file is closed
            reader.close()
    except Exception as error:  # absl status errors arrive as several types
        raise _damaged(file, error) from error
    for first in range(0, count, 256):
        indices = range(first, min(first + 256, count))
        for index, record in zip(indices, _array_records(reader, indices), strict=True):
            name = f"{file.name}:{index}"
            if isinstance(record, Exception):
                yield Skip(name, "corrupt", str(record)[:200], bad=True)
            else:
                yield _array_record_text(record, name, text_field)
    reader.close()


def _array_records(reader, indices: range) -> list[bytes | Exception]:
    try:
        return reader.read(indices.start, indices.stop)
    except Exception:
        records: list[bytes | Exception] = []
        for index in indices:  # find which of them are damaged
            try:
                records += reader.read([index])
            except Exception as error:
                records.append(error)
        return records


def _array_record_text(record: bytes, name: str, field: str) -> Document | Skip:
    if record[:1] == b"{":
        try:
            fields = json.loads(record)
        except (ValueError, RecursionError):
            fields = {}
        if isinstance(fields, dict) and field in fields:
            return _text_value(fields[field], name, field)
    try:
        return Document(name, record.decode())
    except UnicodeDecodeError as error:
        return Skip(name, "invalid_utf8", f"{error.reason} at byte {error.start}", bad=True)


_READERS: dict[str, Callable[[SourceFile, str], Iterator[Document | Skip]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "arrayrecord": _read_array_record,
}


def content_hash(text: str) -> int:
    """64-bit hash of a document's content: the ground for the held-out split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"heldout").digest()
    return int.from_bytes(digest, "little")


def split_documents(
    documents: Iterator[Document], fraction: float
) -> Iterator[tuple[Document, bool]]:
    """Marks each document as held out (True) or not, by its content alone.

    A document goes to the held-out side when its hash falls in the first ``fraction`` of the
    range, whatever its place or neighbours. If none does, the document with the smallest
    hash is taken; a corpus of one document gives its last lines.
    """
    if fraction == 0:
        yield from ((document, False) for document in documents)
        return
    threshold = int(fraction * 2**64)
    waiting: list[Document] = []
    for document in documents:
        if content_hash(document.text) < threshold:
            yield from ((d, False) for d in waiting)
            yield document, True
            yield from ((d, content_hash(d.text) < threshold) for d in documents)
            return
        waiting.append(document)
    if len(waiting) == 1:
        yield from _split_one(waiting[0], fraction)
    elif waiting:
        chosen = min(range(len(waiting)), key=lambda i: content_hash(waiting[i].text))
        yield from ((d, i == chosen) for i, d in enumerate(waiting))


def _split_one(document: Document, fraction: float) -> Iterator[tuple[Document, bool]]:
    text = document.text
    cut = text.find("\n", int(len(text) * (1 - fraction))) + 1
    if cut in (0, len(text)):  # no line ends there: cut between characters
        cut = max(1, int(len(text) * (1 - fraction)))
    yield document._replace(text=text[:cut]), False
    if text[cut:]:
        yield Document(f"{document.name}#tail", text[cut:]), True
