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
        frequency_F = 1e4 ** (-jnp.arange(self.H // 2) / (self.H // 2)) if self.reuse else None

        def call(q, k, v, positions, lengths, layer):
            options = {"scale": self.H**-0.5, "frequency_F": frequency_F, "layer": layer}
            return decode(q, k, v, positions, lengths, **options)

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

SECTIONS: dict[str, Callable[[Budget], None]] = {"attention": attention, "decode": decode}


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
