"""Compile time against depth, and what a step costs the host.

    python benchmarks/compile_and_dispatch.py [--shallow 4] [--deep 64] [--repeats 3]

Compiles the full train step (loss, gradient, clipping, AdamW, guard, metrics; MFA decoder, bf16)
with scanned layers at two depths and prints CPU seconds of tracing, lowering and compiling
(smallest of the repeats, taken in turn). Then calls the deep step and prints the CPU time that the
calling thread spends in the call, without waiting for the result. Exits 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.models.context import Context, Execution
from step_jax.models.layers.attention import MFA
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.models.tokens import Tokens
from step_jax.training.losses.text import language_model_loss
from step_jax.training.optimizers.build import make_optimizer
from step_jax.training.optimizers.config import AdamW
from step_jax.training.state import abstract_state, init_state
from step_jax.training.step import LossOutput, make_train_step

COMPILE_BAR = 1.15  # deep / shallow
DISPATCH_BAR_MS = 1.0
WIDTH, VOCAB, ROWS, LENGTH = 64, 256, 2, 64


def decoder(depth: int) -> Decoder:
    attention = MFA(4, 16, query_rank=32, query_norm=RMSNorm())
    return Decoder(WIDTH, (Group(depth, (Block(attention, SwiGLU(128)),)),), VOCAB)


def step_of(c: Decoder, remat: str):
    """(jitted step with donation, optimizer)."""
    optimizer = make_optimizer(AdamW(learning_rate=1e-3), c.specs(), total_steps=10_000)

    def loss(params, batch, key):
        ctx = Context(Tokens.packed(batch), execution=Execution(remat=remat))
        return LossOutput(*language_model_loss(params, c, batch, ctx))

    return jax.jit(make_train_step(loss, optimizer, clip_norm=1.0), donate_argnums=0), optimizer


def batch():
    tokens = np.zeros((ROWS, LENGTH), np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens,
        "targets": tokens,
        "segments": tokens + 1,
        "positions": positions,
        "weights": np.ones(tokens.shape, np.float32),
    }


def compile_step(depth: int, remat: str):
    """(CPU seconds of trace, lower and compile, compiled step, optimizer)."""
    c = decoder(depth)
    step, optimizer = step_of(c, remat)
    state = abstract_state(c.specs(), optimizer)
    times = [time.process_time()]
    traced = step.trace(state, batch())
    times.append(time.process_time())
    lowered = traced.lower()
    times.append(time.process_time())
    compiled = lowered.compile()
    times.append(time.process_time())
    return np.diff(times), compiled, optimizer


def dispatch_ms(depth: int, compiled, optimizer, calls: int = 200) -> list[float]:
    """CPU milliseconds of the calling thread for each call, the device idle before it."""
    c = decoder(depth)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), abstract_state(c.specs(), optimizer).params
    )
    state, rows, spent = init_state(zeros, optimizer), jax.device_put(batch()), []
    for _ in range(calls + 5):
        start = time.thread_time()
        state, _ = compiled(state, rows)
        spent.append(1e3 * (time.thread_time() - start))
        jax.block_until_ready(state)
    return spent[5:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shallow", type=int, default=4)
    parser.add_argument("--deep", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    a = parser.parse_args()

    print(f"jax {jax.__version__}, {jax.default_backend()}, remat {a.remat}")
    compile_step(2, a.remat)  # imports and caches
    best: dict[int, np.ndarray] = {}
    for _ in range(a.repeats):
        for depth in (a.shallow, a.deep):
            parts, compiled, optimizer = compile_step(depth, a.remat)
            if depth not in best or parts.sum() < best[depth].sum():
                best[depth] = parts
    print(f"\n{'layers':>6} {'trace':>7} {'lower':>7} {'compile':>8} {'total':>7}  CPU-s")
    for depth, parts in best.items():
        print(f"{depth:6} {parts[0]:7.2f} {parts[1]:7.2f} {parts[2]:8.2f} {parts.sum():7.2f}")
    ratio = best[a.deep].sum() / best[a.shallow].sum()
    print(f"ratio {ratio:.3f} (bar {COMPILE_BAR})")

    spent = sorted(dispatch_ms(a.deep, compiled, optimizer))
    median, p90 = statistics.median(spent), spent[int(0.9 * len(spent))]
    print(
        f"\nhost dispatch at {a.deep} layers: median {median:.3f} ms, 90th percentile {p90:.3f} ms"
    )
    print(f"(bar {DISPATCH_BAR_MS} ms for the median)")
    return 0 if ratio <= COMPILE_BAR and median <= DISPATCH_BAR_MS else 1


if __name__ == "__main__":
    raise SystemExit(main())
