"""Pairs of clips that a diffusion transformer draws itself, judged by a program.

Shape suffixes: N captions or clips, K clips of a caption, F frames, H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from step_jax.core.errors import DataError
from step_jax.core.sharding import Sharding
from step_jax.data.captions import TextBank
from step_jax.data.latents import MANIFEST, Clip, LatentFolder, write_latents
from step_jax.data.rendered import RenderedClips
from step_jax.inference.flow import draw_each
from step_jax.models.context import Execution
from step_jax.models.video.dit import VideoDiT
from step_jax.trainers.diffusion.asked import AskedData, Asking
from step_jax.trainers.reference import digest_of_params

SIDES = ("winners", "losers")


@dataclass(frozen=True, kw_only=True)
class PairData(AskedData):
    """Clips that the policy draws by captions of scenes: of each caption the best and the worst.

    Where all clips of a caption have the same reward there is no pair.

    path: folder in which pairs are kept, each round of them under the hash of what made them.
    """

    kind: ClassVar[str] = "pairs"
    path: str


def best_and_worst(rewards: Sequence[float]) -> tuple[int, int] | None:
    """The first clip of the highest and the first of the lowest reward; None if all are equal."""
    best, worst = int(np.argmax(rewards)), int(np.argmin(rewards))
    return None if rewards[best] == rewards[worst] else (best, worst)


class PairMaker:
    """Draws rounds of pairs, and finds those that were drawn."""

    def __init__(
        self,
        data: PairData,
        asked: RenderedClips,
        model: VideoDiT,
        bank: TextBank,
        execution: Execution,
        sharding: Sharding,
        report: Callable[[str], None],
    ):
        """
        Raises:
          ConfigError: a model that does not draw what ``data`` says.
        """
        self._data, self._model, self._bank = data, model, bank
        self._execution, self._sharding, self._report = execution, sharding, report
        self._asking = Asking(replace(data, path=""), asked, model, bank, sharding)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a run that goes on must agree with."""
        return self._asking.made | {"refresh_every": self._data.refresh_every}

    def drawn(self, params: Any, step: int) -> str:
        """Has the policy draw the round that begins with a step, if that was not done before.

        Args:
          params: the policy's, of that step.

        Returns:
          The hash of the policy, of what it was asked, of the reward and of the round: the same
          pairs have the same name.

        Raises:
          DataError: no caption's clips differ in their reward.
        """
        number = self._data.round(step)
        made, dtype = self._asking.made, self._execution.dtype
        facts = (digest_of_params(params), self._model, made, dtype, number)
        made_by = hashlib.sha256(repr(facts).encode()).hexdigest()
        folder = self._folder(made_by)
        if not (folder / SIDES[-1] / MANIFEST).exists():  # it is written last
            for name, clips in zip(SIDES, self._draw(params, number, step), strict=True):
                write_latents(folder / name, clips, made_by)
        return made_by

    def open(self, made_by: str) -> list[LatentFolder]:
        """Winners and losers.

        Raises:
          DataError: they are not there, or damaged.
        """
        folder = self._folder(made_by)
        try:
            return [LatentFolder.open(folder / name, made_by) for name in SIDES]
        except DataError as error:
            raise DataError(
                f"{error}. The run learns from these pairs: put them back, or branch from a step "
                "with which a round of pairs begins"
            ) from None

    def _folder(self, made_by: str) -> Path:
        return Path(self._data.path) / made_by[:16]

    def _draw(self, params: Any, number: int, step: int) -> tuple[list[Clip], list[Clip]]:
        data = self._data
        numbers = number * data.captions + np.arange(data.captions)
        texts = self._asking.texts(numbers)
        clips = draw_each(
            params,
            self._model,
            self._bank.encoded,
            self._asking.which(texts),
            data.buckets[0],
            data.sampler,
            seed=data.seed,
            number=number * len(texts) * data.clips,
            execution=self._execution,
            sharding=self._sharding,
        )
        winners: list[Clip] = []
        losers: list[Clip] = []
        total = 0.0
        for i, text in zip(numbers, texts, strict=True):
            clips_KFHWC = np.stack(list(islice(clips, data.clips)))
            rewards = self._asking.rewards(int(i), clips_KFHWC)
            total += sum(rewards)
            if chosen := best_and_worst(rewards):
                for side, k in zip((winners, losers), chosen, strict=True):
                    side.append(Clip(clips_KFHWC[k], (text,), {"reward": rewards[k]}))
        mean = total / (len(texts) * data.clips)
        if not winners:
            raise DataError(
                f"the clips of each of the {len(texts)} captions are alike in "
                f"{', '.join(data.reward)} (their mean is {mean:.3g}): there is no pair. Ask for "
                "more (data.captions, data.clips) or for something else (data.reward)"
            )
        self._report(
            f"the policy of step {step} drew {data.clips} clips of each of {len(texts)} captions: "
            f"a mean reward of {mean:.3f}, {len(winners)} pairs"
        )
        return winners, losers
