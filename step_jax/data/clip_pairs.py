"""Pairs of clips of the same caption in batches: the better one and the worse one.

Shape suffixes: B pairs, 2 winner and loser.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from step_jax.data.clips import ClipDataset
from step_jax.data.schema import Schema

_OTHER = np.uint32(2**31)  # apart from the numbers of all samples that a run may have


def pair_schema(clips: Schema) -> Schema:
    """The arrays of a batch of pairs, of those of a batch of clips: winner and loser side by side
    behind the axis of rows."""
    return {
        name: replace(
            field,
            axes=(field.axes[0], None, *field.axes[1:]),
            shape=(field.shape[0], 2, *field.shape[1:]),
        )
        for name, field in clips.items()
    }


class PairDataset:
    """Batches of pairs as a pure function of (seed, step)."""

    def __init__(self, winners: ClipDataset, losers: ClipDataset, *, shared_noise: bool):
        """
        Args:
          winners, losers: of the same seed; clip i of one is of clip i's caption of the other. So
            both draw the same pairs, and show them with the same text.
          shared_noise: both clips of a pair are the same sample, which time and noise come from.
        """
        self._sides, self._shared = (winners, losers), shared_noise

    def batch(self, step: int, index: int = 0, count: int = 1) -> dict[str, np.ndarray]:
        """Part ``index`` of ``count`` of the rows of a step's batch."""
        winners, losers = (side.batch(step, index, count) for side in self._sides)
        if not self._shared:
            losers["samples"] = losers["samples"] + _OTHER
        return {name: np.stack([winners[name], losers[name]], axis=1) for name in winners}
