"""Packing: which token of which document stands at which place of which row.

A plan is computed from document lengths alone. Each document of n tokens (its closing eos
included) gives n pairs (input, target): the targets are its tokens, the inputs are bos and
its tokens but the last. So every token is a target exactly once in an epoch, no target lies
in another document, and documents joined in one stream are still told apart by eos and bos.

Shape suffixes: B rows, T sequence length, P pieces (runs of pairs of one document in a row).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Protocol

import numpy as np

from step_jax.data.schema import Field, Schema

Batch = dict[str, np.ndarray]


class Pieces(NamedTuple):
    """Runs of consecutive pairs. All arrays have shape (P,), int64 but ``first`` (bool)."""

    slot: np.ndarray  # which of the requested rows
    offset: np.ndarray  # place in the row
    start: np.ndarray  # place of the first target in the token file
    length: np.ndarray
    first: np.ndarray  # the run begins its document


class Plan(Protocol):
    """One epoch of one source."""

    rows: int

    def pieces(self, rows_B: np.ndarray) -> Pieces:
        """The pieces of the given rows, ordered by row and place."""


def derive_key(*parts: object) -> int:
    """A 64-bit key from a seed and names; stable over machines and versions."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permutation(n: int, key: int) -> np.ndarray:
    """A permutation of range(n), int64 (n,).

    Sorts hashed indices (splitmix64, Steele et al. 2014) instead of drawing from
    `numpy.random`, whose streams may change between versions and would reorder a resumed run.
    """
    z = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


def make_plan(
    packing: str, offsets: np.ndarray, sequence_length: int, key: int, given: int = 0
) -> Plan:
    """The plan of one epoch; ``key`` fixes the order of documents and rows.

    ``given``: of a plan that fits, tokens that begin each document and are inputs only.
    """
    if packing == "split":
        assert not given
        return SplitPlan(offsets, sequence_length, key)
    return FitPlan(offsets, sequence_length, key, given)


class SplitPlan:
    """Documents in random order as one stream, cut every T pairs. The last row is padded."""

    def __init__(self, offsets: np.ndarray, sequence_length: int, key: int):
        lengths = np.diff(offsets)
        order = permutation(len(lengths), derive_key(key, "documents"))
        self._length = sequence_length
        self._file_starts = np.asarray(offsets[:-1])[order]
        self._ends = np.cumsum(lengths[order])  # in the shuffled stream
        self._starts = self._ends - lengths[order]
        self.total = int(self._ends[-1]) if len(order) else 0
        self.rows = -(-self.total // sequence_length)
        self._row_order = permutation(self.rows, derive_key(key, "rows"))

    def pieces(self, rows_B: np.ndarray) -> Pieces:
        low = self._row_order[rows_B] * self._length
        high = np.minimum(low + self._length, self.total)
        first = np.searchsorted(self._ends, low, side="right")
        last = np.searchsorted(self._ends, high, side="left")
        slot, document = _ranges(first, last - first + 1)
        start = np.maximum(self._starts[document], low[slot])
        end = np.minimum(self._ends[document], high[slot])
        into = start - self._starts[document]
        return Pieces(
            slot, start - low[slot], self._file_starts[document] + into, end - start, into == 0
        )


class FitPlan:
    """Best-fit decreasing: a document is cut only if it is longer than a row.

    A longer document fills whole rows; its rest is packed like a short document. Which of
    the documents of one length share a row changes with the key; the number of rows does not.
    """

    def __init__(self, offsets: np.ndarray, sequence_length: int, key: int, given: int = 0):
        lengths = np.diff(offsets) - given
        order = permutation(len(lengths), derive_key(key, "documents"))
        file_starts, lengths = np.asarray(offsets[:-1])[order] + given, lengths[order]
        full, rest = lengths // sequence_length, lengths % sequence_length
        document, chunk = _ranges(np.zeros_like(full), full)
        rest_of = np.flatnonzero(rest)
        rest_row, rest_offset, bins = best_fit(rest[rest_of], sequence_length)
        self.rows = len(document) + bins
        row = np.concatenate([np.arange(len(document)), len(document) + rest_row])
        offset = np.concatenate([np.zeros_like(document), rest_offset])
        into = np.concatenate([chunk * sequence_length, (lengths - rest)[rest_of]])
        start = file_starts[np.concatenate([document, rest_of])] + into
        length = np.concatenate([np.full_like(document, sequence_length), rest[rest_of]])
        sort = np.lexsort([offset, row])
        self._pieces = Pieces(row, offset, start, length, into == 0)
        self._pieces = Pieces(*(column[sort] for column in self._pieces))
        self._row_starts = np.searchsorted(self._pieces.slot, np.arange(self.rows + 1))
        self._row_order = permutation(self.rows, derive_key(key, "rows"))

    def pieces(self, rows_B: np.ndarray) -> Pieces:
        rows = self._row_order[rows_B]
        first = self._row_starts[rows]
        slot, piece = _ranges(first, self._row_starts[rows + 1] - first)
        return Pieces(slot, *(column[piece] for column in self._pieces[1:]))


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Best-fit-decreasing bin packing.

    Works on all items of one length at a time, so the Python cost grows with the number of
    distinct lengths and not of items; the result is that of the item-by-item algorithm.

    Args:
      lengths: int64 (n,), each in [1, capacity].

    Returns:
      bin of each item (n,), place of each item in its bin (n,), number of bins.
    """
    order = np.argsort(-lengths, kind="stable")
    lengths_sorted = lengths[order]
    bins_of, places = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    open_bins: dict[int, list[np.ndarray]] = {}  # room left -> bins
    rooms = 0  # bit r is set when a bin with room r is open
    bins = 0
    borders = np.flatnonzero(np.diff(lengths_sorted)) + 1
    for items in np.split(order, borders):
        length = int(lengths[items[0]]) if len(items) else 1
        while len(items):
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                candidates = np.concatenate(open_bins.pop(room))
                rooms &= ~(1 << room)
            else:
                room = capacity
                candidates = np.arange(bins, bins - (-len(items) // (capacity // length)))
                bins = int(candidates[-1]) + 1
            each = room // length  # the fullest bin is refilled while it has room
            used = min(len(candidates), -(-len(items) // each))
            placed, items = items[: used * each], items[used * each :]
            rank = np.arange(len(placed))
            bins_of[placed] = candidates[rank // each]
            places[placed] = capacity - room + rank % each * length
            last = len(placed) - (used - 1) * each
            for left, group in [
                (room - each * length, candidates[: used - 1]),
                (room - last * length, candidates[used - 1 : used]),
                (room, candidates[used:]),
            ]:
                if left and len(group):
                    open_bins.setdefault(left, []).append(group)
                    rooms |= 1 << left
    return bins_of, places, bins


def _ranges(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenated ranges: (index of the range, value) for first[i] .. first[i]+count[i]-1."""
    index = np.repeat(np.arange(len(count)), count)
    inner = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)
    return index, first[index] + inner


def text_schema(rows: int, sequence_length: int) -> Schema:
    """What a batch of packed text is, see `TextDataset.batch`."""
    axes, shape = ("batch", "sequence"), (rows, sequence_length)
    names = ("tokens", "targets", "segments", "positions")
    return {name: Field(axes, shape, "int32") for name in names} | {"weights": Field(axes, shape)}


def empty_batch(rows: int, sequence_length: int, pad_id: int) -> Batch:
    """A batch of padding: int32 (B, T) arrays and float32 weights (B, T)."""
    shape = (rows, sequence_length)
    return {
        "tokens": np.full(shape, pad_id, np.int32),
        "targets": np.full(shape, pad_id, np.int32),
        "weights": np.zeros(shape, np.float32),
        "segments": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }


def fill(
    batch_BT: Batch,
    rows_B: np.ndarray,
    pieces: Pieces,
    tokens: np.ndarray,
    *,
    bos_id: int,
    pad_id: int,
    isolate: bool,
    said: np.ndarray | None = None,
) -> None:
    """Writes pieces into the rows ``rows_B`` of a batch made by `empty_batch`.

    ``said``: of conversations, which tokens carry loss; a document's first input is then its own.

    ``isolate``: segments number the documents of a row from 1 and positions start at 0 in
    each; a document that goes on from an earlier row starts at 0 too, for its earlier part
    is not visible. Otherwise the row is one segment and positions run through.
    """
    length = batch_BT["tokens"].shape[1]
    shape = (len(rows_B), length)
    at_P = pieces.slot * length + pieces.offset
    targets_BT = np.full(shape, pad_id, np.int32)
    flat = targets_BT.reshape(-1)
    spans = zip(at_P.tolist(), pieces.start.tolist(), pieces.length.tolist(), strict=True)
    weights_BT = None if said is None else np.zeros(shape, np.float32)
    for at, start, count in spans:  # copying runs is several times faster than one gather
        flat[at : at + count] = tokens[start : start + count]
        if weights_BT is not None and said is not None:
            weights_BT.reshape(-1)[at : at + count] = said[start : start + count]
    used_B = np.bincount(pieces.slot, pieces.length, minlength=len(rows_B))
    column_T = np.arange(length, dtype=np.int32)
    used_BT = column_T < used_B[:, None]  # pieces lie side by side from the row's start
    begins_BT = np.zeros(shape, np.int32)
    begins_BT.reshape(-1)[at_P] = 1 if isolate else pieces.offset == 0
    first_BT = np.maximum.accumulate(begins_BT * column_T, axis=1)
    inputs_BT = np.empty_like(targets_BT)
    inputs_BT[:, 1:] = targets_BT[:, :-1]
    begins_P = pieces.first & (said is None)
    inputs_BT.reshape(-1)[at_P] = np.where(begins_P, bos_id, tokens[pieces.start - 1])
    batch_BT["tokens"][rows_B] = np.where(used_BT, inputs_BT, targets_BT)
    batch_BT["targets"][rows_B] = targets_BT
    batch_BT["weights"][rows_B] = used_BT if weights_BT is None else weights_BT
    batch_BT["segments"][rows_B] = np.cumsum(begins_BT, axis=1, dtype=np.int32) * used_BT
    batch_BT["positions"][rows_B] = (column_T - first_BT) * used_BT
