"""Preference losses: the papers' formulas in float64 NumPy, TRL's code, whole batches, bad input.

Shape suffixes: B rows (pairs, or single answers), T tokens.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from step_jax.core.errors import ConfigError
from step_jax.core.spec import ZEROS, ParamSpec
from step_jax.data.schema import schema_like
from step_jax.training.learner import Learning
from step_jax.training.losses.preference import (
    DPO,
    IPO,
    KTO,
    ORPO,
    PREFERENCES,
    Answers,
    BradleyTerry,
    Pairs,
    SimPO,
    Verdicts,
    kto_loss,
    pair_loss,
    reward_loss,
)
from step_jax.training.optimizers.build import Optimizer
from step_jax.training.state import init_state
from step_jax.training.step import make_train_step
from tests.models.small import FAST_COMPILE

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "trl_losses.npz"))
B, T = 6, 5


def rows(seed=0, count=B):
    """Answers of unlike lengths: log-probs of policy and reference, masks, verdicts, weights."""
    rng = np.random.default_rng(seed)
    mask_BT = (np.arange(T) < rng.integers(1, T + 1, count)[:, None]).astype(np.float32)
    batch = {
        "logps": -rng.exponential(0.8, (count, T)) * mask_BT,
        "reference": -rng.exponential(0.8, (count, T)) * mask_BT,
        "unrelated": -rng.exponential(4.0, count),
        "unrelated_reference": -rng.exponential(5.0, count),
        "good": (np.arange(count) % 3 == 0).astype(np.float32),
        "weights": np.asarray([1, 2, 1, 0.5, 1, 3], np.float32)[np.arange(count) % 6],
    }
    return {name: a.astype(np.float32) for name, a in batch.items()} | {"mask": mask_BT}


def of_pairs(logps_BT, batch, how):
    """The loss of pairs, chosen rows first, as a step takes it."""
    half = len(logps_BT) // 2
    first, second = (
        Answers.of(logps_BT[s], batch["mask"][s], batch["reference"][s])
        for s in (slice(half), slice(half, None))
    )
    return pair_loss(how, Pairs(first, second, batch["weights"][:half]))


def of_verdicts(logps_BT, batch, how):
    count = len(logps_BT)
    unrelated = Answers(batch["unrelated"], jnp.ones(count), batch["unrelated_reference"])
    answers = Answers.of(logps_BT, batch["mask"], batch["reference"])
    row_B = batch.get("row", jnp.arange(count))
    verdicts = Verdicts(
        answers, unrelated, batch["good"], batch["weights"], row_B, batch.get("rows", count)
    )
    return kto_loss(how, verdicts)


def out_of(how, logps_BT, batch):
    return (of_verdicts if isinstance(how, KTO) else of_pairs)(logps_BT, batch, how)


def total(out):
    return sum(out.values().values())


def with_gradient(loss, x):
    """(loss, gradient) at x, in one compilation."""
    f = jax.value_and_grad(lambda x: total(loss(x)))
    return jax.jit(f, compiler_options=FAST_COMPILE)(x)


# --- Oracles: one pair, one answer at a time, in float64 ------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def odds(p):
    return p / (1 - p)


def oracle(how, logps_BT, batch, frozen_BT):
    """The loss as its paper writes it; ``frozen_BT`` are the log-probs that have no gradient."""
    count_B = batch["mask"].sum(1)
    policy_B, reference_B = logps_BT.sum(1), batch["reference"].sum(1)
    w_B, half = batch["weights"], len(logps_BT) // 2
    if isinstance(how, KTO):
        kl_B = batch["unrelated"] - batch["unrelated_reference"]
        z = max(0.0, (w_B * kl_B).sum() / w_B.sum())
        loss = 0.0
        for i, good in enumerate(batch["good"]):
            d = policy_B[i] - reference_B[i]
            value = sigmoid(how.beta * (d - z)) if good else sigmoid(how.beta * (z - d))
            weight = how.desirable if good else how.undesirable
            loss += w_B[i] * weight * (1 - value)
        return loss / w_B.sum()
    losses, nll, tokens = 0.0, 0.0, 0.0
    for i in range(half):
        j = i + half
        d_w, d_l = policy_B[i] - reference_B[i], policy_B[j] - reference_B[j]
        mean_w, mean_l = policy_B[i] / count_B[i], policy_B[j] / count_B[j]
        if isinstance(how, DPO):
            m, e = how.beta * (d_w - d_l), how.label_smoothing
            loss = -(1 - e) * np.log(sigmoid(m)) - e * np.log(sigmoid(-m))
        elif isinstance(how, IPO):
            h = d_w / count_B[i] - d_l / count_B[j] if how.per_token else d_w - d_l
            loss = (h - 1 / (2 * how.beta)) ** 2
        elif isinstance(how, SimPO):
            loss = -np.log(sigmoid(how.beta * mean_w - how.beta * mean_l - how.gamma))
        else:
            ratio = odds(np.exp(mean_w)) / odds(np.exp(mean_l))
            loss = -how.coefficient * np.log(sigmoid(np.log(ratio)))
            nll -= w_B[i] * policy_B[i]
            tokens += w_B[i] * count_B[i]
        losses += w_B[i] * loss
    return losses / w_B[:half].sum() + (nll / tokens if tokens else 0.0)


def slope(f, x_BT, where_BT, step=1e-6):
    """Central differences of ``f(x)``, where ``where_BT`` is not 0."""
    gradient = np.zeros(x_BT.shape)
    for at in zip(*np.nonzero(where_BT), strict=True):
        moved = [x_BT.copy(), x_BT.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        gradient[at] = (f(moved[0]) - f(moved[1])) / (2 * step)
    return gradient


HOWS = {
    **PREFERENCES,
    "ipo of sums": IPO(0.3, per_token=False),
    "kto unbalanced": KTO(0.2, 1.0, 1.5),
    "simpo without margin": SimPO(2.5, 0.0),
}


@pytest.mark.parametrize("name", HOWS)
def test_a_loss_and_its_gradient_are_the_papers(name):
    how, batch = HOWS[name], rows()
    found, gradient = with_gradient(lambda x: out_of(how, x, batch), batch["logps"])
    exact = {key: np.asarray(a, np.float64) for key, a in batch.items()}
    logps_BT = exact["logps"]
    np.testing.assert_allclose(found, oracle(how, logps_BT, exact, logps_BT), rtol=2e-6)
    expected = slope(lambda x: oracle(how, x, exact, logps_BT), logps_BT, exact["mask"])
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_the_divergence_in_kto_is_not_below_zero():
    """Its estimate can be, from a few unrelated answers."""
    batch = rows()
    batch["unrelated"] = batch["unrelated_reference"] - 1
    found = total(out_of(KTO(), batch["logps"], batch))
    exact = {key: np.asarray(a, np.float64) for key, a in batch.items()}
    np.testing.assert_allclose(
        found, oracle(KTO(), exact["logps"], exact, exact["logps"]), rtol=2e-6
    )
    kl, weight = out_of(KTO(), batch["logps"], batch).metrics["kl"]
    np.testing.assert_allclose(kl / weight, -1, rtol=1e-5)


TRL = {
    "dpo": DPO(),
    "cdpo": DPO(label_smoothing=0.1),
    "ipo": IPO(),
    "orpo": ORPO(),
    "simpo": SimPO(),
    "kto": KTO(undesirable=1.5),
}


@pytest.mark.parametrize("name", TRL)
def test_a_loss_and_its_gradient_are_those_of_trl(name):
    g = {key: a.astype(np.float32) for key, a in GOLDEN.items()}
    count = len(g["logps"])
    g |= {"weights": np.ones(count, np.float32), "good": np.arange(count) < count // 2 + 1}
    found, gradient = with_gradient(lambda x: out_of(TRL[name], x, g), g["logps"])
    np.testing.assert_allclose(found, GOLDEN[f"{name}/loss"], rtol=1e-6)
    # TRL's stand-in for a model gives no gradient to padding, and neither does a mask
    expected = GOLDEN[f"{name}/gradient"] * GOLDEN["mask"]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_the_reward_models_loss_and_its_gradient_are_those_of_trl():
    scores = GOLDEN["scores"].astype(np.float32)
    half = len(scores) // 2

    def loss(scores):
        ones = jnp.ones(half)
        return reward_loss(BradleyTerry(0.01), scores[:half], scores[half:], ones)

    found, gradient = with_gradient(loss, scores)
    np.testing.assert_allclose(found, GOLDEN["reward_model/loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient, GOLDEN["reward_model/gradient"], atol=1e-6)


def test_a_margin_of_rewards_is_asked_for():
    one = jnp.ones(1)
    out = reward_loss(BradleyTerry(), 2 * one, 0.5 * one, one, margin_B=one)
    np.testing.assert_allclose(total(out), -np.log(sigmoid(0.5)), rtol=1e-6)
    assert out.metrics["reward_margin"][0] == 1.5 and set(out.parts) == {"ranking"}


# --- Whole batches --------------------------------------------------------------------------------


def trained(how, batch, accumulation):
    """(gradient, metrics) of one step of a policy whose parameters are its answers' tokens."""
    names = ["mask", "reference", "unrelated", "unrelated_reference", "good", "weights", "row"]
    arrays = {name: jnp.asarray(batch[name]) for name in names}
    if not isinstance(how, KTO):  # a row is a pair: chosen and rejected side by side
        pair = ["mask", "reference"]
        arrays |= {name: jnp.asarray(batch[name]).reshape(-1, 2, T) for name in pair}
    count = len(arrays["mask"])
    arrays |= {n: a[:: len(a) // count] for n, a in arrays.items()}
    specs = {"w": ParamSpec((T,), (None,), ZEROS, role="vector")}

    def loss(params, rows, key):
        logps = -jax.nn.softplus(params["policy"]["w"] + rows["reference"]) * rows["mask"]
        if isinstance(how, KTO):
            return of_verdicts(logps, rows | {"rows": count}, how)
        sides = (
            Answers.of(logps[:, i], rows["mask"][:, i], rows["reference"][:, i]) for i in (0, 1)
        )
        return pair_loss(how, Pairs(*sides, rows["weights"]))

    optimizer = Optimizer(optax.identity(), lambda step: jnp.float32(1.0), 1.0, specs)
    learnings = {"policy": Learning(specs, specs, optimizer)}
    axes = {name: ("batch", *(None,) * (a.ndim - 1)) for name, a in arrays.items()}
    step = make_train_step(
        loss, learnings, schema_like(arrays, axes), accumulation=accumulation,
        compute_dtype=jnp.float32,
    )  # fmt: skip
    step = jax.jit(step, compiler_options=FAST_COMPILE)
    state, metrics = step(init_state({"policy": {"w": jnp.zeros(T)}}, learnings), arrays)
    return -state.learners["policy"].params["w"], metrics


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
def test_microbatches_and_padding_change_nothing(name):
    how = PREFERENCES[name]
    batch = rows(3, 8) | {"row": np.arange(8, dtype=np.int32)}
    gradient, metrics = trained(how, batch, 1)
    parts, of_parts = trained(how, batch, 4)
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(parts, gradient, atol=1e-6)
    for key, value in metrics.items():
        np.testing.assert_allclose(of_parts[key], value, rtol=1e-5, atol=1e-6, err_msg=key)

    padding = {key: np.zeros((8, *a.shape[1:]), a.dtype) for key, a in batch.items()}
    longer = {key: np.concatenate([batch[key], padding[key]]) for key in batch}
    longer["row"] = np.arange(16, dtype=np.int32)
    padded, of_padded = trained(how, longer, 1)
    np.testing.assert_allclose(padded, gradient, atol=1e-6)
    np.testing.assert_allclose(of_padded["loss"], metrics["loss"], rtol=1e-6)


def test_metrics_are_implicit_rewards():
    batch = rows()
    half = B // 2
    metrics = of_pairs(batch["logps"], batch, DPO(0.5)).metrics
    found = {name: float(a / b) for name, (a, b) in metrics.items()}
    reward_B = 0.5 * (batch["logps"].sum(1) - batch["reference"].sum(1))
    w_B = batch["weights"][:half]
    margin_B = reward_B[:half] - reward_B[half:]
    expected = {
        "reward_chosen": reward_B[:half], "reward_rejected": reward_B[half:],
        "reward_margin": margin_B, "reward_accuracy": margin_B > 0,
    }  # fmt: skip
    assert set(found) == set(expected)
    for name, a_B in expected.items():
        np.testing.assert_allclose(found[name], (w_B * a_B).sum() / w_B.sum(), rtol=1e-5)


def test_a_policy_that_is_its_reference_has_no_accuracy_and_the_loss_of_chance():
    batch = rows()
    batch["logps"] = batch["reference"]
    out = of_pairs(batch["logps"], batch, DPO())
    np.testing.assert_allclose(total(out), np.log(2), rtol=1e-6)
    assert out.metrics["reward_accuracy"][0] == 0


@pytest.mark.thorough
@pytest.mark.parametrize("name", HOWS)
def test_extremes_are_finite(name):
    """Certain answers (0), and impossible ones (-400 a token), in every combination."""
    batch = rows(count=8)
    value_B = np.asarray([0.0, -400.0, 0.0, -400.0, 0.0, 0.0, -400.0, -400.0], np.float32)
    logps = value_B[:, None] * batch["mask"]
    loss, gradient = with_gradient(lambda x: out_of(HOWS[name], x, batch), logps)
    assert np.isfinite(loss) and np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (DPO(beta=0.0), "beta is 0.0; it must be above 0"),
        (DPO(label_smoothing=0.5), "label_smoothing is 0.5"),
        (IPO(beta=-1.0), "beta is -1.0"),
        (KTO(undesirable=0.0), "undesirable is 0.0"),
        (ORPO(0.0), "coefficient is 0.0"),
        (SimPO(gamma=-1.0), "gamma is -1.0; it must be at least 0"),
        (BradleyTerry(-0.1), "centre is -0.1"),
    ],
)
def test_bad_settings_are_refused(how, message):
    with pytest.raises(ConfigError, match=message):
        how.validate()


def test_the_table_is_valid_and_a_missing_reference_is_named():
    for how in PREFERENCES.values():
        how.validate()
    answers = Answers(jnp.zeros(2), jnp.ones(2))
    with pytest.raises(ConfigError, match="compares with a reference policy"):
        pair_loss(DPO(), Pairs(answers, answers, jnp.ones(2)))
