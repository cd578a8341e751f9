"""Runs of records inside a file: how a large one is cut, without reading what stands in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from step_jax.data.files import SourceFile

COMPRESSED = (".zst", ".gz")
_CHUNK = 2**20


class Span(NamedTuple):
    """The records ``first`` up to ``stop`` of a file; ``at``: of lines, the byte of the first."""

    first: int = 0
    stop: int = sys.maxsize
    at: int = 0


WHOLE = Span()


def cut(file: SourceFile, most: int) -> list[Span]:
    """Spans of about ``most`` bytes that make up the file; all depend on its bytes alone.

    It stays whole where no record can be found without reading those before it (text, compressed
    lines), and where it is damaged: who reads it says how.
    """
    if file.stamp.size <= most or file.format not in _BORDERS:
        return [WHOLE]
    try:
        begins = _BORDERS[file.format](file.path, file.stamp.size, most)
    except Exception:  # noqa: BLE001 - the readers' libraries raise types of their own
        return [WHOLE]
    stops = [first for first, _ in begins[1:]] + [sys.maxsize]
    return [Span(first, stop, at) for (first, at), stop in zip(begins, stops, strict=True)]


# Each gives (record, byte) where spans begin, the first of all (0, 0).


def _of_lines(path: Path, size: int, most: int) -> list[tuple[int, int]]:
    begins, line, at = [(0, 0)], 0, 0
    if path.name.lower().endswith(COMPRESSED):
        return begins
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            while (end := chunk.find(b"\n", max(0, begins[-1][1] + most - at))) >= 0:
                begins.append((line + chunk.count(b"\n", 0, end + 1), at + end + 1))
            line, at = line + chunk.count(b"\n"), at + len(chunk)
    return begins[:-1] if begins[-1][1] == size else begins


def _of_parquet(path: Path, size: int, most: int) -> list[tuple[int, int]]:
    """Between row groups, which are read as a whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(pa.OSFile(os.fsencode(path))) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    share = size / max(1, sum(width for _, width in sizes))  # of the file, of what is uncompressed
    begins, row, filled = [(0, 0)], 0, 0.0
    for rows, width in sizes:
        if filled and filled + width * share > most:
            begins.append((row, 0))
            filled = 0.0
        row, filled = row + rows, filled + width * share
    return begins


def _of_arrow(path: Path, size: int, most: int) -> list[tuple[int, int]]:
    import pyarrow as pa

    with pa.memory_map(os.fsencode(path)) as stream:
        if stream.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(stream)
            count = sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
        else:
            stream.seek(0)
            count = sum(batch.num_rows for batch in pa.ipc.open_stream(stream))
    return _evenly(count, size, most)


def _of_array_record(path: Path, size: int, most: int) -> list[tuple[int, int]]:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    try:
        return _evenly(reader.num_records(), size, most)
    finally:
        reader.close()


def _evenly(count: int, size: int, most: int) -> list[tuple[int, int]]:
    spans = max(1, min(count, -(-size // most)))
    return [(count * i // spans, 0) for i in range(spans)]


_BORDERS: dict[str, Callable[[Path, int, int], list[tuple[int, int]]]] = {
    "jsonl": _of_lines,
    "parquet": _of_parquet,
    "arrow": _of_arrow,
    "arrayrecord": _of_array_record,
}
