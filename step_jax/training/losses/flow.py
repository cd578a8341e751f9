"""The loss of flow matching on rows of patches; see ``models.video.flow`` for its terms.

Shape suffixes: B rows, G samples of a row, T tokens, P numbers in a patch.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from step_jax.core.sharding import Sharding
from step_jax.models.context import Execution
from step_jax.models.video import flow
from step_jax.models.video.dit import Rows, VideoDiT
from step_jax.models.video.flow import Flow
from step_jax.training.step import LossOutput, Part


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
    """Squared error of the velocity, summed over the numbers of all patches that are no padding.

    Time and noise of a sample come from ``seed`` and its number (``batch["samples"]``), so that
    neither microbatches nor packing nor devices change them.

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
    squared_BT *= of_tokens(config.weight(time_BG, tokens_BG), segments_BT, T)
    counted_BT = jnp.ones_like(squared_BT) if segments_BT is None else segments_BT > 0
    total = jnp.sum(jnp.where(counted_BT, squared_BT, 0.0))
    weight = jnp.sum(counted_BT, dtype=jnp.float32) * numbers
    return LossOutput({"velocity": Part(total, weight)})
