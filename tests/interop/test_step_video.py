"""Step-Video's released layouts: against the released code, there and back, and what is refused.

Shape suffixes: B clips, F frames, C channels, H height, W width, T patches, S tokens of a text.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from step_jax.cli.main import main
from step_jax.core.config import load_file as load_recipe
from step_jax.core.errors import CheckpointError, ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.core.spec import count, map_names, map_specs
from step_jax.inference import text_states
from step_jax.interop.artifacts import InitFrom, load_artifact, starting_point
from step_jax.interop.hf import save_hf, step_video, step_video_vae
from step_jax.models.context import Execution
from step_jax.models.layers.attention import MHA
from step_jax.models.layers.mlp import GELU
from step_jax.models.layers.positions import Rope
from step_jax.models.video.dit import Rows, VideoDiT
from step_jax.models.video.patches import clip_of, patches_of, places_of
from step_jax.models.video.text_inputs import States, Tower
from step_jax.models.video.vae import VideoVAE
from step_jax.trainers.diffusion import flow_matching
from tests.golden import make_step_video_dit_golden as golden
from tests.golden import make_step_video_golden as vae_golden
from tests.interop.test_hf_fields import possible, variants
from tests.models import small
from tests.tokenizers.made import byte_level, ours
from tests.trainers.loops import run_loop

RECIPE = Path(__file__).parents[2] / "configs" / "video" / "step_video_30b.yaml"
FORMS = ("t2v", "ti2v")
WEIGHTS = "diffusion_pytorch_model.safetensors"
#: The small autoencoder of make_step_video_golden.py, with the released class's chunks.
VAE = VideoVAE(
    latents=4, encoder_widths=(32, 64, 64), decoder_widths=(32, 64, 64), encoder_blocks=1,
    decoder_blocks=2, temporal=(False, True),
)  # fmt: skip
SHAPES = np.load(golden.FILE)
ONE = Sharding.build(MeshConfig(), jax.devices()[:1])


@pytest.fixture
def on_one_device(monkeypatch):
    """Commands compute on the first, where arrays are turned without a compilation."""
    monkeypatch.setattr(Sharding, "build", staticmethod(lambda *_: ONE))


def keys(form: str) -> dict:
    """A config.json as `diffusers` writes it for the golden model."""
    return golden.SMALL | {
        "_class_name": "StepVideoModel",
        "_diffusers_version": "0.32.2",
        "attention_head_dim": 128,
        "use_additional_conditions": form == "ti2v",
    }


def write(folder: Path, config: dict, state: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / WEIGHTS)
    return folder


def state_of(form: str) -> dict[str, np.ndarray]:
    """The golden model's tensors: names from the released class, sizes in the place of its own."""
    tensors, _ = step_video.layout(step_video.config_from_diffusers(keys(form)))
    return {t.name: golden.weight(t.name, t.their_shape) for t in tensors}


@pytest.fixture(scope="module", params=FORMS)
def form(request):
    return request.param


@pytest.fixture(scope="module")
def folder(form, tmp_path_factory):
    return write(tmp_path_factory.mktemp("in") / form, keys(form), state_of(form))


# --- names, shapes and numbers of the released code ----------------------------------------------


def test_full_size_tensors_are_those_of_the_released_class(form):
    """No array is made."""
    model = step_video.config_from_diffusers({"use_additional_conditions": form == "ti2v"})
    found = {t.name: list(t.their_shape) for t in step_video.layout(model)[0]}
    assert found == json.loads(str(SHAPES[f"{form}/shapes"]))
    scores, first = (2 * 6144 + 256 * 6144 + 6144**2, 64 * 6144) if form == "ti2v" else (0, 0)
    assert count(model.specs()) == 29_342_478_400 + scores + first


def test_the_recipe_of_30b_is_the_released_model():
    model = load_recipe(flow_matching.Config, RECIPE).model
    config = step_video.config_to_diffusers(model)
    assert step_video.config_from_diffusers(config) == step_video.config_from_diffusers({})
    assert model == replace(step_video.config_from_diffusers({}), init=model.init)


def test_full_size_autoencoder_has_the_tensors_of_the_released_class():
    """But for the decoder's last convolution, which that class renames when it reads the file."""
    released = {
        name.replace("decoder.conv_out.conv.", "decoder.conv_out."): tuple(shape)
        for name, shape in json.loads(str(SHAPES["vae/shapes"])).items()
    }
    found = {t.name: t.their_shape for t in step_video_vae.layout(VideoVAE())[0]}
    assert found == released
    assert step_video_vae.config_from_tensors(released) == VideoVAE()


def test_outputs_are_those_of_the_released_class(form, folder):
    artifact = load_artifact(f"hf:{folder}", ONE)
    model, given = artifact.model, {k: SHAPES[f"{form}/{k}"] for k in golden.inputs(form == "ti2v")}

    def patches(x_BFCHW):
        return patches_of(x_BFCHW.transpose(0, 1, 3, 4, 2), model.patch)

    x_BTP, place_TA = patches(given["latents_BFCHW"]), places_of(golden.SIZE, model.patch)
    pictures = form == "ti2v"
    rows = Rows(
        np.broadcast_to(place_TA, (2, *place_TA.shape)),
        None,
        (given["clip_BSE"][:, None], given["llm_BSE"][:, None]),
        (np.ones((2, 1), np.int32), np.array(golden.LENGTHS, np.int32)[:, None]),
        np.full((2, 1, 1), golden.MOTION, np.float32) if pictures else None,
        patches(given["first_BFCHW"]) if pictures else None,
    )
    found_BTP = small.run(
        lambda *args: model.apply(*args, Execution(dtype="float32")),
        artifact.params, x_BTP, given["time_B"][:, None], rows,
    )  # fmt: skip
    found = clip_of(np.asarray(found_BTP), golden.SIZE, model.patch).transpose(0, 1, 4, 2, 3)
    wanted = SHAPES[f"{form}/output_BFCHW"]
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_one_device")
def test_a_transformer_goes_out_as_it_came_in(form, folder, tmp_path):
    out = tmp_path / "out"
    assert main(["export", f"hf:{folder}", str(out), "--dtype", "float32"]) == 0
    written, before = load_file(out / WEIGHTS), load_file(folder / WEIGHTS)
    assert written.keys() == before.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)
    config = json.loads((out / "config.json").read_text())
    how = {"_diffusers_version", "attention_type"}
    assert {k: config[k] for k in keys(form).keys() - how} == {
        k: v for k, v in keys(form).items() if k not in how
    }
    again = load_artifact(f"hf:{out}", ONE, arrays=False)
    assert again.model == load_artifact(f"hf:{folder}", ONE, arrays=False).model


@pytest.mark.usefixtures("on_one_device")
def test_shards_have_the_names_that_diffusers_looks_for(folder, tmp_path):
    out = tmp_path / "out"
    assert main(["export", f"hf:{folder}", str(out), "--max-shard-gb", "0.001"]) == 0
    shards = sorted(p.name for p in out.glob("*.safetensors"))
    assert shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((out / f"{WEIGHTS}.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    load_artifact(f"hf:{out}", ONE)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """The golden autoencoder's tensors as they fill the released class."""
    folder = tmp_path_factory.mktemp("vae")
    tensors, _ = step_video_vae.layout(VAE)
    state = {t.name: vae_golden.tensor(t.name, t.their_shape) for t in tensors}
    save_file(state, folder / "vae_v2.safetensors")
    return folder


def test_an_autoencoder_has_the_weights_that_the_released_outputs_were_made_with(vae_folder):
    """With which tests/models/test_video_vae.py has the released code's latents and clips."""
    artifact = load_artifact(f"hf:{vae_folder}", ONE)
    assert artifact.model == VAE
    names = map_names(str, VAE.specs())
    wanted = map_specs(lambda s, name: vae_golden.weight(name, s.shape), VAE.specs(), names)
    jax.tree.map(np.testing.assert_array_equal, artifact.params, wanted)


@pytest.mark.usefixtures("on_one_device")
def test_an_autoencoder_goes_out_as_it_came_in(vae_folder, tmp_path):
    out = tmp_path / "out"
    assert main(["export", f"hf:{vae_folder}", str(out), "--dtype", "float32"]) == 0
    written, before = (load_file(f / "vae_v2.safetensors") for f in (out, vae_folder))
    assert written.keys() == before.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)


# --- as an artifact ------------------------------------------------------------------------------


def test_training_starts_from_a_folder(folder):
    init = InitFrom(f"hf:{folder}")
    start = starting_point(None, init, ONE, VideoDiT)
    assert all(leaf is not None for leaf in jax.tree.leaves(start.params))
    assert start.model == load_artifact(init.artifact, ONE, arrays=False).model
    wider = replace(start.model, mlp=GELU(64))
    with pytest.raises(CheckpointError, match="blocks/mlp/up_DF"):
        starting_point(wider, init, ONE, VideoDiT)


def test_a_fresh_released_form_starts_with_open_gates():
    model = replace(step_video.config_from_diffusers(keys("t2v")), width=8, depth=1)
    table = model.specs().blocks.modulation_MD
    rows_LMD = table.init(jax.random.key(0), table.shape[1:], jnp.float32)
    np.testing.assert_array_equal(rows_LMD[:, 0], [0, 0, 1, 0, 0, 1])


def test_a_prompt_needs_the_encoders_and_a_size(folder, tmp_path):
    artifact = load_artifact(f"hf:{folder}", ONE, arrays=False)
    with pytest.raises(ConfigError, match="does not say what makes its states clip"):
        text_states.of_prompts(artifact, ["a cat"], ONE, load_artifact)
    assert main(["sample-video", f"hf:{folder}", "a cat"]) != 0


TUNING = """
loop: diffusion
run: {{directory: {run}}}
init_from: {{artifact: "hf:{model}"}}
data: {{kind: digits}}
text: {{cache: {cache}, encoders: {encoders}}}
training: {{steps: 1, batch_size: 8, ema_decay: null}}
optimizer: {{kind: adamw, learning_rate: 1e-3, schedule: {{kind: constant}}}}
execution: {{dtype: float32}}
sample: {{count: 0}}
"""


@pytest.mark.slow  # compiles a loop, two encoders and a sampler
def test_a_folder_is_tuned_drawn_from_and_written_back(tmp_path):
    """With encoders that are folders too, of 32 numbers a token; pictures of one channel. Drawn and
    written from several devices."""
    pytest.importorskip("sklearn")
    tokenizer = ours(byte_level())
    tokenizer.save(tmp_path / "tokenizer")
    attention = MHA(2, 16, position=Rope())
    encoder = small.decoder(attention, repeat=1, vocab=tokenizer.vocab_size)
    save_hf(
        tmp_path / "llm", small.params(encoder), encoder, context_length=320,
        tokenizer_folder=tmp_path / "tokenizer", dtype="float32",
    )  # fmt: skip
    config = keys("t2v") | {
        "in_channels": 1, "out_channels": 1, "num_layers": 1, "caption_channels": [32, 32]
    }  # fmt: skip
    tensors, _ = step_video.layout(step_video.config_from_diffusers(config))
    state = {t.name: golden.weight(t.name, t.their_shape) for t in tensors}
    model = write(tmp_path / "model", config, state)
    each = [f"{{name: {name}, artifact: 'hf:{tmp_path / 'llm'}'}}" for name in ("clip", "llm")]
    encoders = f"[{', '.join(each)}]"
    recipe = tmp_path / "tuning.yaml"
    places = {"run": tmp_path / "run", "model": model, "cache": tmp_path / "states"}
    recipe.write_text(TUNING.format(**places, encoders=encoders))
    run_loop("diffusion", str(recipe))
    prompt = ["the digit three", "--size", "1", "8", "8", "--encoders", encoders]
    options = ["--sampler.steps", "1", "--sampler.guidance", "3", "--output"]
    drawn = str(tmp_path / "drawn.png")
    assert main(["sample-video", f"hf:{model}", *prompt, *options, drawn]) == 0
    assert Image.open(drawn).size == (10, 10)  # with an edge
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), str(out), "--dtype", "float32"]) == 0
    several = Sharding.build(MeshConfig(fsdp=-1))
    tuned, again = (load_artifact(n, several) for n in (str(tmp_path / "run"), f"hf:{out}"))
    jax.tree.map(np.testing.assert_array_equal, again.params, tuned.params)
    assert replace(again.model, init=tuned.model.init) == tuned.model
    moved = load_file(out / WEIGHTS)["proj_out.weight"]
    assert np.abs(moved - state["proj_out.weight"]).max() > 1e-4


# --- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 2}, r"patch_size 2 \(only 1\)"),
        ({"attention_head_dim": 64}, r"attention_head_dim 64 \(only 128\)"),
        ({"out_channels": 6}, r"out_channels 6 \(only 3\)"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine True"),
        ({"norm_eps": 1e-5}, "norm_eps 1e-05"),
        ({"norm_type": "layer_norm"}, "norm_type 'layer_norm'"),
        ({"window": 9}, r"window 9 \(a key of no known meaning\)"),
        ({"num_layers": "two"}, "num_layers 'two'; it must be an integer"),
        ({"caption_channels": 6144}, "caption_channels 6144; it must be a list"),
        ({"caption_channels": [6144]}, "must be two widths"),
        ({"use_additional_conditions": 1}, "use_additional_conditions 1; it must be true or false"),
    ],
)
def test_configurations_of_another_function_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        step_video.config_from_diffusers(keys("t2v") | change)


def _lacking(state):
    del state["transformer_blocks.1.attn2.wkv.weight"]


def _with_conditions(state):
    """The other conditions of the class of Step-Video-T2V, which no release has."""
    state["adaln_single.emb.fps_embedder.linear_1.bias"] = np.zeros(128, np.float32)


def _misshapen(state):
    state["scale_shift_table"] = np.zeros(256, np.float32)


def _whole_numbers(state):
    state["proj_out.bias"] = np.zeros(3, np.int32)


def _infinite(state):
    state["proj_out.bias"] = np.full(3, np.inf, np.float32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lacking, r"missing transformer_blocks\.1\.attn2\.wkv\.weight \(256, 128\)"),
        (_with_conditions, r"unused adaln_single\.emb\.fps_embedder\.linear_1\.bias \(128,\)"),
        (_misshapen, r"scale_shift_table has shape \(256,\), expected \(2, 128\)"),
        (_whole_numbers, r"proj_out\.bias is int32"),
        (_infinite, r"proj_out\.bias holds NaN or infinite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, damage, message):
    state = state_of("t2v")
    damage(state)
    folder = write(tmp_path / "in", keys("t2v"), state)
    with pytest.raises(CheckpointError, match=message):
        load_artifact(f"hf:{folder}", ONE)


def test_autoencoders_that_do_not_fit_are_refused_by_name(vae_folder, tmp_path):
    whole = load_file(vae_folder / "vae_v2.safetensors")

    def refusal(state, name="vae_v2"):
        (tmp_path / f"{name}.safetensors").unlink(missing_ok=True)
        save_file(state, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError) as refused:
            load_artifact(f"hf:{tmp_path}", ONE)
        return str(refused.value)

    one = {k: v for k, v in whole.items() if "patchify" not in k}
    assert "it is of version 1" in refusal(one)
    assert "decoder.conv_in.conv.weight is missing" in refusal(
        {k: v for k, v in whole.items() if k != "decoder.conv_in.conv.weight"}
    )
    lacking = {k: v for k, v in whole.items() if k != "decoder.mid.attn_1.q.conv.bias"}
    assert "missing decoder.mid.attn_1.q.conv.bias (64,)" in refusal(lacking)
    assert "unused loss.logvar ()" in refusal(whole | {"loss.logvar": np.zeros(())})
    (tmp_path / "vae_v2.safetensors").unlink()
    assert "has neither vae_v2.safetensors" in refusal(one, "vae")


def test_a_whole_pipeline_is_refused_with_the_folders_that_would_do(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"several models .*transformer or hf:.*vae"):
        load_artifact(f"hf:{tmp_path}", ONE)


LLM = States("llm", 5, 320, "mlp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit_gates": True}, "unit_gates is True, there False"),
        ({"prediction": "data"}, "prediction is 'data', there 'velocity'"),
        ({"patch": (1, 2, 2)}, r"patch is \(1, 2, 2\)"),
        ({"mlp": GELU(64)}, "mlp.hidden is 64, there 512"),
        ({"scalars": ("fps",)}, r"scalars is \('fps',\), there \(\)"),
        ({"attention": MHA(1, 128, position=Rope(axes=(64, 32, 32)))}, "attention.qk_norm is None"),
        ({"text": (States("clip", 6, 9, padding=True), LLM)}, "model.text"),
        ({"text": (LLM,)}, "this model states llm"),
        ({"text": (Tower("clip", 5, 9, 8, 1, MHA(2, 4), GELU(16)), LLM)}, "tower clip, states llm"),
        ({"text": ()}, "this model no text"),
    ],
)
def test_transformers_that_the_class_does_not_compute_are_not_exported(change, message):
    model = step_video.config_from_diffusers(keys("t2v"))
    with pytest.raises(ConfigError, match=message):
        step_video.save_transformer("nowhere", None, replace(model, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "plain"}, "head is 'plain', there 'dual_path'"),
        ({"head_width": 64}, "head_width is 64, there 0"),
        ({"attention": False}, "attention is False"),
        ({"groups": 16}, "groups is 16, there 32"),
        ({"chunk": 9}, "chunk is 9, there 17"),
    ],
)
def test_autoencoders_that_the_class_does_not_compute_are_not_exported(change, message):
    step_video_vae.check_released(replace(VAE, head_width=128))
    with pytest.raises(ConfigError, match=message):
        step_video_vae.check_released(replace(VAE, **change))


#: What only training knows: the exported model is the same without it.
OF_TRAINING = {"VideoDiT.init", "FanIn.gain", "MHA.output_rate"}


def test_no_field_is_lost_on_the_way_out(form):
    """A new field of the transformer that export does not know of fails here."""
    base = step_video.config_from_diffusers(keys(form) | {"num_attention_heads": 2})
    expected = step_video.config_to_diffusers(base)
    written = set()
    for field, other in variants(base, None):
        if other == base or not possible(other):
            continue
        try:
            config = step_video.config_to_diffusers(other)
        except ConfigError:
            assert field not in OF_TRAINING, field
            continue
        written.add(field)
        assert (config == expected) == (field in OF_TRAINING), f"{field} is lost: {other}"
    assert written >= {"VideoDiT.depth", "VideoDiT.channels", "States.width", *OF_TRAINING}


def test_no_field_of_the_autoencoder_is_lost_on_the_way_out():
    written = set()
    for field, other in variants(VAE, None):
        if other == VAE or not possible(other):
            continue
        try:
            step_video_vae.check_released(other)
        except ConfigError:
            continue
        written.add(field)
        shapes = {t.name: t.their_shape for t in step_video_vae.layout(other)[0]}
        assert step_video_vae.config_from_tensors(shapes) == other, f"{field} is lost"
    fields = ("latents", "stem", "encoder_blocks", "decoder_blocks", "channels")
    assert written >= {f"VideoVAE.{name}" for name in fields}
