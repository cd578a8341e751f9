"""Attention implementations against a float64 definition and against each other."""

from __future__ import annotations

import dataclasses
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from step_jax.core.errors import ConfigError
from step_jax.core.sharding import MeshConfig, make_mesh
from step_jax.ops import attention as ops
from tests.devices import AMPERE, BLACKWELL, CPU, HOPPER, TPU
from tests.models.small import run

SCALE = 0.35


def definition(q, k, v, mask, scale, alibi):
    """Float64, one query of one head at a time, straight from the words of ``Mask``."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, _ = q.shape
    S, K = k.shape[1:3]
    slopes = np.asarray(ops.alibi_slopes_N(N), np.float64)
    out = np.zeros((B, T, N, v.shape[-1]))
    for b in range(B):
        for t in range(T):
            seen = []
            for s in range(S):
                distance = int(mask.q_positions_BT[b, t]) - int(mask.kv_positions_BS[b, s])
                ok = distance >= 0 or not mask.causal
                ok = ok and (mask.window is None or abs(distance) < mask.window)
                if mask.q_blocks_BT is not None:
                    block = mask.q_blocks_BT[b, t]
                    ok = ok or (block >= 0 and block == mask.kv_blocks_BS[b, s])
                ok = ok and mask.kv_positions_BS[b, s] >= 0
                if mask.q_segments_BT is not None:
                    document = mask.kv_segments_BS[b, s]
                    ok = ok and document > 0 and mask.q_segments_BT[b, t] == document
                if ok:
                    seen.append((s, abs(distance)))
            if not seen:
                continue
            keys, distances = (np.array(a) for a in zip(*seen, strict=True))
            distances = {None: 0, "linear": 1}.get(alibi, 1) * distances.astype(np.float64)
            if alibi == "sqrt":
                distances = np.sqrt(distances)
            for n in range(N):
                score = k[b, keys, n * K // N] @ q[b, t, n] * scale - slopes[n] * distances
                p = np.exp(score - score.max())
                out[b, t, n] = p / p.sum() @ v[b, keys, n * K // N]
    return out


def packed(rng, rows, length, documents):
    """In-order positions and segments; the last piece of a row is padding, one row nothing else."""
    segments, positions = np.zeros((2, rows, length), np.int32)
    for r in range(rows):
        cuts = sorted(rng.integers(0, length + 1, documents))  # equal cuts: an empty document
        for i, (start, stop) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
            segments[r, start:stop], positions[r, start:stop] = i + 1, np.arange(stop - start)
    segments[-1] = 0
    return positions, segments


def blocks_of(rng, rows, length):
    """Blocks of a few neighbours, numbered anew in every row, and tokens of none; some numbers
    appear twice, so that blocks may lie in two pieces and reach into two documents."""
    number = np.cumsum(rng.random((rows, length)) < 0.3, axis=1) % 7
    return np.where(number % 2 == 0, number, -1).astype(np.int32)


def inputs(rng, B, T, S, N, K, H, V, dtype=np.float32):
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, V), (B, T, N, V))
    return tuple(rng.standard_normal(s).astype(dtype) for s in shapes)


def forward_and_gradient(implementation, mask, alibi=None, scale=SCALE):
    def f(q, k, v, cotangent):
        o = ops.attention(
            q, k, v, mask, scale=scale, alibi=alibi, implementation=implementation
        ).astype(jnp.float32)
        return jnp.sum(o * cotangent), o

    return jax.grad(f, argnums=(0, 1, 2), has_aux=True)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


CASES = st.tuples(
    st.sampled_from([1, 3, 17, 128, 130, 256]),  # one block, odd lengths, 2 and 4 blocks
    st.sampled_from([(1, 1), (4, 1), (6, 2), (3, 3)]),
    st.sampled_from([(4, 4), (8, 3)]),
    st.sampled_from([None, 1, 7, 70]),
    st.sampled_from([None, "linear", "sqrt"]),
    st.sampled_from([0, 1, 3]),
    st.sampled_from(["causal", "blocks", "both ways", "blocks both ways"]),
    st.integers(0, 2**31),
)


# no shrinking: every example compiles anew
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
@example((256, (6, 2), (8, 3), 70, "sqrt", 3, "causal", 0))  # several blocks, everything in them
@example((256, (4, 1), (4, 4), 9, "linear", 3, "blocks", 1))
@example((17, (4, 1), (4, 4), 3, "sqrt", 2, "both ways", 2))
@given(CASES)
def test_xla_equals_reference_equals_definition(case):
    T, (N, K), (H, V), window, alibi, documents, sees, seed = case
    rng = np.random.default_rng(seed)
    q, k, v, cotangent = inputs(rng, 2, T, T, N, K, H, V)
    positions, segments = packed(rng, 2, T, documents) if documents else (None, None)
    if not documents:
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
    blocks = blocks_of(rng, 2, T) if "blocks" in sees else None
    mask = ops.Mask(
        positions, positions, segments, segments, blocks, blocks,
        causal="both ways" not in sees, window=window, in_order=True,
    )  # fmt: skip
    (grads, o), (ref_grads, ref_o) = (
        run(forward_and_gradient(name, mask, alibi), q, k, v, cotangent)
        for name in ("xla", "reference")
    )
    assert relative(ref_o, definition(q, k, v, mask, SCALE, alibi)) <= 1e-6
    for got, expected in zip((o, *grads), (ref_o, *ref_grads), strict=True):
        assert np.all(np.isfinite(got))
        # a floor of one element: with a single visible key the gradient is rounding about zero
        assert np.linalg.norm(got - expected) <= 1e-6 * max(np.linalg.norm(expected), 1.0)
    if documents:  # the row that is all padding
        assert not np.any(o[-1]) and not any(np.any(g[-1]) for g in grads)


@pytest.mark.thorough
@pytest.mark.parametrize("in_order", [True, False])
def test_large_blocks_are_worked_off_in_parts(monkeypatch, in_order):
    """Two blocks of 128 in three parts of 43 each, the last one filled up."""
    rng = np.random.default_rng(5)
    q, k, v, cotangent = inputs(rng, 2, 256, 256, 4, 2, 8, 8)
    positions, segments = packed(rng, 2, 256, 3)
    blocks = None if in_order else blocks_of(rng, 2, 256)
    mask = ops.Mask(
        positions, positions, segments, segments, blocks, blocks, window=90, in_order=in_order
    )
    f = forward_and_gradient("xla", mask)
    whole = run(f, q, k, v, cotangent)
    monkeypatch.setattr(ops, "MOST_ROWS", 48)
    parts = run(forward_and_gradient("xla", mask), q, k, v, cotangent)
    for got, expected in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert relative(got, expected) <= 1e-6


@pytest.mark.thorough
def test_parts_within_a_shard_map(monkeypatch):
    """With the check of what varies over the mesh."""
    monkeypatch.setattr(ops, "MOST_ROWS", 48)
    rng = np.random.default_rng(6)
    arrays = inputs(rng, 2, 128, 128, 4, 2, 8, 8)
    positions = np.arange(128, dtype=np.int32)[None]
    f = forward_and_gradient("xla", ops.Mask(positions, positions, in_order=True))
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    cut = jax.shard_map(f, mesh=mesh, in_specs=(P("data"),) * 4, out_specs=P("data"))
    rows = [run(f, *(a[i : i + 1] for a in arrays)) for i in range(2)]
    expected = jax.tree.map(lambda a, b: np.concatenate([a, b]), *rows)
    got = run(cut, *arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative(a, b) <= 1e-6


@pytest.mark.slow
def test_memory_is_linear_in_the_tokens(monkeypatch):
    """Twice the tokens take twice the memory once a block is larger than a part."""
    monkeypatch.setattr(ops, "MOST_ROWS", 64)

    def temporaries(tokens: int) -> int:
        q, k, v, cotangent = (
            jax.ShapeDtypeStruct((1, tokens, heads, 8), jnp.float32) for heads in (4, 1, 1, 4)
        )
        positions = np.arange(tokens, dtype=np.int32)[None]
        f = forward_and_gradient("xla", ops.Mask(positions, positions, in_order=True))
        return jax.jit(f).lower(q, k, v, cotangent).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 2.2 * temporaries(1024)


def test_blocks_do_not_need_to_know_the_order():
    """Without ``in_order`` every block sees all keys, and masks the later ones itself."""
    rng = np.random.default_rng(4)
    q, k, v, cotangent = inputs(rng, 1, 256, 256, 2, 1, 8, 8)
    positions, segments = packed(rng, 1, 256, 2)
    segments[:] = 1 + (positions == 0).cumsum(1)  # no padding
    mask = ops.Mask(positions, positions, segments, segments)
    grads, o = run(forward_and_gradient("xla", mask), q, k, v, cotangent)
    reference = forward_and_gradient("reference", mask.replace(in_order=True))
    ref_grads, ref_o = run(reference, q, k, v, cotangent)
    for got, expected in zip((o, *grads), (ref_o, *ref_grads), strict=True):
        assert relative(got, expected) <= 1e-6


def test_keys_of_a_cache():
    """More keys than queries, at given positions, with empty slots between them."""
    rng = np.random.default_rng(3)
    q, k, v, _ = inputs(rng, 2, 5, 9, 4, 2, 8, 8)
    kv = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8], [6, 7, -1, -1, 2, 3, 4, 5, -5]], np.int32)
    q_positions = np.array([[4, 5, 6, 7, 8], [3, 4, 5, 6, 7]], np.int32)
    for window in (None, 3):
        mask = ops.Mask(q_positions, kv, window=window)
        o = run(lambda q, k, v, m=mask: ops.attention(q, k, v, m, scale=SCALE), q, k, v)
        assert relative(o, definition(q, k, v, mask, SCALE, None)) <= 1e-6


def test_bfloat16_is_as_near_to_float32_as_bfloat16_is():
    rng = np.random.default_rng(0)
    T = 128
    q, k, v, cotangent = inputs(rng, 2, T, T, 4, 2, 16, 16)
    positions, segments = packed(rng, 2, T, 2)
    mask = ops.Mask(positions, positions, segments, segments, in_order=True)
    ref_grads, ref_o = run(forward_and_gradient("reference", mask), q, k, v, cotangent)
    low = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    grads, o = run(forward_and_gradient("xla", mask), *low, cotangent)
    assert grads[0].dtype == jnp.bfloat16
    for got, expected in zip((o, *grads), (ref_o, *ref_grads), strict=True):
        assert relative(got, expected) <= 2e-2  # bfloat16 holds 8 bits


def test_large_scores_choose_one_key_and_stay_finite():
    rng = np.random.default_rng(1)
    q, k, v, cotangent = inputs(rng, 1, 6, 6, 2, 1, 8, 8)
    positions = np.arange(6, dtype=np.int32)[None]
    mask = ops.Mask(positions, positions, in_order=True)
    for name in ("xla", "reference"):
        grads, o = run(forward_and_gradient(name, mask, scale=1e4), q, k, v, cotangent)
        assert relative(o, definition(q, k, v, mask, 1e4, None)) <= 1e-6
        assert all(np.all(np.isfinite(g)) for g in grads)


def ring(mesh, q, k, v, mask, alibi=None, scale=SCALE):
    """``ops.ring`` under shard_map, with the arguments and result of ``ops.attention``."""
    tokens = P(None, "context")
    f = jax.shard_map(
        lambda q, k, v, m: ops.ring(q, k, v, m, scale, alibi, "context"),
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, jax.tree.map(lambda _: tokens, mask)),
        out_specs=tokens,
    )
    return f(q, k, v, mask)


# With scores 50 times as large, the float32 gradients of both are 2e-6 to 3e-6 from float64's.
@pytest.mark.parametrize(
    "window,alibi,scale,bound,sees",
    [
        (5, None, SCALE, 2e-6, "causal"),
        (None, "sqrt", 50.0, 5e-6, "causal"),
        pytest.param(3, "linear", SCALE, 2e-6, "blocks", marks=pytest.mark.thorough),
        pytest.param(3, "linear", SCALE, 2e-6, "both ways", marks=pytest.mark.thorough),
    ],
)
def test_ring_equals_reference(window, alibi, scale, bound, sees):
    """Windows, packing, ALiBi, large scores, an all-padding row; forward and gradient."""
    rng = np.random.default_rng(2)
    T = 16
    q, k, v, cotangent = inputs(rng, 3, T, T, 4, 2, 8, 4)
    positions, segments = packed(rng, 3, T, 2)
    blocks = blocks_of(rng, 3, T) if sees == "blocks" else None
    mask = ops.Mask(
        positions, positions, segments, segments, blocks, blocks,
        causal=sees != "both ways", window=window, in_order=True,
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(context=4), jax.devices()[:4])

    def f(q, k, v, cotangent):
        o = ring(mesh, q, k, v, mask, alibi, scale)
        return jnp.sum(o * cotangent), o

    grads, o = run(jax.grad(f, argnums=(0, 1, 2), has_aux=True), q, k, v, cotangent)
    reference = forward_and_gradient("reference", mask, alibi, scale)
    ref_grads, ref_o = run(reference, q, k, v, cotangent)
    for got, expected in zip((o, *grads), (ref_o, *ref_grads), strict=True):
        assert np.all(np.isfinite(got)) and relative(got, expected) <= bound
    assert not np.any(o[-1]) and not any(np.any(g[-1]) for g in grads)


@pytest.mark.parametrize("how", ["xla", "ring"])
def test_layers_keep_no_mask_of_heads_queries_and_keys_for_their_gradient(how):
    """A loop over layers keeps what it takes to be the same for all of them: at 50,000 tokens a
    mask that was broadcast to the heads is tens of gigabytes."""
    T, heads = 1024, 4
    positions = np.arange(T, dtype=np.int32)[None]
    mask = ops.Mask(positions, positions, in_order=True)
    mesh = make_mesh(MeshConfig(context=2), jax.devices()[:2])

    def layer(x, _):
        q, k = x, x[:, :, :1]
        if how == "ring":
            return ring(mesh, q, k, k, mask), None
        return ops.attention(q, k, k, mask, scale=SCALE, implementation="xla"), None

    def loss(x):
        return jnp.sum(jax.lax.scan(layer, x, length=2)[0])

    made = jax.make_jaxpr(jax.grad(loss))(np.zeros((1, T, heads, 8), np.float32))
    # what stands beside the loops forward and backward, and their results; a broadcast number is
    # none that anything must keep
    kept = [v.aval for equation in made.jaxpr.eqns for v in equation.outvars]
    assert len(kept) > 4
    assert not [a for a in kept if a.dtype == bool and a.size >= T * T // 8]


def test_bad_requests_say_what_there_is():
    q, k, v, _ = inputs(np.random.default_rng(0), 1, 2, 2, 4, 3, 4, 4)
    positions = np.zeros((1, 2), np.int32)
    mask = ops.Mask(positions, positions)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        ops.attention(q, k, v, mask, scale=1.0)
    with pytest.raises(ValueError, match="'flash'.*auto, pallas_tpu, pallas_gpu, .*xla, reference"):
        ops.attention(q, k[:, :, :1], v[:, :, :1], mask, scale=1.0, implementation="flash")


PROBLEM = ops.Problem(
    256, 256, queries=4096, keys=4096, dtype="bfloat16", alibi=False, in_order=True
)


def test_auto_goes_by_the_devices_compiled_for():
    assert ops.resolve("auto", PROBLEM) == "xla"  # this machine's
    assert ops.resolve("auto", PROBLEM, TPU) == "pallas_tpu"
    for change in (
        {"width": 100}, {"alibi": True}, {"dtype": "float16"}, {"queries": 1}, {"blocks": True},
        {"two_sided": True},
    ):  # fmt: skip
        assert ops.resolve("auto", dataclasses.replace(PROBLEM, **change), TPU) == "xla"
    assert set(typing.get_args(ops.Implementation)) == {"auto", *ops.IMPLEMENTATIONS}
    for device in (HOPPER, BLACKWELL, AMPERE):  # the kernel has not been measured yet
        assert ops.resolve("auto", PROBLEM, device) == "xla"
    assert ops.resolve("pallas_gpu", PROBLEM, HOPPER) == "pallas_gpu"
    # one decoded token can be had on request, but is no use of the kernel
    assert ops.resolve("pallas_tpu", dataclasses.replace(PROBLEM, queries=1), TPU) == "pallas_tpu"


@pytest.mark.parametrize(
    "change,device,reason",
    [
        ({}, CPU, "needs a TPU, and this is compiled for cpu"),
        ({}, types.SimpleNamespace(platform="tpu", device_kind="TPU v3"), "'TPU v3' is none of"),
        ({}, types.SimpleNamespace(platform="tpu", device_kind="TPU v4"), "'v4' is none of v5e"),
        ({"width": 100}, TPU, "widths 100 .* and 256 .* not among 64, 128, 192, 256"),
        ({"dtype": "float16"}, TPU, "float16 is neither bfloat16 nor float32"),
        ({"alibi": True}, TPU, "no ALiBi"),
        ({"blocks": True}, TPU, "no blocks of tokens that see each other"),
        ({"two_sided": True}, TPU, "its windows look back only"),
        ({}, BLACKWELL, "needs a Hopper GPU .* compiled for gpu 10.0; use auto"),
        ({}, AMPERE, "needs a Hopper GPU .* compiled for gpu 8.0; use auto"),
        ({"width": 96, "value_width": 96}, HOPPER, "widths 96 .* same of 64, 128, 192, 256"),
        ({"value_width": 128}, HOPPER, "widths 256 .* and 128 .* same of 64"),
        ({"dtype": "float32"}, HOPPER, "float32 is not bfloat16"),
        ({"alibi": True}, HOPPER, "no ALiBi"),
        ({"blocks": True}, HOPPER, "no blocks of tokens that see each other"),
        ({"in_order": False}, HOPPER, "the same tokens in order"),
    ],
)
def test_an_impossible_request_says_why(change, device, reason):
    name = "pallas_gpu" if device.platform == "gpu" else "pallas_tpu"
    with pytest.raises(ConfigError, match=f"{name} cannot do this: .*{reason}"):
        ops.resolve(name, dataclasses.replace(PROBLEM, **change), device)


def test_a_mask_of_other_rows_keeps_its_description():
    positions = np.arange(6, dtype=np.int32)[None]
    mask = ops.Mask(
        positions, positions, positions + 1, positions + 1, positions + 2, positions + 2,
        window=3, in_order=True,
    )  # fmt: skip
    part = mask.rows(2, 4, 5)
    assert part.q_positions_BT.tolist() == [[2, 3]] and part.kv_segments_BS.shape == (1, 5)
    assert part.q_blocks_BT.tolist() == [[4, 5]] and part.kv_blocks_BS.shape == (1, 5)
    assert dataclasses.replace(part, window=None) != part and part.window == 3
