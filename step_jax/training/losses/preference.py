"""Losses that learn from judged answers: pairs (DPO and its relatives), single verdicts, rewards.

They are functions of how likely whole answers are, of sums of log-probabilities and of lengths, and
know nothing of models. Each is a mean over the rows of the whole batch, so microbatches, padding
and devices change nothing. A loss that ``compares`` needs a reference policy. ``PREFERENCES`` is
the table; docs/rl.md has the equations.

Shape suffixes: B rows of a microbatch, R rows of the whole batch, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.training.step import LossOutput, Part

log_sigmoid = jax.nn.log_sigmoid


@struct.dataclass
class Answers:
    """How likely answers are to their prompts.

    Attributes:
      logprobs_B: float32, log pi(y | x), the sum over the answer's tokens; differentiable.
      lengths_B: float32, tokens of the answer.
      reference_B: float32, the same sum under the frozen reference policy; None without one.
    """

    logprobs_B: jax.Array
    lengths_B: jax.Array
    reference_B: jax.Array | None = None

    @classmethod
    def of(cls, logprobs_BT, mask_BT, reference_BT=None) -> Answers:
        """From log-probabilities of tokens and a mask, 1 where a token belongs to the answer."""

        def total(a_BT):
            return jnp.sum(jnp.where(mask_BT > 0, a_BT.astype(jnp.float32), 0.0), axis=1)

        reference_B = None if reference_BT is None else jax.lax.stop_gradient(total(reference_BT))
        return cls(total(logprobs_BT), jnp.sum(mask_BT, axis=1, dtype=jnp.float32), reference_B)

    @property
    def ratio_B(self):
        """log pi(y | x) / pi_ref(y | x)."""
        if self.reference_B is None:
            raise ConfigError("this loss compares with a reference policy: give its log-probs")
        return self.logprobs_B - jax.lax.stop_gradient(self.reference_B)

    @property
    def mean_B(self):
        """log pi(y | x) / |y|; 0 for an empty answer, which padding is."""
        return self.logprobs_B / jnp.maximum(self.lengths_B, 1.0)


@struct.dataclass
class Pairs:
    """Two answers to each prompt. ``weights_B`` is 0 for padding, or how much a pair counts."""

    chosen: Answers
    rejected: Answers
    weights_B: jax.Array


@struct.dataclass
class Verdicts:
    """Single answers found good or bad, for :class:`KTO`.

    Attributes:
      answers: the judged ones.
      unrelated: answers y' to the same prompts that belong to other ones (arXiv 2402.01306, 4.1:
        within the batch, each prompt gets the answer of the next).
      good_B: float32, 1 for a desirable answer, 0 for an undesirable one.
      weights_B: 0 for padding, else how much a row counts.
      row_B: int32, the row's number in the whole batch, of ``rows``.
    """

    answers: Answers
    unrelated: Answers
    good_B: jax.Array
    weights_B: jax.Array
    row_B: jax.Array
    rows: int = struct.field(pytree_node=False)


@dataclass(frozen=True)
class DPO:
    """``-log s(b (d_w - d_l))``, d the log-ratio to the reference (arXiv 2305.18290, eq. 7).

    beta: b, the strength of the pull to the reference.
    label_smoothing: e, the share of labels taken to be wrong: ``-(1 - e) log s(m) - e log s(-m)``
      (cDPO, Mitchell 2023, "A note on DPO with noisy preferences").
    """

    kind: ClassVar[str] = "dpo"
    compares: ClassVar[bool] = True
    beta: float = 0.1
    label_smoothing: float = 0.0

    def validate(self):
        checks.above(self, beta=0)
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"label_smoothing is {self.label_smoothing}; it must be in [0, 0.5): from there on "
                "the labels say nothing, or the opposite"
            )

    def reward_B(self, answers: Answers):
        return self.beta * answers.ratio_B

    def parts(self, pairs: Pairs) -> dict[str, Part]:
        m_B, e = self.reward_B(pairs.chosen) - self.reward_B(pairs.rejected), self.label_smoothing
        loss_B = -(1 - e) * log_sigmoid(m_B) - e * log_sigmoid(-m_B)
        return {"dpo": _mean(loss_B, pairs.weights_B)}


@dataclass(frozen=True)
class IPO:
    """``(h - 1 / (2 tau))^2``, h the difference of the two log-ratios (arXiv 2310.12036, eq. 17).

    beta: tau.
    per_token: take each log-ratio per token of its answer, else the loss grows with the square of
      the lengths. The paper writes sums; its authors' results are of means (as in TRL).
    """

    kind: ClassVar[str] = "ipo"
    compares: ClassVar[bool] = True
    beta: float = 0.1
    per_token: bool = True

    def validate(self):
        checks.above(self, beta=0)

    def reward_B(self, answers: Answers):
        lengths_B = jnp.maximum(answers.lengths_B, 1.0) if self.per_token else 1.0
        return self.beta * answers.ratio_B / lengths_B

    def parts(self, pairs: Pairs) -> dict[str, Part]:
        h_B = (self.reward_B(pairs.chosen) - self.reward_B(pairs.rejected)) / self.beta
        return {"ipo": _mean(jnp.square(h_B - 1 / (2 * self.beta)), pairs.weights_B)}


@dataclass(frozen=True)
class ORPO:
    """Likelihood of the chosen, and the log of the odds ratio (arXiv 2403.07691, eq. 6 and 7).

    ``nll(y_w) - lambda log s(log odds(y_w) - log odds(y_l))`` with odds(y) = p / (1 - p) of the
    geometric mean p of an answer's token probabilities. No reference policy. The likelihood is a
    mean over the tokens of all chosen answers.

    coefficient: lambda.
    """

    kind: ClassVar[str] = "orpo"
    compares: ClassVar[bool] = False
    coefficient: float = 0.1

    def validate(self):
        checks.above(self, coefficient=0)

    def reward_B(self, answers: Answers):
        return self.coefficient * answers.mean_B

    def parts(self, pairs: Pairs) -> dict[str, Part]:
        chosen, w_B = pairs.chosen, pairs.weights_B
        odds_B = _log_odds(chosen.mean_B) - _log_odds(pairs.rejected.mean_B)
        nll = Part(-jnp.sum(w_B * chosen.logprobs_B), jnp.sum(w_B * chosen.lengths_B))
        return {"nll": nll, "odds": _mean(-log_sigmoid(odds_B), w_B, self.coefficient)}


@dataclass(frozen=True)
class SimPO:
    """``-log s(b log pi(y_w) / |y_w| - b log pi(y_l) / |y_l| - gamma)`` (arXiv 2405.14734, eq. 6).

    No reference policy. beta: b; gamma: the margin that is asked for.
    """

    kind: ClassVar[str] = "simpo"
    compares: ClassVar[bool] = False
    beta: float = 2.0
    gamma: float = 1.0

    def validate(self):
        checks.above(self, beta=0)
        checks.at_least(self, gamma=0)

    def reward_B(self, answers: Answers):
        return self.beta * answers.mean_B

    def parts(self, pairs: Pairs) -> dict[str, Part]:
        m_B = self.reward_B(pairs.chosen) - self.reward_B(pairs.rejected)
        return {"simpo": _mean(-log_sigmoid(m_B - self.gamma), pairs.weights_B)}


@dataclass(frozen=True)
class KTO:
    """``mean of lambda_y - v(x, y)`` over single verdicts (arXiv 2402.01306, L_KTO).

    v is ``desirable * s(b (d - z))`` of a good answer and ``undesirable * s(b (z - d))`` of a bad
    one; z = max(0, mean of the log-ratios of unrelated answers), over the whole batch and without
    a gradient, stands for the KL divergence of the policy from the reference.

    beta: b. desirable, undesirable: the two lambdas; with n good and m bad answers the paper asks
      for ``desirable n / (undesirable m)`` from 1 to 3/2.
    """

    kind: ClassVar[str] = "kto"
    compares: ClassVar[bool] = True
    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0

    def validate(self):
        checks.above(self, beta=0, desirable=0, undesirable=0)

    def reward_B(self, answers: Answers):
        return self.beta * answers.ratio_B

    def joint(self, sums) -> dict[str, jax.Array]:
        """The part ``value`` from the sums of the whole batch, see :func:`kto_loss`."""
        weight = jnp.where(sums["weight"] == 0, 1.0, sums["weight"])
        z = jax.lax.stop_gradient(jnp.maximum(sums["kl"] / weight, 0.0))
        value_R = sums["lambda"] * jax.nn.sigmoid(self.beta * sums["sign"] * (sums["ratio"] - z))
        return {"value": -jnp.sum(value_R) / weight}


PairLoss = DPO | IPO | ORPO | SimPO
Preference = PairLoss | KTO

#: name -> the loss as its paper sets it
PREFERENCES: dict[str, Preference] = {
    "dpo": DPO(),
    "cdpo": DPO(label_smoothing=0.1),
    "ipo": IPO(),
    "kto": KTO(),
    "orpo": ORPO(),
    "simpo": SimPO(),
}


def pair_loss(how: PairLoss, pairs: Pairs) -> LossOutput:
    """The loss of pairs.

    Metrics: ``reward_chosen``, ``reward_rejected``, ``reward_margin`` (implicit rewards: what the
    loss compares), ``reward_accuracy`` (how often the chosen one's is the higher; equal ones are
    no success, so a policy that is its own reference starts at 0).
    """
    chosen_B, rejected_B = how.reward_B(pairs.chosen), how.reward_B(pairs.rejected)
    return LossOutput(how.parts(pairs), _pair_metrics(chosen_B, rejected_B, pairs.weights_B))


def kto_loss(how: KTO, verdicts: Verdicts) -> LossOutput:
    """The loss of single verdicts: the part ``lambda`` less the joint one, ``value``.

    Its z is one number of the whole batch that every row's term depends on, so the rows' log-ratios
    are the sums: each microbatch adds its rows at their own places.
    Metrics: ``reward_chosen``, ``reward_rejected`` (means over good and bad answers), ``kl`` (z
    before the maximum).
    """
    w_B, good_B = verdicts.weights_B.astype(jnp.float32), verdicts.good_B.astype(jnp.float32)
    lambda_B = jnp.where(good_B > 0, how.desirable, how.undesirable)
    kl = jax.lax.stop_gradient(jnp.sum(w_B * verdicts.unrelated.ratio_B))

    def placed_R(a_B):
        return jnp.zeros(verdicts.rows, jnp.float32).at[verdicts.row_B].add(a_B)

    sums = {
        "ratio": placed_R(verdicts.answers.ratio_B),
        "sign": placed_R(2 * good_B - 1),
        "lambda": placed_R(w_B * lambda_B),
        "kl": kl,
        "weight": jnp.sum(w_B),
    }

    reward_B = jax.lax.stop_gradient(how.reward_B(verdicts.answers))
    metrics = {"kl": (kl, jnp.sum(w_B))}
    for name, of_B in (("reward_chosen", w_B * good_B), ("reward_rejected", w_B * (1 - good_B))):
        metrics[name] = (jnp.sum(of_B * reward_B), jnp.sum(of_B))
    return LossOutput({"lambda": _mean(lambda_B, w_B)}, metrics, sums, how.joint)


@dataclass(frozen=True)
class BradleyTerry:
    """A reward model: ``-log s(r_w - r_l - margin)`` (Bradley and Terry 1952; arXiv 2203.02155).

    centre: coefficient of ``(r_w + r_l)^2``, which fixes the constant that pairs leave open
      (arXiv 2312.09244).
    """

    centre: float = 0.0

    def validate(self):
        checks.at_least(self, centre=0)


def reward_loss(
    how: BradleyTerry, chosen_B, rejected_B, weights_B, margin_B: jax.Array | float = 0.0
) -> LossOutput:
    """The loss of a reward model's two scores; ``margin_B`` by how much they shall differ at least
    (arXiv 2307.09288, eq. 2). Metrics as :func:`pair_loss`."""
    parts = {"ranking": _mean(-log_sigmoid(chosen_B - rejected_B - margin_B), weights_B)}
    if how.centre:
        parts["centre"] = _mean(jnp.square(chosen_B + rejected_B), weights_B, how.centre)
    return LossOutput(parts, _pair_metrics(chosen_B, rejected_B, weights_B))


def _mean(loss_B, weights_B, coefficient: float = 1.0) -> Part:
    return Part(jnp.sum(weights_B * loss_B), jnp.sum(weights_B), coefficient)


def _pair_metrics(chosen_B, rejected_B, weights_B):
    chosen_B, rejected_B = jax.lax.stop_gradient((chosen_B, rejected_B))
    of = {
        "reward_chosen": chosen_B,
        "reward_rejected": rejected_B,
        "reward_margin": chosen_B - rejected_B,
        "reward_accuracy": (chosen_B > rejected_B).astype(jnp.float32),
    }
    weight = jnp.sum(weights_B)
    return {name: (jnp.sum(weights_B * a_B), weight) for name, a_B in of.items()}


def _log_odds(logp_B):
    """log(p / (1 - p)) of log p; both forms of log(1 - p) are exact where they are used."""
    # 1 - p has no logarithm at p = 1, where padding is
    logp_B = jnp.minimum(logp_B, -1e-7)
    near_B = logp_B > -math.log(2)
    of_near = jnp.log(-jnp.expm1(jnp.where(near_B, logp_B, -1.0)))
    of_far = jnp.log1p(-jnp.exp(jnp.where(near_B, -1.0, logp_B)))
    return logp_B - jnp.where(near_B, of_near, of_far)
