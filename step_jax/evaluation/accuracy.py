"""How often sampled answers are right: alone, among k, by vote, or picked by a score.

All of it is about P problems with N samples each. What would have come of k < N samples is the mean
over all choices of k of the N, exactly, not over a few draws of them. Intervals are over problems:
more samples of one problem are no evidence about others.

Shape suffixes: P problems, N samples of each.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from step_jax.core.errors import DataError

_MOST_SAMPLES = 1000  # binomials of more do not fit in a float


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Samples:
    """Judged replies.

    Attributes:
      correct_PN: bool, whether each is right.
      answers_PN: what each votes for; None for a reply without a conclusion, which does not vote.
      tokens_PN: int, tokens of each reply.
      cut_PN: bool, whether it was cut short.
    """

    correct_PN: np.ndarray
    answers_PN: Sequence[Sequence[str | None]]
    tokens_PN: np.ndarray
    cut_PN: np.ndarray

    def __post_init__(self):
        answers = (len(self.answers_PN), len(self.answers_PN[0]) if self.answers_PN else 0)
        shapes = {self.correct_PN.shape, self.tokens_PN.shape, self.cut_PN.shape, answers}
        if len(shapes) > 1 or 0 in answers or len({len(row) for row in self.answers_PN}) > 1:
            raise DataError(f"samples have shapes {shapes}; all must be (problems, samples)")

    @property
    def count(self) -> int:
        return np.shape(self.correct_PN)[1]


def pass_at_k(correct_PN: np.ndarray, k: int) -> np.ndarray:
    """Chance that one of k samples is right, float64 (P,): ``1 - C(n - c, k) / C(n, k)``.

    arXiv 2107.03374, eq. 1. Unbiased, unlike ``1 - (1 - c / n)^k``.
    """
    P, n = np.shape(correct_PN)
    _check_k(k, n)
    wrong_P = n - np.sum(np.asarray(correct_PN) > 0, axis=1)
    i_N = np.arange(n)
    # C(w, k) / C(n, k) = product over i < k of (w - i) / (n - i)
    share_PK = np.maximum(wrong_P[:, None] - i_N[:k], 0) / (n - i_N[:k])
    return 1.0 - np.prod(share_PK, axis=1)


def best_of_k(correct_PN: np.ndarray, scores_PN: np.ndarray, k: int) -> np.ndarray:
    """Chance that the one with the highest score of k samples is right, float64 (P,).

    Of equal scores each is as likely to be taken.
    """
    P, n = np.shape(correct_PN)
    _check_k(k, n)
    result_P = np.zeros(P)
    for p in range(P):
        _, group_N = np.unique(scores_PN[p], return_inverse=True)
        size_G = np.bincount(group_N)
        right_G = np.bincount(group_N, weights=np.asarray(correct_PN[p], float)) / size_G
        upto_G = np.array([math.comb(int(m), k) for m in np.cumsum(size_G)], object)
        first_G = (upto_G - np.append(0, upto_G[:-1])) / math.comb(n, k)
        result_P[p] = float(np.dot(first_G.astype(float), right_G))
    return result_P


def majority_at_k(
    answers_PN: Sequence[Sequence[str | None]], correct_PN: np.ndarray, k: int
) -> np.ndarray:
    """Chance that the answer that most of k samples give is right, float64 (P,).

    Of equally many votes each is as likely to be taken. Samples without an answer are drawn like
    others and do not vote; if none votes, the answer is wrong. An answer that was judged both ways,
    as when a verifier failed once, counts by the share of its samples that are right.
    """
    _check_k(k, np.shape(correct_PN)[1])
    return np.array(
        [_majority(row, right_N, k) for row, right_N in zip(answers_PN, correct_PN, strict=True)]
    )


def _majority(answers: Sequence[str | None], correct_N: np.ndarray, k: int) -> float:
    votes: Counter[str] = Counter()
    right: Counter[str] = Counter()  # an answer that a verifier once failed on is right in part
    for answer, is_right in zip(answers, correct_N, strict=True):
        if answer is not None:
            votes[answer] += 1
            right[answer] += bool(is_right)
    silent, total = len(answers) - votes.total(), math.comb(len(answers), k)
    chance = 0.0
    for answer, count in votes.items():
        if right[answer]:
            others = [c for other, c in votes.items() if other != answer]
            wins = sum(
                math.comb(count, v) / total * _below(others, silent, v, k - v)
                for v in range(1, min(count, k) + 1)
            )
            chance += wins * right[answer] / count
    return chance


def _below(counts: Sequence[int], silent: int, v: int, left: int) -> float:
    """Ways to draw ``left`` others so that v votes win, each over the number of answers that tie.

    The draws of each answer are counted one answer after the other: ``ways[j, t]`` have j draws so
    far, and t answers with v votes.
    """
    ways = np.zeros((left + 1, left // v + 1))
    ways[: silent + 1, 0] = [math.comb(silent, j) for j in range(min(silent, left) + 1)]
    for count in counts:
        new = np.zeros_like(ways)
        for i in range(min(count, v, left) + 1):
            many = float(math.comb(count, i))
            if i < v:
                new[i:] += many * ways[: left + 1 - i]
            else:
                new[i:, 1:] += many * ways[: left + 1 - i, :-1]
        ways = new
    return float(np.sum(ways[left] / np.arange(1, ways.shape[1] + 1)))


def bootstrap(values_P: np.ndarray, draws: int = 10_000, seed: int = 0) -> Interval:
    """The mean over problems and its percentile bootstrap interval (Efron, 1979).

    Problems are drawn with replacement. With few problems, or all alike, it is too narrow: see
    :func:`binomial`.
    """
    values_P = np.asarray(values_P, float)
    if not len(values_P):
        raise DataError("there are no problems to take a mean of")
    rng, P = np.random.default_rng(seed), len(values_P)
    means = np.concatenate(
        [values_P[rng.integers(P, size=(rows, P))].mean(axis=1) for rows in _rows(draws, P)]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values_P.mean()), float(low), float(high))


def _rows(draws: int, width: int) -> list[int]:
    """Numbers of draws that are made at once, so that memory stays small."""
    most = max(1, 2**22 // width)
    return [min(most, draws - i) for i in range(0, draws, most)]


def binomial(right: int, count: int) -> Interval:
    """The share of problems with one answer each that are right, with its exact 95 % interval
    (Clopper and Pearson, 1934), which holds for any count."""
    from scipy.special import betaincinv

    low = betaincinv(right, count - right + 1, 0.025) if right else 0.0
    high = betaincinv(right + 1, count - right, 0.975) if right < count else 1.0
    return Interval(right / count, float(low), float(high))


def measure(samples: Samples, ks: Sequence[int]) -> dict[str, Interval]:
    """``mean@n``, and ``pass@k`` and ``maj@k`` for each k, with bootstrap intervals over problems;
    ``cut``: the share of replies that were cut short; ``tokens``: of a reply."""
    found = {f"mean@{samples.count}": bootstrap(np.mean(samples.correct_PN, axis=1))}
    for k in ks:
        found[f"pass@{k}"] = bootstrap(pass_at_k(samples.correct_PN, k))
        found[f"maj@{k}"] = bootstrap(majority_at_k(samples.answers_PN, samples.correct_PN, k))
    found["cut"] = bootstrap(np.mean(samples.cut_PN, axis=1))
    found["tokens"] = bootstrap(np.mean(samples.tokens_PN, axis=1))
    return found


@dataclass(frozen=True)
class Spent:
    """A point of accuracy against what it cost.

    tokens: mean of all tokens that were written for a problem.
    """

    tokens: float
    accuracy: Interval

    @property
    def drawn(self) -> tuple[float, float, float, float]:
        """As `runs/plots.py: plot_spending` draws it."""
        return (self.tokens, self.accuracy.mean, self.accuracy.low, self.accuracy.high)


def vote_curve(samples: Samples, ks: Sequence[int]) -> list[Spent]:
    """Majority votes of k samples, each at the tokens of k samples."""
    tokens = float(np.mean(samples.tokens_PN))
    return [
        Spent(k * tokens, bootstrap(majority_at_k(samples.answers_PN, samples.correct_PN, k)))
        for k in ks
    ]


@dataclass(frozen=True)
class Control:
    """How well a thinking budget governs (arXiv 2501.19393, section 3.2).

    control: share of replies whose tokens are within their budget.
    scaling: how much accuracy a doubling of tokens adds, the mean slope between all pairs of
      budgets.
    performance: the best accuracy of any budget.
    """

    control: float
    scaling: float
    performance: float


def budget_control(
    points: Sequence[Spent],
    tokens_by_budget: Sequence[np.ndarray],
    bounds: Sequence[tuple[int, int]],
) -> Control:
    """The figures of several budgets.

    Args:
      points: of each budget, accuracy against tokens.
      tokens_by_budget: of each, tokens of every thought.
      bounds: of each, the least and the most that were asked for.
    """
    within = [
        (low <= tokens) & (tokens <= high)
        for tokens, (low, high) in zip(tokens_by_budget, bounds, strict=True)
    ]
    slopes = [
        (b.accuracy.mean - a.accuracy.mean) / math.log2(b.tokens / a.tokens)
        for a, b in itertools.combinations(sorted(points, key=lambda p: p.tokens), 2)
        if b.tokens > a.tokens
    ]
    return Control(
        control=float(np.mean(np.concatenate([np.ravel(w) for w in within]))),
        scaling=float(np.mean(slopes)) if slopes else math.nan,
        performance=max(point.accuracy.mean for point in points),
    )


def same_cost(curves: Mapping[str, Sequence[Spent]], tokens: float) -> dict[str, float]:
    """The accuracy of each curve at a number of tokens, between its points on a log scale.

    Curves that do not reach it are left out: nothing is guessed beyond what was measured.
    """
    found = {}
    for name, points in curves.items():
        ordered = sorted(points, key=lambda point: point.tokens)
        x = np.log([point.tokens for point in ordered])
        if x[0] <= math.log(tokens) <= x[-1]:
            y = [point.accuracy.mean for point in ordered]
            found[name] = float(np.interp(math.log(tokens), x, y))
    return found


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise DataError(f"k is {k}; with {n} samples of a problem it must be from 1 to {n}")
    if n > _MOST_SAMPLES:
        raise DataError(f"{n} samples of a problem; at most {_MOST_SAMPLES} can be counted")
