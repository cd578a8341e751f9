"""What a text's style is in numbers: a classifier of words, divergence of words, repetition."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """Words and marks in lower case; verse and prose alike."""
    return re.findall(r"[a-z']+|[;:.,!?]", text.lower())


def _grams(text: str) -> list[tuple[str, ...]]:
    found = words(text)
    return [(a,) for a in found] + list(zip(found, found[1:], strict=False))


class Classifier:
    """Naive Bayes on words and pairs of words: ``log p(style) - log p(plain)`` of a text, by word.

    The average and not the sum: long texts of a kind are no more of it than short ones.
    """

    def __init__(self, style: Sequence[str], plain: Sequence[str]):
        counts = [Counter(g for text in texts for g in _grams(text)) for texts in (style, plain)]
        kept = {g for g, n in (counts[0] + counts[1]).items() if n > 2}
        totals = [sum(n for g, n in c.items() if g in kept) + len(kept) / 2 for c in counts]
        self.odds = {
            g: math.log((counts[0][g] + 0.5) / totals[0])
            - math.log((counts[1][g] + 0.5) / totals[1])
            for g in kept
        }

    def score(self, text: str) -> float:
        grams = _grams(text)
        return sum(self.odds.get(g, 0.0) for g in grams) / max(len(words(text)), 1)


def repetition(text: str) -> float:
    """Share of a text's pairs of words that it has already had."""
    found = words(text)
    pairs = list(zip(found, found[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def divergence(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """Jensen-Shannon divergence of two texts' words, in bits: 0 for alike ones, 1 for disjoint.

    Equally many words of both are counted, since it grows where there are few.
    """
    samples = [[w for text in texts for w in words(text)] for texts in (ours, theirs)]
    n = min(map(len, samples))
    p, q = (Counter(sample[:n]) for sample in samples)
    total = 0.0
    for word in p | q:
        a, b = p[word] / n, q[word] / n
        m = (a + b) / 2
        total += sum(x / 2 * math.log2(x / m) for x in (a, b) if x)
    return total
