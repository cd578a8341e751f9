"""Where the diffusion loop's pictures and clips come from.

Each kind knows its sizes without opening anything (``buckets``), and opens as a ``ClipSource``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import yaml

from step_jax.checkpoint.artifact import Artifact
from step_jax.core import checks
from step_jax.core.config import parse_config
from step_jax.core.errors import CheckpointError, ConfigError
from step_jax.core.sharding import Sharding
from step_jax.data.captions import NO_TEXT
from step_jax.data.clips import ClipSource, uniforms
from step_jax.data.digits import SIZE, Digits
from step_jax.data.latents import MANIFEST, Clip, LatentFolder, write_latents
from step_jax.data.rendered import RenderedClips
from step_jax.data.scenes import Scenes
from step_jax.inference import text_states
from step_jax.inference.flow import ROWS, Sampler, check_guidance, draw_each
from step_jax.interop.artifacts import load_artifact
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.patches import Sizes
from step_jax.trainers.diffusion.groups import GroupData
from step_jax.trainers.diffusion.pairs import PairData

Report = Callable[[str], None]


@dataclass(frozen=True)
class DigitsData:
    """scikit-learn's 1,797 handwritten digits with captions in English and Chinese."""

    kind: ClassVar[str] = "digits"
    buckets: ClassVar[tuple[Sizes, ...]] = (SIZE,)
    vae: ClassVar[str | None] = None
    noise_seed: ClassVar[int | None] = None

    def open(self, sharding: Sharding, report: Report) -> ClipSource:
        return Digits.load()


@dataclass(frozen=True)
class SceneData:
    """Moving scenes with captions in English and Chinese, rendered when they are read.

    families: each of a size of its own; with ``frames: 1``, pictures.
    clips: how many scenes, of each family in turn.
    """

    kind: ClassVar[str] = "scenes"
    vae: ClassVar[str | None] = None
    noise_seed: ClassVar[int | None] = None
    families: tuple[Scenes, ...]
    clips: int = 4096
    seed: int = 0

    def validate(self):
        checks.at_least(self, clips=1)
        checks.seed(self.seed)
        if not self.families or len(set(self.buckets)) < len(self.families):
            raise ConfigError(f"data.families must be of one size each: {self.buckets}")

    @property
    def buckets(self) -> tuple[Sizes, ...]:
        return tuple((s.frames, s.height, s.width) for s in self.families)

    def open(self, sharding: Sharding, report: Report) -> ClipSource:
        return RenderedClips(self.families, self.clips, self.seed)


@dataclass(frozen=True)
class LatentData:
    """A folder of latents, as ``data.latents.write_latents`` makes them.

    buckets: every (frames, height, width) of latents that there may be.
    vae: an artifact: the autoencoder that they must be of, which decodes what is drawn.
    clips: what is encoded if the folder is not there.
    """

    kind: ClassVar[str] = "latents"
    noise_seed: ClassVar[int | None] = None
    path: str
    buckets: tuple[Sizes, ...]
    vae: str | None = None
    clips: DigitsData | SceneData | None = None

    def validate(self):
        if not self.buckets or len(set(self.buckets)) < len(self.buckets):
            raise ConfigError("data.buckets must name every size once")
        if self.clips is not None and self.vae is None:
            raise ConfigError("data.clips needs data.vae, which encodes them")

    def open(self, sharding: Sharding, report: Report) -> ClipSource:
        made_by = None
        if self.vae is not None:
            vae = load_artifact(self.vae, sharding)
            made_by = text_states.parameters_hash(vae)
            if self.clips is not None and not (Path(self.path) / MANIFEST).exists():
                clips = self.clips.open(sharding, report)
                report(f"{self.vae} encodes {len(clips.captions):,} clips into {self.path}")
                write_latents(self.path, encoded(vae, clips), made_by)
        source = LatentFolder.open(self.path, made_by)
        known = {tuple(map(int, size)) for size in source.sizes_N3}
        if strange := sorted(known - set(self.buckets)):
            raise ConfigError(
                f"{self.path} has clips of sizes {strange}, which are no buckets; there are: "
                f"{sorted(self.buckets)}"
            )
        return source


def encoded(vae: Artifact, source: ClipSource) -> Iterator[Clip]:
    """The mean latents of a source's clips, those of one size at a time."""
    encode = jax.jit(lambda params, video: vae.model.encode(params, video)[0])
    for size in np.unique(source.sizes_N3, axis=0):
        clips = np.flatnonzero((source.sizes_N3 == size).all(1))
        for low in range(0, len(clips), ROWS):
            chosen = clips[low : low + ROWS]
            video = np.stack([source.latents(int(i)) for i in np.resize(chosen, ROWS)])
            latents = np.asarray(encode(vae.params, video), np.float32)
            for i, latents_FHWC in zip(chosen, latents, strict=False):
                scalars = {name: float(values[i]) for name, values in source.scalars.items()}
                yield Clip(latents_FHWC, source.captions[int(i)], scalars)


@dataclass(frozen=True)
class ReflowData:
    """What a teacher draws by its own captions, each clip with the noise that it began as.

    The second rectified flow (arXiv 2209.03003), as Step-Video's Turbo is made (arXiv 2502.10248):
    a student that starts from the teacher learns the straight line between the two, and needs few
    steps then.

    teacher: an artifact of ``step-jax diffusion``.
    clips: how many are drawn, by each of the teacher's captions in turn.
    size: of the latents.
    path: folder in which they are kept.
    vae: an artifact that decodes what is drawn.
    noise_seed: of the noise.
    sampler: of the teacher.
    """

    kind: ClassVar[str] = "reflow"
    teacher: str
    clips: int
    size: Sizes
    path: str
    vae: str | None = None
    noise_seed: int = 0
    sampler: Sampler = field(default_factory=Sampler)

    def validate(self):
        checks.at_least(self, clips=1)
        checks.seed(self.noise_seed, "noise_seed")

    @property
    def buckets(self) -> tuple[Sizes, ...]:
        return (self.size,)

    def open(self, sharding: Sharding, report: Report) -> ClipSource:
        teacher = load_artifact(self.teacher, sharding)
        teacher.require(VideoDiT, "data.teacher")
        check_guidance(teacher, self.sampler)
        facts = (text_states.parameters_hash(teacher), self)
        made_by = hashlib.sha256(repr(facts).encode()).hexdigest()
        if not (Path(self.path) / MANIFEST).exists():
            report(f"{self.teacher} draws {self.clips} clips into {self.path}")
            write_latents(self.path, self._drawn(teacher, sharding, report), made_by)
        return LatentFolder.open(self.path, made_by)

    def _drawn(self, teacher, sharding: Sharding, report: Report) -> Iterator[Clip]:
        source = data_of(teacher).open(sharding, report)
        numbers = np.arange(self.clips)
        share_N = uniforms(self.noise_seed, "language", numbers)
        captions = [source.captions[int(i) % len(source.captions)] for i in numbers]
        prompts = [t[int(u * len(t))] for t, u in zip(captions, share_N, strict=True)]
        index = {NO_TEXT: 0}
        which = [index.setdefault(prompt, len(index)) for prompt in prompts]
        clips = draw_each(
            teacher.params,
            teacher.model,
            text_states.of_prompts(teacher, list(index), sharding, load_artifact, report),
            np.array(which),
            self.size,
            self.sampler,
            seed=self.noise_seed,
            execution=teacher.execution,
            sharding=sharding,
        )
        for i, (clip_FHWC, prompt) in enumerate(zip(clips, prompts, strict=True)):
            yield Clip(clip_FHWC, (prompt,), noise=i)


ClipData = DigitsData | SceneData | LatentData | ReflowData
AnyData = ClipData | PairData | GroupData


@dataclass(frozen=True)
class _Held:
    """The part of a run's configuration that says what it learnt from."""

    data: AnyData


def data_of(artifact: Artifact) -> AnyData:
    """What a diffusion model learnt from."""
    text = yaml.safe_dump({"data": artifact.meta["config"]["data"]})
    return parse_config(_Held, text, f"{artifact.name}, data").data


def decoder_of(artifact: Artifact, named: str | None, sharding: Sharding) -> Artifact | None:
    """What decodes a model's latents: the autoencoder that is named, or else that of its data.

    Raises:
      CheckpointError: that of its data is no longer the one that made the latents.
    """
    data = data_of(artifact) if "config" in artifact.meta else None
    name = named or (data.vae if data else None)
    if name is None:
        return None
    vae, made = load_artifact(name, sharding), artifact.meta.get("data", {})
    made_by = made.get("made_by") if isinstance(data, LatentData) else made.get("vae")
    if named is None and made_by and made_by != (found := text_states.parameters_hash(vae)):
        raise CheckpointError(
            f"{artifact.name} learnt latents of another autoencoder ({made_by[:12]}) than {name} "
            f"is now ({found[:12]}): name what decodes them, --vae"
        )
    return vae
