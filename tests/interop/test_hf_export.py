"""What is written for `transformers`, and what is refused before a file exists."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from step_jax.core.errors import CheckpointError, ConfigError
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.core.spec import map_specs
from step_jax.interop import hf
from step_jax.interop.hf import export as hf_export
from step_jax.models.layers.attention import MFA, MHA
from step_jax.models.layers.mlp import GELU, SwiGLU
from step_jax.models.layers.moe import Experts
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Alibi
from step_jax.models.text.decoder import Block, Decoder, Group
from tests.golden import golden
from tests.interop import hf_folders
from tests.interop.test_hf import load, mixture


@pytest.mark.parametrize(
    "name",
    ["qwen3_tied_window", "deepseek_v3_no_q_lora_half_split", "deepseek_v3_moe", "step3p7"],
)
def test_load_and_save_folders(tmp_path, name):
    g, config, params = load(name)
    hf_folders.write_folder(tmp_path / "in", g, shards=2)
    loaded_config, loaded = hf.load_hf(tmp_path / "in")
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

    # The golden weights are representable in bfloat16, so nothing is lost.
    hf.save_hf(tmp_path / "out", loaded, config, context_length=64)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    exact = {k for k, v in saved.items() if v.dtype == np.float32}
    assert exact == {k for k in saved if re.search(r"(mlp|moe)\.(gate\.|router_bias)", k)}
    assert {saved[k].dtype for k in saved.keys() - exact} == {np.dtype(ml_dtypes.bfloat16)}
    again_config, again = hf.load_hf(tmp_path / "out")
    assert again_config == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(ConfigError, match="not empty"):
        hf.save_hf(tmp_path / "out", loaded, config, context_length=64)


# --- files ---------------------------------------------------------------------------------------


def export(path, name="llama_gqa", **options):
    _, config, params = load(name)
    return hf.save_hf(path, params, config, **{"context_length": 64, **options})


def test_shards_are_as_large_as_allowed_and_the_index_names_every_tensor(tmp_path):
    g, _, params = load("deepseek_v3_moe")
    limit = 20_000
    report = export(tmp_path / "out", "deepseek_v3_moe", dtype="float32", max_shard_size=limit)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    shards = {file: load_file(tmp_path / "out" / file) for file in files}
    assert {n: f for f, shard in shards.items() for n in shard} == index["weight_map"]
    sizes = [sum(a.nbytes for a in shard.values()) for shard in shards.values()]
    assert sum(sizes) == index["metadata"]["total_size"] == report.bytes
    # a tensor larger than the limit is alone; two neighbours would not fit together
    for shard, size in zip(shards.values(), sizes, strict=True):
        assert size <= limit or len(shard) == 1
    assert len(files) <= 2 * sum(sizes) / limit + 1
    for name, a in {n: a for shard in shards.values() for n, a in shard.items()}.items():
        np.testing.assert_array_equal(a, g.state[name])
    jax.tree.map(np.testing.assert_array_equal, hf.load_hf(tmp_path / "out")[1], params)


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    """A folder that is there is whole: it gets its name last."""
    seen = []

    def fail(folder, *args):
        seen.append(folder)
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("step_jax.interop.hf.save._write_weights", fail)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "out")
    assert seen and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", golden.NAMES)
def test_both_spellings_are_written(tmp_path, name):
    """For transformers 4 rope_theta, rope_scaling and num_experts, for 5 what replaced them."""
    _, config, _ = load(name)
    keys = hf.config_to_hf(config)
    if name == "step3p7":  # the released keys, which are those of either version
        assert isinstance(keys["rope_theta"], list) and keys["moe_num_experts"] == 8
        return
    new, old = keys["rope_parameters"], keys["rope_scaling"]
    assert new["rope_theta"] == keys["rope_theta"]
    scaling = {k: v for k, v in new.items() if k != "rope_theta"}
    assert scaling == ({"rope_type": "default"} if old is None else old)
    if name.startswith("qwen3_moe"):
        assert keys["num_experts"] == keys["num_local_experts"] == 8
    for spelling in ({"rope_parameters": None}, {"rope_theta": None, "rope_scaling": None}):
        assert hf.config_from_hf(keys | spelling) == config


@pytest.mark.parametrize("name", ["llama_gqa", "qwen2", "deepseek_v3"])
@pytest.mark.parametrize("eos, written", [((7,), 7), ((7, 9), [7, 9]), ((), None)])
def test_generation_stops_where_ours_does_and_nowhere_else(tmp_path, name, eos, written):
    """DeepSeek's and Llama's configurations have stop tokens of their own where a file has none."""
    export(tmp_path / "out", name, bos_id=1, eos_ids=eos, context_length=48)
    for file in ("config.json", "generation_config.json"):
        keys = json.loads((tmp_path / "out" / file).read_text())
        assert (keys["bos_token_id"], keys["eos_token_id"]) == (1, written)
        assert keys["pad_token_id"] == (eos[0] if eos else None)
    assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == 48


def test_tokenizer_files_are_copied_and_nothing_else(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        (tmp_path / "tokenizer" / file).write_text(file)
    report = export(tmp_path / "out", tokenizer_folder=tmp_path / "tokenizer")
    expected = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(report.files) == expected | {"tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "out/tokenizer.json").read_text() == "tokenizer.json"
    assert hf.load_hf(tmp_path / "out")[0] == load("llama_gqa")[1]
    with pytest.raises(ConfigError, match="has no file of a tokenizer"):
        export(tmp_path / "other", tokenizer_folder=tmp_path)


@pytest.mark.parametrize("name", golden.NAMES)
def test_the_report_names_the_class_that_loads_the_folder(tmp_path, name):
    report = export(tmp_path / "out", name)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [report.architecture]
    if name == "step3p7":
        assert report.auto_class is None and "Step3p7ForConditionalGeneration" in report.note
    else:
        assert report.auto_class == "AutoModelForCausalLM" and not report.note


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "int8"}, "dtype is 'int8'; export as one of bfloat16, float16, float32"),
        ({"context_length": 0}, "context_length is 0"),
        ({"max_shard_size": 0}, "max_shard_size is 0"),
        ({"bos_id": 128}, "bos_id has 128; the vocabulary has 128 tokens"),
        ({"eos_ids": (3, -1)}, "eos_ids has -1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path, options, message
):
    with pytest.raises(ConfigError, match=message):
        export(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, on_host",
    [(None, False), ({"fsdp": 2, "tensor": 2}, True), ({"pipeline": 2, "expert": 3}, False)],
)
def test_loaded_onto_a_mesh_each_device_has_its_part(monkeypatch, mesh, on_host):
    """And an export from there is what was imported."""
    monkeypatch.setattr("step_jax.interop.hf.load._on_host", lambda device: on_host)
    monkeypatch.setattr("step_jax.interop.hf.save._on_host", lambda leaf: on_host and mesh is None)
    g, config, whole = load("deepseek_v3_moe")
    config = mixture(config, experts=(Experts(9, 12),))
    sharding = None
    if mesh is not None:
        count = int(np.prod(list(mesh.values())))
        sharding = Sharding.build(MeshConfig(**mesh), jax.devices()[:count])
    params = hf.params_from_hf(g.state, config, sharding=sharding)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    if sharding is not None:
        specs = config.specs()
        expected = jax.tree.leaves(sharding.params(specs))
        assert [a.sharding for a in jax.tree.leaves(params)] == expected
        up = params.groups[1][0].mlp.experts[0].up_EDF
        assert up.addressable_shards[0].data.size * count == up.size
    back = hf.params_to_hf(params, config, dtype=jnp.float32)
    for key, value in back.items():
        np.testing.assert_array_equal(value, g.state[key])


def with_leaf(params, **changes):
    return params.replace(**{k: f(getattr(params, k)) for k, f in changes.items()})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head_DV": lambda a: a[:, :-1]}, r"head_DV has shape \(64, 127\), expected \(64, 128\)"),
        ({"head_DV": lambda a: None}, r"missing head_DV \(64, 128\)"),
        ({"groups": lambda g: g * 2}, "unused groups/1/0/attention"),
        ({"final_norm_D": lambda a: a.astype(np.int32)}, "final_norm_D is int32"),
        ({"embedding_VD": lambda a: a[None]}, "embedding_VD has shape .1, 128, 64"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_and_never_cut(tmp_path, changes, message):
    _, config, params = load("llama_gqa")
    with pytest.raises(CheckpointError, match=message):
        hf.save_hf(tmp_path / "out", with_leaf(params, **changes), config, context_length=64)
    deeper = replace(config, layers=(replace(config.layers[0], repeat=1),))
    with pytest.raises(CheckpointError, match="mlp/up_DF has shape .2, 64, 96., expected .1, 64"):
        hf.params_to_hf(params, deeper)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("on_host", [True, False], ids=["numpy", "device"])
@pytest.mark.parametrize(
    "value, dtype, message",
    [
        (np.nan, "float32", "holds NaN or infinite values"),
        (-np.inf, "bfloat16", "holds NaN or infinite values"),
        (70_000.0, "float16", "holds values too large for float16: export as float32"),
        (3.4e38, "bfloat16", "holds values too large for bfloat16"),
    ],
)
def test_values_that_cannot_be_written_are_refused(
    tmp_path, monkeypatch, value, dtype, message, on_host
):
    monkeypatch.setattr("step_jax.interop.hf.save._on_host", lambda leaf: on_host)
    _, config, params = load("llama_gqa")
    bad = with_leaf(params, final_norm_D=lambda a: a.at[3].set(value))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \(final_norm_D\) " + message):
        hf.save_hf(tmp_path / "out", bad, config, dtype=dtype, context_length=64)
    assert not list(tmp_path.iterdir())


# --- configurations ------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_named():
    _, config, _ = load("llama_gqa")
    block = config.layers[0].blocks[0]

    def export(**changes):
        b = replace(block, **changes)
        return hf.config_to_hf(replace(config, layers=(Group(1, (block,)), Group(1, (b,)))))

    # what only training knows is not the model's
    export(attention=replace(block.attention, output_rate=0.1))
    gate = replace(block.attention, output_gate=True)
    with pytest.raises(ConfigError, match=r"layer 1\.attention\.output_gate is True"):
        export(attention=gate)
    with pytest.raises(ConfigError, match=r"layer 1\.mlp\.clamp is 7\.0"):
        export(mlp=SwiGLU(hidden=96, clamp=7.0))
    with pytest.raises(ConfigError, match=r"layer 1\.attention\.window is 5"):
        export(attention=replace(block.attention, window=5))
    with pytest.raises(ConfigError, match=r"layer 1\.attention\.position is Alibi"):
        export(attention=replace(block.attention, position=Alibi()))
    with pytest.raises(ConfigError, match=r"model\.norm\.zero_centred is True"):
        hf.config_to_hf(replace(config, norm=RMSNorm(zero_centred=True)))
    mfa = replace(config, layers=(Group(1, (Block(MFA(heads=2, head_dim=8), block.mlp),)),))
    with pytest.raises(ConfigError, match="MFA attention: cannot export"):
        hf.config_to_hf(mfa)
    gated = replace(config, layers=(Group(1, (replace(block, attention=gate),)),))
    with pytest.raises(ConfigError, match="no Hugging Face tensor for .*gate_DN"):
        hf.params_to_hf(map_specs(lambda s: np.zeros(s.shape), gated.specs()), gated)


def test_mixtures_that_cannot_be_exported_are_named():
    _, config, _ = load("qwen3_moe")
    cases = [
        ({"scale": 2.0}, r"layer 1\.mlp\.router\.scale is 2\.0"),
        ({"shared": 8}, r"layer 1\.mlp\.shared is 8"),
        ({"common": 8}, r"layer 1\.mlp\.common is 8"),
        ({"experts": (Experts(4, 16), Experts(4, 8))}, r"layer 1\.mlp\.experts is"),
    ]
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            hf.config_to_hf(mixture(config, **changes))
    # what only training knows is not the model's
    trained = mixture(config, balance_loss=0.01, z_loss=1e-3, exchange="gather", capacity=2.0)
    assert hf.config_to_hf(trained) == hf.config_to_hf(config)
    unlike = mixture(config, experts=(Experts(4, 16), Experts(4, 8)))
    with pytest.raises(ConfigError, match="no Hugging Face tensor for .*mlp/experts/1/down_EFD"):
        hf.params_to_hf(map_specs(lambda s: np.zeros(s.shape), unlike.specs()), unlike)


def test_a_decoder_with_a_plain_mlp_is_refused():
    block = Block(MHA(2, 8), GELU(16))
    with pytest.raises(ConfigError, match="layer 0 has an MLP of kind gelu"):
        hf_export.config_to_hf(Decoder(16, (Group(1, (block,)),), 32))
