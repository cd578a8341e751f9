"""What detectors find in clips that a model draws by captions of moving scenes.

    python benchmarks/scenes.py runs/scenes --sampler dpm --steps 20 --guidance 3 --shift 6

Captions in English and Chinese of scenes that were not trained on: of combinations of colour, shape
and motion that the run has seen in other places, and of those that it has never seen (1 in 8, where
the run's family has ``combinations: seen``). Beside them the ceiling: the same detectors on those
scenes as rendered. Whether clips are copies is told by their distance to the nearest of all clips
that were trained on, beside the same distance of fresh rendered scenes. Exits 1 if a bar is missed:
colour and shape 95 %, motion 90 %, the languages within 3 points, of all seen combinations.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from step_jax import MeshConfig, Sharding, load_artifact
from step_jax.data.rendered import HELDOUT_SEED, RenderedClips
from step_jax.data.scenes import LANGUAGES, Scene, Scenes
from step_jax.evaluation.video_scenes import judge_scenes
from step_jax.inference import text_states
from step_jax.inference.flow import Sampler, draw_each
from step_jax.models.video.dit import VideoDiT
from step_jax.runs import media
from step_jax.trainers.diffusion.sources import SceneData, data_of

BARS = {"colour": 0.95, "shape": 0.95, "motion": 0.90}
LANGUAGES_APART = 0.03
COLUMNS = ("colour", "shape", "count", "motion", "all", "flicker")


def asked(family: Scenes, seed: int, count: int) -> list[Scene]:
    """Scenes that no training has: of another seed."""
    return [family.draw(seed + HELDOUT_SEED, i) for i in range(count)]


def distances(clips_NFHWC: np.ndarray, known_MFHWC: np.ndarray) -> np.ndarray:
    """From each clip to the nearest of the known ones, root mean square of a number: (N,)."""
    a_ND, b_MD = (x.reshape(len(x), -1).astype(np.float32) for x in (clips_NFHWC, known_MFHWC))
    square_NM = np.square(a_ND).sum(1)[:, None] + np.square(b_MD).sum(1) - 2 * a_ND @ b_MD.T
    return np.sqrt(np.maximum(square_NM.min(1), 0) / a_ND.shape[1])


def row(name: str, figures: dict[str, float]) -> str:
    return f"| {name} | " + " | ".join(f"{figures[c]:.3f}" for c in COLUMNS) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="of step-jax diffusion on scenes, or of a loop that tunes one")
    parser.add_argument("--data", help="the run whose scenes they are, if another")
    parser.add_argument("--captions", type=int, default=150, help="of each set, in both languages")
    parser.add_argument("--sampler", default="dpm", choices=["euler", "heun", "dpm", "unipc"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--shift", type=float, default=6.0)
    parser.add_argument("--pictures", type=Path, help="a PNG of some of the clips")
    args = parser.parse_args()
    sharding = Sharding.build(MeshConfig())
    artifact = load_artifact(args.run, sharding)
    model = artifact.require(VideoDiT, "this benchmark")
    data = data_of(load_artifact(args.data or args.run, sharding, arrays=False))
    assert isinstance(data, SceneData), "the run was not trained on scenes: name one, --data"
    family = data.families[0]
    size = (family.frames, family.height, family.width)
    sampler = Sampler(args.sampler, args.steps, args.shift, args.guidance)
    sets = {"seen": family}
    if family.combinations == "seen":
        sets["unseen"] = replace(family, combinations="unseen")
    print(f"{args.run}, step {artifact.step}; {sampler}\n")
    print(f"| {args.captions} captions, twice | {' | '.join(COLUMNS)} |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    found, drawn = {}, {}
    for name, scenes_of in sets.items():
        scenes = asked(scenes_of, data.seed, args.captions)
        rendered = [scenes_of.render(scene) for scene in scenes]
        print(row(f"{name}, as rendered", judge_scenes(scenes, rendered)))
        for language in LANGUAGES:
            captions = ["", *(scene.caption(language) for scene in scenes)]
            texts = text_states.of_prompts(artifact, captions, sharding, load_artifact, print)
            clips = draw_each(
                artifact.params, model, texts, 1 + np.arange(len(scenes)), size, sampler,
                seed=LANGUAGES.index(language), execution=artifact.execution, sharding=sharding,
            )  # fmt: skip
            drawn[name, language] = np.stack(list(clips))
            found[name, language] = judge_scenes(scenes, drawn[name, language])
            print(row(f"{name}, {language}", found[name, language]), flush=True)
    source = RenderedClips(data.families, data.clips, data.seed)
    known = np.stack([source.latents(i) for i in range(data.clips)])
    fresh = np.stack([family.render(s) for s in asked(family, data.seed + 1, args.captions)])
    own = distances(np.concatenate([drawn["seen", x] for x in LANGUAGES]), known)
    for what, values in (("drawn clips", own), ("fresh rendered scenes", distances(fresh, known))):
        low, middle = np.quantile(values, [0.01, 0.5])
        found_in = f"nearest of {len(known):,} trained clips to {what}"
        print(f"\n{found_in}: {middle:.3f}, 1 % below {low:.3f}")
    if args.pictures is not None:
        some = np.concatenate([clips[:4] for clips in drawn.values()])
        media.save_clip(media.grid(some, 1), args.pictures, 8.0, 6)
    both = {c: np.mean([found["seen", x][c] for x in LANGUAGES]) for c in BARS}
    apart = abs(found["seen", "en"]["all"] - found["seen", "zh"]["all"])
    missed = [f"{c} {both[c]:.3f} < {bar}" for c, bar in BARS.items() if both[c] < bar]
    missed += [f"languages {apart:.3f} apart"] * (apart > LANGUAGES_APART)
    print(f"\nmissed: {'; '.join(missed) or 'nothing'}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
