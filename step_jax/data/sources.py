"""Readers: from files to documents, naming everything that is left out."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from step_jax.core.errors import DataError
from step_jax.core.text import printable
from step_jax.data.files import Skip, SourceFile

_SNIFF_BYTES = 8192


class Document(NamedTuple):
    """One document: ``name`` is its relative file name, with ``:record`` inside record files."""

    name: str
    text: str
    truncated_bytes: int = 0


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

        stream = pa.OSFile(os.fsencode(path))
        return io.BufferedReader(pa.input_stream(stream, compression="zstd"))
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
        f"{printable(str(file.path))}: cannot be read as {file.format}: {detail}. The file is "
        "damaged or not of this format: restore or remove it, or set the format of the source"
    )


def _read_parquet(file: SourceFile, text_field: str) -> Iterator[Document | Skip]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.OSFile(os.fsencode(file.path)))  # a name may not be UTF-8
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
        with pa.memory_map(os.fsencode(file.path)) as stream:
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

    if printable(str(file.path)) != str(file.path):
        raise DataError(
            f"{printable(str(file.path))}: the reader of ArrayRecord files takes only file names "
            "that are UTF-8: rename the file"
        )
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
