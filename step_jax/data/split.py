"""The held-out side: chosen by what documents say, for all sources of a run together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from step_jax.data.sources import Document


@dataclass(frozen=True)
class Choice:
    """Contents (see `content_hash`) that a small source adds to those below the threshold.

    held: held out as a whole.
    cut: texts whose last lines are held out.
    """

    held: frozenset[int] = frozenset()
    cut: frozenset[int] = frozenset()

    def __or__(self, other: Choice) -> Choice:
        return Choice(self.held | other.held, self.cut | other.cut)

    def __sub__(self, other: Choice) -> Choice:
        return Choice(self.held - other.held, self.cut - other.cut)

    def to_json(self) -> list[list[int]]:
        return [sorted(self.held), sorted(self.cut)]


def content_hash(text: str) -> int:
    """64-bit hash of a document's content: the ground for the held-out split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"heldout").digest()
    return int.from_bytes(digest, "little")


def choose(documents: Iterable[Document], fraction: float, may_be_cut: bool = True) -> Choice:
    """What one source must add so that it holds out something.

    Nothing if one of its documents hashes below the threshold, as in any but a small source;
    else the content with the smallest hash. A source of one content (however often it occurs)
    gives the last lines of it, or holds out nothing if it may not be cut. Reads no further than it
    has to.
    """
    if fraction == 0:
        return Choice()
    threshold = _threshold(fraction)
    hashes: set[int] = set()
    below = False
    for document in documents:
        value = content_hash(document.text)
        hashes.add(value)
        below |= value < threshold
        if below and len(hashes) > 1:
            return Choice()
    if len(hashes) == 1:
        return Choice(cut=frozenset(hashes)) if may_be_cut else Choice()
    return Choice(held=frozenset([min(hashes)])) if hashes else Choice()


def split_documents(
    documents: Iterable[Document], fraction: float, choice: Choice
) -> Iterator[tuple[Document, bool]]:
    """Marks each document as held out (True) or not, by its content alone.

    A document goes to the held-out side when its hash falls in the first ``fraction`` of the
    range or is among ``choice``, whatever its place or neighbours: equal documents stay together.
    """
    threshold = _threshold(fraction)
    for document in documents:
        value = content_hash(document.text)
        if value in choice.cut:
            yield from _cut(document, fraction)
        else:
            yield document, value < threshold or value in choice.held


def _threshold(fraction: float) -> int:
    return int(fraction * 2**64)


def _cut(document: Document, fraction: float) -> Iterator[tuple[Document, bool]]:
    text = document.text
    cut = text.find("\n", int(len(text) * (1 - fraction))) + 1
    if cut in (0, len(text)):  # no line ends there: cut between characters
        cut = max(1, int(len(text) * (1 - fraction)))
    yield document._replace(text=text[:cut]), False
    if text[cut:]:
        yield Document(f"{document.name}#tail", text[cut:]), True
