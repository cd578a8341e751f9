"""What a diffusion model draws while it trains and at the end.

Shape suffixes: N samples, F frames, H height, W width, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.data.captions import NO_TEXT, TextBank
from step_jax.data.clips import ClipSource
from step_jax.data.digits import Digits
from step_jax.data.rendered import RenderedClips
from step_jax.data.scenes import LANGUAGES, Scene
from step_jax.evaluation.images import judge_digits
from step_jax.evaluation.video_scenes import judge_scenes
from step_jax.inference.flow import Sampler, draw
from step_jax.interop.artifacts import load_artifact
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.patches import Sizes
from step_jax.runs import media, plots
from step_jax.runs.session import Session


@dataclass(frozen=True)
class Sample:
    """Pictures or clips drawn by the moving average during the run and at its end.

    every_steps: 0 for the end only.
    prompts: of captions; none given takes those that the data name.
    count: of each prompt; 0 draws nothing.
    negative: what is not wanted, in the place of no text.
    size: of latents; the first bucket by default.
    fps: frames per second of the files.
    """

    every_steps: int = 0
    prompts: tuple[str, ...] = ()
    count: int = 2
    negative: str = NO_TEXT
    size: Sizes | None = None
    fps: float = 8.0
    sampler: Sampler = Sampler(steps=32)

    def validate(self):
        checks.at_least(self, every_steps=0, count=0)
        checks.above(self, fps=0)
        if not all(prompt.strip() for prompt in self.prompts):
            raise ConfigError("sample.prompts has an empty one")

    @property
    def unwanted(self) -> tuple[str, ...]:
        return (self.negative,) if self.negative else ()

    def prompts_of(self, source: ClipSource) -> tuple[str, ...]:
        return self.prompts or source.prompts

    def due(self, step: int, total: int) -> bool:
        return bool(self.every_steps) and step % self.every_steps == 0 and step < total


class Preview:
    """Draws the prompts of a run with the same noise at every step."""

    def __init__(
        self,
        session: Session,
        config: Any,
        model: VideoDiT,
        bank: TextBank,
        source: ClipSource,
    ):
        self._session, self._config, self._model = session, config, model
        self._bank, self._source = bank, source
        sample: Sample = config.sample
        self._prompts = sample.prompts_of(source)
        self._size = sample.size or config.data.buckets[0]
        vae = config.data.vae
        self._vae = None if vae is None else load_artifact(vae, session.sharding)

    def draw(self, step: int, params) -> dict[str, float]:
        """Draws and records; returns the figures of the data's own judge, if it has one."""
        sample: Sample = self._config.sample
        if not sample.count:
            return {}
        numbers_N = np.repeat([self._bank.index[p] for p in self._prompts], sample.count)
        nothing_N = np.full(len(numbers_N), self._bank.index[sample.negative])
        clips_NFHWC = draw(
            params,
            self._model,
            self._texts(numbers_N),
            self._texts(nothing_N),
            self._size,
            sample.sampler,
            seed=self._config.run.seed,
            execution=self._config.execution,
            sharding=self._session.sharding,
            count=len(numbers_N),
            scalars={name: float(np.median(v)) for name, v in self._source.scalars.items()},
            first_NHWC=self._first(len(numbers_N)),
        )
        if self._vae is not None:
            decoded = jax.jit(self._vae.model.decode)(self._vae.params, clips_NFHWC)
            clips_NFHWC = np.asarray(jax.device_get(decoded))
        figures = self._judged(clips_NFHWC)
        if figures:
            self._session.reporter.evaluation(step, figures, "samples")
        if self._session.primary:
            path = self._session.directory.samples / f"step_{step}"
            media.save_grid(clips_NFHWC, sample.count, path, sample.fps)
        return figures

    def finish(self, params) -> dict[str, float]:
        """What the model draws in the end, its figures, and the loss curve."""
        session = self._session
        result = self.draw(session.total_steps, params)
        if session.primary:
            plots.plot_run(session.directory.path, session.directory.plots / "loss.png")
        session.reporter.summary({"status": "done", **result})
        return result

    def _texts(self, numbers_N):
        texts = [self._bank.texts(int(n)) for n in numbers_N]
        return {
            name: (np.stack([t[name][0] for t in texts]), np.array([t[name][1] for t in texts]))
            for name in self._bank.fields
        }

    def _first(self, count: int):
        """For a model that continues pictures: first frames of the data."""
        if not self._model.first_frame:
            return None
        fits = np.flatnonzero((self._source.sizes_N3 == self._size).all(1))
        return np.stack([self._source.latents(int(i))[0] for i in np.resize(fits, count)])

    def _judged(self, clips_NFHWC) -> dict[str, float]:
        count = self._config.sample.count
        if isinstance(self._source, Digits):
            names = {text: i for i, t in enumerate(self._source.names) for text in t}
            mine = np.repeat([p in names for p in self._prompts], count)
            digits = np.repeat([names.get(p, 0) for p in self._prompts], count)
            if not mine.any():
                return {}
            return judge_digits(self._source, clips_NFHWC[mine, 0], digits[mine])
        if isinstance(self._source, RenderedClips):
            return self._of_scenes(self._source.asked_for, count, clips_NFHWC)
        return {}

    def _of_scenes(self, scenes: dict[str, Scene], count: int, clips_NFHWC) -> dict[str, float]:
        """What a program sees in the clips, and the same of each language's prompts alone."""
        prompts = [p for p in self._prompts for _ in range(count)]
        known = [(p, clip) for p, clip in zip(prompts, clips_NFHWC, strict=True) if p in scenes]
        if not known:
            return {}
        figures = judge_scenes([scenes[p] for p, _ in known], [clip for _, clip in known])
        for language in LANGUAGES:
            own = [(p, c) for p, c in known if scenes[p].caption(language) == p]
            if own:
                judged = judge_scenes([scenes[p] for p, _ in own], [clip for _, clip in own])
                figures[f"all_{language}"] = judged["all"]
        return figures
