"""Loss and every gradient on eight simulated devices against one device, in float32.

One model holds every attention kind, so a mesh costs one compilation; errors are per leaf, so the
name of the kind at fault is in the message. ``slow`` has each kind alone on every mesh.
"""

from __future__ import annotations

import functools
import math
import re

import jax
import numpy as np
import pytest

from step_jax.core.spec import is_spec
from tests.models import small

TOLERANCE = 1e-5

MESHES = {
    "fsdp8": {"fsdp": 8},
    "tensor8": {"tensor": 8},
    "context8": {"context": 8},
    "fsdp4_tensor2": {"fsdp": 4, "tensor": 2},
    "data2_context2_tensor2": {"data": 2, "context": 2, "tensor": 2},
    "fsdp2_context4": {"fsdp": 2, "context": 4},
    "ring8": {"context": 8, "ring": True},
    "ring4_tensor2": {"context": 4, "tensor": 2, "ring": True},
}


def problem(*kinds, mtp=0):
    c = small.decoder(*kinds, mtp=mtp)
    return c, small.params(c), small.packed_batch()


@functools.cache
def one_device(*kinds, mtp=0):
    c, p, batch = problem(*kinds, mtp=mtp)
    return small.run(small.loss_and_gradient(c), p, batch)


@functools.cache
def on_mesh(mesh: str, *kinds, mtp=0):
    c, p, batch = problem(*kinds, mtp=mtp)
    sharding = small.on_mesh(**MESHES[mesh])
    compiled, args = small.compile_on(sharding, c, p, batch)
    return compiled, args, compiled(*args)


def check(mesh: str, *kinds, mtp=0):
    loss, gradient = one_device(*kinds, mtp=mtp)
    _, _, (mesh_loss, mesh_gradient) = on_mesh(mesh, *kinds, mtp=mtp)
    assert abs(mesh_loss - loss) <= TOLERANCE * abs(loss)
    assert all(np.any(g) for g in jax.tree.leaves(gradient)), "a dead gradient compares nothing"
    error, leaf = small.worst_leaf(mesh_gradient, gradient)
    assert error <= TOLERANCE, leaf


ALL = tuple(small.KINDS)
SOME = ("gqa", "mla")  # where what is looked at is not theirs


@pytest.mark.thorough
@pytest.mark.parametrize(
    "mesh", [pytest.param("fsdp8", marks=pytest.mark.slow), "data2_context2_tensor2"]
)
def test_every_kind_equals_one_device(mesh):
    check(mesh, *ALL, mtp=1)


@pytest.mark.slow
def test_ring_equals_one_device():
    check("ring4_tensor2", "mha", "gqa")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [m for m in MESHES if "ring" not in m])
@pytest.mark.parametrize("kind", ALL)
def test_each_kind_alone_equals_one_device(kind, mesh):
    check(mesh, kind, mtp=1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [m for m in MESHES if "ring" in m])
@pytest.mark.parametrize("kind", ["mha", "gqa", "mla"])
def test_each_kind_alone_with_the_ring(kind, mesh):
    check(mesh, kind)


def collectives(text: str, op: str):
    """Element counts of the results of every ``op`` in compiled HLO text."""
    for shape in re.findall(rf"= \(?\w+\[([\d,]*)\][^=]*? {op}(?:-start)?\(", text):
        yield math.prod(int(n) for n in shape.split(",") if n)


def in_loops(text: str, op: str):
    """Names in the metadata of every ``op`` inside a loop's body, with the result's shape."""
    return [line for line in text.splitlines() if f" {op}(" in line and "/while/body/" in line]


def test_fsdp_shards_every_matrix_of_every_kind():
    specs = problem(*ALL, mtp=1)[0].specs()
    layout = small.on_mesh(**MESHES["fsdp8"]).params(specs)
    for spec, how in zip(
        jax.tree.leaves(specs, is_leaf=is_spec), jax.tree.leaves(layout), strict=True
    ):
        square = spec.axes[-2:] == (None, None)  # key reuse's (C, C)
        pieces = 1 if spec.role == "vector" or square else 8
        assert math.prod(how.shard_shape(spec.shape)) == spec.size // pieces, spec


@pytest.mark.thorough
def test_fsdp_gathers_one_layer_at_a_time():
    compiled, (p, batch), (_, gradient) = on_mesh("fsdp8", *SOME, mtp=1)
    for tree in (p, gradient):
        for a in jax.tree.leaves(tree.groups):
            pieces = 8 if a.ndim > 2 else 1  # the others are vectors of layers
            assert {s.data.size for s in a.addressable_shards} == {a.size // pieces}
    assert all(s.data.shape[0] == 1 for s in batch["tokens"].addressable_shards)
    gathered = list(collectives(compiled.as_text(), "all-gather"))
    assert gathered and max(gathered) <= p.head_DV.size, "a stack of layers was gathered at once"


@pytest.mark.thorough
def test_loss_adds_up_over_devices_once_not_per_chunk():
    compiled, _, _ = on_mesh("fsdp8", *SOME, mtp=1)
    head = f"[{small.WIDTH},{small.VOCAB}]"
    assert not [line for line in in_loops(compiled.as_text(), "all-reduce") if head in line]


def test_context_parallelism_of_mfa_moves_keys_and_values_only():
    """No all-gather is as large as the queries or the hidden states of its tokens."""
    compiled, (p, _), _ = on_mesh("context8", "mfa", "kr")
    rows, length = small.packed_batch()["tokens"].shape
    # weights are gathered over the axis as well, whole or one layer of them
    weights = {math.prod(w.shape[i:]) for w in jax.tree.leaves(p) for i in (0, 1)}
    hidden, keys = rows * length * small.WIDTH, rows * length * 8  # (B, T, C) with C = 8
    gathered = set(collectives(compiled.as_text(), "all-gather"))
    assert keys in gathered and hidden not in gathered  # as large as the queries
    assert max(gathered - weights | {keys}) == keys
