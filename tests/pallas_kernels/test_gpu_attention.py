"""The Hopper attention kernels in the interpreter against float32 attention.

Shape suffixes: B batch, T queries, S keys, N query heads, H head width.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.gpu import attention
from pallas_kernels.gpu.attention import bounds, head_groups, mfa_attention
from step_jax.ops import attention as ops
from tests import devices

HOPPER = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def interpreted(function, *arguments):
    """``function(*arguments)`` compiled for this CPU while the kernels see a Hopper GPU.

    The warpgroups of a cluster run as threads that wait for each other: the test session gives the
    CPU client enough of them (``--xla_force_host_platform_device_count``).
    """
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=HOPPER)):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cpu",))
        compiled = lowered.compile(device_assignment=(jax.devices("cpu")[0],))
    return compiled(*arguments)


def reference(q_BTNH, k_BSH, v_BSH, *, scale, causal=True, window=None, segments_BT=None):
    q_BTNH, k_BSH, v_BSH = (x.astype(jnp.float32) for x in (q_BTNH, k_BSH, v_BSH))
    s_BNTS = jnp.einsum("btnh,bsh->bnts", q_BTNH, k_BSH) * scale
    t_T1 = jnp.arange(q_BTNH.shape[1])[:, None]
    s_1S = jnp.arange(k_BSH.shape[1])[None]
    visible_BTS = jnp.ones((1, *s_BNTS.shape[2:]), bool)
    if causal:
        visible_BTS &= s_1S <= t_T1
    if window is not None:
        visible_BTS &= t_T1 - s_1S < window
    if segments_BT is not None:
        visible_BTS &= segments_BT[:, :, None] == segments_BT[:, None, :]
    p_BNTS = jax.nn.softmax(jnp.where(visible_BTS[:, None], s_BNTS, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsh->btnh", p_BNTS, v_BSH)


def random(B=1, T=128, S=None, N=2, H=64, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(B, T, N, H), (B, S or T, H), (B, S or T, H), (B, T, N, H)]
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]


def check(shape, gradients=True, detect_races=False, **options):
    """Output and gradients within bfloat16 rounding of the reference."""
    q_BTNH, k_BSH, v_BSH, do_BTNH = random(**shape)
    scale = q_BTNH.shape[-1] ** -0.5
    interpret = plgpu.InterpretGPUParams(detect_races=detect_races)
    kernel = functools.partial(mfa_attention, scale=scale, interpret=interpret, **options)
    exact = functools.partial(reference, scale=scale, **options)

    def both(attend, q_BTNH, k_BSH, v_BSH, do_BTNH):
        o_BTNH, pull = jax.vjp(attend, q_BTNH, k_BSH, v_BSH)
        return o_BTNH, *pull(do_BTNH.astype(o_BTNH.dtype))

    inputs = (q_BTNH, k_BSH, v_BSH) + ((do_BTNH,) if gradients else ())
    with jax.default_matmul_precision("highest"):
        if gradients:
            got = interpreted(functools.partial(both, kernel), *inputs)
            want = both(exact, *inputs)
        else:
            got, want = [interpreted(kernel, *inputs)], [exact(*inputs)]
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, want, strict=False):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        # Both sides are rounded to bfloat16, whose neighbours lie up to 2**-7 of a value apart.
        atol = 1e-2 if name == "o" else 2e-2
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=atol, err_msg=name)
        # Three roundings to bfloat16 (p or ds, the operands' products, the result) of 2**-9 each.
        error, size = np.linalg.norm(a - b), np.linalg.norm(b)
        if size:  # no gradient of the queries when each sees one key
            assert error < 3 * 2**-9 * size, f"{name}: relative error {error / size:.4f}"


@pytest.mark.thorough
def test_causal_forward_and_gradients():
    check({"T": 256})


@pytest.mark.thorough
def test_width_256_forward():
    check({"T": 128, "H": 256}, gradients=False)


@pytest.mark.thorough
def test_full_forward():
    check({"T": 128, "S": 256}, gradients=False, causal=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"T": 256, "H": 256}, {}),
        ({"T": 128, "H": 128, "N": 3}, {}),  # an odd head: no cluster over heads
        ({"T": 128, "H": 192, "B": 2, "N": 4}, {}),
        ({"T": 128, "S": 384}, {"causal": False}),
        ({"T": 512}, {"window": 100}),
        ({"T": 256}, {"window": 1}),
    ],
)
def test_gradients(shape, options):
    check(shape, **options)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 70])
def test_packed_documents(window):
    lengths = [[130, 62, 192], [1, 63, 320]]
    segments_BT = jnp.stack([jnp.repeat(jnp.arange(1, 4), np.array(row)) for row in lengths])
    check({"B": 2, "T": 384}, segments_BT=segments_BT, window=window)


@pytest.mark.slow
def test_groups_of_heads_add_up_to_the_same_gradient(monkeypatch):
    monkeypatch.setattr(attention, "head_groups", lambda heads, blocks: 2)
    check({"T": 128, "N": 4})


@pytest.mark.slow
@pytest.mark.parametrize("N", [1, 2])  # without and with a cluster over heads
@pytest.mark.parametrize("options", [{}, {"window": 100}])
def test_no_races_and_no_reads_of_what_was_never_written(N, options):
    """The interpreter fills memory with NaN and raises where no barrier orders two accesses."""
    check({"T": 256, "N": N}, detect_races=True, **options)


@pytest.mark.slow
def test_same_bits_in_every_run():
    q_BTNH, k_BSH, v_BSH, do_BTNH = random(T=256)

    def gradients(*inputs):
        attend = functools.partial(mfa_attention, scale=0.125, interpret=plgpu.InterpretGPUParams())
        return jax.vjp(attend, *inputs[:3])[1](inputs[3])

    runs = [interpreted(gradients, q_BTNH, k_BSH, v_BSH, do_BTNH) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_bounds_are_the_mask():
    segments_BT = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [7] * 8])
    for window in (None, 2):
        first_BT, last_BS = bounds((2, 8), window, segments_BT)
        t_T1, s_1S = jnp.arange(8)[:, None], jnp.arange(8)[None]
        visible_BTS = (s_1S <= t_T1) & (segments_BT[:, :, None] == segments_BT[:, None, :])
        if window is not None:
            visible_BTS &= t_T1 - s_1S < window
        by_query_BTS = (s_1S <= t_T1) & (s_1S >= first_BT[:, :, None])
        by_key_BTS = (s_1S <= t_T1) & (t_T1 <= last_BS[:, None, :])
        assert (by_query_BTS == visible_BTS).all() and (by_key_BTS == visible_BTS).all()
        assert (jnp.diff(first_BT) >= 0).all() and (jnp.diff(last_BS) >= 0).all()


def test_bounds_of_a_window_go_by_positions():
    rng = np.random.default_rng(0)
    segments_BT = np.repeat([[1, 2, 0, 3], [0, 4, 4, 5]], [30, 20, 6, 8], axis=1)
    positions_BT = np.cumsum(rng.integers(1, 4, segments_BT.shape), axis=1)
    positions_BT[:, 30:] -= positions_BT[:, 29:30]  # a document begins before the last one ends
    assert positions_BT[0, 30] < positions_BT[0, 29]
    positions_BT, segments_BT = (jnp.asarray(x, jnp.int32) for x in (positions_BT, segments_BT))
    first_BT, last_BS = bounds(segments_BT.shape, 7, segments_BT, positions_BT)
    mask = ops.Mask(positions_BT, positions_BT, segments_BT, segments_BT, window=7, in_order=True)
    index_T = jnp.arange(segments_BT.shape[1])
    seen_BTS = index_T[:, None] >= index_T
    by_query_BTS = seen_BTS & (index_T >= first_BT[:, :, None])
    by_key_BTS = seen_BTS & (index_T[:, None] <= last_BS[:, None, :])
    real_BT1 = segments_BT[:, :, None] > 0
    assert (by_query_BTS & real_BT1 == mask.allowed_BTS()).all()
    assert (by_key_BTS & real_BT1 == mask.allowed_BTS()).all()


@pytest.mark.parametrize(
    ("segments", "positions", "expected"),
    [
        ([1, 1, 2, 2, 0], [0, 4, 0, 1, 0], True),
        ([0, 3, 3, 0, 7], [5, 0, 1, 0, 0], True),
        ([1, 1, 2, 2, 1], [0, 1, 0, 1, 2], False),  # a document that comes back
        ([1, 1, 0, 0, 1], [0, 1, 0, 0, 2], False),  # padding within one
        ([2, 2, 1, 1, 1], [0, 1, 0, 1, 2], False),  # numbers that fall may have come before
        ([1, 1, 1, 2, 2], [0, 1, 1, 0, 1], False),  # two tokens that see each other
        ([1, 1, 1, 1, 1], [0, 1, 0, 1, 2], False),  # two documents of one number
    ],
)
def test_rows_that_would_mean_something_else_are_found(segments, positions, expected):
    found_B = ops.are_runs_B(*(jnp.asarray([x], jnp.int32) for x in (positions, segments)))
    assert found_B.tolist() == [expected]
    q = jnp.ones((1, 5, 1, 64), jnp.bfloat16)
    arrays = [jnp.asarray([x], jnp.int32) for x in (positions, segments)]
    mask = ops.Mask(arrays[0], arrays[0], arrays[1], arrays[1], in_order=True)
    constant = functools.partial(lambda q, *_, **__: q)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "mfa_attention", constant)
        o = ops.attention(
            q, q, q, mask, scale=1.0, implementation="pallas_gpu", device=devices.HOPPER
        )
    assert bool(jnp.isnan(o).all()) is not expected


def test_head_groups_divide_the_heads_and_fill_the_device():
    assert head_groups(64, 64) == 16  # 4096 keys: 64 blocks a group, 528 wanted
    assert head_groups(26, 1000) == 1
    assert head_groups(26, 1) == 26


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ({"H": 32}, {}, "head width 32"),
        ({"T": 100}, {}, "multiples of 128"),
        ({"S": 256}, {}, "as many keys as queries"),
        ({}, {"causal": False, "window": 3}, "need causal"),
        ({}, {"window": 0}, "at least 1"),
        ({}, {"segments_BT": jnp.ones((1, 64))}, "segments must be"),
        ({}, {}, "attention cannot run: it needs a Hopper GPU"),
    ],
)
def test_refuses_what_it_does_not_support(shape, options, message):
    q_BTNH, k_BSH, v_BSH, _ = random(**shape)
    with pytest.raises(ValueError, match=message):
        mfa_attention(q_BTNH, k_BSH, v_BSH, scale=1.0, **options)


def test_refuses_other_dtypes():
    q_BTNH, k_BSH, v_BSH, _ = random()
    with pytest.raises(ValueError, match="only bfloat16"):
        mfa_attention(q_BTNH.astype(jnp.float16), k_BSH, v_BSH, scale=1.0)


@pytest.mark.thorough
@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_as_implementation_of_attention(monkeypatch, gradients):
    """Several key heads, a window, packed documents with padding, no whole tiles."""
    interpret = functools.partial(mfa_attention, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(attention, "mfa_attention", interpret)
    B, T, K, G, H = 1, 130, 2, 2, 64
    rng = np.random.default_rng(0)
    shapes = ((B, T, K * G, H), (B, T, K, H), (B, T, K, H), (B, T, K * G, H))
    arrays = [jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes]
    segments = np.repeat([0, 1, 2, 3, 0], (5, 70, 3, 40, 12))[None].astype(np.int32)
    starts = np.repeat([0, 5, 75, 78, 118], (5, 70, 3, 40, 12))
    positions = (np.arange(T) - starts)[None].astype(np.int32)
    positions[:, 20:75] *= 3  # a window is of positions, not of tokens
    positions[:, :2] = -1
    mask = ops.Mask(positions, positions, segments, segments, window=30, in_order=True)

    def value(name, *arrays):
        dtype = arrays[0].dtype if name == "pallas_gpu" else jnp.float32
        q, k, v, do = (x.astype(dtype) for x in arrays)

        def f(q, k, v):
            return ops.attention(
                q, k, v, mask, scale=0.2, implementation=name, device=devices.HOPPER
            )

        if not gradients:
            return (f(q, k, v),)
        o, pull = jax.vjp(f, q, k, v)
        return o, *pull(do)

    got = interpreted(functools.partial(value, "pallas_gpu"), *arrays)
    expected = jax.jit(functools.partial(value, "reference"))(*arrays)
    for a, b in zip(got, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b)  # of bfloat16 results
        nowhere = segments[0] == 0
        assert not a[:, nowhere].any() and not b[:, nowhere].any()
