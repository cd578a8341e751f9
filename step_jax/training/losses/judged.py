"""Losses of judged answers that a decoder gives to packed rows of examples (``data.preferences``).

Shape suffixes: B rows, S the two sides of an example, R = B S halves, T tokens of a half, K
examples of a row, N = B K, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from step_jax.core.sharding import Sharding
from step_jax.models import expert_health
from step_jax.models.context import Context, Execution
from step_jax.models.text.decoder import Decoder, DecoderParams
from step_jax.models.text.reward import RewardModel, RewardParams
from step_jax.models.tokens import Tokens
from step_jax.ops.token_logprobs import token_logprobs
from step_jax.training.losses.preference import (
    KTO,
    Answers,
    BradleyTerry,
    Pairs,
    Preference,
    Verdicts,
    kto_loss,
    pair_loss,
    reward_loss,
)
from step_jax.training.losses.text import own_routing, routing_loss
from step_jax.training.step import LossOutput

Batch = Mapping[str, Any]
Balance = Literal["batch", "microbatch"]


class Sums(NamedTuple):
    """What adds up over a batch: of the experts, and of a loss that is no sum over rows."""

    experts: Any
    loss: Any


def halves(batch: Batch) -> dict[str, jax.Array]:
    """The texts of a batch as rows of packed text: (B S, T) arrays."""
    names = ("tokens", "targets", "segments", "positions", "weights")
    return {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in names}


def _context(text_RT: Batch, execution: Execution, sharding: Sharding | None) -> Context:
    return Context(
        Tokens.packed(text_RT), within_capacity=True, sharding=sharding, execution=execution
    )


def _totals_RK(a_RT, text_RT: Batch, batch: Batch):
    """The sum over each example's tokens, exact in float32 also where products are not."""
    numbers_K = 1 + jnp.arange(batch["judged"].shape[1])
    inside_RTK = (text_RT["segments"][..., None] == numbers_K).astype(jnp.float32)
    return jnp.einsum("RT,RTK->RK", a_RT, inside_RTK, precision=jax.lax.Precision.HIGHEST)


def answer_logprobs(p: DecoderParams, c: Decoder, batch: Batch, ctx: Context, text_RT: Batch):
    """(log-probabilities of the answers, their tokens, the ExpertStats of the layers).

    The first two are float32 (B, S, K), the first differentiable.
    """
    x_RTD, _, stats = c.hidden(p, text_RT["tokens"], ctx)
    logprobs_RT, _ = token_logprobs(
        c.normed(p, x_RTD),
        c.head(p),
        text_RT["targets"],
        chunks=ctx.execution.loss_chunks,
        sharding=ctx.sharding,
    )
    said_RT = text_RT["weights"]
    shape = (len(batch["judged"]), 2, -1)
    logprobs_RK = _totals_RK(jnp.where(said_RT > 0, logprobs_RT, 0.0), text_RT, batch)
    lengths_RK = _totals_RK(said_RT, text_RT, batch)
    return logprobs_RK.reshape(shape), lengths_RK.reshape(shape), stats


def reference_logprobs(c: Decoder, execution: Execution, sharding: Sharding | None):
    """A function (params, batch) -> float32 (B, S, K): log-probabilities of the answers."""

    def of(p: DecoderParams, batch: Batch):
        text_RT = halves(batch)
        return answer_logprobs(p, c, batch, _context(text_RT, execution, sharding), text_RT)[0]

    return of


def preference_loss(
    how: Preference,
    c: Decoder,
    execution: Execution,
    sharding: Sharding | None,
    *,
    examples: int,
    balance: Balance = "batch",
):
    """A function (params, batch) -> LossOutput of ``data.preferences``' batches.

    Its parts are those of ``how``, and ``routing`` of a mixture of experts whose router has a loss
    (see ``packed_text_loss``). The sums are :class:`Sums`. Heads of multi-token prediction have no
    part in it.

    Metrics beside the loss's own: ``logprob_chosen``, ``logprob_rejected`` (nats of an answer; of
    verdicts the good and the bad ones), and with a reference policy ``log_ratio_chosen``,
    ``log_ratio_rejected``: by how many nats the answers have become likelier.

    Args:
      examples: N of the whole batch, padding included.
    """
    trunk = replace(c, mtp=None)
    routing = routing_loss(trunk) if balance == "batch" else None

    def joint(sums: Sums):
        parts = how.joint(sums.loss) if isinstance(how, KTO) else {}
        return parts | ({} if routing is None else routing(sums.experts))

    def loss(p: DecoderParams, batch: Batch) -> LossOutput:
        text_RT = halves(batch)
        ctx = _context(text_RT, execution, sharding)
        logprobs_BSK, lengths_BSK, stats = answer_logprobs(p, c, batch, ctx, text_RT)
        reference_BSK, judged_N = batch.get("reference"), batch["judged"].reshape(-1)
        first, second = (
            Answers(
                logprobs_BSK[:, side].reshape(-1),
                lengths_BSK[:, side].reshape(-1),
                None if reference_BSK is None else reference_BSK[:, side].reshape(-1),
            )
            for side in range(2)
        )
        if isinstance(how, KTO):
            good_N, number_N = batch["good"].reshape(-1), batch["number"].reshape(-1)
            out = kto_loss(how, Verdicts(first, second, good_N, judged_N, number_N, examples))
            seen = _likelihoods(first, judged_N * good_N, "chosen")
            seen |= _likelihoods(first, judged_N * (1 - good_N), "rejected")
        else:
            out = pair_loss(how, Pairs(first, second, judged_N))
            seen = _likelihoods(first, judged_N, "chosen")
            seen |= _likelihoods(second, judged_N, "rejected")
        return _with_routing(out, seen, stats, trunk, ctx, balance, joint if joined else None)

    joined = isinstance(how, KTO) or routing is not None
    return loss


def bradley_terry_loss(
    how: BradleyTerry,
    c: RewardModel,
    execution: Execution,
    sharding: Sharding | None,
    balance: Balance = "batch",
):
    """A function (params, batch) -> LossOutput of a reward model; see :func:`preference_loss`."""
    trunk = replace(c.decoder, mtp=None)
    routing = routing_loss(trunk) if balance == "batch" else None

    def joint(sums: Sums):
        return {} if routing is None else routing(sums.experts)

    def loss(p: RewardParams, batch: Batch) -> LossOutput:
        text_RT = halves(batch)
        ctx = _context(text_RT, execution, sharding)
        scores_RK, stats = text_scores(p, c, batch, ctx, text_RT)
        scores_BSK = scores_RK.reshape(len(batch["judged"]), 2, -1)
        chosen_N, rejected_N = (scores_BSK[:, side].reshape(-1) for side in range(2))
        out = reward_loss(how, chosen_N, rejected_N, batch["judged"].reshape(-1))
        return _with_routing(
            out, {}, stats, trunk, ctx, balance, None if routing is None else joint
        )

    return loss


def text_scores(p: RewardParams, c: RewardModel, batch: Batch, ctx: Context, text_RT: Batch):
    """(float32 (B S, K), the score of each text, read at its last token; ExpertStats)."""
    scores_RT, stats = c.scores(p, text_RT["tokens"], ctx)
    segments_RT = text_RT["segments"]
    following_RT = jnp.pad(segments_RT[:, 1:], ((0, 0), (0, 1)))
    last_RT = segments_RT != following_RT
    return _totals_RK(jnp.where(last_RT, scores_RT, 0.0), text_RT, batch), stats


def _likelihoods(answers: Answers, weights_N, side: str) -> dict[str, tuple[jax.Array, jax.Array]]:
    of = {"logprob": answers.logprobs_B}
    if answers.reference_B is not None:
        of["log_ratio"] = answers.ratio_B
    of = jax.lax.stop_gradient(of)
    weight = jnp.sum(weights_N)
    return {f"{name}_{side}": (jnp.sum(weights_N * a_N), weight) for name, a_N in of.items()}


def _with_routing(out: LossOutput, metrics, stats, trunk: Decoder, ctx, balance: Balance, joint):
    """The output with what the experts add to it."""
    stats = expert_health.layers(stats)
    own = {} if balance == "batch" else own_routing(trunk, stats, ctx)
    return LossOutput(out.parts | own, out.metrics | metrics, Sums(stats, out.sums), joint)
