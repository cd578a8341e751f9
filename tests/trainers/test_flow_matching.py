"""The diffusion loop: learning, buckets compiled once, packs, accumulation, frozen encoders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from step_jax.cli.main import main
from step_jax.core.config import to_plain
from step_jax.core.errors import CheckpointError, ConfigError, DataError, ExitCode
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data.digits import Digits
from step_jax.data.latents import Clip, LatentFolder, write_latents
from step_jax.inference.flow import Sampler, draw
from step_jax.inference.text_states import of_prompts
from step_jax.interop.artifacts import load_artifact
from step_jax.runs.session import Session
from step_jax.trainers.diffusion import sources
from step_jax.trainers.diffusion.sources import DigitsData, LatentData
from tests.trainers.loops import run_loop, steps

RECIPE = """
run: {{directory: {run}, checkpoint: {{every_steps: 40}}, logging: {{sinks: []}}}}
optimizer: {{kind: adamw, learning_rate: 1e-2, schedule: {{kind: constant}}}}
execution: {{dtype: float32}}
model:
  width: 16
  depth: 2
  channels: {channels}
  patch: {patch}
  attention: {{kind: mha, heads: 2, head_dim: 8, position: {{kind: rope, axes: [4, 2, 2]}}}}
  mlp: {{kind: gelu, hidden: 32}}
  text:
    - kind: tower
      name: clip
      tokens: 4
      vocab: {vocab}
      width: 16
      depth: 1
      attention: {{kind: mha, heads: 2, head_dim: 8}}
      mlp: {{kind: gelu, hidden: 16}}
"""
DIGITS = "training: {{steps: 60, batch_size: 32}}\nsample: {{count: 1, sampler: {{steps: 2}}}}\n"
LATENTS = """
data: {{kind: latents, path: {data}, buckets: [[1, 2, 2], [2, 2, 2]]}}
training: {{steps: 6, batch_size: 4}}
sample: {{count: 0}}
"""


def recipe(folder: Path, rest: str, run: str = "run", **values) -> str:
    path = folder / f"{run}.yaml"
    given = {"channels": 1, "patch": [1, 4, 4], "vocab": 320} | values
    path.write_text((RECIPE + rest).format(run=folder / run, **given))
    return str(path)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    rng = np.random.default_rng(0)
    clips = [
        Clip(rng.standard_normal((1 + i % 2, 2, 2, 3)), (f"clip {i % 3}", f"片段{i % 3}"))
        for i in range(12)
    ]
    write_latents(tmp_path_factory.mktemp("latents"), clips, made_by="vae")
    return tmp_path_factory.getbasetemp() / "latents0"


def latent_recipe(folder: Path, latents, **values) -> str:
    return recipe(folder, LATENTS, channels=3, patch=[1, 1, 1], vocab=272, data=latents, **values)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, latents):
    """The records of an undisturbed run on two buckets, and what was compiled in each step."""
    folder, compiled, now = tmp_path_factory.mktemp("straight"), [], [0]
    finished = Session.finished

    def watched(self, step, *rest, **named):
        now[0] = step
        finished(self, step, *rest, **named)

    def listen(event, _, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(now[0])

    jax.monitoring.register_event_duration_secs_listener(listen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "finished", watched)
        run_loop("diffusion", latent_recipe(folder, latents))
    jax.monitoring.unregister_event_duration_listener(listen)
    return steps(folder / "run"), compiled


@pytest.mark.slow
def test_it_learns_and_draws(tmp_path):
    """A fifth of the loss of the first steps, which is that of no prediction, is soon gone."""
    pytest.importorskip("sklearn")
    run_loop("diffusion", recipe(tmp_path, DIGITS))
    losses = [r["loss"] for r in steps(tmp_path / "run")]
    assert np.mean(losses[-10:]) < 0.8 * losses[0]
    records = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    (judged,) = [r for r in records if r["event"] == "eval"]
    assert 0 <= judged["accuracy"] <= 1 and judged["heldout_accuracy"] > 0.9
    assert Image.open(tmp_path / "run" / "samples" / "step_60.png").size == (10 * 4, 20 * 10 * 4)


@pytest.mark.slow
def test_buckets_are_compiled_before_the_first_step_and_never_again(straight):
    records, compiled = straight
    weights = {r["loss_weight"] for r in records}
    assert weights == {4 * 8 * 3.0, 6 * 4 * 3.0}  # rows x tokens x channels of the two buckets
    assert compiled.count(0) >= 3  # before the first step: both buckets, and the fresh state
    assert not [step for step in compiled if 1 <= step < 6]


@pytest.mark.slow
def test_microbatches_change_nothing(straight, tmp_path, latents):
    run_loop("diffusion", latent_recipe(tmp_path, latents), "--training.accumulation", "2")
    for got, want in zip(steps(tmp_path / "run"), straight[0], strict=True):
        assert got == pytest.approx(want, rel=2e-5, abs=1e-6)


@pytest.mark.slow
def test_packs_on_a_context_axis_learn_what_they_learn_on_one_device(tmp_path, latents):
    """Also if the run is cut off and goes on."""
    packs = ["--training.packs.tokens", "12", "--training.packs.samples", "3"]
    run_loop("diffusion", latent_recipe(tmp_path, latents, run="whole"), *packs)
    mesh = ["--parallel.context", "2", "--parallel.fsdp", "2", "--run.checkpoint.every-steps", "2"]
    cut = latent_recipe(tmp_path, latents, run="cut")
    run_loop("diffusion", cut, *packs, *mesh, devices=4, cut_after=3)
    run_loop("diffusion", cut, *packs, *mesh, devices=4)
    for got, want in zip(steps(tmp_path / "cut"), steps(tmp_path / "whole"), strict=True):
        assert got == pytest.approx(want, rel=2e-5, abs=1e-6)


@pytest.mark.slow
def test_a_student_learns_from_a_teachers_clips_and_the_noise_they_began_as(tmp_path, latents):
    """What is kept of a pair is what the teacher draws of its noise, whoever asks."""
    teacher = latent_recipe(tmp_path, latents, run="teacher")
    run_loop("diffusion", teacher, "--training.steps", "2")
    student = Path(latent_recipe(tmp_path, latents, run="student"))
    text = student.read_text()
    pairs = (
        f"init_from: {{artifact: {tmp_path / 'teacher'}}}\n"
        f"data: {{kind: reflow, teacher: {tmp_path / 'teacher'}, clips: 6, size: [1, 2, 2], "
        f"path: {tmp_path / 'pairs'}, noise_seed: 3, sampler: {{steps: 2, guidance: 2}}}}\n"
        "flow: {density: {kind: u_shaped}}\n"
    )
    start, rest = text.index("model:"), text.index("training:")
    student.write_text(text[:start] + pairs + text[rest:])
    run_loop("diffusion", str(student), "--training.steps", "2")
    assert len(steps(tmp_path / "student")) == 2
    folder = LatentFolder.open(tmp_path / "pairs")
    assert folder.noises_N.tolist() == list(range(6))
    one = Sharding.build(MeshConfig(), jax.devices()[:1])
    artifact = load_artifact(str(tmp_path / "teacher"), one)
    texts = of_prompts(artifact, ["", *folder.captions[4]], one, load_artifact)["clip"]
    (clip,) = draw(
        artifact.params,
        artifact.model,
        {"clip": (texts.values[1:], texts.lengths_K[1:])},
        {"clip": (texts.values[:1], texts.lengths_K[:1])},
        (1, 2, 2),
        Sampler(steps=2, guidance=2.0),
        seed=3,
        number=4,
        count=1,
        execution=artifact.execution,
        sharding=one,
    )
    np.testing.assert_allclose(folder.latents(4), clip, rtol=1e-4, atol=1e-4)
    other = ["--data.noise-seed", "4", "--training.steps", "3"]
    assert main(["diffusion", str(student), *other]) == ExitCode.FAILURE  # other pairs lie there


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        Digits.load()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.patch", "1", "3", "1"], "do not divide into patches of 1 x 3 x 1"),
        (["--text.dropout", "1"], "dropout is 1.0; use a share in [0, 1)"),
        (["--text.dropout", "0", "--sample.sampler.guidance", "3"], "also learns without text"),
        (["--model.channels", "4"], "the data have 3 channels, the model 4"),
        (["--training.packs.tokens", "4", "--training.packs.samples", "2"], "largest clip has 8"),
        (["--optimizer.learning-rate", "step_law"], "step_law is a law of pretraining tokens"),
    ],
)
def test_bad_input_is_refused_in_words(tmp_path, capsys, latents, flags, message):
    assert main(["diffusion", latent_recipe(tmp_path, latents), *flags]) in (
        ExitCode.CONFIG,
        ExitCode.FAILURE,
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


class Halves:
    """In the place of an autoencoder: every other row and column, and the clip twice as bright."""

    def __init__(self, gain: float):
        self.gain = gain

    def __repr__(self):
        return f"Halves({self.gain})"

    def encode(self, params, video):
        return self.gain * video[:, :, ::2, ::2], video


def test_clips_are_encoded_once_and_by_one_autoencoder(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    vaes = {n: SimpleNamespace(model=Halves(n), params={}) for n in (1.0, 2.0)}
    monkeypatch.setattr(sources, "load_artifact", lambda name, _: vaes[float(name)])
    data = LatentData(str(tmp_path), ((1, 4, 4),), vae="2.0", clips=DigitsData())
    one, said = Sharding.build(MeshConfig(), jax.devices()[:1]), []
    folder, digits = data.open(one, said.append), Digits.load()
    assert len(said) == 1 and "2.0 encodes 1,437 clips" in said[0]
    np.testing.assert_array_equal(folder.latents(70), 2 * digits.latents(70)[:, ::2, ::2])
    assert folder.captions == digits.captions
    data.open(one, said.append)
    assert len(said) == 1
    with pytest.raises(DataError, match="of another autoencoder"):
        replace(data, vae="1.0").open(one, said.append)
    # a run decodes by the autoencoder that its latents are of, or by one that is named
    meta = {"config": {"data": to_plain(data)}, "data": folder.fingerprint}
    run = SimpleNamespace(name="run", meta=meta)
    assert sources.decoder_of(run, None, one) is vaes[2.0]
    assert sources.decoder_of(run, "1.0", one) is vaes[1.0]
    vaes[2.0] = vaes[1.0]
    with pytest.raises(CheckpointError, match="run learnt latents of another autoencoder"):
        sources.decoder_of(run, None, one)


def test_clips_of_a_size_that_is_no_bucket_are_refused(latents):
    one = Sharding.build(MeshConfig(), jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"\(2, 2, 2\).*are no buckets; there are"):
        LatentData(str(latents), ((1, 2, 2),)).open(one, print)


def test_states_without_an_encoder_are_refused(tmp_path, capsys, latents):
    text = latent_recipe(tmp_path, latents)
    found = Path(text).read_text()
    head, tower = found.split("    - kind: tower")
    states = "    - {kind: states, name: llm, width: 8, tokens: 4}\n"
    Path(text).write_text(head + states + tower[tower.index("\ndata:") :])
    assert main(["diffusion", text]) == ExitCode.CONFIG
    message = "the model reads states of ['llm'], and text.encoders has none"
    assert message in capsys.readouterr().err
