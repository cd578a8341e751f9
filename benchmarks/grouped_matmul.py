"""Speed of a mixture-of-experts feed-forward network against a dense one of the same products.

    python benchmarks/grouped_matmul.py [--rows 8192] [--width 512] [--hidden 1024] [--experts 16]

SwiGLU of three grouped matmuls, forward and backward, in float32 and bfloat16, with experts that
get equal, random, geometrically falling or all rows (`--rows` counts a token once per expert it
goes to). Dense is the same network with one expert's matrices for all rows. Repetitions of both
take turns and the best of each counts. Exits 1 if the chosen implementation is below the bar
anywhere.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from step_jax.ops.grouped_matmul import IMPLEMENTATIONS, Problem, grouped_matmul, resolve

BAR = 0.75


def timed(product, *args):
    """A function that runs the compiled network and its gradients once and returns seconds."""

    def loss(x_MD, gate, up, down, sizes_E, cotangent_MD):
        h_MF = jax.nn.silu(product(x_MD, gate, sizes_E)) * product(x_MD, up, sizes_E)
        return jnp.sum((product(h_MF, down, sizes_E) * cotangent_MD).astype(jnp.float32))

    f = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).lower(*args).compile()

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        return time.perf_counter() - start

    run()
    return run


def group_sizes(rows: int, experts: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shares = {
        "equal": np.full(experts, 1 / experts),
        "random": rng.dirichlet(np.ones(experts)),
        "falling": 2.0 ** -np.arange(1, experts + 1),
        "half empty": np.arange(experts) % 2 * 2 / experts,
        "all to one": np.arange(experts) == experts // 2,
    }
    return {k: rng.multinomial(rows, p / p.sum()).astype(np.int32) for k, p in shares.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--implementation", default="auto", choices=("auto", *IMPLEMENTATIONS))
    a = parser.parse_args()
    M, D, F, E = a.rows, a.width, a.hidden, a.experts
    name = resolve(a.implementation, Problem.of(M, E, D, F, "float32"))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {M} rows, {E} experts, ", end="")
    print(f"width {D}, hidden {F}; {name}")
    print(
        f"{'dtype':<9} {'sizes':<11} {'dense ms':>9} {'GFLOP/s':>8} {name + ' ms':>14} {'speed':>6}"
    )
    flops = 3 * 3 * 2 * M * D * F  # three products, each with two more for the gradients
    worst = np.inf
    for dtype in (jnp.float32, jnp.bfloat16):
        keys = jax.random.split(jax.random.key(0), 5)
        x, cotangent = (jax.random.normal(k, (M, D), dtype) for k in keys[:2])
        gate, up = (jax.random.normal(k, (E, D, F), dtype) * D**-0.5 for k in keys[2:4])
        down = jax.random.normal(keys[4], (E, F, D), dtype) * F**-0.5
        dense = timed(lambda x, w, _: x @ w, x, gate[0], up[0], down[0], None, cotangent)
        for label, sizes in group_sizes(M, E).items():
            args = (x, gate, up, down, jnp.asarray(sizes), cotangent)
            chosen = timed(lambda *o: grouped_matmul(*o, implementation=name), *args)
            times = [(dense(), chosen()) for _ in range(a.repeat)]
            d, c = (min(t) for t in zip(*times, strict=True))
            worst = min(worst, d / c)
            print(f"{dtype.__name__:<9} {label:<11} {d * 1e3:9.0f} {flops / d / 1e9:8.0f} ", end="")
            print(f"{c * 1e3:14.0f} {d / c:6.2f}", flush=True)
    print(f"\nbar: {BAR} of dense everywhere: {worst:.2f}, {'met' if worst >= BAR else 'MISSED'}")
    return 0 if worst >= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
