"""Readers: from files to documents, naming everything that is left out."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from step_jax.core.errors import DataError
from step_jax.core.text import printable
from step_jax.data.files import Skip, SourceFile
from step_jax.data.spans import COMPRESSED, WHOLE, Span
from step_jax.tokenizers.base import Tokenizer

_SNIFF_BYTES = 8192


class Document(NamedTuple):
    """One document: ``name`` is its relative file name, with ``:record`` inside record files."""

    name: str
    text: str
    truncated_bytes: int = 0


class Encoded(NamedTuple):
    """The tokens of a document, or of a part of it.

    ids: int32 (n,).
    text: UTF-8 bytes that the targets among them stand for.
    said: bool (n,): which of them are targets; None for all of them, after a token before them.
    cut: tokens that were left out at the end.
    """

    ids: np.ndarray
    text: bytes
    said: np.ndarray | None = None
    cut: int = 0


class Readable(Protocol):
    """What the records of a file are.

    fields: that are read of a record, as far as it has them.
    may_be_cut: whether part of a document is a document.
    """

    @property
    def fields(self) -> tuple[str, ...]: ...
    @property
    def may_be_cut(self) -> bool: ...

    def lacking(self, fields: Collection[str]) -> str | None:
        """What records with only these fields lack, and what to do about it; None for nothing."""

    def document(self, record: Mapping[str, Any], name: str) -> Document | Skip:
        """The document of a record that lacks nothing."""

    def file(self, text: str, name: str) -> Document | Skip:
        """The document of a whole text file, or of a record that is only text."""


class Records(Readable, Protocol):
    """Records that become tokens.

    key: JSON of what decides the documents, in the names of caches.
    """

    @property
    def key(self) -> Sequence[Any]: ...

    def words(self, document: Document) -> str:
        """The text of a document that a tokenizer is trained on."""

    def tokens_key(self, tokenizer: Tokenizer) -> list[Any]:
        """JSON of what else decides the tokens, beside the tokenizer's hash."""

    def encode(
        self, documents: Sequence[Document], tokenizer: Tokenizer
    ) -> Sequence[Sequence[Encoded] | Skip]:
        """What becomes of each document."""


def read_file(
    file: SourceFile, records: Readable, max_document_bytes: int, span: Span = WHOLE
) -> Iterator[Document | Skip]:
    """Documents of one file in file order, and what was left out in their place.

    Args:
      span: of the file's records those that are read; see `spans.cut`.

    Raises:
      DataError: a record file that is damaged as a whole, or whose first record has not the
        fields (that is a wrong setting, not a bad record).
    """
    for item in _READERS[file.format](file, records, span):
        if isinstance(item, Document):
            item = _limit(item, max_document_bytes, records.may_be_cut)
        yield item


def _limit(document: Document, max_bytes: int, may_be_cut: bool) -> Document | Skip:
    if not document.text:
        return Skip(document.name, "empty")
    try:
        size = len(document.text.encode())
    except UnicodeEncodeError:  # a lone surrogate, written as an escape in JSON
        return Skip(document.name, "invalid_utf8", "lone surrogate", bad=True)
    if size <= max_bytes:
        return document
    if not may_be_cut:
        return Skip(document.name, "too_long", f"{size:,} bytes", bad=True)
    kept = document.text.encode()[:max_bytes].decode(errors="ignore")
    return Document(document.name, kept, size - len(kept.encode()))


def _read_text(file: SourceFile, records: Readable, span: Span) -> Iterator[Document | Skip]:
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
        yield records.file(data.decode(), file.name)
    except UnicodeDecodeError as error:
        yield Skip(file.name, "invalid_utf8", f"{error.reason} at byte {error.start}")


def _read_jsonl(file: SourceFile, records: Readable, span: Span) -> Iterator[Document | Skip]:
    number = span.first
    try:
        with _open_lines(file.path) as stream:
            if span.at:
                stream.seek(span.at)
            for number, line in enumerate(stream, start=span.first + 1):
                if number > span.stop:
                    break
                if line.strip():
                    yield _json_record(line, f"{file.name}:{number}", records, number == 1)
    except DataError:
        raise
    except Exception as error:  # the decompressors raise types of their own
        raise _damaged(file, f"after line {number}: {error}") from error


def _open_lines(path: Path):
    zst, gz = COMPRESSED
    if path.name.lower().endswith(zst):
        # Not the `zstandard` package: it takes a truncated file for a shorter one, silently.
        import pyarrow as pa

        stream = pa.OSFile(os.fsencode(path))
        return io.BufferedReader(pa.input_stream(stream, compression="zstd"))
    if path.name.lower().endswith(gz):
        return gzip.open(path, "rb")
    return open(path, "rb")


def _json_record(line: bytes, name: str, records: Readable, first: bool) -> Document | Skip:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return Skip(name, "invalid_utf8", str(error.reason), bad=True)
    except (ValueError, RecursionError) as error:
        return Skip(name, "invalid_json", str(error)[:200], bad=True)
    if not isinstance(record, dict):
        return Skip(name, "invalid_json", "not an object", bad=True)
    if lacks := records.lacking(record):
        if first:
            raise DataError(f"{name}: {lacks}")
        return Skip(name, "missing_field", lacks.split(";")[0], bad=True)
    return records.document(record, name)


def _damaged(file: SourceFile, detail: object) -> DataError:
    return DataError(
        f"{printable(str(file.path))}: cannot be read as {file.format}: {detail}. The file is "
        "damaged or not of this format: restore or remove it, or set the format of the source"
    )


def _read_parquet(file: SourceFile, records: Readable, span: Span) -> Iterator[Document | Skip]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.OSFile(os.fsencode(file.path)))  # a name may not be UTF-8
        columns = table.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error
    if lacks := records.lacking(columns):
        raise DataError(f"{file.name}: {lacks}")
    wanted = [field for field in records.fields if field in columns]
    row = 0
    with table:
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if not span.first <= row < span.stop:  # a span is of whole groups
                row += count
                continue
            try:
                found = table.read_row_group(group, columns=wanted).to_pylist()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                found = [Skip("", "corrupt", f"row group {group}: {error}", bad=True)] * count
            for item in found:
                name = f"{file.name}:{row}"
                bad = isinstance(item, Skip)
                yield item._replace(name=name) if bad else records.document(item, name)
                row += 1


def _read_arrow(file: SourceFile, records: Readable, span: Span) -> Iterator[Document | Skip]:
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
            if lacks := records.lacking(reader.schema.names):
                raise DataError(f"{file.name}: {lacks}")
            wanted = [field for field in records.fields if field in reader.schema.names]
            for batch in batches:
                first, stop = (min(max(at - row, 0), batch.num_rows) for at in span[:2])
                for i in range(first, stop):  # one at a time: a batch may be the whole file
                    values = {field: batch.column(field)[i].as_py() for field in wanted}
                    yield records.document(values, f"{file.name}:{row + i}")
                row += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(file, f"after row {row}: {error}") from error


def _read_array_record(
    file: SourceFile, records: Readable, span: Span
) -> Iterator[Document | Skip]:
    """Records are UTF-8 text, or JSON objects with the fields."""
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
    last = min(count, span.stop)
    for first in range(span.first, last, 256):
        indices = range(first, min(first + 256, last))
        for index, record in zip(indices, _array_records(reader, indices), strict=True):
            name = f"{file.name}:{index}"
            if isinstance(record, Exception):
                yield Skip(name, "corrupt", str(record)[:200], bad=True)
            else:
                yield _array_record(record, name, records)
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


def _array_record(record: bytes, name: str, records: Readable) -> Document | Skip:
    if record[:1] == b"{":
        try:
            fields = json.loads(record)
        except (ValueError, RecursionError):
            fields = {}
        if isinstance(fields, dict) and not records.lacking(fields):
            return records.document(fields, name)
    try:
        return records.file(record.decode(), name)
    except UnicodeDecodeError as error:
        return Skip(name, "invalid_utf8", f"{error.reason} at byte {error.start}", bad=True)


_READERS: dict[str, Callable[[SourceFile, Readable, Span], Iterator[Document | Skip]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "arrayrecord": _read_array_record,
}
