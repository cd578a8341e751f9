"""Each estimate against all choices of k samples, counted one by one."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_jax.core.errors import DataError
from step_jax.evaluation.accuracy import (
    Control,
    Interval,
    Samples,
    Spent,
    best_of_k,
    binomial,
    bootstrap,
    budget_control,
    majority_at_k,
    measure,
    pass_at_k,
    same_cost,
    vote_curve,
)  # fmt: skip


@given(st.integers(1, 60), st.data())
def test_pass_at_k_is_the_exact_fraction(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    correct_PN = np.array([[i < c for i in range(n)]])
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    np.testing.assert_allclose(pass_at_k(correct_PN, k), [float(exact)], rtol=1e-12, atol=1e-15)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not():
    """Its mean over samples of a known chance is that chance of k independent ones."""
    chance, n, k = 0.3, 5, 3
    mean = sum(
        math.comb(n, c) * chance**c * (1 - chance) ** (n - c)
        * pass_at_k(np.array([[i < c for i in range(n)]]), k)[0]
        for c in range(n + 1)
    )  # fmt: skip
    assert mean == pytest.approx(1 - (1 - chance) ** k, abs=1e-12)


def counted(answers, right, k, scores=None):
    """Mean over all choices of k: of the best score or of the vote, ties shared."""
    total = Fraction(0)
    for chosen in itertools.combinations(range(len(answers)), k):
        if scores is not None:
            best = max(scores[i] for i in chosen)
            winners = [i for i in chosen if scores[i] == best]
            total += Fraction(sum(right[i] for i in winners), len(winners))
            continue
        votes = Counter(answers[i] for i in chosen if answers[i] is not None)
        most = max(votes.values(), default=0)
        winners = [answer for answer, count in votes.items() if count == most]
        good = {answer for answer, is_right in zip(answers, right, strict=True) if is_right}
        if winners:
            total += Fraction(sum(answer in good for answer in winners), len(winners))
    return float(total / math.comb(len(answers), k))


@given(st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=9), st.data())
def test_majority_at_k_is_the_mean_over_all_choices(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    right = [answer in ("a", "d") for answer in answers]
    found = majority_at_k([answers], np.array([right]), k)
    np.testing.assert_allclose(found, [counted(answers, right, k)], atol=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=9), st.data())
def test_best_of_k_is_the_mean_over_all_choices(pairs, data):
    k = data.draw(st.integers(1, len(pairs)))
    right, scores = zip(*pairs, strict=True)
    found = best_of_k(np.array([right]), np.array([scores]), k)
    expected = counted(range(len(pairs)), right, k, scores)
    np.testing.assert_allclose(found, [expected], atol=1e-12)


def test_an_answer_that_was_judged_both_ways_counts_by_its_share():
    """A verifier that fails on one of two equal replies must not end an evaluation."""
    correct_PN = np.array([[True, False, True, False]])
    assert majority_at_k([["7", "7", "7", "8"]], correct_PN, 4) == pytest.approx([2 / 3])


@pytest.mark.parametrize("k", [0, 4])
def test_k_is_among_the_samples(k):
    with pytest.raises(DataError, match=f"k is {k}; with 3 samples"):
        pass_at_k(np.zeros((2, 3), bool), k)


def test_the_bootstrap_interval_covers_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        interval = bootstrap(rng.random(60) < 0.4, draws=400)
        covered += interval.low <= 0.4 <= interval.high
    assert 0.88 <= covered / 200 <= 1.0


def test_the_bootstrap_is_over_problems_and_always_the_same():
    values_P = np.repeat([0.0, 1.0], 50)
    one, again = bootstrap(values_P), bootstrap(values_P)
    assert one == again and one.mean == 0.5
    assert one.high - one.low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.1)


@given(st.integers(1, 40), st.data())
def test_the_binomial_interval_is_that_of_the_exact_tails(count, data):
    right = data.draw(st.integers(0, count))
    interval = binomial(right, count)

    def tail(chance, outcomes):
        return sum(math.comb(count, i) * chance**i * (1 - chance) ** (count - i) for i in outcomes)

    if right:
        assert tail(interval.low, range(right, count + 1)) == pytest.approx(0.025, rel=1e-6)
    if right < count:
        assert tail(interval.high, range(right + 1)) == pytest.approx(0.025, rel=1e-6)
    assert interval.low <= right / count <= interval.high


SAMPLES = Samples(
    correct_PN=np.array([[True, True, False], [False, False, True]]),
    answers_PN=[["1", "1", "2"], ["3", "3", "4"]],
    tokens_PN=np.array([[10, 20, 30], [40, 50, 60]]),
    cut_PN=np.array([[False, False, True], [False, False, False]]),
)


def test_measures_have_their_names_and_means():
    found = measure(SAMPLES, [1, 3])
    means = {name: interval.mean for name, interval in found.items()}
    assert means == pytest.approx(
        {"mean@3": 0.5, "pass@1": 0.5, "maj@1": 0.5, "pass@3": 1.0, "maj@3": 0.5, "cut": 1 / 6,
         "tokens": 35.0}
    )  # fmt: skip


def test_votes_cost_the_tokens_of_their_samples():
    assert [point.tokens for point in vote_curve(SAMPLES, [1, 2, 3])] == [35, 70, 105]


def test_curves_are_compared_where_all_were_measured():
    def curve(*points):
        return [Spent(tokens, Interval(mean, 0, 1)) for tokens, mean in points]

    curves = {"votes": curve((10, 0.1), (1000, 0.5)), "rounds": curve((100, 0.4), (400, 0.9))}
    assert same_cost(curves, 100) == pytest.approx({"votes": 0.3, "rounds": 0.4})
    assert same_cost(curves, 50).keys() == {"votes"}


def test_samples_of_unlike_shapes_are_refused():
    with pytest.raises(DataError, match="must be .problems, samples."):
        Samples(np.zeros((2, 3)), [["1"] * 3] * 2, np.zeros((2, 2)), np.zeros((2, 3)))


def test_a_budget_is_judged_by_control_slope_and_best_accuracy():
    def point(tokens, mean):
        return Spent(tokens, Interval(mean, 0, 1))

    tokens = [np.array([[8, 9], [10, 11]]), np.array([[40], [41]])]
    found = budget_control([point(10, 0.2), point(40, 0.6)], tokens, [(0, 10), (30, 40)])
    assert found == Control(control=4 / 6, scaling=pytest.approx(0.2), performance=0.6)
    alone = budget_control([point(10, 0.2)], tokens[:1], [(0, 11)])
    assert alone.control == 1.0 and math.isnan(alone.scaling)
