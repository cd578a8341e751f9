"""Clips that a diffusion transformer is asked to draw by captions of scenes, judged by a program.

Shape suffixes: M clips asked for, K clips of a caption, F frames, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import numpy as np

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.data.captions import TextBank
from step_jax.data.clips import uniforms
from step_jax.data.rendered import RenderedClips
from step_jax.data.scenes import Scene, Scenes
from step_jax.evaluation.video_scenes import agreement, see
from step_jax.inference import text_states
from step_jax.inference.flow import Sampler
from step_jax.interop.artifacts import load_artifact
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.patches import Sizes

Statement = Literal["colour", "shape", "count", "motion", "camera", "all"]


@dataclass(frozen=True, kw_only=True)
class AskedData:
    """What a policy is asked to draw, how, and what of it is rewarded.

    scenes: whose captions are asked for, and whose detectors judge (``evaluation.video_scenes``).
    reward: which statements of its caption a clip shall bear out; their mean is its reward.
    captions: scenes that there are.
    clips: drawn of each caption.
    refresh_every: steps after which the policy of that step draws anew; null learns from what that
      of the start drew.
    seed: of scenes and noise.
    size: of the latents; null for those of the scenes, of a model of pixels.
    vae: an artifact that decodes what is drawn.
    """

    scenes: Scenes
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
        """Which round of clips the step with this 0-based number learns from."""
        return 0 if self.refresh_every is None else step // self.refresh_every

    def begins(self, step: int) -> bool:
        """Whether a round begins with the step."""
        return step == 0 or self.round(step) > self.round(step - 1)

    def score(self, scene: Scene, video_FHWC: np.ndarray) -> float:
        """The reward of a clip in [0, 1]."""
        found = agreement(scene, see(video_FHWC))
        return float(np.mean([found[name] for name in self.reward]))


class Asking:
    """Asks for captions and judges clips.

    A round asks for captions by their *numbers*, which go on from round to round: number n is
    caption ``n % data.captions``, in the language that the seed has for it.

    Attributes:
      made: JSON-able, what decides the clips besides the policy and the round.
    """

    def __init__(
        self,
        data: AskedData,
        source: RenderedClips,
        model: VideoDiT,
        bank: TextBank,
        sharding: Sharding,
    ):
        """
        Raises:
          ConfigError: a model that does not draw what ``data`` says.
        """
        self._data, self._source, self._bank = data, source, bank
        if model.first_frame:
            raise ConfigError(
                "the model continues pictures, and clips are drawn from captions alone: take a "
                "model without first_frame"
            )
        vae = None if data.vae is None else load_artifact(data.vae, sharding)
        channels = source.channels if vae is None else vae.model.latents
        if channels != model.channels:
            raise ConfigError(f"the data have {channels} channels, the model {model.channels}")
        self._decoded = lambda clips: clips
        if vae is not None:
            decode = jax.jit(vae.model.decode)
            self._decoded = lambda clips: np.asarray(jax.device_get(decode(vae.params, clips)))
        self.made: dict[str, Any] = {
            "asked": repr(replace(data, vae=None, refresh_every=None)),
            "vae": None if vae is None else text_states.parameters_hash(vae),
            "texts": bank.fingerprint,
        }

    def texts(self, numbers: np.ndarray) -> list[str]:
        """The captions of these numbers."""
        captions = self._source.captions
        share = uniforms(self._data.seed, "language", numbers)
        of = [captions[int(n) % len(captions)] for n in numbers]
        return [texts[int(u * len(texts))] for texts, u in zip(of, share, strict=True)]

    def which(self, texts: list[str]) -> np.ndarray:
        """The text in the bank of each clip, ``data.clips`` of each caption: int64 (M,)."""
        return np.repeat([self._bank.index[text] for text in texts], self._data.clips)

    def rewards(self, number: int, clips_KFHWC: np.ndarray) -> list[float]:
        """Of the clips of a number, in [0, 1]."""
        scene = self._data.scenes.draw(self._data.seed, number % self._data.captions)
        return [self._data.score(scene, video) for video in self._decoded(clips_KFHWC)]
