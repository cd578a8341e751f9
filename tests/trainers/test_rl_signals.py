"""Signals against loops over answers in float64; padding, order, cut texts, shaping, groups.

Shape suffixes: B rows, T places.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from step_jax.core.errors import ConfigError
from step_jax.trainers.rl.algorithms import ALGORITHMS, algorithm
from step_jax.trainers.rl.signals import (
    GAE,
    KL,
    BatchNormalised,
    GroupRelative,
    LeaveOneOut,
    Overlong,
    kl_estimate,
    shaped,
    telling,
    uniform_B,
)
from tests.models.small import FAST_COMPILE
from tests.trainers import rl_oracles as oracle
from tests.trainers.rl_batches import answers, at_places, batch, padded, reordered

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "trl_losses.npz"))
SIGNALS = {
    "gae": (GAE(normalise=False), lambda a: oracle.gae(a, 1.0, 1.0)[0]),
    "gae discounted": (GAE(0.9, 0.8, False), lambda a: oracle.gae(a, 0.9, 0.8)[0]),
    "gae normalised": (GAE(1.0, 0.95), lambda a: oracle.whitened(oracle.gae(a, 1.0, 0.95)[0])),
    "grpo": (GroupRelative(), lambda a: oracle.group_relative(a, True)),
    "dr_grpo": (GroupRelative(divide=False), lambda a: oracle.group_relative(a, False)),
    "rloo": (LeaveOneOut(), oracle.leave_one_out),
    "reinforce++": (BatchNormalised(), lambda a: oracle.batch_normalised(a, False)),
    "reinforce++ baseline": (BatchNormalised(True), lambda a: oracle.batch_normalised(a, True)),
}


def computed(signal, t):
    """(advantages, returns) under jit, NumPy."""
    return jax.device_get(jax.jit(signal.compute, compiler_options=FAST_COMPILE)(t))


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_is_what_its_paper_says(name):
    signal, expected = SIGNALS[name]
    t = batch()
    advantages_BT, _ = computed(signal, t)
    expected_BT = at_places(t, expected(answers(t, t.old_BT)))
    assert np.abs(expected_BT).max() > 0.5
    np.testing.assert_allclose(advantages_BT, expected_BT, rtol=1e-5, atol=2e-6)

    more_BT, _ = computed(signal, padded(t))
    B, T = t.mask_BT.shape
    np.testing.assert_allclose(more_BT[:B, :T], advantages_BT, atol=1e-6)
    assert not more_BT[B:].any() and not more_BT[:, T:].any()

    order = np.random.default_rng(5).permutation(B)
    np.testing.assert_allclose(
        computed(signal, reordered(t, order))[0], advantages_BT[order], atol=1e-6
    )


def test_padding_changes_no_bit_of_gae():
    t = batch(3)
    small, large = (computed(GAE(0.99, 0.95, False), x) for x in (t, padded(t)))
    B, T = t.mask_BT.shape
    for a_BT, b_BT in zip(small, large, strict=True):
        np.testing.assert_array_equal(a_BT, b_BT[:B, :T])


def test_the_critic_learns_returns_and_a_cut_text_had_a_future():
    t = batch(1)
    _, returns_BT = computed(GAE(0.9, 0.8), t)  # of advantages before they are normalised
    expected_BT = at_places(t, oracle.gae(answers(t, t.old_BT), 0.9, 0.8)[1])
    np.testing.assert_allclose(returns_BT, expected_BT, rtol=1e-5, atol=2e-6)

    ended, cut = (dataclasses.replace(t, finish_B=np.full(8, n, np.int32)) for n in (0, 1))
    (ended_BT, _), (cut_BT, _) = (computed(GAE(normalise=False), x) for x in (ended, cut))
    for b, places in enumerate(map(np.flatnonzero, t.mask_BT)):
        # with gamma = lambda = 1 every choice gains the value of what came after the last
        after = t.values_BT[b, places[-1] + 1]
        np.testing.assert_allclose((cut_BT - ended_BT)[b, places], after, atol=2e-6)
        togo = np.cumsum(t.rewards_BT[b, places][::-1])[::-1]
        np.testing.assert_allclose(ended_BT[b, places], togo - t.values_BT[b, places], atol=2e-6)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_advantages_of_groups_are_those_of_trl(name):
    scores_B = GOLDEN["scores"].astype(np.float32)
    t = batch()
    t = dataclasses.replace(
        t, rewards_BT=np.zeros_like(t.rewards_BT), group_B=(np.arange(8) // 4).astype(np.int32)
    ).rewarded(scores_B)
    signal = SIGNALS[name][0]
    advantages_BT, _ = computed(signal, t)
    first_B = np.argmax(t.mask_BT, axis=1)
    found_B = advantages_BT[np.arange(8), first_B]
    np.testing.assert_allclose(found_B, GOLDEN[f"advantages/{name}"], atol=1e-6)


@pytest.mark.parametrize(
    "signal", [GroupRelative(), LeaveOneOut(), BatchNormalised(), BatchNormalised(True)]
)
def test_equal_rewards_teach_exactly_nothing(signal):
    """0.1 less the mean of three times 0.1 is not 0 in float32."""
    t = batch()
    t = dataclasses.replace(t, rewards_BT=np.zeros_like(t.rewards_BT))
    t = t.rewarded(np.full(8, 0.1, np.float32))
    assert not computed(signal, t)[0].any()


def test_equal_groups_are_known_and_become_padding():
    group_B = np.asarray([0, 1, 0, 2, 1, 2, 3, 3], np.int32)
    scores_B = np.asarray([1, 0, 1, 1, 0, 0, 1, 0], np.float32)
    real_B = np.asarray([1, 1, 1, 1, 1, 1, 1, 0], np.float32)
    equal_B = np.asarray(uniform_B(scores_B, group_B, real_B))
    # the last group has one real answer: it is equal to itself
    np.testing.assert_array_equal(equal_B, [1, 1, 1, 0, 1, 0, 1, 1])
    t = dataclasses.replace(batch(), group_B=group_B)
    left = telling(t, scores_B)
    np.testing.assert_array_equal(left.real_B, [0, 0, 0, 1, 0, 1, 1, 1])  # here all rows are real
    np.testing.assert_array_equal(left.mask_BT[3], t.mask_BT[3])


def test_dapo_drops_groups_before_lengths_make_a_difference():
    t = batch()
    t = dataclasses.replace(
        t, rewards_BT=np.zeros_like(t.rewards_BT), group_B=(np.arange(8) // 4).astype(np.int32)
    )
    t = t.rewarded(np.asarray([1, 1, 1, 1, 1, 0, 1, 0], np.float32))
    how = algorithm("dapo", 4)
    judged = how.judged(t)
    np.testing.assert_array_equal(judged.real_B, [0, 0, 0, 0, 1, 1, 1, 1])
    penalty_B = [oracle.overlong(int(n), 4, 1) for n in t.chosen_B]
    assert min(penalty_B[4:]) < 0
    np.testing.assert_allclose(
        judged.outcome_B[4:], np.asarray([1, 0, 1, 0]) + penalty_B[4:], atol=1e-6
    )


def test_the_punishment_of_length_counts_tokens():
    how = Overlong(limit=20, buffer=4)
    found_B = how.penalty_B(np.arange(1, 30).astype(np.float32))
    expected = [oracle.overlong(n, 20, 4) for n in range(1, 30)]
    np.testing.assert_allclose(found_B, expected, atol=1e-7)
    assert expected[15] == 0 and expected[17] == -0.5 and expected[19] == expected[28] == -1


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_divergence_can_stand_in_the_rewards(estimator):
    t = batch()
    kl = KL(0.3, estimator, "reward")
    found = shaped(t, kl=kl)
    less = [
        [0.3 * getattr(oracle, estimator)(p, q) for p, q in zip(a.old, a.reference, strict=True)]
        for a in answers(t, t.old_BT)
    ]
    expected_BT = t.rewards_BT - at_places(t, less)
    np.testing.assert_allclose(found.rewards_BT, expected_BT, atol=2e-6)
    # without the trainer's own log-probs it is of those that were reported with the choices
    found = shaped(dataclasses.replace(t, old_BT=None), kl=kl)
    assert np.abs(np.asarray(found.rewards_BT) - expected_BT).max() > 1e-3
    assert shaped(t, kl=dataclasses.replace(kl, estimator="k3", place="loss")) is t


#: a policy and a reference over four tokens
P = np.asarray([0.5, 0.25, 0.2, 0.05])
Q = np.asarray([0.3, 0.3, 0.1, 0.3])


def test_expectations_of_the_estimators_over_an_exact_distribution():
    """k1 and k3 have the divergence as their mean; k2 has not; k3 and k2 are never negative."""
    divergence = np.sum(P * np.log(P / Q))
    mean = {k: np.sum(P * kl_estimate(k, np.log(P / Q))) for k in ("k1", "k2", "k3")}
    np.testing.assert_allclose([mean["k1"], mean["k3"]], divergence, rtol=1e-5)
    assert abs(mean["k2"] - divergence) > 0.01
    assert kl_estimate("k3", np.log(P / Q)).min() >= 0 > kl_estimate("k1", np.log(P / Q)).min()


def test_gradients_of_the_estimators_over_an_exact_distribution():
    """What E_p[gradient of the estimate] is the gradient of: this decides what may be a loss."""
    logits = np.log(P).astype(np.float32)

    def gradient(f):
        return jax.jit(jax.grad(f), compiler_options=FAST_COMPILE)(logits)

    def sampled(estimator):  # the samples are drawn from p, so p as a weight has no gradient
        def loss(logits):
            d = jax.nn.log_softmax(logits) - np.log(Q)
            return (P * kl_estimate(estimator, d)).sum()

        return gradient(loss)

    def exact(f):
        return gradient(lambda x: f(jax.nn.softmax(x)))

    reverse = exact(lambda p: (p * jax.numpy.log(p / Q)).sum())
    forward = exact(lambda p: (Q * jax.numpy.log(Q / p)).sum())
    np.testing.assert_allclose(sampled("k1"), 0, atol=1e-6)
    np.testing.assert_allclose(sampled("k2"), reverse, atol=1e-6)
    np.testing.assert_allclose(sampled("k3"), forward, atol=1e-6)
    assert np.abs(reverse - forward).max() > 0.05


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (KL(0.1, "k1", "loss"), "k1 has no place in a loss"),
        (KL(0.0), "coefficient is 0.0; it must be above 0"),
        (Overlong(10, 11), "buffer is 11; it must be from 1 to 10 tokens"),
        (GAE(gamma=1.5), r"gamma is 1.5; it must be in \[0, 1\]"),
        (GAE(gae_lambda=-0.1), "gae_lambda is -0.1"),
    ],
)
def test_bad_settings_are_refused(how, message):
    with pytest.raises(ConfigError, match=message):
        how.validate()


def test_every_algorithm_of_the_table_judges_the_batch_it_checks():
    for name in ALGORITHMS:
        how = algorithm(name, 5)
        t = batch()
        how.check(t)
        judged = jax.device_get(jax.jit(how.judged, compiler_options=FAST_COMPILE)(t))
        assert np.isfinite(judged.advantages_BT).all() and np.abs(judged.advantages_BT).max() > 0.1
        assert (judged.returns_BT is not None) == (how.critic is not None)
