"""Parameters meet a configuration that is not their own: what differs is refused by its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from step_jax.cli import main as cli
from step_jax.core import spec as spec_lib
from step_jax.core.errors import CheckpointError
from step_jax.interop import artifacts, hf
from step_jax.interop.artifacts import OF_TRAINING, InitFrom, starting_point
from step_jax.models.layers.attention import MFA, MHA
from step_jax.models.layers.mlp import GELU, SwiGLU
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import LinearScaling, Rope
from step_jax.models.text.decoder import MTP, Block, Decoder, Group
from step_jax.models.text.reward import RewardModel
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.text_inputs import States, Tower
from step_jax.models.video.vae import VideoVAE
from tests.golden import golden
from tests.interop.test_hf_fields import possible, variants

VIDEO = Path(__file__).parents[2] / "configs/video"
MIXED = Block(MFA(2, 8, value="gated_key", query_norm=RMSNorm(), window=6), SwiGLU(16, clamp=7.0))
SMALL = MHA(2, 8, position=Rope(axes=(4, 2, 2)), qk_norm=RMSNorm())
#: Together they have every kind of layer.
MODELS = {
    "mixed": Decoder(16, (Group(2, (MIXED,)),), vocab=32, mtp=MTP(1, MIXED)),
    "qwen3_moe": hf.config_from_hf(golden.load("qwen3_moe").config),
    "deepseek_v3_moe": hf.config_from_hf(golden.load("deepseek_v3_moe").config),
    "step3p7": hf.config_from_hf(golden.load("step3p7").config),
    "pictures": VideoDiT(
        16, 2, SMALL, GELU(16), 3, patch=(1, 2, 2), scalars=("fps",),
        text=(Tower("clip", 4, 32, 8, 1, MHA(2, 4), GELU(8)), States("llm", 12, 5)),
    ),
    "vae": VideoVAE(4, 4, (8, 8), (8, 8), 1, 1, temporal=(True,), groups=4, chunk=5),
}  # fmt: skip


@pytest.fixture
def start(monkeypatch):
    """A start of a model with the parameters of another one."""

    def start(model, found, **init):
        artifact = SimpleNamespace(
            model=found, params=None, processor={}, step=3, require=lambda *_: found
        )
        monkeypatch.setattr(artifacts, "load_artifact", lambda *_, **__: artifact)
        return starting_point(model, InitFrom("runs/a", **init), None, type(found), arrays=False)

    return start


def shapes(model):
    return {name: spec.shape for name, spec in spec_lib.by_name(model.specs()).items()}


@pytest.mark.parametrize("name", MODELS)
def test_every_setting_is_either_the_artifacts_or_of_training(name, start):
    """Nothing but what a model is trained by differs in silence, whether parameters fit or not."""
    found, refused = MODELS[name], set()
    for field, model in variants(found, None):
        if model == found or not possible(model):
            continue
        if field in OF_TRAINING | {"FanIn.gain", "Fixed.std", "Fixed.scale_mlp_output"}:
            assert start(model, found).model == model
            continue
        with pytest.raises(CheckpointError) as caught:
            start(model, found)
        fit = shapes(model) == shapes(found)
        told = f"{field.partition('.')[2]} was " if fit else "the model has"
        assert told in str(caught.value), (field, str(caught.value))
        refused.add(field)
    assert refused


def with_theta(theta: float, **more) -> Decoder:
    attention = replace(MIXED.attention, position=Rope(theta, **more))
    group = Group(2, (replace(MIXED, attention=attention),))
    return replace(MODELS["mixed"], layers=(group,))


def test_what_differs_is_named_with_both_values_and_may_be_meant(start):
    longer = with_theta(5e5, scaling=LinearScaling(4.0))
    with pytest.raises(CheckpointError) as caught:
        start(longer, MODELS["mixed"])
    message, key = str(caught.value), "layers.0.blocks.0.attention.position"
    assert "the parameters of runs/a fit the model" in message
    assert f"\n  {key}.theta was 10000.0 and is 500000.0\n" in message
    assert f"\n  {key}.scaling was None and is {{'kind': 'linear', 'factor': 4.0}}\n" in message
    assert "Leave model out" in message and "init_from.changed" in message
    with pytest.raises(CheckpointError) as caught:
        start(longer, MODELS["mixed"], changed=("*.theta",))
    assert "theta" not in str(caught.value) and ".scaling was None" in str(caught.value)
    assert start(longer, MODELS["mixed"], changed=("*.position.*",)).model == longer


def test_the_trunk_of_a_reward_model_is_compared_too(start):
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.0\..*\.theta was 10000\.0"):
        start(RewardModel(with_theta(5e5)), RewardModel(MODELS["mixed"]))


def test_a_setting_that_fresh_parameters_answer_for_needs_no_other_word(start):
    """Another head of an autoencoder, which starts anew, and not another piece of its clips."""
    found = replace(MODELS["vae"], head="none")
    fresh = {"fresh": ("*/head",)}
    assert start(MODELS["vae"], found, **fresh).model == MODELS["vae"]
    with pytest.raises(CheckpointError, match="chunk was 5 and is 9") as caught:
        start(replace(MODELS["vae"], chunk=9), found, **fresh)
    assert "head was" not in str(caught.value)


@pytest.mark.parametrize(
    ("loop", "recipe", "before"),
    [
        ("vae", "vae_stage2", "vae_stage1"),
        ("vae", "vae_gan", "vae_stage2"),
        ("diffusion", "stages/t2vi_192p", "stages/t2i_256"),
        ("diffusion", "stages/ti2v", "step_video_30b"),
        ("diffusion", "stages/turbo", "step_video_30b"),
    ],
)
def test_every_stage_of_our_recipes_goes_on_from_the_one_before(loop, recipe, before, start):
    of, source = (cli.read([loop, str(VIDEO / f"{r}.yaml")])[1].config for r in (recipe, before))
    assert of.init_from.artifact == source.run.directory
    assert start(of.model, source.model, fresh=of.init_from.fresh).model == of.model
