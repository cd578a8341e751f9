"""The device's side of reinforcement learning: from answers to a batch, and from it to a loss.

Shape suffixes: B rows, T places, D model width, L layers of a stack, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.core import spec as spec_lib
from step_jax.core.sharding import Sharding
from step_jax.models import expert_health
from step_jax.models.context import Context, Execution
from step_jax.models.layers.moe import MoE
from step_jax.models.text.decoder import Decoder
from step_jax.models.text.reward import RewardModel, RewardParams, headless
from step_jax.models.tokens import Tokens
from step_jax.ops.token_logprobs import token_logprobs
from step_jax.trainers.rl.objectives import Algorithm, critic_loss, policy_loss
from step_jax.trainers.rl.samples import Sample
from step_jax.trainers.rl.trajectory import FINISH, Trajectory
from step_jax.training.losses.text import routing_loss
from step_jax.training.step import LossFn, LossOutput

POLICY, CRITIC = "policy", "critic"
#: Places that the rows of a batch come in: short texts would else be compiled for every length.
SHORTEST = 16


def places(longest: int, most: int, pieces: int) -> int:
    """How many places the rows of a batch get: few lengths, each compiled once, at most a quarter
    or ``SHORTEST`` too long; a multiple of the ``pieces`` that a sequence is cut into."""
    step = max(SHORTEST, 1 << max(0, (longest - 1).bit_length() - 3))
    return -(-min(-(-longest // step) * step, most) // pieces) * pieces


def trajectory(
    samples: Sequence[Sample], prompts: Sequence[Sequence[int]], group: int, T: int
) -> Trajectory:
    """Answers as arrays of NumPy, with their rewards; ``group`` answers to each prompt."""
    B = len(samples)
    tokens_BT, version_BT = np.zeros((2, B, T), np.int32)
    mask_BT, logprobs_BT, rewards_BT = np.zeros((3, B, T), np.float32)
    lengths_B, finish_B = np.zeros((2, B), np.int32)
    routing = tuple(np.zeros((len(a), B, T, a.shape[2]), np.int32) for a in samples[0].routing)
    for row, (sample, prompt) in enumerate(zip(samples, prompts, strict=True)):
        P, N = len(prompt), len(sample.tokens)
        tokens_BT[row, :P], tokens_BT[row, P : P + N] = prompt, sample.tokens
        lengths_B[row] = P + N
        answer = slice(P - 1, P + N - 1)  # the places whose targets the answer's tokens are
        mask_BT[row, answer] = sample.chosen
        logprobs_BT[row, answer] = sample.logprobs * sample.chosen
        version_BT[row, answer] = sample.versions
        if sample.chosen.any():
            rewards_BT[row, P - 1 + np.flatnonzero(sample.chosen)[-1]] = sample.reward
        assert sample.finish is not None  # batches are of whole answers
        finish_B[row] = FINISH.index(sample.finish)
        for whole, own in zip(routing, sample.routing, strict=True):
            whole[:, row, : own.shape[1]] = own
    return Trajectory(
        tokens_BT=tokens_BT,
        targets_BT=np.pad(tokens_BT[:, 1:], ((0, 0), (0, 1))),
        mask_BT=mask_BT,
        logprobs_BT=logprobs_BT,
        rewards_BT=rewards_BT,
        version_BT=version_BT,
        lengths_B=lengths_B,
        finish_B=finish_B,
        group_B=(np.arange(B) // group).astype(np.int32),
        routing_LBTK=routing,
    )


def context(t: Trajectory, execution: Execution, sharding: Sharding | None) -> Context:
    """Every row is one text from its first place on."""
    B, T = t.tokens_BT.shape
    place_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    segments_BT = (place_BT < t.lengths_B[:, None]).astype(jnp.int32)
    return Context(Tokens(place_BT, segments_BT), sharding=sharding, execution=execution)


def likelihoods(params, model: Decoder, t: Trajectory, ctx: Context, temperature: float):
    """(log-probability of every target, entropy of every place, the experts' stats).

    The forward pass is the engine's: nothing is dropped, and the temperature divides the logits.
    """
    leaves = iter(t.routing_LBTK)
    routing = None
    if t.routing_LBTK:
        routing = tuple(
            tuple(next(leaves) if isinstance(block.mlp, MoE) else None for block in group.blocks)
            for group in model.layers
        )
    x_BTD, _, stats = model.hidden(params, t.tokens_BT, ctx, routing=routing)
    logprobs_BT, entropy_BT = token_logprobs(
        model.normed(params, x_BTD),
        model.head(params),
        t.targets_BT,
        temperature=temperature,
        chunks=ctx.execution.loss_chunks,
        sharding=ctx.sharding,
    )
    return logprobs_BT, entropy_BT, stats


def make_judge(
    how: Algorithm,
    models: Mapping[str, Any],
    views: Mapping[str, Callable],
    execution: Execution,
    sharding: Sharding,
    temperature: float,
    *,
    old: bool,
) -> Callable:
    """(what each learner keeps, the reference's parameters or None, batch) -> (batch, figures).

    The whole batch gets what its algorithm compares with (the trainer's log-probabilities before
    the first update if ``old``, the reference's, the critic's values), and then advantages.
    """
    policy = models[POLICY]

    def judge(kept, reference, batch):
        t = Trajectory.of(batch)
        ctx = context(t, execution, sharding)

        def cast(params, model):
            return spec_lib.cast(params, execution.dtype, model.specs())

        def logprobs_of(params):
            return likelihoods(cast(params, policy), policy, t, ctx, temperature)[0]

        streams = {}
        if old:
            streams["old_BT"] = logprobs_of(views[POLICY](kept[POLICY]))
        if how.kl is not None:
            streams["reference_BT"] = logprobs_of(reference)
        if how.critic is not None:
            critic: RewardModel = models[CRITIC]
            held = cast(views[CRITIC](kept[CRITIC]), critic)
            streams["values_BT"], _ = critic.scores(held, t.tokens_BT, ctx)
        t = how.judged(replace(t, **streams))
        figures = {}
        if how.critic is not None:
            error_BT = t.mask_BT * jnp.square(t.returns_BT - t.values_BT)
            figures["value_error"] = jnp.sum(error_BT) / jnp.maximum(jnp.sum(t.mask_BT), 1.0)
        if how.kl is None or how.kl.place == "reward":  # it is in the advantages by now
            t = replace(t, reference_BT=None)
        return t.batch(), figures

    return judge


def streams_of(how: Algorithm, *, old: bool) -> tuple[str, ...]:
    """What a judged batch has besides the rollout."""
    found = ["advantages"] + ["old"] * old
    if how.kl is not None and how.kl.place == "loss":
        found.append("reference")
    return (*found, *(("values", "returns") if how.critic is not None else ()))


def make_loss(
    how: Algorithm,
    models: Mapping[str, Any],
    execution: Execution,
    sharding: Sharding,
    temperature: float,
) -> LossFn:
    """The loss of policy and critic, of a microbatch of a judged batch."""
    policy: Decoder = models[POLICY]
    joint = routing_loss(policy)

    def loss(params, batch, key) -> LossOutput:
        t = Trajectory.of(batch)
        ctx = context(t, execution, sharding)
        logprobs_BT, entropy_BT, stats = likelihoods(params[POLICY], policy, t, ctx, temperature)
        if t.old_BT is None:  # the only update: the policy before it is this one
            t = replace(t, old_BT=jax.lax.stop_gradient(logprobs_BT))
        out = policy_loss(how, t, logprobs_BT, entropy_BT)
        parts, metrics = out.parts, out.metrics
        if how.critic is not None:
            values_BT, _ = models[CRITIC].scores(params[CRITIC], t.tokens_BT, ctx)
            value = critic_loss(how.critic, t, values_BT)
            parts, metrics = parts | value.parts, metrics | value.metrics
        return LossOutput(parts, metrics, expert_health.layers(stats), joint)

    return loss


def critic_params(params: Any, score_D) -> RewardParams:
    """A critic's parameters on the trunk of a decoder's."""
    return RewardParams(headless(params), score_D)


def routing_shapes(policy: Decoder) -> list[tuple[int, int]]:
    """(layers, experts a token) of every stack of layers with a mixture, see ``schema``."""
    return [
        (group.repeat, block.mlp.router.top_k)
        for group in policy.layers
        for block in group.blocks
        if isinstance(block.mlp, MoE)
    ]
