import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_jax.data.mixture import (
    MAX_PERIOD,
    Mixture,
    MixtureStage,
    integer_weights,
    period_schedule,
)

WEIGHTS = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any)


@given(WEIGHTS)
def test_every_prefix_is_exact_to_one_row(weights):
    schedule = period_schedule(weights)
    total = sum(weights)
    assert len(schedule) == total
    rows = np.arange(1, total + 1)
    for source, weight in enumerate(weights):
        had = np.cumsum(schedule == source)
        assert (np.abs(had - rows * weight / total) < 1).all()
        assert had[-1] == weight


@given(WEIGHTS, WEIGHTS, st.integers(1, 200))
def test_locate_counts_each_source_without_gaps_across_stages(first, second, border):
    count = max(len(first), len(second))
    stages = [
        MixtureStage(at, (*weights, *[0] * (count - len(weights))))
        for at, weights in ((0, first), (border, second))
    ]
    mixture = Mixture(stages)
    rows = np.arange(border + 150)
    source, local = mixture.locate(rows)
    for k in range(count):
        mine = local[source == k]
        np.testing.assert_array_equal(mine, np.arange(len(mine)))
    for row in (0, border // 2, border, border + 77):
        expected = np.bincount(source[:row], minlength=count)
        np.testing.assert_array_equal(mixture.counts(row), expected)
    after = source[border : border + sum(second)]
    np.testing.assert_array_equal(
        np.bincount(after, minlength=count)[: len(second)][: len(after)],
        np.bincount(period_schedule(second)[: len(after)], minlength=len(second))[: len(after)],
    )


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((0.7, 0.3), (7, 3)), ((2.0, 4.0), (1, 2)), ((1.0,), (1,)), ((0.125, 0.0), (1, 0))],
)
def test_decimal_weights_are_met_exactly(weights, expected):
    assert integer_weights(weights) == expected


def test_fine_weights_are_rounded_but_never_to_nothing():
    weights = integer_weights((1 / 3, 2 / 3, 1e-9))
    assert sum(weights) <= MAX_PERIOD + 3
    assert weights[2] == 1
    assert abs(weights[0] / sum(weights) - 1 / 3) < 1e-4
