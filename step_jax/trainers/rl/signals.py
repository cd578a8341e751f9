"""Signals: from rewards to how much better each choice was than expected.

A signal is a frozen dataclass and a pure function of a whole batch of trajectories (its groups and
means are not those of a microbatch), computed in float32 before the batch is learned from. What
shapes rewards first is here, too. docs/rl.md has the equations.

Shape suffixes: B rows, T places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.trainers.rl.trajectory import Trajectory

#: added to a standard deviation that is divided by
EPSILON = 1e-4
#: exp() of more is of no use to a ratio, and its gradient overflows
LARGEST_LOG_RATIO = 20.0

Estimator = Literal["k1", "k2", "k3"]


class Signal(Protocol):
    """What a signal has, be it of the union ``SignalKind`` or of your own.

    smallest_group: how many answers to a prompt it needs. needs: the streams that it reads.
    """

    @property
    def smallest_group(self) -> int: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    def compute(self, t: Trajectory) -> tuple[jax.Array, jax.Array | None]:
        """(advantages_BT, 0 where nothing was chosen; returns_BT for a critic, or None)."""
        ...


# --- Rewards ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlong:
    """DAPO's soft punishment of length (arXiv 2503.14476, eq. 13), in tokens of the answer.

    0 up to ``limit - buffer`` tokens, from there down to -1 at ``limit``, and -1 beyond.
    """

    limit: int
    buffer: int

    def validate(self):
        if not 1 <= self.buffer <= self.limit:
            raise ConfigError(f"buffer is {self.buffer}; it must be from 1 to {self.limit} tokens")

    def penalty_B(self, lengths_B):
        """The (negative) reward of answers with so many tokens."""
        over_B = lengths_B - (self.limit - self.buffer)
        return -jnp.clip(over_B / self.buffer, 0.0, 1.0)


@dataclass(frozen=True)
class KL:
    """The divergence from a reference policy, estimated from the tokens that were chosen.

    With d = log pi(a) - log pi_ref(a) (Schulman 2020, "Approximating KL divergence"): k1 is d, k2
    is d^2 / 2, k3 is exp(-d) - 1 + d. k1 and k3 have the divergence as their mean.

    coefficient: beta.
    estimator: which one.
    place: ``reward`` subtracts beta times it from each choice's reward, ``loss`` adds it to the
      loss. Not k1 there: the mean of its gradient is 0, that of k2's is the divergence's.
    """

    coefficient: float
    estimator: Estimator = "k3"
    place: Literal["reward", "loss"] = "loss"

    def validate(self):
        checks.above(self, coefficient=0)
        if self.place == "loss" and self.estimator == "k1":
            raise ConfigError(
                "k1 has no place in a loss: its gradient is that of log pi, whose mean is 0, "
                "whatever the reference. Use k2 or k3, or put it into the reward"
            )

    def of(self, logprobs_BT, reference_BT):
        """The estimate for each token, differentiable."""
        return kl_estimate(self.estimator, bounded(logprobs_BT - reference_BT))


def bounded(log_ratio_BT):
    """A log-ratio whose exponential is finite, with its gradient."""
    return jnp.clip(log_ratio_BT, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def kl_estimate(estimator: Estimator, d):
    """KL(p || q) from samples of p, ``d = log p - log q``; see :class:`KL`."""
    if estimator == "k1":
        return d
    return jnp.square(d) / 2 if estimator == "k2" else jnp.expm1(-d) + d


def shaped(t: Trajectory, overlong: Overlong | None = None, kl: KL | None = None) -> Trajectory:
    """With rewards for the length of answers, and for staying near the reference."""
    if overlong is not None:
        t = t.rewarded(t.real_B * overlong.penalty_B(t.chosen_B))
    if kl is not None and kl.place == "reward":
        old_BT = t.logprobs_BT if t.old_BT is None else t.old_BT
        t = t.rewarded(-kl.coefficient * kl.of(old_BT, t.reference_BT))
    return t


# --- Groups -------------------------------------------------------------------------------------


def group_sum_B(x_B, group_B):
    """For every row, the sum of ``x`` over the rows of its group."""
    return jax.ops.segment_sum(x_B, group_B, num_segments=len(x_B))[group_B]


def uniform_B(x_B, group_B, real_B):
    """bool: whether all rows of a row's group have the same value, padding left out."""
    B = len(x_B)
    most_B = jax.ops.segment_max(jnp.where(real_B > 0, x_B, -jnp.inf), group_B, num_segments=B)
    least_B = jax.ops.segment_min(jnp.where(real_B > 0, x_B, jnp.inf), group_B, num_segments=B)
    return (most_B <= least_B)[group_B]


def telling(t: Trajectory, scores_B) -> Trajectory:
    """DAPO's filter (arXiv 2503.14476, eq. 11): groups whose scores are all equal become padding.

    They teach nothing, but would count in every mean. The rows are free for other prompts.

    Args:
      scores_B: what the verifier said, before any shaping: lengths must not make a difference.
    """
    keep_B = ~uniform_B(scores_B, t.group_B, t.real_B)
    masked = {name: getattr(t, name) * keep_B[:, None] for name in ("mask_BT", "rewards_BT")}
    return replace(t, **masked)


def _above_others_B(t: Trajectory):
    """(each outcome less the mean of its group, the group's size); exactly 0 if all are equal."""
    size_B = jnp.maximum(group_sum_B(t.real_B, t.group_B), 1.0)
    above_B = t.outcome_B - group_sum_B(t.real_B * t.outcome_B, t.group_B) / size_B
    same_B = uniform_B(t.outcome_B, t.group_B, t.real_B)
    # what rounding leaves of 0.1 - mean(0.1, 0.1, 0.1) would else be divided by almost nothing
    return jnp.where(same_B, 0.0, above_B), size_B


@dataclass(frozen=True)
class GroupRelative:
    """An answer's outcome less the mean of its group (GRPO, arXiv 2402.03300, sec. 4.1.2).

    divide: by the group's standard deviation (of a sample: n - 1), plus 1e-4 as in TRL. Without it
      (Dr. GRPO, arXiv 2503.20783) a group counts by how far its answers are apart.
    """

    kind: ClassVar[str] = "group_relative"
    smallest_group: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ()
    divide: bool = True

    def compute(self, t: Trajectory):
        above_B, size_B = _above_others_B(t)
        if self.divide:
            squares_B = group_sum_B(t.real_B * jnp.square(above_B), t.group_B)
            deviation_B = jnp.sqrt(squares_B / jnp.maximum(size_B - 1, 1.0))
            above_B = above_B / (deviation_B + EPSILON)
        return t.mask_BT * above_B[:, None], None


@dataclass(frozen=True)
class LeaveOneOut:
    """An answer's outcome less the mean of the *others* of its group (RLOO, arXiv 2402.14740)."""

    kind: ClassVar[str] = "leave_one_out"
    smallest_group: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ()

    def compute(self, t: Trajectory):
        above_B, size_B = _above_others_B(t)
        return t.mask_BT * (above_B * size_B / jnp.maximum(size_B - 1, 1.0))[:, None], None


# --- Along the text -----------------------------------------------------------------------------


def normalised(advantages_BT, mask_BT):
    """Mean 0 and deviation 1 over all choices of the batch; all equal ones become exactly 0."""
    count = jnp.maximum(jnp.sum(mask_BT), 1.0)
    most = jnp.max(advantages_BT, where=mask_BT > 0, initial=-jnp.inf)
    least = jnp.min(advantages_BT, where=mask_BT > 0, initial=jnp.inf)
    above_BT = mask_BT * (advantages_BT - jnp.sum(mask_BT * advantages_BT) / count)
    above_BT = jnp.where(most > least, above_BT, 0.0)
    return above_BT / (jnp.sqrt(jnp.sum(jnp.square(above_BT)) / count) + EPSILON)


def backwards(rewards_BT, values_BT, mask_BT, after_B, gamma: float, decay: float):
    """Sums of TD errors from the end: ``A_t = r_t + gamma V_next - V_t + gamma decay A_next``.

    "Next" is the next choice: tokens in between that the policy did not choose cost no time. One
    choice after the other, so that padding changes no bit.

    Args:
      after_B: the value of the state after the last choice.
    """

    def earlier(carry, place):
        value_B, sum_B = carry
        reward_B, own_B, chosen_B = place
        new_B = reward_B + gamma * value_B - own_B + gamma * decay * sum_B
        value_B, sum_B = (
            jnp.where(chosen_B > 0, own_B, value_B),
            jnp.where(chosen_B > 0, new_B, sum_B),
        )
        return (value_B, sum_B), sum_B

    places = tuple(a_BT.astype(jnp.float32).T for a_BT in (rewards_BT, values_BT, mask_BT))
    start = (after_B.astype(jnp.float32), jnp.zeros_like(after_B, jnp.float32))
    _, sums_TB = jax.lax.scan(earlier, start, places, reverse=True)
    return sums_TB.T * mask_BT


@dataclass(frozen=True)
class GAE:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) from a critic's values.

    A text that was cut short had a future: its last choice is followed by the critic's value of
    what was there, not by 0 (arXiv 2602.10604). The critic learns advantage plus value.

    gamma: discount of a step.
    gae_lambda: 1 for whole returns, as in Open-Reasoner-Zero (arXiv 2503.24290; gamma is 1, too).
    normalise: advantages to mean 0 and deviation 1 over the choices of the batch.
    """

    kind: ClassVar[str] = "gae"
    smallest_group: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("values",)
    gamma: float = 1.0
    gae_lambda: float = 1.0
    normalise: bool = True

    def validate(self):
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")

    def compute(self, t: Trajectory):
        values_BT = t.values_BT.astype(jnp.float32)
        places_T = jnp.arange(values_BT.shape[1])
        last_B = jnp.max(jnp.where(t.mask_BT > 0, places_T, -1), axis=1)
        after_B1 = jnp.minimum(last_B + 1, places_T[-1])[:, None]
        after_B = t.cut_B * jnp.take_along_axis(values_BT, after_B1, axis=1)[:, 0]
        advantages_BT = backwards(
            t.rewards_BT, values_BT, t.mask_BT, after_B, self.gamma, self.gae_lambda
        )
        returns_BT = t.mask_BT * (advantages_BT + values_BT)
        if self.normalise:
            advantages_BT = normalised(advantages_BT, t.mask_BT)
        return advantages_BT, returns_BT


@dataclass(frozen=True)
class BatchNormalised:
    """Rewards to go, normalised over the choices of the batch (REINFORCE++, arXiv 2501.03262).

    Put the KL divergence into the rewards (``KL(..., "k1", "reward")``): it is the only part that
    differs from choice to choice.

    baseline: take the group's mean outcome off first (REINFORCE++-baseline).
    """

    kind: ClassVar[str] = "batch_normalised"
    needs: ClassVar[tuple[str, ...]] = ()
    baseline: bool = False

    @property
    def smallest_group(self) -> int:
        return 2 if self.baseline else 1

    def compute(self, t: Trajectory):
        zero_B, zero_BT = jnp.zeros(len(t.mask_BT)), jnp.zeros(t.mask_BT.shape)
        togo_BT = backwards(t.rewards_BT, zero_BT, t.mask_BT, zero_B, 1.0, 1.0)
        if self.baseline:
            above_B, _ = _above_others_B(t)
            togo_BT = togo_BT - t.mask_BT * (t.outcome_B - above_B)[:, None]
        return normalised(togo_BT, t.mask_BT), None


SignalKind = GAE | GroupRelative | LeaveOneOut | BatchNormalised
