"""Which experts a token is sent to, and what keeps their loads equal.

Shape suffixes: B rows, T tokens of a row, D model width, E experts, K experts per token, G groups.
Everything here is float32 and knows nothing of where experts live.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.core.spec import ZEROS, ParamSpec
from step_jax.models.layers.initialisation import Initialisation


@dataclass(frozen=True)
class Router:
    """Scores experts and sends each token to the ``top_k`` best.

    score: ``softmax`` over all experts (Mixtral, Qwen3, Step-3), or ``sigmoid`` of each
      (DeepSeek-V3, Step-3.5-Flash).
    normalise: the chosen experts' weights are divided by their sum.
    scale: multiplies the weights after that (routed scaling factor).
    groups, top_groups: experts are chosen among those of the ``top_groups`` groups whose two best
      experts score highest together (arXiv 2412.19437, 2.1.2); 1 and 1 for no limit.
    bias: experts are chosen by score plus a learned bias, but weighted by the score alone
      (arXiv 2408.15664); ``bias_rate`` is its step per update, 0 leaves it as it is.
    balance_loss: coefficient of ``E sum_e f_e p_e`` (arXiv 2101.03961), f an expert's share of the
      assignments and p its mean probability over the tokens of a microbatch.
    group_loss, loss_groups: coefficient of the same over ``loss_groups`` groups of neighbouring
      experts, usually the expert-parallel shards (arXiv 2602.10604).
    z_loss: coefficient of the mean squared log-partition of the scores (arXiv 2202.08906).
    frozen: weight and bias are left as they are and nothing is balanced (mid-training).
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    bias: bool = False
    bias_rate: float = 0.0
    balance_loss: float = 0.0
    group_loss: float = 0.0
    loss_groups: int = 1
    z_loss: float = 0.0
    frozen: bool = False

    def check(self, experts: int) -> None:
        """Raises ConfigError if this cannot route to ``experts`` experts."""
        if not 1 <= self.top_k <= experts:
            raise ConfigError(f"top_k is {self.top_k}, but there are {experts} experts")
        for name in ("groups", "loss_groups"):
            groups = getattr(self, name)
            if groups < 1 or experts % groups:
                raise ConfigError(f"{name} {groups} does not divide {experts} experts")
        if not 1 <= self.top_groups <= self.groups:
            raise ConfigError(
                f"top_groups is {self.top_groups}, but there are {self.groups} groups"
            )
        if self.top_k > self.top_groups * (experts // self.groups):
            raise ConfigError(
                f"top_k {self.top_k} is more than the experts of {self.top_groups} groups"
            )
        if self.bias_rate and not self.bias:
            raise ConfigError("bias_rate needs bias: true")
        checks.at_least(self, bias_rate=0, balance_loss=0, group_loss=0, z_loss=0)
        checks.above(self, scale=0)

    def specs(
        self, width: int, experts: int, init: Initialisation
    ) -> tuple[ParamSpec, ParamSpec | None]:
        """(weight, selection bias or None)."""
        learned = {"trainable": not self.frozen}
        weight = ParamSpec(
            (width, experts), ("embed", None), init.matrix(width), role="router", **learned
        )
        bias = ParamSpec(
            (experts,), (None,), ZEROS, role="balance", balance_rate=self.bias_rate,
            trainable=not self.frozen and self.bias_rate > 0,
        )  # fmt: skip
        return weight, bias if self.bias else None

    def apply(self, weight_DE, bias_E, x_BTD, counted_BT, chosen_BTK=None) -> Routing:
        """Routes every token.

        Args:
          weight_DE, bias_E: float32; the bias may be None.
          x_BTD: hidden states of any dtype.
          counted_BT: bool, False for padding, which goes nowhere and counts nowhere.
          chosen_BTK: int32 decisions to replay instead of choosing anew (their weights are
            computed afresh), e.g. those of a rollout's engine.
        """
        if self.frozen:
            weight_DE = jax.lax.stop_gradient(weight_DE)
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE", x_BTD.astype(jnp.float32), weight_DE.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        softmax = self.score == "softmax"
        score_BTE = jax.nn.softmax(logits_BTE) if softmax else jax.nn.sigmoid(logits_BTE)
        if chosen_BTK is None:
            chosen_BTK = self._choose(score_BTE, bias_E)
        weight_BTK = jnp.take_along_axis(score_BTE, chosen_BTK, axis=-1)
        mass_BT = jnp.sum(weight_BTK, axis=-1)
        total_BT: Any = 1.0 if softmax else jnp.sum(score_BTE, axis=-1)
        if self.normalise:
            weight_BTK /= mass_BT[..., None] + 1e-20
        probability_BTE = score_BTE if softmax else score_BTE / total_BT[..., None]
        load_E = _load(chosen_BTK, counted_BT, logits_BTE.shape[-1])
        if bias_E is not None and not self.frozen:
            weight_BTK = _with_load(weight_BTK, bias_E, load_E - jnp.mean(load_E))
        weight_BTK = jnp.where(counted_BT[..., None], weight_BTK * self.scale, 0.0)
        tokens = jnp.sum(counted_BT, dtype=jnp.float32)
        return Routing(
            chosen_BTK=chosen_BTK,
            weight_BTK=weight_BTK,
            load_E=load_E,
            tokens=tokens,
            probability_E=jnp.sum(jnp.where(counted_BT[..., None], probability_BTE, 0.0), (0, 1)),
            squared=_sum(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)), counted_BT),
            entropy=_reported(jax.scipy.special.entr(probability_BTE).sum(-1), counted_BT),
            confidence=_reported(mass_BT / total_BT, counted_BT),
        )

    def _choose(self, score_BTE, bias_E):
        choice_BTE = jax.lax.stop_gradient(score_BTE)
        if bias_E is not None:
            choice_BTE += jax.lax.stop_gradient(bias_E)
        if self.groups > 1:
            groups_BTGe = choice_BTE.reshape(*choice_BTE.shape[:-1], self.groups, -1)
            best_BTG = jnp.sum(jax.lax.top_k(groups_BTGe, min(2, groups_BTGe.shape[-1]))[0], -1)
            _, kept_BTg = jax.lax.top_k(best_BTG, self.top_groups)
            open_BTG = jnp.any(kept_BTg[..., None] == jnp.arange(self.groups), axis=-2)
            choice_BTE = jnp.where(open_BTG[..., None], groups_BTGe, -jnp.inf).reshape(
                choice_BTE.shape
            )
        return jax.lax.top_k(choice_BTE, self.top_k)[1]

    def loss(self, sums):
        """What balances and bounds the scores, to be added to the mean loss; float32.

        Of sums, not of means: so it is that of a whole batch which came in several pieces.

        Args:
          sums: a Routing, or what carries its ``load_E``, ``tokens``, ``probability_E`` and
            ``squared``; leading axes (layers) are kept.
        """
        load_E, tokens = sums.load_E, jnp.maximum(sums.tokens, 1.0)
        if self.frozen:
            return jnp.zeros_like(tokens)
        E, loss = load_E.shape[-1], self.z_loss * sums.squared / tokens
        share_E = load_E / (tokens[..., None] * self.top_k)
        mean_E = sums.probability_E / tokens[..., None]
        for coefficient, G in ((self.balance_loss, E), (self.group_loss, self.loss_groups)):
            f_G, p_G = (a.reshape(*a.shape[:-1], G, -1).sum(-1) for a in (share_E, mean_E))
            loss += coefficient * G * jnp.sum(f_G * p_G, -1)
        return loss


@struct.dataclass
class Routing:
    """Decisions of one layer for one batch, and what they look like.

    Attributes:
      chosen_BTK: int32 experts of every token.
      weight_BTK: float32 what each expert's output is multiplied by; 0 for padding.
      load_E: float32 assignments of every expert.
      tokens: float32 number of tokens routed.
      probability_E, squared: sums over tokens of the probabilities and of the squared
        log-partition, from which :meth:`Router.loss` takes its gradient.
      entropy, confidence: sums over tokens of the probabilities' entropy (nats) and of the chosen
        experts' probability.
    """

    chosen_BTK: jax.Array
    weight_BTK: jax.Array
    load_E: jax.Array
    tokens: jax.Array
    probability_E: jax.Array
    squared: jax.Array
    entropy: jax.Array
    confidence: jax.Array


def _sum(values_BT, counted_BT):
    return jnp.sum(jnp.where(counted_BT, values_BT, 0.0))


def _reported(values_BT, counted_BT):
    return jax.lax.stop_gradient(_sum(values_BT, counted_BT))


def _load(chosen_BTK, counted_BT, experts: int):
    # a comparison per expert, not a scatter: it splits over a mesh and is one pass
    hit_BTKE = chosen_BTK[..., None] == jnp.arange(experts)
    return jnp.sum(hit_BTKE & counted_BT[..., None, None], (0, 1, 2), dtype=jnp.float32)


@jax.custom_vjp
def _with_load(weight_BTK, bias_E, excess_E):
    """``weight_BTK``; the gradient of ``bias_E`` is ``excess_E``.

    So an expert's load above the mean adds up over devices and microbatches as gradients do, and
    the optimizer finds it where it finds every gradient.
    """
    return weight_BTK


def _with_load_forward(weight_BTK, bias_E, excess_E):
    return weight_BTK, excess_E


def _with_load_backward(excess_E, g_BTK):
    return g_BTK, excess_E, jnp.zeros_like(excess_E)


_with_load.defvjp(_with_load_forward, _with_load_backward)
