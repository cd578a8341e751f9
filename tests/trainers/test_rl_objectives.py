"""Objectives: every algorithm's loss and gradient against float64 loops and TRL; identities; sums.

Shape suffixes: B rows, T places.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from step_jax.core import config
from step_jax.core.errors import ConfigError
from step_jax.core.spec import ZEROS, ParamSpec
from step_jax.trainers.rl.algorithms import ALGORITHMS, algorithm
from step_jax.trainers.rl.objectives import (
    Algorithm,
    Clip,
    ClippedWeight,
    Constant,
    Critic,
    Filter,
    Mask,
    PolicyGradient,
    SequenceMean,
    TokenMean,
    Truncate,
    critic_loss,
    policy_loss,
)
from step_jax.trainers.rl.signals import KL, GroupRelative
from step_jax.trainers.rl.trajectory import Trajectory, schema
from step_jax.training.learner import Learning
from step_jax.training.optimizers.build import Optimizer
from step_jax.training.state import init_state
from step_jax.training.step import make_train_step
from tests.models.small import FAST_COMPILE
from tests.trainers import rl_oracles as oracle
from tests.trainers.rl_batches import B, T, answers, at_places, batch, padded, policy, reordered

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "trl_losses.npz"))
LIMIT = 7


def total(out):
    return sum(out.values().values())


@functools.cache
def compiled(how: Algorithm, judge: bool):
    def loss(logprobs_BT, t: Trajectory, entropy_BT):
        t = how.judged(t) if judge else t
        out = policy_loss(how, t, logprobs_BT, entropy_BT)
        return total(out), {name: a / b for name, (a, b) in out.metrics.items()}

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE)


def with_gradient(how: Algorithm, t: Trajectory, logprobs_BT, entropy_BT=None, judge=False):
    """((loss, metrics), gradient), NumPy; with ``judge`` from rewards, else from advantages."""
    return jax.device_get(compiled(how, judge)(logprobs_BT, t, entropy_BT))


def slope(f, x_BT, where_BT, step=1e-6):
    """Central differences of ``f(x)``, where ``where_BT`` is not 0."""
    gradient = np.zeros(x_BT.shape)
    for at in zip(*np.nonzero(where_BT), strict=True):
        moved = [x_BT.copy(), x_BT.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        gradient[at] = (f(moved[0]) - f(moved[1])) / (2 * step)
    return gradient


def given(t: Trajectory) -> list[list[float]]:
    """The advantages as the oracles want them."""
    return [row[mask > 0].tolist() for row, mask in zip(t.advantages_BT, t.mask_BT, strict=True)]


#: mismatch at which the trajectory filter of MIS-PO takes some answers and leaves others
NEAR = {"mis_po": 0.006}
#: how far the policy has to be from the old one for some ratios to be clipped
SPREAD = {"gspo": 0.001, "cispo": 3.0}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithms_loss_and_gradient_are_its_papers(name):
    t = batch(mismatch=NEAR.get(name, 0.05))
    how = algorithm(name, LIMIT)
    policy_BT = policy(t, spread=SPREAD.get(name, 0.3))
    (found, metrics), gradient = with_gradient(how, t, policy_BT)
    exact_BT = policy_BT.astype(np.float64)

    def expected(x_BT):
        return oracle.losses(answers(t, x_BT, exact_BT), given(t), LIMIT)[name]

    np.testing.assert_allclose(found, expected(exact_BT), rtol=1e-5, atol=1e-6)
    expected_BT = slope(expected, exact_BT, t.mask_BT)
    assert np.abs(expected_BT).max() > 1e-2
    np.testing.assert_allclose(gradient, expected_BT, rtol=2e-4, atol=2e-6)
    # the interesting branch was taken by some and not by all
    if isinstance(how.policy, Clip | ClippedWeight):
        assert 0 < metrics["clip_share"] < 1
    if how.corrections:
        assert 0 < metrics["masked_share"] < 1


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "truncated"])
def test_an_algorithms_loss_and_gradient_are_those_of_trl(name):
    g = {key: a.astype(np.float32) for key, a in GOLDEN.items()}
    rows, tokens = g["mask"].shape
    t = Trajectory(
        **dict.fromkeys(["tokens_BT", "targets_BT", "rewards_BT", "version_BT"]),
        **dict.fromkeys(["lengths_B", "finish_B", "group_B"]),
        mask_BT=g["mask"],
        logprobs_BT=g["behaviour"],
        old_BT=g["old"],
        reference_BT=g["reference"],
        advantages_BT=np.broadcast_to(g["advantages"][:, None], (rows, tokens)),
    )
    if name == "truncated":
        how = dataclasses.replace(algorithm("ppo", tokens), corrections=(Truncate(1.1),))
    elif name == "cispo":
        how = dataclasses.replace(algorithm(name, tokens), policy=ClippedWeight(1.2))
    else:
        how = algorithm(name, tokens)
    (found, _), gradient = with_gradient(how, t, g["logps"])
    np.testing.assert_allclose(found, GOLDEN[f"{name}/loss"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, GOLDEN[f"{name}/gradient"], atol=1e-6)


# --- Identities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "grpo", "dapo", "gspo", "cispo", "reinforce_pp"])
def test_at_the_first_step_the_gradient_is_the_policy_gradient(name):
    """pi is old: every ratio is 1, nothing is clipped."""
    t = batch(off_policy=0.0)
    how = dataclasses.replace(algorithm(name, LIMIT), kl=None)
    plain = dataclasses.replace(how, policy=PolicyGradient())
    (_, metrics), gradient = with_gradient(how, t, t.old_BT)
    (loss, _), expected = with_gradient(plain, t, t.old_BT)
    if name == "gspo":  # an answer's gradient is shared out evenly among its tokens
        count_B = t.mask_BT.sum(1, keepdims=True)
        expected = t.mask_BT * expected.sum(1, keepdims=True) / count_B
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert metrics["clip_share"] == 0 and metrics["ratio"] == 1
    assert abs(loss) > 1e-3


def test_a_pull_to_the_reference_is_none_at_the_reference():
    t = batch()
    t = dataclasses.replace(t, reference_BT=t.old_BT)
    how = algorithm("grpo", LIMIT)
    (a, _), a_BT = with_gradient(how, t, t.old_BT)
    (b, _), b_BT = with_gradient(dataclasses.replace(how, kl=None), t, t.old_BT)
    np.testing.assert_allclose(a, b, atol=1e-7)
    np.testing.assert_allclose(a_BT, b_BT, atol=1e-7)


def test_grpos_loss_at_the_first_step_is_the_mean_advantage_of_answers():
    """So with one length it is 0, and only its gradient says anything."""
    t = batch()
    how = dataclasses.replace(algorithm("grpo", LIMIT), kl=None)
    (loss, _), _ = with_gradient(how, t, t.old_BT, judge=True)
    np.testing.assert_allclose(loss, 0, atol=1e-6)


def test_reductions_agree_on_answers_of_one_length():
    t = batch()
    mask_BT = np.zeros((B, T), np.float32)
    mask_BT[:, 2:6] = 1
    t = dataclasses.replace(t, mask_BT=mask_BT)
    x_BT = policy(t)
    losses = [
        with_gradient(Algorithm(GroupRelative(), Clip(), how), t, x_BT)[0][0]
        for how in (TokenMean(), SequenceMean(), Constant(4))
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_a_dual_clip_bounds_what_a_bad_choice_can_do():
    t = batch()
    x_BT = policy(t, spread=3.0)
    how = Algorithm(GroupRelative(), Clip(0.2, 0.2, dual=3.0), TokenMean())
    (found, _), gradient = with_gradient(how, t, x_BT)

    def loss(a, i, advantage):
        return oracle.dual_clip(oracle.ratio(a, i), advantage, 0.2, 0.2, 3.0)

    def expected(x_BT):
        return oracle.token_mean(oracle.tokens(answers(t, x_BT), given(t), loss))

    exact_BT = x_BT.astype(np.float64)
    np.testing.assert_allclose(found, expected(exact_BT), rtol=1e-5)
    np.testing.assert_allclose(gradient, slope(expected, exact_BT, t.mask_BT), rtol=2e-4, atol=1e-6)
    free = dataclasses.replace(how, policy=Clip())
    assert found < with_gradient(free, t, x_BT)[0][0]


# --- Corrections, terms, metrics ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("correction", "weight"),
    [
        (Truncate(1.2), lambda w, _: min(w, 1.2)),
        (Mask(0.8, 1.2), lambda w, _: w if 0.8 <= w <= 1.2 else 0.0),
        (Filter(0.8, 1.2), lambda w, _: float(0.8 <= w <= 1.2)),
        (Truncate(1.05, "sequence"), lambda _, s: min(s, 1.05)),
        (Mask(0.95, 1.05, "sequence"), lambda _, s: s if 0.95 <= s <= 1.05 else 0.0),
    ],
)
def test_corrections_weigh_a_choice_by_old_to_behaviour(correction, weight):
    t = batch(mismatch=0.3)
    x_BT = policy(t)
    how = Algorithm(GroupRelative(), Clip(), TokenMean(), (correction,))
    (found, metrics), _ = with_gradient(how, t, x_BT)

    def of(a, i):
        w = math.exp(a.old[i] - a.behaviour[i])
        return weight(w, oracle.geometric(a.old, a.behaviour))

    all_answers = answers(t, x_BT)
    losses = oracle.tokens(
        all_answers, given(t),
        lambda a, i, advantage: of(a, i) * oracle.ppo(oracle.ratio(a, i), advantage, 0.2, 0.2),
    )  # fmt: skip
    # what is masked still counts in the mean: 0 is a choice's share, not a missing choice
    np.testing.assert_allclose(found, oracle.token_mean(losses), rtol=1e-5, atol=1e-6)
    masked = [float(of(a, i) == 0) for a in all_answers for i in range(a.length)]
    np.testing.assert_allclose(metrics["masked_share"], np.mean(masked), rtol=1e-6)
    if not isinstance(correction, Truncate):
        assert 0 < np.mean(masked) < 1


def test_corrections_do_nothing_to_a_rollout_of_the_trainers_own():
    t = batch(mismatch=0.0)
    t = dataclasses.replace(t, logprobs_BT=t.old_BT * t.mask_BT)
    x_BT = policy(t)
    every = (Truncate(), Mask(), Filter(), Filter(0.996, 1.001, "sequence"))
    corrected = Algorithm(GroupRelative(), Clip(), TokenMean(), every)
    (a, metrics), a_BT = with_gradient(corrected, t, x_BT)
    (b, _), b_BT = with_gradient(dataclasses.replace(corrected, corrections=()), t, x_BT)
    assert a == b and metrics["masked_share"] == 0 and metrics["rollout_gap"] == 0
    np.testing.assert_array_equal(a_BT, b_BT)


def test_corrections_have_no_gradient_even_if_old_is_the_policy_itself():
    """A loop of one step a batch gives pi as old: its gradient must be stopped there, too."""
    t = batch()
    how = Algorithm(GroupRelative(), PolicyGradient(), TokenMean(), (Truncate(50.0),))

    def loss(x_BT):
        return total(policy_loss(how, dataclasses.replace(t, old_BT=x_BT), x_BT))

    x_BT = policy(t)
    weight_BT = np.exp(x_BT - t.logprobs_BT)
    expected_BT = -t.mask_BT * weight_BT * t.advantages_BT / t.mask_BT.sum()
    gradient = jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)(x_BT)
    np.testing.assert_allclose(gradient, expected_BT, rtol=1e-4, atol=1e-6)


def test_the_bonus_is_the_mean_entropy_of_a_choice_whatever_the_reduction():
    t = batch()
    x_BT = policy(t)
    entropy_BT = np.random.default_rng(4).exponential(1.0, (B, T)).astype(np.float32)
    how = Algorithm(GroupRelative(), Clip(), Constant(50), entropy=0.02)
    (found, metrics), _ = with_gradient(how, t, x_BT, entropy_BT)
    (without, _), _ = with_gradient(dataclasses.replace(how, entropy=0.0), t, x_BT)
    mean = entropy_BT[t.mask_BT > 0].mean()
    np.testing.assert_allclose(found - without, -0.02 * mean, rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], mean, rtol=1e-5)
    with pytest.raises(ConfigError, match="needs the entropy of each place"):
        policy_loss(how, t, x_BT)


def test_metrics_say_what_they_are_called():
    t = batch()
    x_BT = policy(t)
    (_, metrics), _ = with_gradient(Algorithm(GroupRelative(), Clip(), TokenMean()), t, x_BT)
    on = t.mask_BT > 0
    ratio, mu = np.exp(x_BT - t.old_BT)[on], (x_BT - t.logprobs_BT)[on]
    advantages = t.advantages_BT[on]
    clipped = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    expected = {
        "ratio": ratio.mean(),
        "clip_share": clipped.mean(),
        "kl_behaviour": (np.exp(mu) - 1 - mu).mean(),
        "rollout_gap": np.abs(t.old_BT - t.logprobs_BT)[on].mean(),
    }
    assert set(metrics) == set(expected) and 0 < expected["clip_share"] < 1
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_critics_loss(clip):
    t = batch()
    values_BT = t.values_BT + 0.4 * np.random.default_rng(2).standard_normal((B, T)).astype("f4")
    t = dataclasses.replace(t, returns_BT=t.rewards_BT + t.values_BT * t.mask_BT)
    out = critic_loss(Critic(clip), t, values_BT)
    losses, clips = [], []
    for at in zip(*np.nonzero(t.mask_BT), strict=True):
        v, old, r = (float(a[at]) for a in (values_BT, t.values_BT, t.returns_BT))
        held = v if clip is None else min(max(v, old - clip), old + clip)
        losses.append(max((v - r) ** 2, (held - r) ** 2) / 2)
        clips.append((held - r) ** 2 > (v - r) ** 2)
    np.testing.assert_allclose(out.parts["value"].value(), np.mean(losses), rtol=1e-5)
    if clip is not None:
        a, b = out.metrics["value_clip_share"]
        np.testing.assert_allclose(a / b, np.mean(clips), rtol=1e-6)


def test_ratios_that_overflow_leave_a_finite_gradient():
    t = batch()
    x_BT = np.where(np.arange(T) % 2, -1e-3, -300.0).astype(np.float32) * np.ones((B, 1), "f4")
    t = dataclasses.replace(t, old_BT=x_BT[:, ::-1].copy() - 100)
    for name in ALGORITHMS:
        (loss, metrics), gradient = with_gradient(algorithm(name, LIMIT), t, x_BT)
        assert np.isfinite(loss) and np.isfinite(gradient).all(), name
        assert np.isfinite(list(metrics.values())).all(), name


# --- Whole batches --------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("name", ALGORITHMS)
def test_padding_and_order_change_nothing(name):
    """From rewards to gradients; what stands in the padding is nonsense, and not finite."""
    how = algorithm(name, LIMIT)

    learned = functools.partial(with_gradient, how, judge=True)
    t = batch(mismatch=NEAR.get(name, 0.05))
    x_BT = policy(t)
    (loss, metrics), gradient = learned(t, x_BT)
    more_BT = np.full((B + 3, T + 4), np.nan, np.float32)
    more_BT[:B, :T] = x_BT
    (padded_loss, padded_metrics), padded_BT = learned(padded(t), more_BT)
    np.testing.assert_allclose(padded_loss, loss, atol=1e-6)
    np.testing.assert_allclose(padded_BT[:B, :T], gradient, atol=1e-6)
    assert not padded_BT[B:].any() and not padded_BT[:, T:].any()
    order = np.random.default_rng(6).permutation(B)
    (other_loss, other_metrics), other_BT = learned(reordered(t, order), x_BT[order])
    np.testing.assert_allclose(other_loss, loss, atol=1e-6)
    np.testing.assert_allclose(other_BT, gradient[order], atol=1e-6)
    for key, value in metrics.items():
        np.testing.assert_allclose([padded_metrics[key], other_metrics[key]], value, rtol=1e-5)


def stepped(how: Algorithm, t: Trajectory, accumulation: int):
    """(gradients, metrics) of one step of a policy and a critic with a parameter per place."""
    streams = [n for n in ("old", "reference", "values", "advantages", "returns")
               if getattr(t, f"{n}_BT") is not None]  # fmt: skip
    specs = {"w": ParamSpec((T,), (None,), ZEROS, role="vector")}

    def loss(params, rows, key):
        t = Trajectory.of(rows)
        out = policy_loss(how, t, t.old_BT - jax.nn.softplus(params["policy"]["w"] - 1))
        if how.critic is None:
            return out
        critic = critic_loss(how.critic, t, t.values_BT + params["critic"]["w"])
        return dataclasses.replace(
            out, parts=out.parts | critic.parts, metrics=out.metrics | critic.metrics
        )

    optimizer = Optimizer(optax.identity(), lambda step: jnp.float32(1.0), 1.0, specs)
    names = ["policy"] if how.critic is None else ["policy", "critic"]
    learnings = {name: Learning(specs, specs, optimizer) for name in names}
    step = make_train_step(
        loss, learnings, schema(B, T, streams), accumulation=accumulation,
        compute_dtype=jnp.float32,
    )  # fmt: skip
    state = init_state({name: {"w": jnp.zeros(T)} for name in names}, learnings)
    arrays = {name: jnp.asarray(a) for name, a in t.batch().items()}
    state, metrics = jax.jit(step, compiler_options=FAST_COMPILE)(state, arrays)
    return [-state.learners[name].params["w"] for name in names], metrics


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["grpo", "rloo", "mis_po"])
def test_accumulation_changes_nothing(name):
    """One of each reduction; several parts, two learners."""
    how = algorithm(name, LIMIT)
    judge = jax.jit(how.judged, compiler_options=FAST_COMPILE)
    t = jax.device_get(judge(batch(2, mismatch=NEAR.get(name, 0.05))))
    (whole, metrics), (parts, of_parts) = stepped(how, t, 1), stepped(how, t, 4)
    assert np.abs(whole[0]).max() > 1e-2
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6)
    for key, value in metrics.items():
        np.testing.assert_allclose(of_parts[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


# --- The table, and those who are not in it -------------------------------------------------------


@dataclass(frozen=True)
class SoftGate:
    """SAPO (arXiv 2511.20347): a sigmoid in the place of the clip. All that a new term takes."""

    positive: float = 1.0
    negative: float = 1.05

    def loss(self, logprobs_BT, log_ratio_BT, advantages_BT, mask_BT):
        tau_BT = jnp.where(advantages_BT > 0, self.positive, self.negative)
        gate_BT = jax.nn.sigmoid(tau_BT * (jnp.exp(log_ratio_BT) - 1)) * 4 / tau_BT
        return -gate_BT * advantages_BT, jnp.zeros_like(mask_BT)


def test_an_algorithm_of_ones_own_needs_no_line_of_the_package():
    how = Algorithm(GroupRelative(), SoftGate(), SequenceMean())
    t = batch()
    _, gradient = with_gradient(how, t, t.old_BT, judge=True)
    plain = dataclasses.replace(how, policy=PolicyGradient())
    _, expected = with_gradient(plain, t, t.old_BT, judge=True)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert np.abs(gradient).max() > 1e-2


def test_the_table_fits_in_a_file_of_80_lines_and_its_entries_are_valid():
    path = Path(__file__).parents[2] / "step_jax" / "trainers" / "rl" / "algorithms.py"
    assert len(path.read_text().splitlines()) <= 80
    for name in ALGORITHMS:
        config.validate(algorithm(name, LIMIT), {})
    with pytest.raises(ConfigError, match="no algorithm 'grp'; did you mean 'grpo'.*mis_po"):
        algorithm("grp", LIMIT)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Clip(low=1.0), r"low is 1.0; it must be in \(0, 1\)"),
        (Clip(dual=0.5), "dual is 0.5; it must be above 1"),
        (ClippedWeight(0.5), "high is 0.5; it must be above 1"),
        (Filter(1.1, 2.0), r"filter: the range \[1.1, 2.0\] must have 1 inside it"),
        (Mask(0.5, 1.0), "mask: the range"),
        (Constant(0), "length is 0; it must be at least 1"),
        (Critic(0.0), "clip is 0.0"),
        (Algorithm(GroupRelative(), Clip(), TokenMean(), critic=Critic()), "need each other"),
        (Algorithm(GroupRelative(), Clip(), TokenMean(), entropy=-0.1), "entropy is -0.1"),
    ],
)
def test_bad_settings_are_refused(how, message):
    with pytest.raises(ConfigError, match=message):
        how.validate()


def test_a_correction_without_the_trainers_own_log_probs_is_refused():
    t = dataclasses.replace(batch(), old_BT=None)
    with pytest.raises(ConfigError, match="give old_BT"):
        policy_loss(algorithm("mis_po", LIMIT), t, policy(batch()))


def test_without_old_log_probs_the_ratio_is_to_those_who_wrote():
    t = batch(mismatch=0.3)
    x_BT = policy(t)
    how = Algorithm(GroupRelative(), Clip(), TokenMean())
    (a, metrics), _ = with_gradient(how, dataclasses.replace(t, old_BT=None), x_BT)
    (b, _), _ = with_gradient(how, dataclasses.replace(t, old_BT=t.logprobs_BT), x_BT)
    assert a == b and "rollout_gap" not in metrics


def test_the_divergence_in_the_loss_is_reduced_as_the_policy_term_is():
    t = batch()
    x_BT = policy(t)
    how = Algorithm(GroupRelative(), Clip(), SequenceMean(), kl=KL(0.5, "k2"))
    out = policy_loss(how, t, x_BT)
    rows = [
        [oracle.k2(p, q) for p, q in zip(a.policy, a.reference, strict=True)]
        for a in answers(t, x_BT)
    ]
    np.testing.assert_allclose(out.parts["kl"].value(), 0.5 * oracle.sequence_mean(rows), rtol=1e-5)
    assert at_places(t, rows).max() > 0.01
