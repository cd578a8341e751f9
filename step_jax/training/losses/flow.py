"""The losses of flow matching on rows of patches, and of pairs of clips; see ``models.video.flow``
for their terms.

Shape suffixes: B rows or pairs, 2 winner and loser, N clips of all pairs, G samples of a row, T
tokens, P numbers in a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from step_jax.core import checks
from step_jax.core.sharding import Sharding
from step_jax.models.context import Execution
from step_jax.models.video import flow
from step_jax.models.video.dit import Rows, VideoDiT
from step_jax.models.video.flow import Flow
from step_jax.training.losses.preference import DPO, Answers, Pairs, pair_loss
from step_jax.training.step import LossOutput, Part

REFERENCE = "reference"  # the array of a batch of pairs that a frozen model's errors are in


def rows_of(model: VideoDiT, batch: Mapping[str, jax.Array]) -> Rows:
    """What a batch (``data.clips.clip_schema``) says of its rows besides the patches."""
    names = [t.name for t in model.text]
    return Rows(
        place_BTA=batch["places"],
        segments_BT=batch.get("segments"),
        text=tuple(batch[f"text/{name}"] for name in names),
        lengths=tuple(batch[f"lengths/{name}"] for name in names),
        scalars_BGK=batch.get("scalars"),
        first_BTP=batch.get("first"),
    )


def of_tokens(values_BG, segments_BT, tokens: int):
    """What holds for each token of what holds for its sample: (B, T); of padding anything."""
    if segments_BT is None:
        return jnp.broadcast_to(values_BG[:, :1], (values_BG.shape[0], tokens))
    return jnp.take_along_axis(values_BG, jnp.maximum(segments_BT - 1, 0), axis=1)


def sizes_of(segments_BT, samples_BG, tokens: int):
    """Tokens of each sample, float32 (B, G)."""
    if segments_BT is None:
        return jnp.full(samples_BG.shape, tokens, jnp.float32)
    number_G = 1 + jnp.arange(samples_BG.shape[1])
    return jnp.sum(segments_BT[:, None] == number_G[:, None], -1, dtype=jnp.float32)


def velocity_errors(
    params,
    model: VideoDiT,
    batch: Mapping[str, jax.Array],
    config: Flow,
    seed: int,
    execution: Execution,
    sharding: Sharding | None = None,
    noise_seed: int | None = None,
):
    """Squared error of each token's velocity, summed over its numbers and weighted: (B, T).

    Time and noise of a sample come from ``seed`` and its number (``batch["samples"]``), so that
    neither microbatches nor packing nor devices change them. Of padding it is anything.

    Args:
      noise_seed: of samples that began as a noise of their own, numbered by ``batch["noises"]``;
        None where noise is drawn afresh.
    """
    data_BTP, segments_BT = batch["patches"], batch.get("segments")
    samples_BG, T = batch["samples"], data_BTP.shape[1]
    tokens_BG = sizes_of(segments_BT, samples_BG, T)
    time_BG = config.times(flow.shares(seed, samples_BG), tokens_BG)
    own = noise_seed is not None
    noise_BT = of_tokens(batch["noises"] if own else samples_BG, segments_BT, T)
    numbers = data_BTP.shape[-1]
    noise_BTP = flow.noise(noise_seed if own else seed, noise_BT, batch["places"], numbers)
    time_BT1 = of_tokens(time_BG, segments_BT, T)[..., None]
    x_BTP = flow.at(time_BT1, noise_BTP, data_BTP)
    out_BTP = model.apply(params, x_BTP, time_BG, rows_of(model, batch), execution, sharding)
    if model.prediction == "data":
        error_BTP = flow.velocity_of("data", out_BTP, data_BTP, time_BT1)
    else:
        error_BTP = out_BTP - (data_BTP - noise_BTP)
    squared_BT = jnp.sum(jnp.square(error_BTP), -1)
    return squared_BT * of_tokens(config.weight(time_BG, tokens_BG), segments_BT, T)


def flow_matching(
    params,
    model: VideoDiT,
    batch: Mapping[str, jax.Array],
    config: Flow,
    seed: int,
    execution: Execution,
    sharding: Sharding | None = None,
    noise_seed: int | None = None,
) -> LossOutput:
    """Squared error of the velocity, a mean over the numbers of all patches that are no padding.

    Arguments as :func:`velocity_errors`.
    """
    squared_BT = velocity_errors(
        params, model, batch, config, seed, execution, sharding, noise_seed
    )
    segments_BT = batch.get("segments")
    counted_BT = jnp.ones_like(squared_BT) if segments_BT is None else segments_BT > 0
    total = jnp.sum(jnp.where(counted_BT, squared_BT, 0.0))
    weight = jnp.sum(counted_BT, dtype=jnp.float32) * batch["patches"].shape[-1]
    return LossOutput({"velocity": Part(total, weight)})


@dataclass(frozen=True)
class FlowDPO:
    """DPO of velocities: ``-log s(-b/2 ((e_w - e_w') - (e_l - e_l')))``.

    Diffusion-DPO (arXiv 2311.12908, eq. 14) for flow matching, as in Step-Video (arXiv 2502.10248)
    and VideoAlign (arXiv 2501.13918, eq. 8, b the same at all times): e is the mean squared error
    of a clip's velocity, e' that of the frozen reference, w the winner and l the loser. So half the
    fall of an error below the reference's stands in the place of DPO's log-ratio.

    beta: b, the strength of the pull to the reference. The gradient grows with it: Diffusion-DPO's
      5000 asks for a learning rate of 1e-8, and Step-Video lowers the one to raise the other.
    shared_noise: winner and loser are shown with the same noise at the same time, as in Step-Video.
      False draws both for each.
    velocity: coefficient of the winners' own loss of flow matching.
    """

    beta: float = 500.0
    shared_noise: bool = True
    velocity: float = 0.0

    def validate(self):
        checks.above(self, beta=0)
        checks.at_least(self, velocity=0)


def pair_errors(params, model: VideoDiT, batch, *rest) -> jax.Array:
    """The mean squared error of each clip's velocity, float32 (B, 2): of winners and losers.

    Args:
      batch: of pairs (``data.clip_pairs.pair_schema``).
      rest: as :func:`velocity_errors`, from ``config`` on.
    """
    B, two, T, P = batch["patches"].shape
    clips = {
        name: a.reshape(B * two, *a.shape[2:]) for name, a in batch.items() if name != REFERENCE
    }
    squared_NT = velocity_errors(params, model, clips, *rest)
    return jnp.sum(squared_NT, axis=1).reshape(B, two) / (T * P)


def flow_preference(params, model: VideoDiT, batch, how: FlowDPO, *rest) -> LossOutput:
    """The loss of pairs, whose ``batch["reference"]`` has the reference's :func:`pair_errors`.

    Metrics: as ``losses.preference.pair_loss``, and ``error_winner``, ``error_loser``.
    """
    error_B2 = pair_errors(params, model, batch, *rest)
    one_B = jnp.ones(len(error_B2), jnp.float32)
    # the log-likelihood that an error stands for, but for a constant that both models share
    logprob_B2, reference_B2 = -0.5 * error_B2, -0.5 * batch[REFERENCE]
    winners, losers = (Answers(logprob_B2[:, i], one_B, reference_B2[:, i]) for i in range(2))
    out = pair_loss(DPO(how.beta), Pairs(winners, losers, one_B))
    weight = jnp.sum(one_B)
    parts = dict(out.parts)
    if how.velocity:
        parts["velocity"] = Part(jnp.sum(error_B2[:, 0]), weight, how.velocity)
    sums_2 = jax.lax.stop_gradient(jnp.sum(error_B2, axis=0))
    errors = {"error_winner": (sums_2[0], weight), "error_loser": (sums_2[1], weight)}
    return LossOutput(parts, out.metrics | errors)
