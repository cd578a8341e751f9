"""Pairs of clips that a diffusion transformer draws itself, judged by a program.

Shape suffixes: N captions or clips, K clips of a caption, F frames, H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from step_jax.core import checks
from step_jax.core.errors import ConfigError, DataError
from step_jax.core.sharding import Sharding
from step_jax.data.captions import TextBank
from step_jax.data.clips import uniforms
from step_jax.data.latents import MANIFEST, Clip, LatentFolder, write_latents
from step_jax.data.rendered import RenderedClips
from step_jax.data.scenes import Scene, Scenes
from step_jax.evaluation.video_scenes import agreement, see
from step_jax.inference import text_states
from step_jax.inference.flow import Sampler, draw_each
from step_jax.interop.artifacts import load_artifact
from step_jax.models.context import Execution
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.patches import Sizes
from step_jax.trainers.reference import digest_of_params

Statement = Literal["colour", "shape", "count", "motion", "camera", "all"]
SIDES = ("winners", "losers")


@dataclass(frozen=True)
class PairData:
    """Clips that the policy draws by captions of scenes: of each caption the best and the worst.

    scenes: whose captions are asked for, and whose detectors judge (``evaluation.video_scenes``).
    path: folder in which pairs are kept, each round of them under the hash of what made them.
    reward: which statements of its caption a clip shall bear out; their mean is its reward.
    captions: scenes that are asked for.
    clips: drawn of each caption. Where all have the same reward there is no pair.
    refresh_every: steps after which the policy of that step draws all of them anew; null learns
      from those of the start alone.
    seed: of scenes and noise.
    size: of the latents; null for those of the scenes, of a model of pixels.
    vae: an artifact that decodes what is drawn.
    """

    kind: ClassVar[str] = "pairs"
    scenes: Scenes
    path: str
    reward: tuple[Statement, ...]
    captions: int = 256
    clips: int = 4
    refresh_every: int | None = None
    seed: int = 0
    size: Sizes | None = None
    vae: str | None = None
    sampler: Sampler = field(default_factory=Sampler)

    def validate(self):
        checks.at_least(self, captions=1, clips=2, refresh_every=1)
        checks.seed(self.seed)
        if not self.reward:
            raise ConfigError("data.reward names no statement of a caption")
        if still := sorted(
            {"motion", "camera"} & set(self.reward) if self.scenes.frames == 1 else ()
        ):
            raise ConfigError(f"data.reward has {still}, and in scenes of one frame nothing moves")

    @property
    def buckets(self) -> tuple[Sizes, ...]:
        s = self.scenes
        return (self.size or (s.frames, s.height, s.width),)

    def open(self, sharding: Sharding, report: Callable[[str], None]) -> RenderedClips:
        """The scenes that are asked for."""
        return RenderedClips((self.scenes,), self.captions, self.seed)

    def round(self, step: int) -> int:
        """Which round of pairs the step with this 0-based number learns from."""
        return 0 if self.refresh_every is None else step // self.refresh_every

    def begins(self, step: int) -> bool:
        """Whether a round begins with the step."""
        return step == 0 or self.round(step) > self.round(step - 1)

    def score(self, scene: Scene, video_FHWC: np.ndarray) -> float:
        """The reward of a clip in [0, 1]."""
        found = agreement(scene, see(video_FHWC))
        return float(np.mean([found[name] for name in self.reward]))


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
        self._data, self._asked, self._model, self._bank = data, asked, model, bank
        self._execution, self._sharding, self._report = execution, sharding, report
        if model.first_frame:
            raise ConfigError(
                "the model continues pictures, and pairs are drawn from captions alone: take a "
                "model without first_frame"
            )
        vae = None if data.vae is None else load_artifact(data.vae, sharding)
        channels = asked.channels if vae is None else vae.model.latents
        if channels != model.channels:
            raise ConfigError(f"the data have {channels} channels, the model {model.channels}")
        self._decoded = lambda clips: clips
        if vae is not None:
            decode = jax.jit(vae.model.decode)
            self._decoded = lambda clips: np.asarray(jax.device_get(decode(vae.params, clips)))
        alone = replace(data, path="", vae=None, refresh_every=None)
        self._made = {
            "pairs": repr(alone),
            "vae": None if vae is None else text_states.parameters_hash(vae),
            "texts": bank.fingerprint,
        }

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a run that goes on must agree with."""
        return self._made | {"refresh_every": self._data.refresh_every}

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
        facts = (digest_of_params(params), self._model, self._made, self._execution.dtype, number)
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
        data, captions = self._data, self._asked.captions
        share_N = uniforms(data.seed, "language", number * len(captions) + np.arange(len(captions)))
        texts = [of[int(u * len(of))] for of, u in zip(captions, share_N, strict=True)]
        clips = draw_each(
            params,
            self._model,
            self._bank.encoded,
            np.repeat([self._bank.index[text] for text in texts], data.clips),
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
        for i, text in enumerate(texts):
            clips_KFHWC = np.stack(list(islice(clips, data.clips)))
            scene = data.scenes.draw(data.seed, i)
            rewards = [data.score(scene, video) for video in self._decoded(clips_KFHWC)]
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
