"""The TPU attention kernels in the interpreter, against float64 from the words of the mask.

Shape suffixes as in ``pallas_kernels.tpu.attention``. Blocks are of 128 tokens, the smallest, so
that short rows have several.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention

from pallas_kernels.tpu import attention as kernels
from pallas_kernels.tpu import block_sizes
from pallas_kernels.tpu.attention import attention
from pallas_kernels.tpu.block_sizes import BackwardSizes, ForwardSizes
from pallas_kernels.tpu.visits import Pattern

CHIP = "v6e"
SMALL = (ForwardSizes(1, 128, 256, 128), BackwardSizes(1, 128, 128, 256))


def definition(q, k, v, do, positions, segments, pattern, scale):
    """(o, lse, dq, dk, dv) in float64; lse is -inf where nothing is seen."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    (q_BT, kv_BS), (qs_BT, ks_BS) = positions, segments
    distance_BTS = q_BT[:, :, None] - kv_BS[:, None]
    seen_BTS = np.broadcast_to(kv_BS[:, None] >= 0, distance_BTS.shape).copy()
    if pattern.causal:
        seen_BTS &= distance_BTS >= 0
    if pattern.window is not None:
        seen_BTS &= distance_BTS < pattern.window
    if qs_BT is not None:
        seen_BTS &= (qs_BT[:, :, None] == ks_BS[:, None]) & (ks_BS[:, None] > 0)
    s = np.where(seen_BTS[:, None, None], scale * np.einsum("bkgth,bksh->bkgts", q, k), -np.inf)
    top = np.maximum(s.max(-1, keepdims=True), -1e300)
    p = np.exp(s - top)
    total = p.sum(-1, keepdims=True)
    p /= np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    o = np.einsum("bkgts,bksv->bkgtv", p, v)
    dp = np.einsum("bkgtv,bksv->bkgts", do, v)
    ds = scale * p * (dp - (do * o).sum(-1, keepdims=True))
    dq, dk = np.einsum("bkgts,bksh->bkgth", ds, k), np.einsum("bkgts,bkgth->bksh", ds, q)
    return o, lse, dq, dk, np.einsum("bkgts,bkgtv->bksv", p, do)


def run(f, *args):
    """``f(*args)`` under jit, compiled quickly (it is run once), as NumPy arrays."""
    fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.device_get(jax.jit(f).lower(*args).compile(compiler_options=fast)(*args))


def computed(
    q, k, v, do, positions, segments, pattern, scale, sizes=SMALL, interpret=True, chip=CHIP
):
    """The same from the kernels."""

    def f(q, k, v, do):
        def forward(q, k, v):
            return attention(
                q,
                k,
                v,
                *positions,
                *segments,
                pattern=pattern,
                scale=scale,
                chip=chip,
                sizes=sizes,
                interpret=interpret,
            )

        o, back, lse = jax.vjp(forward, q, k, v, has_aux=True)
        return o, lse, *back(do)

    return run(f, q, k, v, do)


def arrays(seed, B, K, G, T, S, H, V, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = ((B, K, G, T, H), (B, K, S, H), (B, K, S, V), (B, K, G, T, V))
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def in_a_row(B, T):
    return np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))


def packed(lengths_of_rows, T):
    """(positions, segments) of rows of documents of these lengths, padding after them."""
    positions, segments = np.zeros((2, len(lengths_of_rows), T), np.int32)
    for row, lengths in enumerate(lengths_of_rows):
        start = 0
        for i, n in enumerate(lengths, 1):
            segments[row, start : start + n] = i
            positions[row, start : start + n] = np.arange(n)
            start += n
    return positions, segments


def assert_close(got, expected, bound, names=("o", "lse", "dq", "dk", "dv")):
    for name, a, b in zip(names, got, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if name == "lse":
            assert np.all(a[b == -np.inf] < -1e25)
            a, b = a[b != -np.inf], b[b != -np.inf]
        assert np.all(np.isfinite(a)), name
        # a floor of one element: with a single visible key a gradient is rounding about zero
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1.0)
        assert error <= bound, (name, error)


def check(inputs, positions, segments, pattern, scale=0.2, bound=2e-6, **options):
    expected = definition(*inputs, positions, segments, pattern, scale)
    got = computed(*inputs, positions, segments, pattern, scale, **options)
    assert_close(got, expected, bound)
    return got


NONE = (None, None)


@pytest.mark.thorough
@settings(max_examples=5, phases=[Phase.explicit, Phase.generate])
@given(
    st.integers(1, 400),
    st.sampled_from([(1, 3), (2, 1)]),
    st.sampled_from([(64, 64), (192, 128)]),
    st.sampled_from([None, 1, 100, 300]),
    st.lists(st.lists(st.integers(0, 150), max_size=3), min_size=1, max_size=2),
    st.integers(0, 2**31),
)
def test_packed_rows_of_any_length(T, heads, widths, window, lengths, seed):
    """Odd lengths, empty documents, windows, rows that are all padding."""
    positions, segments = packed([[min(n, T // 3) for n in row] for row in lengths], T)
    inputs = arrays(seed, len(lengths), *heads, T, T, *widths)
    pattern = Pattern(window=window, in_order=True)
    o, _, dq, _, _ = check(inputs, (positions,) * 2, (segments,) * 2, pattern)
    padding_BT = segments == 0
    for x in (o, dq):
        assert not np.any(x.transpose(0, 3, 1, 2, 4)[padding_BT])


@pytest.mark.parametrize("window", [None, pytest.param(130, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("causal", [True, False])
def test_one_document(causal, window):
    """Keys in pieces of 256 and 128."""
    T = 384
    pattern = Pattern(causal, window, in_order=True)
    sizes = (ForwardSizes(1, 128, 384, 256), SMALL[1])
    inputs = arrays(1, 1, 1, 2, T, T, 128, 128)
    check(inputs, (in_a_row(1, T),) * 2, NONE, pattern, sizes=sizes)


def test_an_odd_number_of_heads_is_made_even_for_two_cores():
    found = [block_sizes.computed_heads("v5p", *of) for of in ((1, 3), (2, 3), (3, 5), (3, 3))]
    assert found == [4, 3, 6, 3]  # two rows are one a core; three heads of three rows gain nothing
    assert block_sizes.computed_heads("v5p", 1, 1) == 1  # a second would be all that is gained
    assert block_sizes.computed_heads("v6e", 1, 3) == 3
    seen = {}

    def watched(f):
        def call(*args, **kwargs):
            seen[f.__name__] = args[2].shape[2], kwargs.get("parts")
            return f(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "backward_of_chunk"):
            patch.setattr(kernels, name, watched(getattr(kernels, name)))
        positions, none = in_a_row(1, 200), (None, None)
        inputs = arrays(3, 1, 1, 3, 200, 200, 64, 64)
        check(inputs, (positions, positions), none, Pattern(in_order=True), sizes=None, chip="v5p")
    assert seen == {"forward": (4, None), "backward_of_chunk": (4, 2)}


def test_visits_that_do_not_fit_the_scalar_memory_are_made_in_several_calls(monkeypatch):
    """Four visits of each of two rows: ranges of queries forwards, fewer keys backwards."""
    T, calls = 500, []

    def counted(visits, *rest, **options):
        calls.append(visits[0].shape)
        return forward(visits, *rest, **options)

    forward = kernels.forward
    monkeypatch.setattr(kernels, "TABLES", 4 * 2 * 4)
    monkeypatch.setattr(kernels, "forward", counted)
    positions, segments = packed([[200, 250], [480]], T)
    inputs = arrays(11, 2, 1, 1, T, T, 64, 64)
    check(inputs, (positions,) * 2, (segments,) * 2, Pattern(in_order=True))
    assert calls == [(2, 4), (2, 2)]


@pytest.mark.slow
def test_a_part_of_the_queries_sees_what_it_would_see_in_the_whole_row():
    """Context parallelism: the same numbers for a slice of the queries, with all the keys."""
    T, part = 512, slice(256, 384)
    q, k, v, do = arrays(2, 2, 1, 2, T, T, 64, 64)
    positions, segments = packed([[200, 250], [512]], T)
    pattern = Pattern(window=220)
    whole = check((q, k, v, do), (positions,) * 2, (segments,) * 2, pattern)
    got = check(
        (q[..., part, :], k, v, do[..., part, :]),
        (positions[:, part], positions),
        (segments[:, part], segments),
        pattern,
    )
    for i in (0, 2):  # o, dq
        np.testing.assert_allclose(got[i], whole[i][..., part, :], rtol=0, atol=2e-6)


@pytest.mark.thorough
def test_keys_of_a_cache_with_empty_slots():
    """More keys than queries, out of order, some slots empty; a query that precedes all keys."""
    rng = np.random.default_rng(3)
    kv = np.stack([rng.permutation(300), np.where(np.arange(300) % 3, -1, np.arange(300))])
    q = np.stack([np.arange(250, 260), np.arange(-2, 8)])
    inputs = arrays(3, 2, 2, 2, 10, 300, 64, 64)
    got = check(inputs, (q.astype(np.int32), kv.astype(np.int32)), NONE, Pattern(window=200))
    assert not np.any(got[0][1, :, :, :2])


@pytest.mark.thorough
def test_nobody_sees_anything():
    positions, segments = packed([[]], 200)
    inputs = arrays(4, 1, 1, 2, 200, 200, 64, 64)
    got = check(inputs, (positions,) * 2, (segments,) * 2, Pattern(in_order=True))
    assert not any(np.any(got[i]) for i in (0, 2, 3, 4))


@pytest.mark.thorough
def test_large_scores_choose_one_key_and_stay_finite():
    T = 256
    inputs = arrays(5, 1, 1, 1, T, T, 64, 64)
    # one part in 1e7 of a score of 1e4 is 1e-3 of its power
    check(inputs, (in_a_row(1, T),) * 2, NONE, Pattern(in_order=True), scale=1e3, bound=5e-3)


@pytest.mark.thorough
def test_bfloat16_is_as_near_as_bfloat16_is():
    T = 256
    inputs = arrays(6, 1, 1, 2, T, T, 256, 256, jnp.bfloat16)
    pattern = Pattern(in_order=True)
    got = check(inputs, (in_a_row(1, T),) * 2, NONE, pattern, scale=1 / 16, bound=1e-2)
    assert got[0].dtype == got[2].dtype == got[3].dtype == jnp.bfloat16


def splash(q, k, v, do):
    """(o, dq, dk, dv) of JAX's own kernel for TPUs, causal, for scaled queries."""
    G, T = q.shape[2:4]
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((T, T))] * G)
    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute"
    sizes = dict.fromkeys([*names.split(), "block_q_dq", "block_kv_dq"], 128)
    kernel = splash_attention.make_splash_mqa_single_device(
        mask, block_sizes=splash_attention.BlockSizes(**sizes), interpret=True
    )
    o, back = jax.vjp(lambda *a: jax.vmap(jax.vmap(kernel))(*a), q, k, v)
    return o, *back(do)


@pytest.mark.slow
@pytest.mark.parametrize("width", [pytest.param(128, marks=pytest.mark.slow), 256])
def test_errors_in_bfloat16_beside_splash_attention(width):
    """Root mean square errors at most 1.5 times those of the public kernel."""
    T, G, pattern = 512, 4, Pattern(in_order=True)
    q, k, v, do = arrays(16, 1, 1, G, T, T, width, width, jnp.bfloat16)
    q *= 0.25  # a power of two: both kernels see the same scores, splash without a scale of its own
    positions = (in_a_row(1, T),) * 2
    o, _, *gradients = computed(q, k, v, do, positions, NONE, pattern, 1.0)
    exact, _, *exact_gradients = definition(q, k, v, do, positions, NONE, pattern, 1.0)
    theirs = run(splash, q, k, v, do)
    for name, ours, their, truth in zip(
        ("o", "dq", "dk", "dv"),
        (o, *gradients),
        theirs,
        (exact, *exact_gradients),
        strict=True,
    ):
        error, bound = (
            np.sqrt(np.mean((np.asarray(x, np.float64) - truth) ** 2)) for x in (ours, their)
        )
        assert error <= 1.5 * bound, (name, error / bound)


@pytest.mark.thorough
def test_the_log_sum_exp_has_a_gradient():
    T = 200
    q, k, v, _ = arrays(7, 1, 1, 2, T, T, 64, 64)
    positions = (in_a_row(1, T),) * 2
    weights = np.random.default_rng(7).standard_normal((1, 1, 2, T)).astype(np.float32)

    def kernel(q, k):
        options = {"pattern": Pattern(in_order=True), "scale": 0.2, "chip": CHIP, "sizes": SMALL}
        return jnp.sum(weights * attention(q, k, v, *positions, interpret=True, **options)[1])

    def plain(q, k):
        s = 0.2 * jnp.einsum("bkgth,bksh->bkgts", q, k, precision="highest")
        s = jnp.where(np.tri(T, dtype=bool), s, -jnp.inf)
        return jnp.sum(weights * jax.nn.logsumexp(s, axis=-1))

    got, expected = (run(jax.grad(f, argnums=(0, 1)), q, k) for f in (kernel, plain))
    assert_close(got, expected, 2e-6, names=("dq", "dk"))


@pytest.mark.slow
def test_gradients_are_the_same_bits_with_heads_in_one_block_and_every_time():
    """Rows of a block do not mix: dQ does not depend on how heads are grouped, bit for bit."""
    T, pattern = 256, Pattern(in_order=True)
    inputs = arrays(8, 1, 1, 4, T, T, 64, 64)
    compute = functools.partial(computed, *inputs, (in_a_row(1, T),) * 2, NONE, pattern, 0.2)
    one, again, four = (
        compute(sizes=(ForwardSizes(n, 128, 128, 128), BackwardSizes(n, 128, 128, 128)))
        for n in (1, 1, 4)
    )
    for a, b in zip(one, again, strict=True):
        assert np.array_equal(a, b)
    for i in (0, 1, 2):
        assert np.array_equal(one[i], four[i])


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[[300], [100, 150]], [[], [384]]])
def test_no_races_and_no_reads_of_what_was_never_written(lengths):
    """The interpreter with DMAs: NaN where nothing was written, and races detected."""
    positions, segments = packed(lengths, 384)
    check(
        arrays(9, 2, 1, 2, 384, 384, 64, 64),
        (positions,) * 2,
        (segments,) * 2,
        Pattern(window=200, in_order=True),
        interpret=pltpu.InterpretParams(detect_races=True),
    )
