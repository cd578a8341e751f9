"""The parameter table: counts of public models, cache sizes, and what parameters start as."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core import spec as lib
from step_jax.core.sharding import MeshConfig, Sharding, make_mesh
from step_jax.core.spec import Constant, Normal, ParamSpec
from step_jax.models.layers.attention import MFA, MHA, MLA, equal_parameter_heads
from step_jax.models.layers.initialisation import FanIn, Fixed
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.text.decoder import MTP, Block, Decoder, Group


def model(attention, depth, width, hidden, vocab=0, **changes):
    return Decoder(width, (Group(depth, (Block(attention, SwiGLU(hidden)),)),), vocab, **changes)


# --- sizes of public models: only shapes, nothing is allocated ---------------------------------


def test_step3_attention_layer():
    """Step-3 (arXiv 2507.19427): 169.35 million parameters per attention layer."""
    mfa = MFA(64, 256, query_rank=2048, query_norm=RMSNorm())
    matrices = 7168 * 2048 + 2048 * 64 * 256 + 2 * 7168 * 256 + 64 * 256 * 7168
    assert lib.count(mfa.specs(7168, FanIn())) == matrices + 2048 == 169_347_072


def test_llama_7b_and_llama3_8b():
    llama = model(MHA(32, 128), 32, 4096, 11008, 32_000)
    assert lib.count(llama.specs()) == 6_738_415_616
    llama3 = model(MHA(32, 128, kv_heads=8), 32, 4096, 14_336, 128_256)
    assert lib.count(llama3.specs()) == 8_030_261_248


def test_qwen3_and_deepseek_attention():
    """Qwen3-0.6B whole (tied, QK-norm); one layer of DeepSeek-V3's attention (187.1 million)."""
    qwen = MHA(16, 128, kv_heads=8, qk_norm=RMSNorm())
    assert lib.count(model(qwen, 28, 1024, 3072, 151_936, tied=True).specs()) == 596_049_920
    mla = MLA(128, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, query_rank=1536)
    assert lib.count(mla.specs(7168, FanIn())) == 187_107_328


@pytest.mark.parametrize(
    "attention,bytes_7b,bytes_1b",
    [
        (MHA(8, 256), 196_608, 163_840),
        (MFA(26, 256), 24_576, 20_480),
        (MFA(26, 256, value="gated_key"), 12_288, 10_240),
        (MFA(26, 256, value="key"), 12_288, 10_240),
    ],
)
@pytest.mark.parametrize("depth", [24, 20])
def test_cache_bytes_per_token_of_the_mfa_paper(attention, bytes_7b, bytes_1b, depth):
    """arXiv 2412.19255, 16 bit, H = 2048 = 8 C: the 7B (24 layers) and 1B (20 layers) models."""
    c = model(attention, depth, 2048, 5464)
    bytes_per_token = {24: bytes_7b, 20: bytes_1b}[depth]
    batch, tokens = 3, 128
    cache = jax.eval_shape(lambda: c.init_cache(batch, tokens))
    held = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(cache.layers))
    assert held == bytes_per_token * batch * tokens


@pytest.mark.parametrize("width,head_dim", [(512, 64), (768, 96), (1024, 128), (2048, 256)])
def test_equal_parameter_heads_of_mfa_are_26_at_eight_heads(width, head_dim):
    mha = MHA(8, head_dim)
    assert equal_parameter_heads(MFA(1, head_dim), width, mha) == 26
    assert equal_parameter_heads(mha, width, mha) == 8  # and of a kind beside itself, its own
    counts = [lib.count(a.specs(width, FanIn())) for a in (MFA(26, head_dim), mha)]
    assert abs(counts[0] / counts[1] - 1) < 0.02


def test_counts_by_role_add_up():
    c = model(MHA(4, 8), 2, 32, 48, 64)
    roles = ("matrix", "embedding", "head", "vector")
    assert sum(lib.count(c.specs(), (r,)) for r in roles) == lib.count(c.specs())
    assert lib.count(c.specs(), ("vector",)) == 5 * 32


# --- the table itself --------------------------------------------------------------------------


def test_matrix_view():
    query = ParamSpec((32, 4, 8), ("embed", "heads", None), Normal(1.0))
    output = ParamSpec((4, 8, 32), ("heads", None, "embed"), Normal(1.0), fan_in=2)
    assert query.matrix_shape == ((), 32, 32)
    assert lib.stack(output, 5).matrix_shape == ((5,), 32, 32)
    assert lib.stack(output, 5).axes == ("layers", "heads", None, "embed")


def test_a_table_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="differ in length"):
        ParamSpec((2, 3), ("embed",), Normal(1.0))
    with pytest.raises(ValueError, match="has shape"):
        ParamSpec((2, 0), ("embed", None), Normal(1.0))


def test_abstract_has_the_shapes_and_layouts():
    specs = model(MFA(4, 8), 2, 32, 48, 64).specs()
    sharding = Sharding(make_mesh(MeshConfig(fsdp=8)))
    for plain, laid in zip(
        jax.tree.leaves(lib.abstract(specs)),
        jax.tree.leaves(lib.abstract(specs, sharding.params(specs))),
        strict=True,
    ):
        assert plain.shape == laid.shape and plain.dtype == laid.dtype == jnp.float32
        assert laid.sharding.mesh == sharding.mesh


# --- initialisation ----------------------------------------------------------------------------

SPECS = {
    "a": ParamSpec((16, 8), ("embed", "heads"), Normal(0.5)),
    "b": lib.stack(ParamSpec((16, 8), ("embed", "mlp"), Normal(0.5)), 3),
}


def lib_init(items, seed):
    return lib.init(dict(items), jax.random.key(seed))


def test_the_same_bits_on_any_mesh():
    plain = jax.jit(lambda: lib.init(SPECS, jax.random.key(7)))()
    sharding = Sharding(make_mesh(MeshConfig(fsdp=4, tensor=2)))
    split = jax.jit(
        lambda: lib.init(SPECS, jax.random.key(7)), out_shardings=sharding.params(SPECS)
    )()
    assert split["b"].addressable_shards[0].data.shape == (3, 4, 4)
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(split), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_value_depends_on_its_own_name_and_layer_only():
    draw = jax.jit(lib_init, static_argnums=0)
    first, more = (draw(tuple(s.items()), 7) for s in (SPECS, SPECS | {"aa": SPECS["a"]}))
    np.testing.assert_array_equal(first["b"], more["b"])
    arrays = [more["a"], more["aa"], *more["b"]]  # all of one shape: no two alike
    for i, x in enumerate(arrays):
        assert not any(np.array_equal(x, y) for y in arrays[i + 1 :])
    assert not np.array_equal(first["a"], draw(tuple(SPECS.items()), 8)["a"])


def deviations(spec, key=0, **layers):
    x = lib.init({"w": spec}, jax.random.key(key), **layers)["w"]
    return np.std(np.asarray(x, np.float64).reshape(x.shape[0], -1), axis=1)


def test_depth_scaling_counts_layers_of_the_whole_model():
    """Layer l (from 0) of a group that starts at layer 4 and holds every second layer."""
    spec = lib.stack(ParamSpec((64, 64), ("embed", "mlp"), Normal(0.3, depth="layer")), 3)
    got = deviations(spec, layers=lambda name: (4, 2))
    expected = 0.3 / np.sqrt(2.0 * (np.array([4, 6, 8]) + 1))
    np.testing.assert_allclose(got, expected, rtol=0.06)  # 4,096 draws: 1.1 % standard error


def test_the_decoder_tells_each_parameter_its_layer():
    block = Block(MFA(2, 8), SwiGLU(16))
    c = Decoder(16, (Group(2, (block,)), Group(3, (block, block))), 32, mtp=MTP(1, block))
    at = {
        "groups/0/0/mlp/down_FD": (0, 1),
        "groups/1/0/mlp/down_FD": (2, 2),
        "groups/1/1/mlp/down_FD": (3, 2),
        "mtp/0/block/mlp/down_FD": (8, 1),
        "head_DV": (0, 1),
    }
    assert {name: c.layers_of(name) for name in at} == at
    names = [
        lib.path_name(path) for path, _ in jax.tree.leaves_with_path(c.specs(), is_leaf=lib.is_spec)
    ]
    assert set(at) <= set(names)  # these are the names that initialisation asks for


def matrices(c):
    """(name, spec) of every non-vector parameter."""
    return {
        lib.path_name(path): spec
        for path, spec in jax.tree.leaves_with_path(c.specs(), is_leaf=lib.is_spec)
        if spec.role != "vector"
    }


@pytest.mark.parametrize(
    "attention", [MHA(4, 8), MFA(4, 8, query_rank=24), MLA(4, 16, 8, 4, 8, query_rank=24)]
)
def test_fan_in_gives_every_reading_weight_unit_gain_and_closes_every_branch(attention):
    for name, spec in matrices(model(attention, 2, 32, 48, 64)).items():
        if "output" in name or "down_FD" in name:
            assert spec.init == Constant(0.0), name
        elif name == "head_DV":
            assert spec.init == Constant(0.0)
        elif name != "embedding_VD":
            _, rows, _ = spec.matrix_shape
            assert spec.init.std == pytest.approx(rows**-0.5), name


def test_fixed_is_one_deviation_but_for_the_mlp_output():
    c = model(MFA(4, 8), 2, 32, 48, 64, init=Fixed(0.02))
    for name, spec in matrices(c).items():
        assert spec.init == Normal(0.02, depth="layer" if "down_FD" in name else "none"), name
    flat = model(MFA(4, 8), 2, 32, 48, 64, init=Fixed(0.02, scale_mlp_output=False))
    assert {s.init for s in matrices(flat).values()} == {Normal(0.02)}


def test_drawn_weights_have_the_named_deviation_and_no_mean():
    x = np.asarray(
        lib.init({"w": ParamSpec((256, 128), (None, None), Normal(0.2))}, jax.random.key(0))["w"]
    )
    assert x.std() == pytest.approx(0.2, rel=0.02) and abs(x.mean()) < 0.2 * 4 / np.sqrt(x.size)
    assert x.dtype == np.float32
