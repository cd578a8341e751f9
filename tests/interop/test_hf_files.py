"""Which files of a folder are read, and one clear error for each way in which they can be bad."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from step_jax.core.errors import CheckpointError, ConfigError
from step_jax.interop import hf
from step_jax.interop.hf import files
from tests.golden import golden
from tests.interop import hf_folders
from tests.interop.hf_folders import entry, raw_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9900000\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Path, Path]:
    """(a folder with one file, a folder with two shards)."""
    at = tmp_path_factory.mktemp("hf")
    g = hf_folders.small()
    return hf_folders.write_folder(at / "one", g), hf_folders.write_folder(at / "two", g, shards=2)


# --- which files ---------------------------------------------------------------------------------


def test_other_files_of_a_folder_are_not_read(good, tmp_path):
    """A backup, stale shards, an optimizer's state, another format."""
    expected = hf.load_hf(good[0])[1]
    other = hf_folders.zeros_like(hf_folders.small().state)
    for name, folder in zip(("one", "two"), good, strict=True):
        path = shutil.copytree(folder, tmp_path / name)
        for file in ("model.bak.safetensors", "model-00003.safetensors", "zz.safetensors"):
            save_file(other, path / file)
        save_file({"state": np.ones(3)}, path / "optimizer.safetensors")
        save_file({"other": np.zeros(2)}, path / "consolidated.safetensors")
        jax.tree.map(np.testing.assert_array_equal, hf.load_hf(path)[1], expected)


def test_one_whole_file_counts_before_an_index(good, tmp_path):
    path = shutil.copytree(good[1], tmp_path / "both")
    save_file(hf_folders.zeros_like(hf_folders.small().state), path / SINGLE)
    assert not np.any(hf.load_hf(path)[1].embedding_VD)


def test_headers_are_read_as_the_reference_package_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "half": rng.standard_normal((3, 5)).astype(np.float16),
        "brain": rng.standard_normal((4,)).astype(ml_dtypes.bfloat16),
        "double": rng.standard_normal((2, 2, 2)),
        "nothing": np.zeros((0, 4), np.float32),
        "number": np.array(3.0, np.float32),
        "whole": np.arange(5, dtype=np.int16),
    }
    save_file(arrays, tmp_path / SINGLE)
    stored = files.read_folder(tmp_path)
    assert stored.keys() == arrays.keys()
    for name, array in load_file(tmp_path / SINGLE).items():
        got = np.asarray(stored[name])
        assert (got.dtype, got.shape, stored[name].shape) == (array.dtype, array.shape, array.shape)
        np.testing.assert_array_equal(got, array)


# --- bad folders ---------------------------------------------------------------------------------


def replaced(file: str, data: bytes):
    return lambda path: (path / file).write_bytes(data)


def cut(file: str, size: int):
    """The file's first bytes, or all but its last."""
    return lambda path: (path / file).write_bytes((path / file).read_bytes()[:size])


def deleted(file: str):
    return lambda path: (path / file).unlink()


def with_map(change):
    def damage(path):
        index = json.loads((path / INDEX).read_text())
        weight_map = change(index["weight_map"])
        (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return damage


def moved(old: str, new: str):
    return lambda path: (path / old).rename(path / new)


def doubled(path):
    first = load_file(path / "model-00001.safetensors")
    second = load_file(path / "model-00002.safetensors")
    save_file(
        second | {next(iter(first)): next(iter(first.values()))}, path / "model-00002.safetensors"
    )


def as_folder(file: str):
    def damage(path):
        (path / file).unlink()
        (path / file).mkdir()

    return damage


ONE = [
    ("no config", deleted("config.json"), "no config.json in"),
    ("config a folder", as_folder("config.json"), "config.json is no file"),
    ("config empty", replaced("config.json", b""), "config.json is empty, not JSON"),
    ("config pointer", replaced("config.json", LFS), "config.json is a pointer of git-lfs"),
    ("config html", replaced("config.json", b"<!DOCTYPE html>"), "config.json is a web page"),
    ("config cut", cut("config.json", 40), "config.json is not JSON"),
    ("config list", replaced("config.json", b"[1]"), "config.json is no JSON object but list"),
    ("config bytes", replaced("config.json", b'{"a": "\xff"}'), "config.json is not JSON"),
    ("config twice", replaced("config.json", b'{"a": 1, "a": 2}'), "has the key a twice"),
    ("config deep", replaced("config.json", b"[" * 100_000), "config.json is not JSON"),
    ("no weights", deleted(SINGLE), "has neither model.safetensors nor model.safetensors.index"),
    ("pytorch only", moved(SINGLE, "pytorch_model.bin"), "it has pytorch_model.bin, which are not"),
    (
        "adapter only",
        moved(SINGLE, "adapter_model.safetensors"),
        "it has adapter_model.safetensors",
    ),
    ("weights a folder", as_folder(SINGLE), "model.safetensors is no file"),
    ("empty", replaced(SINGLE, b""), "model.safetensors is empty"),
    ("blank", replaced(SINGLE, bytes(1000)), "model.safetensors is blank"),
    ("pointer", replaced(SINGLE, LFS), "a pointer of git-lfs .fetch the file itself"),
    ("html", replaced(SINGLE, b"\n<html><body>404"), "model.safetensors is a web page"),
    ("pickle", replaced(SINGLE, b"PK\x03\x04" + bytes(90)), "is a PyTorch or zip file"),
    ("gguf", replaced(SINGLE, b"GGUF" + bytes(90)), "is a GGUF file"),
    ("five bytes", cut(SINGLE, 5), "truncated or no .safetensors file: it has 5 bytes"),
    ("half a header", cut(SINGLE, 300), "truncated or no .safetensors file: it has 300 bytes"),
    ("half the data", cut(SINGLE, 60_000), "model.safetensors is truncated: it has 60000 bytes"),
    ("a byte less", cut(SINGLE, -1), "model.safetensors is truncated"),
    ("long header", replaced(SINGLE, raw_file({}, length=2**62)), "names a header of 4611686"),
    ("header list", replaced(SINGLE, raw_file([])), "the header of .* is no JSON object but list"),
    ("header text", replaced(SINGLE, raw_file(b"not json")), "the header of .* is not JSON"),
    ("entry", replaced(SINGLE, raw_file({"a": 3})), "damaged: a has the entry 3"),
    ("type", replaced(SINGLE, raw_file({"a": entry("Q4")})), "a has the type 'Q4', which is none"),
    ("shape", replaced(SINGLE, raw_file({"a": entry(shape=(-2,))})), "a has the shape .-2"),
    (
        "offsets",
        replaced(SINGLE, raw_file({"a": entry(offsets=(8, 0))})),
        "a has the offsets .8, 0",
    ),
    ("sizes", replaced(SINGLE, raw_file({"a": entry(offsets=(0, 12))})), "a has 12 bytes, but F32"),
    (
        "overlap",
        replaced(SINGLE, raw_file({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12))),
        "b overlaps another tensor",
    ),
    (
        "hole",
        replaced(SINGLE, raw_file({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20))),
        "b follows bytes of no tensor",
    ),
    ("rest", replaced(SINGLE, raw_file({"a": entry()}, bytes(9))), "is damaged: it has"),
    (
        "twice in a header",
        replaced(SINGLE, raw_file(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2))),
        "has the key a twice",
    ),
]
TWO = [
    ("index text", replaced(INDEX, b"weights"), "index.json is not JSON"),
    ("index pointer", replaced(INDEX, LFS), "index.json is a pointer of git-lfs"),
    ("index empty", replaced(INDEX, b"{}"), "index.json has no weight_map"),
    ("index list", with_map(list), "index.json has no weight_map"),
    ("index number", with_map(lambda m: m | {"x": 3}), "puts x into 3, which is no .safetensors"),
    ("index bin", with_map(lambda m: m | {"x": "a.bin"}), "puts x into 'a.bin'"),
    ("outside", with_map(lambda m: m | {"x": "../a.safetensors"}), "outside of its folder"),
    ("absolute", with_map(lambda m: m | {"x": "/etc/a.safetensors"}), "outside of its folder"),
    ("inside", with_map(lambda m: m | {"x": "a/../../b.safetensors"}), "outside of its folder"),
    ("lost shard", deleted("model-00002.safetensors"), "lacks model-00002.safetensors, which its"),
    ("lost tensor", with_map(lambda m: m | {"x": "model-00002.safetensors"}), "lacks x, which its"),
    (
        "stale shard",
        with_map(lambda m: {k: v for k, v in m.items() if k != "model.norm.weight"}),
        "has model.norm.weight, which model.safetensors.index.json does not look for there",
    ),
    ("two of a name", doubled, "twice: in model-00001.safetensors and in model-00002.safetensors"),
    ("empty shard", replaced("model-00001.safetensors", b""), "model-00001.safetensors is empty"),
]


@pytest.mark.parametrize(
    "kind, damage, message",
    [*[("one", *case[1:]) for case in ONE], *[("two", *case[1:]) for case in TWO]],
    ids=[case[0] for case in ONE + TWO],
)
def test_a_damaged_folder_is_one_clear_error(good, tmp_path, kind, damage, message):
    path = shutil.copytree(good[kind == "two"], tmp_path / "bad")
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        hf.load_hf(path)


def test_a_path_that_is_no_folder_is_named(good, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist: give a folder"):
        hf.load_hf(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="model.safetensors is a file: give a folder"):
        hf.load_hf(good[0] / SINGLE)


def test_links_to_files_elsewhere_are_followed(good, tmp_path):
    """As in the cache of the hub."""
    path = tmp_path / "snapshot"
    path.mkdir()
    for file in good[1].iterdir():
        (path / file.name).symlink_to(file)
    assert hf.load_hf(path)[0] == hf.load_hf(good[1])[0]


# --- values --------------------------------------------------------------------------------------


def changed(name: str, value, dtype=None):
    """The small model's tensors with one element, or the type of one tensor, changed."""
    state = {k: v.copy() for k, v in hf_folders.small().state.items()}
    if dtype is not None:
        state[name] = state[name].astype(dtype)
    if value is not None:
        state[name].flat[-1] = value
    return state


@pytest.mark.parametrize("on_host", [True, False], ids=["numpy", "device"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused_with_their_tensor(monkeypatch, value, on_host):
    monkeypatch.setattr("step_jax.interop.hf.load._on_host", lambda device: on_host)
    config = hf.config_from_hf(hf_folders.small().config)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        name = "model.layers.1.self_attn.k_proj.weight"
        with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinite values"):
            hf.params_from_hf(changed(name, value, dtype), config)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.bool_, ml_dtypes.float8_e5m2])
def test_weights_of_types_that_need_a_scale_are_refused(dtype):
    config = hf.config_from_hf(hf_folders.small().config)
    state = changed("model.layers.0.mlp.up_proj.weight", None, dtype)
    with pytest.raises(
        CheckpointError, match=r"0\.mlp\.up_proj\.weight is .*expected floats of 16"
    ):
        hf.params_from_hf(state, config)


def test_float64_that_float32_cannot_hold_is_refused():
    config = hf.config_from_hf(hf_folders.small().config)
    state = changed("model.norm.weight", 1.5, np.float64)
    assert hf.params_from_hf(state, config).final_norm_D[-1] == 1.5
    with pytest.raises(CheckpointError, match="norm.weight has float64 values that are too large"):
        hf.params_from_hf(changed("model.norm.weight", 1e39, np.float64), config)


# --- eight bits ----------------------------------------------------------------------------------


def quantized(state, block, skip=()):
    """Every matrix of the layers in float8 with a scale per block, and what that is in float64."""
    rng, out, exact = np.random.default_rng(0), {}, {}
    for name, w in state.items():
        out[name], exact[name] = w, w.astype(np.float64)
        if w.ndim < 2 or ".layers." not in name or name.endswith("gate.weight") or name in skip:
            continue
        rows, columns = (-(-n // b) for n, b in zip(w.shape[-2:], block, strict=True))
        scale = rng.uniform(0.01, 2.0, (*w.shape[:-2], rows, columns)).astype(np.float32)
        wide = np.zeros(w.shape)
        for index in np.ndindex(*w.shape):
            i, j = index[-2] // block[0], index[-1] // block[1]
            wide[index] = scale[(*index[:-2], i, j)]
        out[name] = (w / wide).astype(ml_dtypes.float8_e4m3fn)
        out[name + "_scale_inv"] = scale
        exact[name] = out[name].astype(np.float64) * wide
    return out, exact


@pytest.mark.parametrize("name", ["deepseek_v3_moe", "step3p7"])
def test_weights_of_eight_bits_are_multiplied_by_their_blocks_scales(tmp_path, name):
    """Blocks that the sizes do not divide; experts one by one and stacked."""
    g, block = golden.load(name), (8, 7)
    q = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    g.config["quantization_config"] = q | {"weight_block_size": list(block), "scale_fmt": "ue8m0"}
    text = {k: v for k, v in g.state.items() if not hf.left_out(g.config).match(k)}
    state, exact = quantized(text, block)
    assert sum(k.endswith("_scale_inv") for k in state) > 20
    path = hf_folders.write_folder(tmp_path / "fp8", g, shards=2, state=state)
    config, params = hf.load_hf(path)
    for key, value in hf.params_to_hf(params, config).items():
        np.testing.assert_allclose(value, exact[key], rtol=1e-6, err_msg=key)
    # an export of it is a plain checkpoint
    assert "quantization_config" not in hf.config_to_hf(config)


def test_quantized_checkpoints_that_do_not_add_up_are_named(tmp_path):
    g = golden.load("deepseek_v3")
    state, _ = quantized(g.state, (128, 128))
    name = "model.layers.0.mlp.up_proj.weight"

    def load(state, config):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        g.config["quantization_config"] = config
        return hf.load_hf(hf_folders.write_folder(path, g, state=state))

    fp8 = {"quant_method": "fp8"}
    load(state, fp8)
    with pytest.raises(
        CheckpointError, match="is float8_e4m3, but config.json has no quantization"
    ):
        load(state, None)
    bare = {k: v for k, v in state.items() if k != name + "_scale_inv"}
    with pytest.raises(
        CheckpointError, match=f"{name} is float8_e4m3, but there is no {name}_scale"
    ):
        load(bare, fp8)
    with pytest.raises(CheckpointError, match=r"has shape \(1, 1\); the blocks of 64 by 64"):
        load(state, fp8 | {"weight_block_size": [64, 64]})
    with pytest.raises(ConfigError, match="weight_block_size .64.; it must be two positive"):
        load(state, fp8 | {"weight_block_size": [64]})
    with pytest.raises(CheckpointError, match="layers.0.mlp.up_proj.weight holds NaN"):
        load(state | {name + "_scale_inv": np.full((1, 1), np.nan, np.float32)}, fp8)
    stray = {"model.norm.weight_scale_inv": np.ones((1, 1), np.float32)}
    with pytest.raises(CheckpointError, match="unused model.norm.weight_scale_inv"):
        load(state | stray, fp8)
