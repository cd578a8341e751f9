"""Pairwise judging: both orders, ties, position bias, and a language model as the judge."""

from __future__ import annotations

import pytest

from step_jax.core.errors import DataError
from step_jax.evaluation.judge import Shown, Tally, compare

PAIRS = [Shown("q", "a" * i, "b" * j) for i, j in ((3, 1), (1, 3), (2, 2), (4, 2), (5, 1))]


def longer(shown):
    return [len(one.first) - len(one.second) for one in shown]


def first(shown):
    return [1.0] * len(shown)


def test_a_fair_judge_has_no_position_bias_and_ties_are_counted():
    tally = compare(longer, PAIRS)
    assert (tally.wins, tally.losses, tally.ties, tally.first) == (3, 1, 1, 0.5)
    assert tally.rate == pytest.approx(0.7)
    assert "70.0% of 5 pairs" in str(tally) and "shown first was chosen 50.0%" in str(tally)


def test_a_judge_of_positions_decides_nothing_and_is_shown_as_one():
    tally = compare(first, PAIRS)
    assert (tally.wins, tally.losses, tally.ties, tally.first) == (0, 0, 5, 1.0)
    assert tally.rate == 0.5


def test_what_is_within_the_margin_makes_no_difference():
    tally = compare(longer, PAIRS, margin=2.0)
    assert (tally.wins, tally.losses, tally.ties) == (1, 0, 4)
    assert compare(lambda shown: [0.0] * len(shown), PAIRS).first == 0.5


def test_the_interval_is_wilsons():
    low, high = Tally(wins=70, losses=30, ties=0, first=0.5).interval()
    assert (low, high) == pytest.approx((0.6042, 0.7811), abs=1e-4)


@pytest.mark.parametrize(
    ("judge", "pairs", "message"),
    [
        (longer, [], "nothing to compare"),
        (lambda shown: [1.0], PAIRS, "1 numbers to 10 showings, 0 of them not finite"),
        (lambda shown: [float("nan")] * 10, PAIRS, "10 of them not finite"),
    ],
)
def test_a_judge_that_does_not_judge_is_refused(judge, pairs, message):
    with pytest.raises(DataError, match=message):
        compare(judge, pairs)
