"""The loss of flow matching: its value, packs and batches of any size, meshes.

Shape suffixes: B rows, T tokens, P numbers in a patch.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from step_jax.core.spec import map_specs
from step_jax.models.layers.attention import MHA
from step_jax.models.layers.mlp import GELU
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.layers.positions import Rope
from step_jax.models.video import flow
from step_jax.models.video.dit import VideoDiT
from step_jax.models.video.flow import Flow, LogitNormal
from step_jax.models.video.text_inputs import States
from step_jax.training.losses.flow import flow_matching
from tests.models import small

ATTENTION = MHA(4, 8, qk_norm=RMSNorm(), position=Rope(axes=(4, 2, 2)))
MODEL = VideoDiT(16, 2, ATTENTION, GELU(32), 3, text=(States("llm", 4, 3),), scalars=("fps",))
FLOW = Flow(LogitNormal(), shift=3.0, shift_tokens=4, min_snr=5.0)
LENGTHS = (5, 2, 6)  # tokens of three samples


@pytest.fixture(scope="module")
def params():
    return small.params(MODEL)


def batch(rows: list[list[int]], tokens: int, samples: int, packed: bool = True):
    """Rows of samples of :data:`LENGTHS` by number, and padding."""
    B, rng = len(rows), np.random.default_rng(0)
    drawn = [rng.standard_normal((n, 3)).astype(np.float32) for n in LENGTHS]
    texts = rng.standard_normal((3, 3, 4)).astype(np.float32)
    out = {
        "patches": np.zeros((B, tokens, 3), np.float32),
        "places": np.zeros((B, tokens, 3), np.int32),
        "samples": np.zeros((B, samples), np.uint32),
        "text/llm": np.zeros((B, samples, 3, 4), np.float32),
        "lengths/llm": np.zeros((B, samples), np.int32),
        "scalars": np.zeros((B, samples, 1), np.float32),
    }
    segments = np.zeros((B, tokens), np.int32)
    for r, row in enumerate(rows):
        at = 0
        for g, i in enumerate(row):
            here = slice(at, at + LENGTHS[i])
            out["patches"][r, here], segments[r, here] = drawn[i], g + 1
            out["places"][r, here, 0] = np.arange(LENGTHS[i])
            out["samples"][r, g], out["scalars"][r, g] = 40 + i, 8 + i
            out["text/llm"][r, g], out["lengths/llm"][r, g] = texts[i], 2 + i % 2
            at = here.stop
    return out | ({"segments": segments} if packed else {})


def compiled(sharding=None):
    """(params, batch) -> (total, numbers), gradient of the total."""

    def loss(p, rows):
        out = flow_matching(p, MODEL, rows, FLOW, 7, small.execution(), sharding)
        part = out.parts["velocity"]
        return part.total, part.weight

    return jax.value_and_grad(loss, has_aux=True)


def program(params, example):
    f = jax.jit(compiled()).lower(params, example).compile(compiler_options=small.FAST_COMPILE)
    return lambda params, rows: jax.device_get(f(params, rows))


@pytest.fixture(scope="module")
def of_packs(params):
    f = program(params, batch([[0]], 16, 3))
    return lambda rows, **other: f(params, batch(rows, 16, 3) | other)


@pytest.fixture(scope="module")
def of_bucket(params):
    """(params, batch of two rows of one size) -> as :func:`compiled`."""
    return program(params, batch([[0], [0]], LENGTHS[0], 1, packed=False))


@pytest.fixture(scope="module")
def pack(of_packs):
    return of_packs([[0, 1, 2]])


@pytest.mark.thorough
def test_a_pack_learns_what_its_samples_learn_alone(of_packs, pack):
    """Loss and every gradient: nothing passes between samples, each has its own time and text."""
    alone = [of_packs([[i]]) for i in range(3)]
    ((total, numbers), gradient) = pack
    assert total == pytest.approx(sum(a[0][0] for a in alone), rel=1e-5)
    assert numbers == 3 * sum(LENGTHS) == sum(a[0][1] for a in alone)
    summed = jax.tree.map(lambda *g: np.sum(g, axis=0), *[a[1] for a in alone])
    error, leaf = small.worst_leaf(gradient, summed)
    assert error < 1e-5, leaf
    assert alone[0][0][0] != alone[1][0][0]


@pytest.mark.thorough
def test_a_batch_of_one_size_learns_what_packs_learn(of_packs, of_bucket, params):
    """Rows without segments, in which a sample is a whole row: a batch of 2 and batches of 1."""
    rows = batch([[0], [0]], LENGTHS[0], 1, packed=False)
    rows["samples"][1] = 77
    (total, numbers), gradient = of_bucket(params, rows)
    (one, n), of_one = of_packs([[0]])
    (second, _), of_second = of_packs([[0]], samples=np.array([[77, 0, 0]], np.uint32))
    assert numbers == 2 * n
    assert total == pytest.approx(one + second, rel=1e-5)
    error, leaf = small.worst_leaf(gradient, jax.tree.map(np.add, of_one, of_second))
    assert error < 1e-5, leaf


def test_the_loss_is_the_weighted_squared_error_of_the_velocity(of_bucket):
    """Of a model that predicts nothing but zero, so that only noise, data and weights are left."""
    zero = map_specs(lambda s: np.zeros(s.shape, np.float32), MODEL.specs())
    rows = batch([[0], [0]], LENGTHS[0], 1, packed=False)
    rows["samples"][1] = 77
    noise = np.asarray(flow.noise(7, np.repeat(rows["samples"], LENGTHS[0], 1), rows["places"], 3))
    size = np.float32(LENGTHS[0])
    time = FLOW.times(flow.shares(7, rows["samples"]), size)
    weight = np.asarray(FLOW.weight(time, np.full((2, 1), size)))
    squared = np.sum((rows["patches"] - noise) ** 2, (1, 2))
    (total, _), _ = of_bucket(zero, rows)
    assert total == pytest.approx(np.sum(weight[:, 0] * squared), rel=1e-5)


@pytest.mark.thorough
def test_an_error_of_predicted_data_is_one_of_the_velocity_they_mean():
    """Of predictions of zero again, from a model that reads no text."""
    model = VideoDiT(8, 1, MHA(1, 8, position=None), GELU(8), 3, prediction="data")
    zero = map_specs(lambda s: np.zeros(s.shape, np.float32), model.specs())
    rows = {k: v[:1] for k, v in batch([[0]], LENGTHS[0], 1, packed=False).items()}

    def total(p, rows):
        return flow_matching(p, model, rows, Flow(), 7, small.execution()).parts["velocity"].total

    rest = max(1 - float(flow.shares(7, rows["samples"])[0, 0]), flow.LEAST_REST)
    expected = np.sum((rows["patches"] / rest) ** 2)
    assert small.run(total, zero, rows) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def by_heads(params):
    """(compiled text, ((total, numbers), gradient), rows) on a mesh that exchanges heads."""
    rows = [[0, 1, 2], [2], [1, 0], [2, 1, 0]]
    sharding = small.on_mesh(context=2, fsdp=2, tensor=2, ulysses=True)
    layout, data = sharding.params(MODEL.specs()), batch(rows, 16, 3)

    def place(name, a):
        of_tokens = name in ("patches", "places", "segments")
        axes = ("batch", "sequence" if of_tokens else None, *(None,) * (a.ndim - 2))
        return jax.device_put(a, sharding.named(axes, a.shape))

    args = jax.device_put(params, layout), {name: place(name, a) for name, a in data.items()}
    f = jax.jit(compiled(sharding)).lower(*args).compile(compiler_options=small.FAST_COMPILE)
    return f.as_text(), jax.device_get(f(*args)), rows


@pytest.mark.thorough
def test_packs_on_a_mesh_that_exchanges_heads_are_those_of_one_device(of_packs, by_heads):
    _, ((total, _), gradient), rows = by_heads
    alone = [of_packs([row]) for row in rows]
    assert total == pytest.approx(sum(a[0][0] for a in alone), rel=1e-5)
    error, leaf = small.worst_leaf(
        gradient, jax.tree.map(lambda *g: np.sum(g, axis=0), *[a[1] for a in alone])
    )
    assert error < 1e-5, leaf


@pytest.mark.thorough
def test_heads_are_exchanged_for_self_attention_and_nothing_for_attention_over_texts(by_heads):
    """In a layer queries, keys, values and what comes out, there and back, of a device's own
    tokens; no row of tokens is gathered, nor a mask."""
    text, _, rows = by_heads
    lines = [line for line in text.splitlines() if "/while/body/" in line]
    exchanged = [line for line in lines if " all-to-all(" in line]
    own = f"f32[{len(rows) // 2},8,1,1,1,8]", f"f32[{len(rows) // 2},1,8,1,1,8]"
    assert all(line.split("= (")[1].startswith(own) for line in exchanged)
    back = [line for line in exchanged if "transpose(jvp" in line]
    assert (len(exchanged), len(back)) == (8, 4)
    gathered = [line for line in lines if " all-gather(" in line]
    of_weights = "gather/sharding_constraint", "dynamic_slice"
    assert gathered and all(any(name in line for name in of_weights) for line in gathered)
