"""What a step says about its experts: load, routing, activations and weights.

Balanced loads look healthy while one expert explodes, so the norms of each expert's activations and
weights are watched against the median of its layer (Step-3.5-Flash, arXiv 2602.10604, 4.3).

Shape suffixes: L layers of one stack, E experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from step_jax.models.layers.moe import ExpertParams, ExpertStats, MoE
from step_jax.models.text.decoder import Decoder, DecoderParams


def layers(stats) -> list[ExpertStats]:
    """The stats of all stacks of layers that have experts, in order."""
    found = jax.tree.leaves(stats, is_leaf=lambda s: isinstance(s, ExpertStats))
    return [s for s in found if isinstance(s, ExpertStats)]


def mixtures(c: Decoder) -> list[MoE]:
    """The mixture of every stack of layers that has one, in the order of :func:`layers`."""
    blocks = [stack.block for stack in c.trunk.walk()]
    blocks += [c.mtp.block] * c.mtp.heads if c.mtp else []
    return [block.mlp for block in blocks if isinstance(block.mlp, MoE)]


def routing_loss(c: Decoder, stats: list[ExpertStats]):
    """Sum over layers of the routers' losses, to be added to the mean loss; 0 without experts."""
    losses = (jnp.sum(m.router.loss(s)) for m, s in zip(mixtures(c), stats, strict=True))
    return sum(losses, jnp.float32(0.0))


def expert_weights(c: Decoder, p: DecoderParams) -> list[tuple[ExpertParams, ...]]:
    """The experts of every stack of layers, in the order of :func:`layers`."""
    blocks = [(stack.block, stack.of(p.groups)) for stack in c.trunk.walk()]
    blocks += [(c.mtp.block, head.block) for head in p.mtp] if c.mtp else []
    return [params.mlp.experts for block, params in blocks if isinstance(block.mlp, MoE)]


def report(c: Decoder, p: DecoderParams, stats: list[ExpertStats]) -> dict[str, jax.Array]:
    """Metrics of one step, float32 scalars; empty for a model without experts.

    Args:
      p: float32 parameters.
      stats: sums over the step's microbatches, as ``packed_text_loss`` gives them.

    Returns:
      Over all layers: ``moe/load_max`` and ``moe/load_min`` (the most and least loaded expert of
      any layer by an even load), ``moe/entropy`` (of the routing probabilities, 1 is uniform),
      ``moe/confidence`` (probability of the chosen experts), ``moe/dropped`` (share of
      assignments), ``moe/activation_max`` and ``_min`` (largest and smallest root mean square of
      an expert's hidden activations, of the rows it computed, by its layer's median),
      ``moe/weight_max`` and ``_min`` (the same of its weights), and ``moe/activation_layer``,
      ``moe/activation_expert``, ``moe/weight_layer``, ``moe/weight_expert``: where the largest are
      (layers counted among those with experts).
    """
    if not stats:
        return {}
    loads, activations, entropies, confidences = [], [], [], []
    for s in stats:
        s = jax.tree.map(lambda a, s=s: a if s.load_E.ndim == 2 else a[None], s)  # MTP: no stack
        experts = s.load_E.shape[1]
        loads.append(s.load_E * experts / jnp.maximum(s.load_E.sum(1, keepdims=True), 1.0))
        computed_LE = s.load_E - s.dropped_E
        rms_LE = jnp.sqrt(s.square_E / jnp.maximum(computed_LE, 1.0))
        activations.append(_by_median(rms_LE, computed_LE > 0))
        entropies.append(s.entropy / jnp.maximum(s.tokens, 1.0) / jnp.log(max(experts, 2)))
        confidences.append(s.confidence / jnp.maximum(s.tokens, 1.0))
    weights = [_by_median(_norms(experts)) for experts in expert_weights(c, p)]
    assigned = sum(jnp.sum(s.load_E) for s in stats)
    return {
        "moe/load_max": _largest(loads)[0],
        "moe/load_min": jnp.min(jnp.stack([jnp.min(a) for a in loads])),
        "moe/entropy": jnp.mean(jnp.concatenate(entropies)),
        "moe/confidence": jnp.mean(jnp.concatenate(confidences)),
        "moe/dropped": sum(jnp.sum(s.dropped_E) for s in stats) / jnp.maximum(assigned, 1.0),
        **_extremes("activation", activations),
        **_extremes("weight", weights),
    }


def _norms(experts: tuple[ExpertParams, ...]):
    """Root mean square of every expert's weights: (L, E)."""

    def rms(p: ExpertParams):
        arrays = [p.gate_EDF, p.up_EDF, p.down_EFD]
        arrays = [a if a.ndim == 4 else a[None] for a in arrays]
        squares = sum(jnp.sum(jnp.square(a.astype(jnp.float32)), (2, 3)) for a in arrays)
        return jnp.sqrt(squares / sum(a.shape[2] * a.shape[3] for a in arrays))

    return jnp.concatenate([rms(p) for p in experts], axis=1)


def _by_median(values_LE, used_LE=None):
    """Values by the median of their layer; 1 where an expert is not used."""
    if used_LE is None:
        used_LE = jnp.ones(values_LE.shape, bool)
    median_L1 = jnp.nanmedian(jnp.where(used_LE, values_LE, jnp.nan), axis=1, keepdims=True)
    known = used_LE & (median_L1 > 0)
    return jnp.where(known, values_LE / jnp.where(median_L1 > 0, median_L1, 1.0), 1.0)


def _largest(arrays):
    """(value, layer, expert) of the largest element of a list of (L, E)."""
    tops = jnp.stack([jnp.max(a) for a in arrays])
    places = jnp.stack([jnp.argmax(a) for a in arrays])
    sizes = jnp.asarray([a.shape[1] for a in arrays])
    first, firsts = 0, []
    for a in arrays:
        firsts.append(first)
        first += a.shape[0]
    i = jnp.argmax(tops)
    return tops[i], jnp.asarray(firsts)[i] + places[i] // sizes[i], places[i] % sizes[i]


def _extremes(name: str, arrays) -> dict[str, jax.Array]:
    value, layer, expert = _largest(arrays)
    return {
        f"moe/{name}_max": value,
        f"moe/{name}_min": jnp.min(jnp.stack([jnp.min(a) for a in arrays])),
        f"moe/{name}_layer": layer.astype(jnp.float32),
        f"moe/{name}_expert": expert.astype(jnp.float32),
    }
