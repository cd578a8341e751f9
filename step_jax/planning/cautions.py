"""What a plan's reader would change if it were pointed out: shapes, sums, batch and capacity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from statistics import NormalDist

from pallas_kernels.tpu.chips import CHIPS
from step_jax.core.hardware import Chip
from step_jax.models.layers import capacity
from step_jax.models.layers.moe import MoE
from step_jax.models.text.decoder import Decoder
from step_jax.planning.case import Case
from step_jax.planning.collectives import Traffic
from step_jax.runs.console import si
from step_jax.training.scaling_laws import step_law_batch_tokens

#: Below which share of whole blocks of the matrix unit a width is said to waste it.
_FILLED = 0.9
#: Share of what a device sends from which sums in the place of scatters are worth a word.
_SENT = 0.05
#: How many times Step Law's batch a batch is above or below it, where the loss is no more flat.
_FROM_LAW = 4
#: Share of the assignments that may find no room before it is said.
_DROPPED = 0.01


def cautions(
    case: Case | None,
    chip: Chip | None,
    collectives: Iterable[Traffic],
    tokens: float | None,
) -> list[str]:
    """Sentences, none for what is as it should be.

    Args:
      case: of a decoder of texts; None for other models.
      chip: of the devices, None for a CPU.
      collectives: of a step.
      tokens: of a whole pretraining run; None for other loops.
    """
    found = list(_sums(list(collectives)))
    if case is not None:
        if chip is not None and chip.name in CHIPS:
            found += _shapes(case, CHIPS[chip.name].side, chip.name)
        found += _loads(case)
        if tokens is not None:
            found += _batch(case.tokens, tokens)
    return found


def _shapes(case: Case, side: int, chip: str) -> Iterator[str]:
    """Widths that leave a part of the matrix units empty."""
    for what, width in sorted(set(_widths(case.model, case.sharding.size("tensor")))):
        filled = width / (math.ceil(width / side) * side)
        if filled < _FILLED:
            yield (
                f"{what} of {width:,} fill {filled:.0%} of {chip}'s matrix units, which are {side} "
                "wide"
            )


def _widths(model: Decoder, tensor: int) -> Iterator[tuple[str, int]]:
    """(what, numbers of it on a device)."""
    yield "a vocabulary", -(-model.vocab // tensor)
    for stack in model.trunk.walk():
        attention, mlp = stack.block.attention, stack.block.mlp
        for width in set(attention.score_and_value_widths()):
            yield "heads", width
        if isinstance(mlp, MoE):
            yield from (("experts", c.hidden // tensor) for c in mlp.experts)
        else:
            yield "hidden units", mlp.hidden // tensor


def _sums(collectives: list[Traffic]) -> Iterator[str]:
    """Sums over axes that parameters are split along, of which a device needs but its piece."""
    total = sum(c.nbytes for c in collectives)
    for c in collectives:
        split = {"fsdp", "context"} & set(c.links.split("+"))
        if c.kind == "all-reduce" and split and c.nbytes > _SENT * total:
            yield (
                f"{si(c.nbytes)}B of sums over {c.where} are all-reduces, which send twice the "
                "bytes of reduce-scatters"
            )


def _batch(batch: int, tokens: float) -> Iterator[str]:
    law = step_law_batch_tokens(tokens)
    for word, times in (("below", law / batch), ("above", batch / law)):
        if times > _FROM_LAW:
            yield (
                f"a batch of {si(batch)} tokens is {times:.2g} times {word} Step Law's {si(law)} "
                f"for {si(tokens)} tokens (arXiv 2503.04715)"
            )


def _loads(case: Case) -> Iterator[str]:
    """Experts without room for what an even router gives them."""
    for mixture in {s.block.mlp for s in case.model.trunk.walk() if isinstance(s.block.mlp, MoE)}:
        if mixture.capacity is None:
            continue
        share = dropped(case.sequence, mixture.router.top_k, mixture.total, mixture.capacity)
        if share > _DROPPED:
            yield (
                f"capacity {mixture.capacity:g} drops {share:.1%} of the assignments even of a "
                "router that prefers no expert"
            )


def dropped(tokens: int, top_k: int, experts: int, factor: float) -> float:
    """The share of assignments beyond the room of experts that are chosen at random.

    An expert's assignments of a piece are about normal, with the mean and variance of a binomial.
    """
    n, p = min(tokens, capacity.PIECE), top_k / experts
    mean, deviation = n * p, math.sqrt(n * p * (1 - p))
    room = capacity.room(tokens, top_k, experts, factor)
    if not deviation:
        return max(0.0, mean - room) / mean
    z, normal = (room - mean) / deviation, NormalDist()
    return (deviation * normal.pdf(z) - (room - mean) * (1 - normal.cdf(z))) / mean
