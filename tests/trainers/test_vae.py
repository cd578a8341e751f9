"""The autoencoder's loop: its losses, who learns from which, buckets, pictures, stages.

The loop contract (test_loop_contract.py) runs it with a discriminator.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from step_jax.core import spec as spec_lib
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data.scenes import Scenes
from step_jax.data.video import SceneClips
from step_jax.interop.artifacts import load_artifact
from step_jax.models.video.discriminator import Discriminator
from step_jax.models.video.vae import VideoVAE
from step_jax.runs.session import RunConfig
from step_jax.trainers.diffusion.vae import (
    DISCRIMINATOR,
    LEARNER,
    Adversarial,
    Config,
    Loss,
    PerceptualLoss,
    Training,
    frozen_schema,
    judged,
    make_loss,
)
from step_jax.training.optimizers.config import AdamW
from step_jax.training.schedules import Constant
from tests.models.small import FAST_COMPILE
from tests.trainers.loops import run_loop, steps

MODEL = VideoVAE(
    latents=2, stem=4, encoder_widths=(8,), decoder_widths=(8,), encoder_blocks=1,
    decoder_blocks=1, temporal=(), head_width=16, groups=4, attention=False, chunk=3,
)  # fmt: skip
JUDGE = Discriminator((4,), groups=4)
PARTS = ("l1", "kl", "adversarial", "discriminator")
ONE = Sharding.build(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def gradients():
    """(value of each part, its gradient's norm at each learner), all parts compiled at once."""
    config = Loss(kl=0.5, adversarial=Adversarial(JUDGE, coefficient=0.25))
    loss = make_loss(config, MODEL, ONE)
    rng = np.random.default_rng(0)
    params = {
        name: spec_lib.map_specs(
            lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32), model.specs()
        )
        for name, model in ((LEARNER, MODEL), (DISCRIMINATOR, JUDGE))
    }
    video = jnp.asarray(rng.uniform(-1, 1, (2, 3, 8, 8, 3)), jnp.float32)

    def norms(params, judged):
        """The parts' values, and from one pass forwards what each of them teaches whom."""
        batch = {"video": video, "judged": judged}

        def values(p):
            parts = loss(p, batch, jax.random.key(0)).parts
            return {name: parts[name].value() for name in PARTS}

        found, back = jax.vjp(values, params)
        out = {}
        for name in PARTS:
            (slope,) = back({n: jnp.float32(n == name) for n in PARTS})
            size = {
                who: sum(jnp.sum(jnp.abs(a)) for a in jax.tree.leaves(slope[who])) for who in slope
            }
            out[name] = found[name], size
        return out

    compiled = jax.jit(norms, compiler_options=FAST_COMPILE)
    return {on: jax.device_get(compiled(params, jnp.float32(on))) for on in (0, 1)}


@pytest.mark.parametrize(
    ("part", "taught"),
    [
        ("l1", LEARNER),
        ("kl", LEARNER),
        ("adversarial", LEARNER),
        ("discriminator", DISCRIMINATOR),
    ],
)
def test_every_part_teaches_one_learner(gradients, part, taught):
    value, sizes = gradients[1][part]
    assert np.isfinite(value) and value != 0
    assert {who: bool(size > 0) for who, size in sizes.items()} == {
        LEARNER: taught == LEARNER,
        DISCRIMINATOR: taught == DISCRIMINATOR,
    }


def test_before_it_counts_the_judgement_teaches_nobody(gradients):
    value, sizes = gradients[0]["adversarial"]
    assert value == 0 and sizes[LEARNER] == 0
    assert gradients[0]["discriminator"][1][DISCRIMINATOR] > 0


def test_the_judgement_counts_from_its_step_on():
    config = Loss(adversarial=Adversarial(after=3))
    assert [float(judged(config, step)["judged"]) for step in (0, 2, 3, 9)] == [0, 0, 1, 1]
    assert judged(Loss(), 5) == {}


def test_the_perceptual_network_is_described_without_its_file():
    schema = frozen_schema(Loss(perceptual=PerceptualLoss()))
    assert schema["perceptual/AlexNet_0/Conv_0/kernel"].shape == (11, 11, 3, 64)
    assert all(field.row_axis is None for field in schema.values())
    assert frozen_schema(Loss()) == {}


RECIPE = """
loop: vae
run: {{directory: {run}, checkpoint: {{every_steps: 3}}, logging: {{sinks: []}}}}
model:
  latents: 2
  stem: 4
  encoder_widths: [8]
  decoder_widths: [8]
  encoder_blocks: 1
  decoder_blocks: 1
  temporal: []
  head: {head}
  head_width: 16
  groups: 4
  attention: false
  chunk: 3
training: {{steps: 3, batch_size: 1}}
data:
  kind: scenes
  scenes: [{scenes}]
evaluation: {{clips: 2}}
optimizer: {{kind: adamw, learning_rate: 1e-3, schedule: {{kind: constant}}}}
"""


PICTURES = "{frames: 1, height: 12, width: 12}"
BOTH = "{frames: 3, height: 12, width: 12}, " + PICTURES


@pytest.mark.slow
def test_clips_and_pictures_are_learned_together_and_shown(tmp_path, capsys):
    run = tmp_path / "run"
    (tmp_path / "1.yaml").write_text(RECIPE.format(run=run, head="none", scenes=BOTH))
    run_loop("vae", str(tmp_path / "1.yaml"))
    assert "1 of 3x12x12, 3 of 1x12x12" in capsys.readouterr().out
    assert len(steps(run)) == 3
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (judgement,) = [r for r in records if r["event"] == "eval"]
    assert judgement["psnr"] > 0 and -1 <= judgement["ssim"] <= 1
    shown = {path.name: path for path in (run / "samples").iterdir()}
    assert shown.keys() == {"step_3_3x12x12.gif", "step_3_1x12x12.png"}
    with Image.open(shown["step_3_3x12x12.gif"]) as clip:
        assert clip.n_frames == 3


@pytest.mark.slow
def test_a_stage_with_a_fresh_head_goes_on_from_one_without(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    start = (
        f'init_from: {{artifact: {first}, fresh: ["*/head"], freeze: ["*/levels", "*/middle"]}}\n'
    )
    few = ["--evaluation.clips", "0", "--training.steps", "1"]
    for run, head, more in ((first, "none", ""), (second, "dual_path", start)):
        recipe = tmp_path / f"{head}.yaml"
        recipe.write_text(RECIPE.format(run=run, head=head, scenes=PICTURES) + more)
        run_loop("vae", str(recipe), *few)
    before, after = (load_artifact(str(run), ONE) for run in (first, second))
    assert (before.model.reduction, after.model.reduction) == ((1, 1, 1), (2, 2, 2))
    for part in ("levels", "middle"):
        pair = (getattr(a.params.encoder, part) for a in (before, after))
        jax.tree.map(np.testing.assert_array_equal, *pair)


def test_what_the_sizes_do_not_allow_is_refused_before_anything_runs():
    def config(**changes):
        scenes = SceneClips((Scenes(3, 20, 20),))
        plain = {"model": VideoVAE(), "data": scenes}
        adamw = AdamW(learning_rate=1e-3, schedule=Constant())
        return Config(RunConfig("x"), Training(1), optimizer=adamw, **(plain | changes))

    with pytest.raises(ConfigError, match="multiples of 16"):
        config().validate()
    with pytest.raises(ConfigError, match="20 x 20 are too small for alexnet"):
        config(model=MODEL, loss=Loss(perceptual=PerceptualLoss())).validate()
    with pytest.raises(ConfigError, match="give a model, or init_from"):
        config(model=None).validate()
