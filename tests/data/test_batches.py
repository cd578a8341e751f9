"""Batches with named axes: what lies where on every mesh, and what breaks a schema."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from step_jax.core.errors import ConfigError, DataError
from step_jax.core.sharding import MeshConfig, Sharding, make_mesh
from step_jax.data.batches import abstract_batch, microbatches, process_rows, to_mesh
from step_jax.data.schema import Field

#: a text of 8 rows, a stack of patches for each row, a pack of clips with rows of its own, a table
SCHEMA = {
    "tokens": Field(("batch", "sequence"), (8, 16), "int32"),
    "patches": Field(("batch", None, None), (8, 6, 3)),
    "clips": Field((None, "batch", None), (2, 16, 5)),
    "table": Field((None,), (7,)),
}
MESHES = [
    {"data": 8},
    {"fsdp": 4, "context": 2},
    {"data": 2, "context": 4},
    {"fsdp": 2, "tensor": 2, "context": 2},
    {"pipeline": 2, "expert": 2, "data": 2},
    {"context": 8},
]


def batch():
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 99, f.shape).astype(f.dtype)
        if f.dtype == "int32"
        else rng.standard_normal(f.shape).astype(f.dtype)
        for name, f in SCHEMA.items()
    }


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_arrays_lie_as_their_axes_say_and_hold_what_they_held(mesh):
    sharding = Sharding(make_mesh(MeshConfig(**mesh)))
    placed, arrays = to_mesh(sharding, SCHEMA, batch()), batch()
    rows, pieces = sharding.ways("batch"), sharding.ways("sequence")
    for name, field in SCHEMA.items():
        np.testing.assert_array_equal(placed[name], arrays[name])
        ways = [{"batch": rows, "sequence": pieces, None: 1}[axis] for axis in field.axes]
        expected = tuple(n // w for n, w in zip(field.shape, ways, strict=True))
        assert {s.data.shape for s in placed[name].addressable_shards} == {expected}
    like = abstract_batch(sharding, SCHEMA)
    assert jax.tree.map(lambda a: a.sharding, like) == jax.tree.map(lambda a: a.sharding, placed)


def test_a_batch_that_the_mesh_does_not_cut_evenly_is_refused_with_what_would_do():
    sharding = Sharding(make_mesh(MeshConfig(data=4, context=2)))
    wanted = "6 rows .* 4 equal parts.* a multiple of 4 rows.* keeps its batch.* into 1, 2, 3, 6$"
    with pytest.raises(ConfigError, match=wanted):
        process_rows(sharding, 6)


def test_a_microbatch_takes_rows_modulo_wherever_they_stand():
    arrays = batch()
    part = microbatches(SCHEMA, arrays, 4)(1)
    np.testing.assert_array_equal(part["tokens"], arrays["tokens"][1::4])
    np.testing.assert_array_equal(part["patches"], arrays["patches"][1::4])
    np.testing.assert_array_equal(part["clips"], arrays["clips"][:, 1::4])
    np.testing.assert_array_equal(part["table"], arrays["table"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("patches"), "patches is missing"),
        (lambda b: b.update(more=b["table"]), "more is not in the schema"),
        (
            lambda b: b.update(patches=b["patches"][:, :5]),
            "patches has shape (8, 5, 3) and dtype float32, expected (8, 6, 3) (batch, None,",
        ),
        (
            lambda b: b.update(tokens=b["tokens"].astype(np.int64)),
            "tokens has shape (8, 16) and dtype int64, expected (8, 16) (batch, sequence) and",
        ),
    ],
)
def test_what_breaks_the_schema_is_named(change, message):
    arrays = batch()
    change(arrays)
    with pytest.raises(DataError, match=re.escape(message)):
        to_mesh(Sharding(make_mesh(MeshConfig(data=8))), SCHEMA, arrays)


def test_sizes_that_do_not_divide_name_the_array():
    sharding = Sharding(make_mesh(MeshConfig(context=8)))
    schema = {"tokens": Field(("batch", "sequence"), (8, 12), "int32")}
    with pytest.raises(ConfigError, match="array tokens: the logical axis 'sequence' has size 12"):
        abstract_batch(sharding, schema)
    with pytest.raises(ConfigError, match=r"16 rows \(clips\) cannot be split into 3"):
        microbatches({"clips": SCHEMA["clips"]}, batch(), 3)
    with pytest.raises(ValueError, match="do not name the dimensions"):
        Field(("batch",), (8, 12))
