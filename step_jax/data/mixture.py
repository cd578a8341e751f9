"""Mixtures: which source each row comes from, exactly by weight and without state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

MAX_PERIOD = 2**16


class MixtureStage(NamedTuple):
    """Integer weights of the sources that hold from row ``first`` on."""

    first: int
    weights: tuple[int, ...]


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers in proportion to decimal weights, summing to at most 65,536.

    Weights as people write them (0.7 and 0.3) are met exactly; finer ones are rounded to
    1/65,536 of the whole, and no positive weight is rounded to nothing.
    """
    fractions = [Fraction(repr(float(w))) for w in weights]
    scale = math.lcm(*(f.denominator for f in fractions))
    whole = [int(f * scale) for f in fractions]
    whole = [w // math.gcd(*whole) for w in whole]
    total = sum(whole)
    if total > MAX_PERIOD:
        whole = [max(1, round(w * MAX_PERIOD / total)) if w else 0 for w in whole]
        whole = [w // math.gcd(*whole) for w in whole]
    return tuple(whole)


def period_schedule(weights: Sequence[int]) -> np.ndarray:
    """Source of each row of one period, int64 (sum of weights,).

    Tijdeman's chairman assignment (1980): after any number of rows n, each source has had
    n * weight / sum rows up to an error below 1.
    """
    used = [k for k, weight in enumerate(weights) if weight]
    period = sum(weights)
    if len(used) == 1:
        return np.full(period, used[0], np.int64)
    spread = 2 * len(used) - 2
    given = dict.fromkeys(used, 0)
    schedule = np.empty(period, np.int64)
    for row in range(period):
        # Integers scaled by spread * period; a source may be ahead by less than one row.
        owed = {k: spread * (weights[k] * (row + 1) - period * given[k]) for k in used}
        due = [k for k in used if owed[k] >= period]
        chosen = min(due, key=lambda k: ((spread - 1) * period - owed[k]) / weights[k])
        given[chosen] += 1
        schedule[row] = chosen
    return schedule


class Mixture:
    """Maps a global row to (source, row of that source) in constant time."""

    def __init__(self, stages: Sequence[MixtureStage]):
        """``stages`` start at row 0 and ascend."""
        self.stages = tuple(stages)
        self._firsts = np.array([stage.first for stage in stages], np.int64)
        self._schedules = [period_schedule(stage.weights) for stage in stages]
        count = len(stages[0].weights)
        # before[i, k]: rows of source k among the first i rows of a period.
        self._before = [
            np.pad(np.cumsum(s[:, None] == np.arange(count), axis=0), ((1, 0), (0, 0)))
            for s in self._schedules
        ]
        self._base = np.zeros((len(stages), count), np.int64)
        for i in range(1, len(stages)):
            self._base[i] = self._counts(i - 1, int(self._firsts[i]))

    def _counts(self, stage: int, rows: int) -> np.ndarray:
        before = self._before[stage]
        periods, rest = divmod(rows - int(self._firsts[stage]), len(before) - 1)
        return self._base[stage] + periods * before[-1] + before[rest]

    def counts(self, rows: int) -> np.ndarray:
        """How many of the first ``rows`` rows come from each source, int64 (sources,)."""
        return self._counts(int(np.searchsorted(self._firsts, rows, side="right")) - 1, rows)

    def locate(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source (B,) and row of the source (B,), int64, of global rows."""
        source, local = np.empty_like(rows_B), np.empty_like(rows_B)
        stage_of = np.searchsorted(self._firsts, rows_B, side="right") - 1
        for stage in np.unique(stage_of):
            here = stage_of == stage
            before = self._before[stage]
            periods, rest = np.divmod(rows_B[here] - self._firsts[stage], len(before) - 1)
            chosen = self._schedules[stage][rest]
            source[here] = chosen
            local[here] = (
                self._base[stage][chosen] + periods * before[-1][chosen] + before[rest, chosen]
            )
        return source, local
