"""Rendered scenes as a source of clips in pixels; see ``data.scenes`` and ``data.clips``.

Shape suffixes: N clips, F frames, H height, W width, C channels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from step_jax.data.scenes import LANGUAGES, Scene, Scenes

HELDOUT_SEED = 2**31  # of scenes that are only asked for
PROMPTS = 24


def captions_of(scene: Scene) -> tuple[str, ...]:
    """A scene in every language."""
    return tuple(scene.caption(language) for language in LANGUAGES)


@dataclass(frozen=True)
class RenderedClips:
    """So many scenes, of each family in turn.

    families: each of a size of its own.
    clips: how many scenes in all; they are rendered when they are read.
    """

    families: tuple[Scenes, ...]
    clips: int
    seed: int = 0
    channels: int = 3
    scalars: dict[str, np.ndarray] = field(default_factory=dict)
    noises_N: None = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        families = [str(scenes) for scenes in self.families]
        return {"scenes": families, "clips": self.clips, "seed": self.seed}

    @property
    def sizes_N3(self) -> np.ndarray:
        sizes = [(s.frames, s.height, s.width) for s in self.families]
        return np.array(sizes)[np.arange(self.clips) % len(sizes)]

    def _family(self, i: int) -> Scenes:
        return self.families[i % len(self.families)]

    @functools.cached_property
    def _scenes(self) -> list[Scene]:
        return [self._family(i).draw(self.seed, i) for i in range(self.clips)]

    @functools.cached_property
    def captions(self) -> list[tuple[str, ...]]:
        return [captions_of(scene) for scene in self._scenes]

    def latents(self, i: int) -> np.ndarray:
        return self._family(i).render(self._scenes[i])

    @functools.cached_property
    def asked_for(self) -> dict[str, Scene]:
        """Prompts of scenes of the first family that are none of the clips, in every language."""
        drawn = [self.families[0].draw(self.seed + HELDOUT_SEED, i) for i in range(PROMPTS)]
        return {text: scene for scene in drawn for text in captions_of(scene)}

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(self.asked_for)
