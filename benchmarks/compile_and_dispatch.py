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

from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data.packing import text_schema
from step_jax.models.context import Execution
from step_jax.models.layers.attention import MFA
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.training.learner import Learning
from step_jax.training.losses.text import packed_text_loss
from step_jax.training.optimizers.build import make_optimizer
from step_jax.training.optimizers.config import AdamW
from step_jax.training.program import Program, Work

COMPILE_BAR = 1.15  # deep / shallow
DISPATCH_BAR_MS = 1.0
WIDTH, VOCAB, ROWS, LENGTH = 64, 256, 2, 64


def decoder(depth: int) -> Decoder:
    attention = MFA(4, 16, query_rank=32, query_norm=RMSNorm())
    return Decoder(WIDTH, (Group(depth, (Block(attention, SwiGLU(128)),)),), VOCAB)


def program_of(depth: int, remat: str) -> Program:
    c, sharding = decoder(depth), Sharding.build(MeshConfig(), jax.devices()[:1])
    specs = c.specs()
    optimizer = make_optimizer(AdamW(learning_rate=1e-3), specs, total_steps=10_000)
    loss = packed_text_loss(c, Execution(remat=remat), sharding)
    return Program.build(
        lambda params, batch, key: loss(params["model"], batch),
        {"model": c},
        {"model": Learning(specs, specs, optimizer)},
        text_schema(ROWS, LENGTH),
        sharding,
        total_steps=10_000,
        work=Work(ROWS * LENGTH, dtype="bfloat16"),
        seed=0,
    )


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


def compile_step(program: Program):
    """(CPU seconds of trace, lower and compile, compiled step)."""
    times = [time.process_time()]
    traced = program.step.trace(program.state_like, program.batch_like)
    times.append(time.process_time())
    lowered = traced.lower()
    times.append(time.process_time())
    compiled = lowered.compile()
    times.append(time.process_time())
    return np.diff(times), compiled


def dispatch_ms(program: Program, compiled, calls: int = 200) -> list[float]:
    """CPU milliseconds of the calling thread for each call, the device idle before it."""
    state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), program.state_like)
    rows, spent = jax.device_put(batch()), []
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
    compile_step(program_of(2, a.remat))  # imports and caches
    best: dict[int, np.ndarray] = {}
    for _ in range(a.repeats):
        for depth in (a.shallow, a.deep):
            program = program_of(depth, a.remat)
            parts, compiled = compile_step(program)
            if depth not in best or parts.sum() < best[depth].sum():
                best[depth] = parts
    print(f"\n{'layers':>6} {'trace':>7} {'lower':>7} {'compile':>8} {'total':>7}  CPU-s")
    for depth, parts in best.items():
        print(f"{depth:6} {parts[0]:7.2f} {parts[1]:7.2f} {parts[2]:8.2f} {parts.sum():7.2f}")
    ratio = best[a.deep].sum() / best[a.shallow].sum()
    print(f"ratio {ratio:.3f} (bar {COMPILE_BAR})")

    spent = sorted(dispatch_ms(program, compiled))
    median, p90 = statistics.median(spent), spent[int(0.9 * len(spent))]
    print(
        f"\nhost dispatch at {a.deep} layers: median {median:.3f} ms, 90th percentile {p90:.3f} ms"
    )
    print(f"(bar {DISPATCH_BAR_MS} ms for the median)")
    return 0 if ratio <= COMPILE_BAR and median <= DISPATCH_BAR_MS else 1


if __name__ == "__main__":
    raise SystemExit(main())
