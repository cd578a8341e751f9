"""The bubble of a pipeline: predicted, counted in the compiled program, and measured.

    python benchmarks/pipeline_bubble.py [--layers 16] [--width 256] [--length 128] [--repeats 3]

A decoder's loss over its hidden states, forward and backward, on simulated CPU devices: as a
pipeline, and with the same devices splitting the batch (``data``) instead. Every device then has
the same useful work, so the share of a pipeline's work that is idle is one minus the work without
by the work with a pipeline. It is

* predicted: ``step_jax.models.pipeline.bubble_fraction``;
* counted: by the operations of matrix products per device in both compiled programs, trip counts
  of loops included (``step_jax.planning``);
* measured: by the CPU seconds and the wall seconds of a step, medians of ``--repeats`` rounds in
  turn. An idle device computes on padding, so simulated devices that share a few cores pay for
  idle work as real ones do by waiting. Whatever else differs between the two programs is in there.

Exits 1 if a count differs from its prediction by more than 0.001.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp

from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.core.spec import abstract
from step_jax.models import pipeline
from step_jax.models.context import Context, Execution
from step_jax.models.layers.attention import MFA
from step_jax.models.layers.initialisation import Fixed
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.models.tokens import Tokens
from step_jax.planning import hlo, operations

#: (stages, rounds, microbatches)
CASES = ((2, 1, 2), (2, 1, 8), (2, 2, 2), (2, 2, 8), (4, 1, 4), (4, 1, 8), (4, 2, 4), (4, 4, 8))
MICROBATCH_ROWS = 2


def compiled(c: Decoder, mesh: MeshConfig, rows: int, length: int):
    """(compiled gradient, its arguments) on as many devices as the mesh has."""
    sharding = Sharding.build(mesh, jax.devices()[: mesh.pipeline * mesh.data])

    def loss(p, tokens_BT):
        tokens = Tokens.in_order(*tokens_BT.shape)
        ctx = Context(tokens, sharding=sharding, execution=Execution(dtype="float32"))
        return jnp.sum(jnp.square(c.hidden(p, tokens_BT, ctx)[0]))

    layout = sharding.params(c.specs())
    tokens = sharding.named(("batch", "sequence"), (rows, length))
    arguments = (
        abstract(c.specs(), layout),
        jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=tokens),
    )
    f = jax.jit(jax.grad(loss), out_shardings=layout).lower(*arguments).compile()
    p = jax.jit(lambda: c.initialise(jax.random.key(0)), out_shardings=layout)()
    return f, (p, jax.device_put(jnp.ones((rows, length), jnp.int32), tokens))


def flops(f) -> float:
    """Operations of one device's matrix products in one call."""
    module = hlo.parse(f.as_text())
    executions, unknown = hlo.executions(module)
    if unknown:
        raise ValueError(f"loops of unknown length: {unknown}")
    return operations.count(module, executions).flops


def seconds(f, arguments) -> tuple[float, float]:
    """(CPU, wall) seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(f(*arguments))
    return time.process_time() - cpu, time.perf_counter() - wall


def idle(with_bubble, without) -> float:
    return 1 - without / with_bubble


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    block = Block(MFA(4, 64), SwiGLU(4 * args.width))
    c = Decoder(args.width, (Group(args.layers, (block,)),), 256, init=Fixed(0.02))
    print("| stages | rounds | microbatches | predicted | counted | by CPU-s | by wall s |")
    print("|---|---|---|---|---|---|---|")
    wrong = 0
    for stages, rounds, microbatches in CASES:
        rows = MICROBATCH_ROWS * microbatches
        mesh = MeshConfig(
            pipeline=stages, pipeline_rounds=rounds, pipeline_microbatches=microbatches
        )
        pair = [compiled(c, m, rows, args.length) for m in (mesh, MeshConfig(data=stages))]
        predicted = pipeline.bubble_fraction(stages, rounds, microbatches)
        counted = idle(*(flops(f) for f, _ in pair))
        for f, arguments in pair:
            seconds(f, arguments)
        times = [[seconds(f, arguments) for f, arguments in pair] for _ in range(args.repeats)]
        cpu, wall = (
            idle(*(statistics.median(turn[side][kind] for turn in times) for side in (0, 1)))
            for kind in (0, 1)
        )
        shares = " | ".join(f"{share:.3f}" for share in (predicted, counted, cpu, wall))
        print(f"| {stages} | {rounds} | {microbatches} | {shares} |", flush=True)
        wrong += abs(counted - predicted) > 1e-3
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
