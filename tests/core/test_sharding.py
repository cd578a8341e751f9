"""Meshes and rules: what goes where, and errors that name the axis and the sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, Sharding, make_mesh
from step_jax.models.layers.attention import MFA, MHA
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.text.decoder import Block, Decoder, Group


def on(**axes) -> Sharding:
    return Sharding(make_mesh(MeshConfig(**axes)))


def decoder(heads=8, width=32, vocab=64, hidden=48, kv_heads=None):
    attention = MFA(heads, 8) if kv_heads is None else MHA(heads, 8, kv_heads=kv_heads)
    return Decoder(width, (Group(2, (Block(attention, SwiGLU(hidden)),)),), vocab)


def test_mesh_axes_and_the_rest():
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert mesh.axis_names == ("pipeline", "data", "fsdp", "expert", "context", "tensor")
    assert mesh.devices.shape == (1, 2, 2, 1, 1, 2)
    assert [d.id for d in mesh.devices[0, 0, 0, 0, 0]] == [0, 1]  # tensor: the nearest devices
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "axes,message",
    [
        ({"data": 3}, "data=3 does not match the 8 devices.*-1"),
        ({"data": 3, "fsdp": -1}, "data=3 x fsdp=-1 does not match the 8 devices"),
        ({"fsdp": -1, "tensor": -1}, "only one mesh axis can be -1"),
        ({"tensor": 0}, "must be positive.*'tensor': 0"),
        ({"tensor": -2}, "must be positive.*'tensor': -2"),
    ],
)
def test_meshes_that_cannot_be(axes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(MeshConfig(**axes))


@pytest.mark.parametrize(
    "axes,changes,message",
    [
        ({"data": 2, "tensor": 4}, {"heads": 26}, "'heads' has size 26.*tensor=4"),
        ({"tensor": 8}, {"vocab": 100}, "'vocab' has size 100.*tensor=8"),
        ({"tensor": 8}, {"hidden": 50}, "'mlp' has size 50.*tensor=8"),
        ({"fsdp": 8}, {"width": 36}, "'embed' has size 36.*fsdp=8"),
    ],
)
def test_models_that_do_not_divide_name_axis_and_sizes(axes, changes, message):
    with pytest.raises(ConfigError, match=message):
        on(**axes).params(decoder(**changes).specs())


@pytest.mark.parametrize(
    "shape,message",
    [
        ((6, 16), "'batch' has size 6.*data=2 x fsdp=2"),
        ((8, 15), "'sequence' has size 15.*context=2"),
    ],
)
def test_batches_that_do_not_divide_name_axis_and_sizes(shape, message):
    with pytest.raises(ConfigError, match=message):
        on(data=2, fsdp=2, context=2).named(("batch", "sequence"), shape)


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(ConfigError, match="no sharding rule for the logical axis 'head'"):
        on(data=8).spec(("head",), (8,))


def test_rules():
    sharding = on(data=2, fsdp=2, tensor=2)
    assert sharding.spec(("batch", "sequence"), (8, 16)) == P(("data", "fsdp"), None)
    p = sharding.params(decoder().specs()).groups[0][0]
    assert p.attention.query_down_DR.spec == P(None, "fsdp", None)
    assert p.attention.query_up_RNC.spec == P(None, "fsdp", "tensor", None)
    assert p.attention.output_NCD.spec == P(None, "tensor", None, "fsdp")
    assert p.mlp.gate_DF.spec == P(None, "fsdp", "tensor")
    assert p.mlp_norm_D.spec == P(None, None)
    assert [sharding.ways(a) for a in ("batch", "sequence", "embed")] == [4, 1, 2]


def test_few_key_heads_and_small_ranks_are_copied_instead():
    p = on(fsdp=2, tensor=4).params(decoder(kv_heads=2).specs()).groups[0][0].attention
    assert p.key_DKH.spec == P(None, "fsdp", None, None)
    assert p.query_DNH.spec == P(None, "fsdp", "tensor", None)
    assert on(fsdp=8).spec(("rank", "heads"), (4, 8)) == P(None, None)


def test_one_mesh_axis_is_used_once_per_array():
    assert on(fsdp=8).spec(("embed", "rank"), (16, 16)) == P("fsdp", None)


def test_constrain_lays_out_and_does_nothing_on_one_device():
    x = jnp.arange(32.0).reshape(8, 4)
    y = jax.jit(lambda x: on(data=8).constrain(x, "batch", None))(x)
    assert {s.data.shape for s in y.addressable_shards} == {(1, 4)}
    np.testing.assert_array_equal(x, y)
    alone = Sharding(make_mesh(MeshConfig(), jax.devices()[:1]))
    assert alone.constrain(x, "batch", None) is x


def test_whole_heads_are_cut_by_what_cuts_the_sequence_elsewhere():
    sharding = on(data=2, context=2, tensor=2)
    whole = sharding.of_whole_heads()
    axes, shape = ("batch", "sequence", "heads", None), (2, 4, 8, 4)
    assert sharding.spec(axes, shape) == P("data", "context", "tensor", None)
    assert whole.spec(axes, shape) == P("data", None, ("tensor", "context"), None)
    with pytest.raises(ConfigError, match="'kv_heads' has size 6"):
        whole.spec(("kv_heads",), (6,))
    with pytest.raises(ConfigError, match="ring and ulysses"):
        MeshConfig(ring=True, ulysses=True).validate()


def test_what_writes_text_gathers_nothing_over_the_experts_axis():
    train = Sharding.build(MeshConfig(fsdp=1, expert=2, context=2, tensor=2))
    write = train.for_inference()
    assert train.spec(("embed", "heads"), (8, 4)) == P(("expert", "context"), "tensor")
    assert write.spec(("embed", "heads"), (8, 4)) == P(None, "tensor")
    assert write.spec(("rank", "heads", None), (8, 4, 2)) == P(None, "tensor", None)
    assert write.spec(("experts", "embed", "mlp"), (4, 8, 2)) == P("expert", None, "tensor")
    assert write.spec(("embed", "vocab"), (8, 9)) == P(None, None)  # no half of nine words
    with pytest.raises(ConfigError, match="'vocab' has size 9"):
        train.spec(("embed", "vocab"), (8, 9))
    shared = Sharding.build(MeshConfig(fsdp=4, expert=2)).for_inference()
    assert shared.spec(("embed", "heads"), (8, 4)) == P("fsdp", None)
