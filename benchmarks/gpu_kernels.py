"""Hopper kernels on a GPU: first whether they are right, then how fast they are.

    PYTHONPATH=. python benchmarks/gpu_kernels.py                   # all sections, under 8 minutes
    PYTHONPATH=. python benchmarks/gpu_kernels.py attention --seconds 240

Needs one H100 or H200 and ``jax[cuda13]``; tokamax is measured beside the kernels if it is
installed. Data is random normal (power, so clock, depends on it). A time is the median of
``REPEATS`` runs of enough calls to last 50 ms, with the lowest and highest in brackets. FLOPs of
attention: forward 4 B N T S H, halved if causal; backward 2.5 times that, whatever a kernel
computes again.

A section is a function of a :class:`Budget` in ``SECTIONS``; one that fails prints its error and
the next one runs. The exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

REPEATS = 7
SAMPLE_SECONDS = 0.05


class Budget:
    """Seconds left for measurements.

    Attributes:
      end: ``time.monotonic()`` at which they are spent.
    """

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def spent(self, what: str) -> bool:
        """Whether no time is left; says so of ``what``."""
        if time.monotonic() < self.end:
            return False
        print(f"{what}: not measured, out of time")
        return True


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, lowest and highest of the repeats."""

    median: float
    low: float
    high: float

    def rate(self, amount: float, unit: float) -> str:
        """``amount / seconds`` in multiples of ``unit``, with its spread."""
        at = [amount / seconds / unit for seconds in (self.median, self.high, self.low)]
        return f"{at[0]:7.1f} [{at[1]:.1f}, {at[2]:.1f}]"


def measure(function: Callable, *arguments) -> Timing:
    """Times ``function(*arguments)``, which is compiled and warm afterwards."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(1, round(SAMPLE_SECONDS / (time.perf_counter() - start)))
    samples = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*arguments)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / calls)
    return Timing(statistics.median(samples), min(samples), max(samples))


def relative_error(got, want) -> float:
    """Norm of the difference over the norm of ``want``."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# --- attention -----------------------------------------------------------------------------------
# B batch, T queries, S keys, N query heads, H head width.


def attention(budget: Budget) -> None:
    """Forward and backward of MFA attention, 64 heads on one, width 256, causal."""
    check_attention()
    print("attention, TFLOP/s, causal, 64 heads on 1, width 256, batch 1")
    for T in (4096, 8192, 16384):
        inputs = attention_inputs(1, T, 64, 256)
        flops = 4 * 64 * T * T * 256 / 2
        for name, attend in contenders():
            if budget.spent(f"T={T} {name}"):
                continue
            try:
                forward, backward = attention_timings(attend, *inputs)
            except Exception as error:  # one contender must not stop the others
                print(f"  T={T:<6} {name:10} {type(error).__name__}: {str(error)[:300]}")
                continue
            rates = forward.rate(flops, 1e12), backward.rate(2.5 * flops, 1e12)
            print(f"  T={T:<6} {name:10} forward {rates[0]}  backward {rates[1]}", flush=True)


def attention_inputs(B: int, T: int, N: int, H: int, seed: int = 0):
    """Random bfloat16 q_BTNH, k_BSH, v_BSH and do_BTNH."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(B, T, N, H), (B, T, H), (B, T, H), (B, T, N, H)]
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]


def attention_timings(attend: Callable, q_BTNH, k_BSH, v_BSH, do_BTNH) -> tuple[Timing, Timing]:
    """Forward alone, and backward alone from what the forward saved."""
    inputs = (q_BTNH, k_BSH, v_BSH)
    forward = measure(jax.jit(attend), *inputs)
    _, pull = jax.jit(lambda *x: jax.vjp(attend, *x))(*inputs)
    return forward, measure(jax.jit(lambda pull, do_BTNH: pull(do_BTNH)), pull, do_BTNH)


def contenders() -> Iterator[tuple[str, Callable]]:
    """Causal attention by every implementation there is, as functions of q_BTNH, k_BSH, v_BSH."""
    from pallas_kernels.gpu.attention import mfa_attention

    def multi(attend, **options):
        def call(q_BTNH, k_BSH, v_BSH):
            scale = q_BTNH.shape[-1] ** -0.5
            keys_values = k_BSH[:, :, None], v_BSH[:, :, None]
            return attend(q_BTNH, *keys_values, scale=scale, is_causal=True, **options)

        return call

    yield "ours", lambda q, k, v: mfa_attention(q, k, v, scale=q.shape[-1] ** -0.5)
    yield "cudnn", multi(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        import tokamax
    except ImportError:
        print("  tokamax is not installed")
    else:
        yield "tokamax", multi(tokamax.dot_product_attention, implementation="mosaic")


def check_attention() -> None:
    """Output and gradients against float32 attention, beside cuDNN's error on the same inputs.

    Raises:
      AssertionError: an error above four bfloat16 roundings, or two runs that differ in a bit.
    """
    from pallas_kernels.gpu.attention import mfa_attention

    cases: list[tuple[tuple[int, int, int, int], dict]] = [
        ((1, 1024, 4, 256), {}),
        ((2, 512, 3, 256), {}),
        ((1, 1024, 4, 128), {}),
        ((1, 512, 2, 64), {}),
        ((1, 512, 2, 192), {}),
        ((1, 512, 2, 256), {"causal": False}),
        ((1, 1024, 2, 256), {"window": 200}),
        ((1, 1024, 2, 256), {"segments_BT": jnp.repeat(jnp.arange(4), 256)[None] * 2 // 3}),
    ]
    for shape, options in cases:
        inputs = attention_inputs(*shape)
        attend = functools.partial(mfa_attention, scale=shape[-1] ** -0.5, **options)
        exact = functools.partial(exact_attention, scale=shape[-1] ** -0.5, **options)
        gradients = jax.jit(functools.partial(output_and_gradients, attend))
        with jax.default_matmul_precision("highest"):
            want = jax.jit(functools.partial(output_and_gradients, exact))(*inputs)
        got, again = gradients(*inputs), gradients(*inputs)
        errors = [relative_error(a, b) for a, b in zip(got, want, strict=True)]
        label = f"{shape} {', '.join(options)}"
        print(f"  {label:32} error of o, dq, dk, dv:", " ".join(f"{e:.1e}" for e in errors))
        assert max(errors) < 4 * 2**-9, f"{label}: {errors}"
        same = all(bool((a == b).all()) for a, b in zip(got, again, strict=True))
        assert same, f"{label}: two runs differ"
        if not options:
            _print_cudnn_error(inputs, want)


def _print_cudnn_error(inputs, want) -> None:
    attend = dict(contenders())["cudnn"]
    try:
        theirs = jax.jit(functools.partial(output_and_gradients, attend))(*inputs)
    except Exception as error:  # what cuDNN cannot do is no fault of ours
        print(f"  cudnn: {type(error).__name__}: {str(error)[:200]}")
        return
    errors = [relative_error(a, b) for a, b in zip(theirs, want, strict=True)]
    print(f"  {'cudnn':32} error of o, dq, dk, dv:", " ".join(f"{e:.1e}" for e in errors))


def output_and_gradients(attend: Callable, q_BTNH, k_BSH, v_BSH, do_BTNH):
    o_BTNH, pull = jax.vjp(attend, q_BTNH, k_BSH, v_BSH)
    return o_BTNH, *pull(do_BTNH.astype(o_BTNH.dtype))


def exact_attention(q_BTNH, k_BSH, v_BSH, *, scale, causal=True, window=None, segments_BT=None):
    """Attention in float32 with the whole score matrix."""
    q_BTNH, k_BSH, v_BSH = (x.astype(jnp.float32) for x in (q_BTNH, k_BSH, v_BSH))
    s_BNTS = jnp.einsum("btnh,bsh->bnts", q_BTNH, k_BSH) * scale
    before_TS = jnp.arange(q_BTNH.shape[1])[:, None] - jnp.arange(k_BSH.shape[1])
    visible_BTS = (before_TS >= 0)[None] if causal else jnp.ones_like(before_TS, bool)[None]
    if window is not None:
        visible_BTS &= before_TS < window
    if segments_BT is not None:
        visible_BTS &= segments_BT[:, :, None] == segments_BT[:, None, :]
    p_BNTS = jax.nn.softmax(jnp.where(visible_BTS[:, None], s_BNTS, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsh->btnh", p_BNTS, v_BSH)


# --- grouped matmul ------------------------------------------------------------------------------
# M rows, E groups, D width of a row, F width of a result.


def grouped_matmul(budget: Budget) -> None:
    """Forward, gradient of the rows and of the matrices; groups of equal and of ragged sizes.

    ``dense`` is one matrix for all rows: the roof of what the libraries of XLA reach at that shape.
    """
    check_grouped_matmul()
    print("grouped matmul, TFLOP/s: forward, gradient of rows, of matrices")
    for M, D, F, E in ((131072, 4096, 1536, 128), (32768, 7168, 5120, 16), (16384, 2048, 1024, 64)):
        flops = 2 * M * D * F
        for label, sizes_E in (("equal", equal_sizes(M, E)), ("ragged", ragged_sizes(M, E))):
            inputs = grouped_inputs(M, D, F, sizes_E)
            for name, products in grouped_contenders(M, D, E):
                what = f"{M}x{D}x{F}, {E} {label}, {name}"
                if budget.spent(what):
                    continue
                try:
                    times = [measure(jax.jit(product), *inputs) for product in products]
                except Exception as error:  # one contender must not stop the others
                    print(f"  {what}: {type(error).__name__}: {str(error)[:300]}")
                    continue
                print(f"  {what:44}", "  ".join(t.rate(flops, 1e12) for t in times), flush=True)


def equal_sizes(M: int, E: int):
    return np.full(E, M // E, np.int32)


def ragged_sizes(M: int, E: int, seed: int = 0):
    """One group with a quarter of the rows, an eighth of the groups empty, the rest at random."""
    rng = np.random.default_rng(seed)
    share_E = rng.dirichlet(np.ones(E))
    share_E[: E // 8] = 0.0
    share_E[-1] = share_E[:-1].sum() / 3
    sizes_E = np.floor(share_E / share_E.sum() * M).astype(np.int32)
    sizes_E[-1] += M - sizes_E.sum()
    return sizes_E


def grouped_inputs(M: int, D: int, F: int, sizes_E, seed: int = 0):
    """Random bfloat16 x_MD, w_EDF and dy_MF, and the sizes."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(M, D), (len(sizes_E), D, F), (M, F)]
    arrays = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]
    return *arrays, jnp.asarray(sizes_E)


def grouped_contenders(M: int, D: int, E: int) -> Iterator[tuple[str, tuple[Callable, ...]]]:
    """Name and the three products, each a function of x_MD, w_EDF, dy_MF and sizes_E."""
    from pallas_kernels.gpu import grouped_matmul as kernel

    yield (
        "ours",
        (
            lambda x, w, dy, s: kernel.rows_by_matrices(x, w, s),
            lambda x, w, dy, s: kernel.rows_by_matrices(dy, w, s, transposed=True),
            lambda x, w, dy, s: kernel.matrices_of_rows(x, dy, s),
        ),
    )
    yield (
        "dense",
        (
            lambda x, w, dy, s: x @ w[0],
            lambda x, w, dy, s: dy @ w[0].T,
            lambda x, w, dy, s: x.T @ dy,
        ),
    )
    if 2 * M * D * E < 16 * 2**30:  # XLA makes a copy of the rows for every group
        yield "ragged_dot", gradients_of(jax.lax.ragged_dot)
    try:
        import tokamax
    except ImportError:
        print("  tokamax is not installed")
    else:
        yield "tokamax", gradients_of(tokamax.ragged_dot)


def gradients_of(ragged_dot: Callable) -> tuple[Callable, ...]:
    """The product and its two gradients, each alone."""

    def rows(x, w, dy, s):
        return jax.vjp(lambda x: ragged_dot(x, w, s), x)[1](dy)

    def matrices(x, w, dy, s):
        return jax.vjp(lambda w: ragged_dot(x, w, s), w)[1](dy)

    return lambda x, w, dy, s: ragged_dot(x, w, s), rows, matrices


def check_grouped_matmul() -> None:
    """The three products against float32, group by group, twice with the same bits.

    Raises:
      AssertionError: an error above two bfloat16 roundings, or two runs that differ in a bit.
    """
    from pallas_kernels.gpu.grouped_matmul import grouped_matmul

    def run(x, w, dy, s):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, s), x, w)
        return y, *pull(dy)

    cases = [
        (4096, 512, 768, ragged_sizes(4096, 16)),
        (4096, 512, 1024, np.array([0, 4000, 0, 1, 7, 0], np.int32)),  # rows left over
        (1000, 256, 384, np.array([333, 0, 8, 659], np.int32)),
        (128, 128, 128, np.zeros(3, np.int32)),
    ]
    for M, D, F, sizes_E in cases:
        inputs = grouped_inputs(M, D, F, sizes_E)
        got, again = jax.jit(run)(*inputs), jax.jit(run)(*inputs)
        same = all(bool((a == b).all()) for a, b in zip(got, again, strict=True))
        errors = [
            relative_error(a, b) if np.any(b) else float(np.abs(np.asarray(a, np.float32)).max())
            for a, b in zip(got, exact_grouped_matmul(*inputs), strict=True)
        ]
        print(f"  {(M, D, F, len(sizes_E))} error of y, dx, dw:", *(f"{e:.1e}" for e in errors))
        assert max(errors) < 2 * 2**-9, f"{(M, D, F)}: {errors}"
        assert same, f"{(M, D, F)}: two runs differ"


def exact_grouped_matmul(*arrays):
    """Float32 on the host, group by group."""
    x, w, dy = (np.asarray(a, np.float32) for a in arrays[:3])
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for e, size in enumerate(np.asarray(arrays[3])):
        rows = slice(start, start + size)
        y[rows], dx[rows] = x[rows] @ w[e], dy[rows] @ w[e].T
        dw[e] = x[rows].T @ dy[rows]
        start += size
    return y, dx, dw


# --- cross-entropy -------------------------------------------------------------------------------
# N tokens, D width, V vocabulary.

Z_LOSS = 1e-4


def cross_entropy(budget: Budget) -> None:
    """Loss alone, and loss with gradients, beside whole logits; rates are of 2 and 6 N D V."""
    check_cross_entropy()
    print("cross-entropy, TFLOP/s of 2 N D V: loss; of 6 N D V: loss and gradients")
    for N, D, V in ((16384, 4096, 131072), (16384, 7168, 129280), (4096, 4096, 131072)):
        inputs = loss_inputs(N, D, V)
        for name, loss in loss_contenders():
            what = f"{N}x{D}x{V}, {name}"
            if budget.spent(what):
                continue
            try:
                forward = measure(jax.jit(loss), *inputs)
                both = measure(jax.jit(loss_and_gradients(loss)), *inputs)
            except Exception as error:  # whole logits may not fit
                print(f"  {what}: {type(error).__name__}: {str(error)[:300]}")
                continue
            flops = 2 * N * D * V
            rates = forward.rate(flops, 1e12), both.rate(3 * flops, 1e12)
            print(f"  {what:34}", "  ".join(rates), flush=True)


def loss_inputs(N: int, D: int, V: int, seed: int = 0):
    """Random bfloat16 x_ND and w_DV, targets, and float32 weights of both signs."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x_ND = jax.random.normal(keys[0], (N, D), jnp.bfloat16)
    w_DV = jax.random.normal(keys[1], (D, V), jnp.bfloat16) * D**-0.5
    target_N = jax.random.randint(keys[2], (N,), 0, V, jnp.int32)
    return x_ND, w_DV, target_N, jax.random.normal(keys[3], (N,))


def loss_contenders() -> Iterator[tuple[str, Callable]]:
    from pallas_kernels.gpu import cross_entropy as kernel

    yield "ours", lambda x, w, t, weight: kernel.cross_entropy(x, w, t, weight, Z_LOSS)[0]
    yield "whole logits", whole_logits


def whole_logits(x_ND, w_DV, target_N, weight_N):
    logits_NV = jnp.dot(x_ND, w_DV, preferred_element_type=jnp.float32)
    lse_N = jax.nn.logsumexp(logits_NV, axis=-1)
    hit_N = jnp.take_along_axis(logits_NV, target_N[:, None], -1)[:, 0]
    return jnp.sum(weight_N * (lse_N - hit_N + Z_LOSS * lse_N**2))


def loss_and_gradients(loss: Callable) -> Callable:
    return jax.value_and_grad(loss, argnums=(0, 1, 3))


def check_cross_entropy() -> None:
    """Loss and gradients against float32 products, twice with the same bits.

    Raises:
      AssertionError: an error above two bfloat16 roundings, or two runs that differ in a bit.
    """
    loss = dict(loss_contenders())["ours"]
    for shape in ((1024, 512, 32768), (1000, 256, 1408), (70, 128, 128)):
        x, w, *others = loss_inputs(*shape)
        exact = x.astype(jnp.float32), w.astype(jnp.float32), *others
        with jax.default_matmul_precision("highest"):
            want = jax.jit(loss_and_gradients(whole_logits))(*exact)
        got, again = (jax.jit(loss_and_gradients(loss))(x, w, *others) for _ in range(2))
        got, again, want = (jax.tree.leaves(a) for a in (got, again, want))
        errors = [relative_error(a, b) for a, b in zip(got, want, strict=True)]
        print(f"  {shape} error of loss, dx, dw, dweight:", *(f"{e:.1e}" for e in errors))
        assert max(errors) < 2 * 2**-9, f"{shape}: {errors}"
        same = all(bool((a == b).all()) for a, b in zip(got, again, strict=True))
        assert same, f"{shape}: two runs differ"


# --- decode --------------------------------------------------------------------------------------
# B rows, N query heads, K key/value heads, S slots of a row, H head width.

DECODE_STACK_BYTES = 256e6  # several times the L2 cache: no layer is still in it when it is read


@dataclasses.dataclass(frozen=True)
class Decode:
    """One token of every row over caches of bfloat16 or float8.

    reuse: keys are cached before rotation and are their own values (MFA-KR).
    """

    N: int
    K: int
    H: int
    reuse: bool = False
    dtype: str = "bfloat16"

    def inputs(self, layers: int, B: int, S: int, lengths_B):
        """q_BTNH, stacks of caches (values None if reused), positions_BT, lengths_B."""
        keys = jax.random.split(jax.random.key(0), 3)
        shape = (layers, B, S, self.K, self.H)
        q_BTNH = jax.random.normal(keys[0], (B, 1, self.N, self.H), jnp.bfloat16)
        k, v = (jax.random.normal(key, shape, jnp.bfloat16).astype(self.dtype) for key in keys[1:])
        lengths_B = jnp.asarray(lengths_B, jnp.int32)
        return q_BTNH, k, None if self.reuse else v, lengths_B[:, None] - 1, lengths_B

    def function(self, decode: Callable) -> Callable:
        """``decode`` over one layer with the arguments of :meth:`inputs` and the layer."""
        from pallas_kernels.decode_call import DecodeCall

        frequency_F = 1e4 ** (-jnp.arange(self.H // 2) / (self.H // 2)) if self.reuse else None

        def call(*arrays_and_layer):
            *arrays, layer = arrays_and_layer
            options = {"scale": self.H**-0.5, "frequency_F": frequency_F, "layer": layer}
            return decode(DecodeCall(*arrays, **options))

        return call

    def bytes(self, tokens: int) -> int:
        """Of the cached numbers of ``tokens`` tokens of one layer."""
        arrays = 1 if self.reuse else 2
        return tokens * self.K * self.H * arrays * jnp.dtype(self.dtype).itemsize


DECODES = {
    "MFA": Decode(64, 1, 256),
    "MFA-KR": Decode(64, 1, 256, reuse=True),
    "MFA fp8": Decode(64, 1, 256, dtype="float8_e4m3fn"),
    "MFA-KR fp8": Decode(64, 1, 256, reuse=True, dtype="float8_e4m3fn"),
    "GQA": Decode(64, 8, 128),
    "GQA fp8": Decode(64, 8, 128, dtype="float8_e4m3fn"),
}


def decode(budget: Budget) -> None:
    """Decode attention: share of the memory's bandwidth; tokens/s of MFA-KR against MFA."""
    from pallas_kernels.gpu.decode import decode as attend
    from step_jax.core import hardware

    check_decode(attend)
    chip = hardware.detect(jax.devices()[0])
    roof = None if chip is None else chip.hbm_bandwidth
    print("decode, one token a row and layer; cached bytes/s, share of the roof, tokens/s")
    for B, S, unequal in (
        (16, 32768, False),
        (16, 32768, True),
        (64, 8192, False),
        (1, 32768, False),
    ):
        steps = np.linspace(0.05, 1, B) if unequal else np.ones(B)
        lengths_B = np.maximum(1, (S * steps).astype(int))
        tokens_per_s = {}
        for name, case in DECODES.items():
            label = f"B={B} S={S} {'5 to 100 % full' if unequal else 'full'} {name}"
            if budget.spent(label):
                continue
            timing = decode_timing(case, attend, B, S, lengths_B)
            amount = case.bytes(int(lengths_B.sum()))
            tokens_per_s[name] = B / timing.median
            share = "" if roof is None else f"  {amount / timing.median / roof:5.1%}"
            rates = timing.rate(amount, 1e9), timing.rate(B, 1e3)
            print(f"  {label:44} {rates[0]} GB/s{share}  {rates[1]} thousand tokens/s", flush=True)
        for dtype in ("", " fp8"):
            if {f"MFA{dtype}", f"MFA-KR{dtype}"} <= set(tokens_per_s):
                times = tokens_per_s[f"MFA-KR{dtype}"] / tokens_per_s[f"MFA{dtype}"]
                print(f"  MFA-KR{dtype} against MFA{dtype} at equal length: {times:.2f} times")


def decode_timing(case: Decode, attend: Callable, B: int, S: int, lengths_B) -> Timing:
    """Seconds of one layer; a call walks over the layers of the stack."""
    layers = int(np.clip(DECODE_STACK_BYTES / case.bytes(int(lengths_B.sum())), 2, 16))
    layer = case.function(attend)

    def walk(*inputs):
        return [layer(*inputs, jnp.int32(i)) for i in range(layers)]

    timing = measure(jax.jit(walk), *case.inputs(layers, B, S, lengths_B))
    return Timing(*(seconds / layers for seconds in dataclasses.astuple(timing)))


def check_decode(attend: Callable) -> None:
    """Every kind of cache against float32 attention; the same bits twice.

    Raises:
      AssertionError: an error above four bfloat16 roundings, or two runs that differ in a bit.
    """
    from step_jax.ops.decode_attention import reference

    lengths_B = [1500, 1, 0, 3000, 700]  # the fourth has filled its ring twice
    for name, case in DECODES.items():
        inputs = (*case.inputs(2, 5, 1500, lengths_B), jnp.int32(1))
        run = jax.jit(case.function(attend))
        got, again = run(*inputs), run(*inputs)
        with jax.default_matmul_precision("highest"):
            want = jax.jit(case.function(reference))(*inputs)
        error = relative_error(got, want)
        print(f"  {name:12} error {error:.1e}")
        assert error < 4 * 2**-9, f"{name}: {error}"
        assert bool((got == again).all()), f"{name}: two runs differ"


# -------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Budget], None]] = {
    "attention": attention,
    "grouped_matmul": grouped_matmul,
    "cross_entropy": cross_entropy,
    "decode": decode,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all if none")
    parser.add_argument("--seconds", type=float, default=420, help="budget of all sections")
    options = parser.parse_args(arguments)
    names = options.sections or list(SECTIONS)
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}, only {', '.join(SECTIONS)}")
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind}")
    failed = []
    started = time.monotonic()
    for position, name in enumerate(names):
        left = options.seconds - (time.monotonic() - started)
        try:
            SECTIONS[name](Budget(left / (len(names) - position)))
        except Exception:
            traceback.print_exc()
            failed.append(name)
    print("failed:", ", ".join(failed) or "none")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
