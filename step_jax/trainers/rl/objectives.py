"""Objectives: a policy term, corrections and more terms, each reduced to (total, weight).

An :class:`Algorithm` says which. Everything is sums over rows, so accumulation, padding and devices
change nothing; what compares rows with each other was done by the signal. The table of algorithms
is in ``algorithms``; one of your own needs no line here. docs/rl.md has the equations.

Three policies meet in a loss: pi, which is being trained; ``old``, the trainer's before the batch's
first update; and ``behaviour``, the one that wrote, perhaps with older parameters or by an engine
that rounds otherwise. Policy terms look at pi / old, corrections at old / behaviour.

Shape suffixes: B rows, T places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.trainers.rl import trajectory
from step_jax.trainers.rl.signals import KL, Overlong, Signal, bounded, kl_estimate, shaped, telling
from step_jax.trainers.rl.trajectory import Trajectory
from step_jax.training.step import LossOutput, Part

Level = Literal["token", "sequence"]


def at_level(log_ratio_BT, mask_BT, level: Level):
    """The log-ratio of each token, or for all tokens of a row their mean: of the geometric mean."""
    if level == "token":
        return log_ratio_BT
    count_B1 = jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True), 1.0)
    mean_B1 = jnp.sum(mask_BT * log_ratio_BT, axis=1, keepdims=True) / count_B1
    return jnp.broadcast_to(mean_B1, mask_BT.shape)


# --- Policy terms -------------------------------------------------------------------------------


class PolicyTerm(Protocol):
    """What a policy term has, be it of the union ``PolicyKind`` or of your own."""

    def loss(self, logprobs_BT, log_ratio_BT, advantages_BT, mask_BT):
        """(loss of each token, which of them were clipped as 0 or 1).

        Args:
          logprobs_BT: log pi of the choices, differentiable.
          log_ratio_BT: log pi / old, differentiable and bounded.
        """
        ...


@dataclass(frozen=True)
class PolicyGradient:
    """``-A log pi`` (Williams, 1992)."""

    kind: ClassVar[str] = "policy_gradient"

    def loss(self, logprobs_BT, log_ratio_BT, advantages_BT, mask_BT):
        return -advantages_BT * logprobs_BT, jnp.zeros_like(mask_BT)


@dataclass(frozen=True)
class Clip:
    """``-min(r A, clip(r, 1 - low, 1 + high) A)`` of r = pi / old (PPO, arXiv 1707.06347, eq. 7).

    low, high: how far a ratio may go; a larger ``high`` is clip-higher (DAPO, arXiv 2503.14476).
    level: of ``sequence`` the ratio is the answer's geometric mean (GSPO, arXiv 2507.18071).
    dual: c > 1 bounds the loss of a bad choice by ``c |A|`` (arXiv 1912.09729); None: no bound.
    """

    kind: ClassVar[str] = "clip"
    low: float = 0.2
    high: float = 0.2
    level: Level = "token"
    dual: float | None = None

    def validate(self):
        checks.above(self, high=0, dual=1)
        if not 0 < self.low < 1:
            raise ConfigError(f"low is {self.low}; it must be in (0, 1)")

    def loss(self, logprobs_BT, log_ratio_BT, advantages_BT, mask_BT):
        ratio_BT = jnp.exp(at_level(log_ratio_BT, mask_BT, self.level))
        free_BT = ratio_BT * advantages_BT
        held_BT = jnp.clip(ratio_BT, 1 - self.low, 1 + self.high) * advantages_BT
        gain_BT = jnp.minimum(free_BT, held_BT)
        clipped_BT = held_BT < free_BT
        if self.dual is not None:
            least_BT = self.dual * advantages_BT
            bounded_BT = (advantages_BT < 0) & (least_BT > gain_BT)
            gain_BT = jnp.where(bounded_BT, least_BT, gain_BT)
            clipped_BT |= bounded_BT
        return -gain_BT, clipped_BT.astype(jnp.float32)


@dataclass(frozen=True)
class ClippedWeight:
    """``-sg(min(r, high)) A log pi``: every token keeps a gradient (CISPO, arXiv 2506.13585).

    high: the largest weight. The paper names none; 5 is ScaleRL's (arXiv 2510.13786) and TRL's.
    """

    kind: ClassVar[str] = "clipped_weight"
    high: float = 5.0

    def validate(self):
        checks.above(self, high=1)

    def loss(self, logprobs_BT, log_ratio_BT, advantages_BT, mask_BT):
        ratio_BT = jax.lax.stop_gradient(jnp.exp(log_ratio_BT))
        weight_BT = jnp.minimum(ratio_BT, self.high)
        return -weight_BT * advantages_BT * logprobs_BT, (ratio_BT > self.high).astype(jnp.float32)


PolicyKind = PolicyGradient | Clip | ClippedWeight


# --- Corrections --------------------------------------------------------------------------------


class Correction(Protocol):
    """What a correction has. Its weights multiply the policy term, without a gradient."""

    @property
    def level(self) -> Level: ...

    def weight(self, ratio_BT) -> jax.Array:
        """The weight of each token, of old / behaviour at the correction's level."""
        ...


@dataclass(frozen=True)
class Truncate:
    """The weight ``min(w, high)`` of w = old / behaviour (truncated importance sampling)."""

    kind: ClassVar[str] = "truncate"
    high: float = 2.0
    level: Level = "token"

    def validate(self):
        checks.above(self, high=0)

    def weight(self, ratio_BT):
        return jnp.minimum(ratio_BT, self.high)


@dataclass(frozen=True)
class Mask:
    """The weight w where it is in [low, high], else 0 (masked importance sampling, IcePop)."""

    kind: ClassVar[str] = "mask"
    low: float = 0.5
    high: float = 2.0
    level: Level = "token"

    def validate(self):
        _check_range(self)

    def weight(self, ratio_BT):
        return jnp.where(_inside(self, ratio_BT), ratio_BT, 0.0)


@dataclass(frozen=True)
class Filter:
    """The weight 1 where w is in [low, high], else 0: a choice is taken or left (MIS-PO)."""

    kind: ClassVar[str] = "filter"
    low: float = 0.5
    high: float = 2.0
    level: Level = "token"

    def validate(self):
        _check_range(self)

    def weight(self, ratio_BT):
        return _inside(self, ratio_BT).astype(jnp.float32)


CorrectionKind = Truncate | Mask | Filter


def _check_range(c: Mask | Filter):
    if not 0 <= c.low < 1 < c.high:
        raise ConfigError(f"{c.kind}: the range [{c.low}, {c.high}] must have 1 inside it")


def _inside(c: Mask | Filter, ratio_BT):
    return (ratio_BT >= c.low) & (ratio_BT <= c.high)


# --- Reductions ---------------------------------------------------------------------------------


class Reduction(Protocol):
    """What a reduction has: how the losses of tokens become one number."""

    def part(self, loss_BT, mask_BT, coefficient: float = 1.0) -> Part: ...


@dataclass(frozen=True)
class TokenMean:
    """The mean over all choices of the batch: a long answer has more to say (DAPO, eq. 8)."""

    kind: ClassVar[str] = "token_mean"

    def part(self, loss_BT, mask_BT, coefficient: float = 1.0) -> Part:
        return Part(jnp.sum(mask_BT * loss_BT), jnp.sum(mask_BT), coefficient)


@dataclass(frozen=True)
class SequenceMean:
    """The mean over answers of the mean over an answer's tokens (GRPO, arXiv 2402.03300, eq. 3)."""

    kind: ClassVar[str] = "sequence_mean"

    def part(self, loss_BT, mask_BT, coefficient: float = 1.0) -> Part:
        count_B = jnp.sum(mask_BT, axis=1)
        mean_B = jnp.sum(mask_BT * loss_BT, axis=1) / jnp.maximum(count_B, 1.0)
        return Part(jnp.sum(mean_B), jnp.sum(count_B > 0, dtype=jnp.float32), coefficient)


@dataclass(frozen=True)
class Constant:
    """The mean over answers of the sum over tokens, by a constant (Dr. GRPO, arXiv 2503.20783).

    length: the constant: the most tokens of an answer; 1 for plain sums (RLOO).
    """

    kind: ClassVar[str] = "constant"
    length: int = 1

    def validate(self):
        checks.at_least(self, length=1)

    def part(self, loss_BT, mask_BT, coefficient: float = 1.0) -> Part:
        answers = jnp.sum(jnp.any(mask_BT > 0, axis=1), dtype=jnp.float32)
        return Part(jnp.sum(mask_BT * loss_BT), self.length * answers, coefficient)


ReductionKind = TokenMean | SequenceMean | Constant


# --- Algorithms ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Critic:
    """The critic's loss ``max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2``.

    clip: how far a value may go from what it was (PPO's implementation); None for no clipping.
    """

    clip: float | None = None

    def validate(self):
        checks.above(self, clip=0)


@dataclass(frozen=True)
class Algorithm:
    """What is learned from a batch of trajectories.

    signal: from rewards to advantages.
    policy: the term of the policy.
    reduction: from tokens to one number, of the policy term and of the KL divergence.
    corrections: weights for what wrote the batch being another policy; they multiply.
    kl: the pull to a reference policy; None for none, and then no reference is needed.
    entropy: coefficient of the bonus for the mean entropy of a choice.
    critic: its loss, for a signal that reads values.
    overlong: punishment of length.
    dynamic_sampling: groups of equal scores are dropped, and the loop samples others for them.
    """

    signal: Signal
    policy: PolicyTerm
    reduction: Reduction
    corrections: tuple[Correction, ...] = ()
    kl: KL | None = None
    entropy: float = 0.0
    critic: Critic | None = None
    overlong: Overlong | None = None
    dynamic_sampling: bool = False

    def validate(self):
        checks.at_least(self, entropy=0)
        if (self.critic is not None) != ("values" in self.signal.needs):
            raise ConfigError("a critic and a signal that reads values need each other")

    @property
    def needs(self) -> tuple[str, ...]:
        """The streams that a trajectory must have to be judged."""
        return (*self.signal.needs, *(("reference",) if self.kl is not None else ()))

    def check(self, t: Trajectory) -> None:
        """Raises DataError if it cannot be learned from; see ``trajectory.check``."""
        trajectory.check(t, self.needs, self.signal.smallest_group)

    def judged(self, t: Trajectory) -> Trajectory:
        """The whole batch with advantages (and returns), ready for :func:`policy_loss`. Pure."""
        if self.dynamic_sampling:
            t = telling(t, t.outcome_B)
        t = shaped(t, self.overlong, self.kl)
        advantages_BT, returns_BT = self.signal.compute(t)
        return replace(t, advantages_BT=advantages_BT, returns_BT=returns_BT)


def policy_loss(how: Algorithm, t: Trajectory, logprobs_BT, entropy_BT=None) -> LossOutput:
    """The loss of a microbatch.

    Args:
      t: with advantages. Without ``old_BT`` the ratio is pi / behaviour (nothing is corrected). A
        loop that takes one step a batch may give pi itself, its gradient stopped.
      logprobs_BT: float32, log pi of the targets, at the temperature they were drawn at;
        differentiable.
      entropy_BT: float32, of pi at each place, differentiable; needed for the bonus.

    Returns:
      The parts ``policy``, and ``kl`` and ``entropy`` if asked for. Metrics are means over choices:
      ``ratio`` (pi / old), ``clip_share``, ``kl_behaviour`` (k3 of behaviour from pi),
      ``rollout_gap`` (|log old / behaviour|, with ``old_BT``), ``masked_share`` (of weight 0, with
      corrections) and ``entropy``.
    """
    mask_BT = t.mask_BT.astype(jnp.float32)

    def chosen(a_BT):
        """What stands elsewhere (log-probabilities of padding) may be anything."""
        return jnp.where(mask_BT > 0, a_BT.astype(jnp.float32), 0.0)

    logprobs_BT, behaviour_BT = chosen(logprobs_BT), chosen(t.logprobs_BT)
    old_BT = behaviour_BT if t.old_BT is None else chosen(t.old_BT)
    log_ratio_BT = bounded(logprobs_BT - old_BT)
    loss_BT, clipped_BT = how.policy.loss(logprobs_BT, log_ratio_BT, t.advantages_BT, mask_BT)
    figures = {
        "ratio": jnp.exp(log_ratio_BT),
        "clip_share": clipped_BT,
        "kl_behaviour": kl_estimate("k3", bounded(behaviour_BT - logprobs_BT)),
    }
    if t.old_BT is not None:
        figures["rollout_gap"] = jnp.abs(old_BT - behaviour_BT)
    if how.corrections:
        if t.old_BT is None:
            raise ConfigError("corrections compare the trainer with what wrote: give old_BT")
        weight_BT = _weights(how.corrections, old_BT - behaviour_BT, mask_BT)
        loss_BT = weight_BT * loss_BT
        figures["masked_share"] = weight_BT == 0
    parts = {"policy": how.reduction.part(loss_BT, mask_BT)}
    if how.kl is not None and how.kl.place == "loss":
        kl_BT = how.kl.of(logprobs_BT, chosen(t.reference_BT))
        parts["kl"] = how.reduction.part(kl_BT, mask_BT, how.kl.coefficient)
    if how.entropy and entropy_BT is None:
        raise ConfigError("the entropy bonus needs the entropy of each place")
    if entropy_BT is not None:
        figures["entropy"] = chosen(entropy_BT)
    if how.entropy:
        parts["entropy"] = TokenMean().part(figures["entropy"], mask_BT, -how.entropy)
    return LossOutput(parts, _means(figures, mask_BT))


def critic_loss(how: Critic, t: Trajectory, values_BT) -> LossOutput:
    """The part ``value``: the mean over choices of the critic's loss of ``values_BT``.

    Metric: ``value_clip_share``, if values are clipped.
    """
    mask_BT = t.mask_BT.astype(jnp.float32)
    values_BT = jnp.where(mask_BT > 0, values_BT.astype(jnp.float32), 0.0)
    error_BT = jnp.square(values_BT - t.returns_BT)
    metrics = {}
    if how.clip is not None:
        held_BT = jnp.clip(values_BT, t.values_BT - how.clip, t.values_BT + how.clip)
        held_BT = jnp.square(held_BT - t.returns_BT)
        metrics = _means({"value_clip_share": held_BT > error_BT}, mask_BT)
        error_BT = jnp.maximum(error_BT, held_BT)
    return LossOutput({"value": TokenMean().part(error_BT / 2, mask_BT)}, metrics)


def _weights(corrections: tuple[Correction, ...], log_ratio_BT, mask_BT):
    weight_BT = jnp.ones_like(mask_BT)
    for correction in corrections:
        ratio_BT = jnp.exp(bounded(at_level(log_ratio_BT, mask_BT, correction.level)))
        weight_BT *= correction.weight(ratio_BT)
    return jax.lax.stop_gradient(weight_BT)


def _means(figures, mask_BT):
    count = jnp.sum(mask_BT)
    return {
        name: (jax.lax.stop_gradient(jnp.sum(mask_BT * a_BT)), count)
        for name, a_BT in figures.items()
    }
