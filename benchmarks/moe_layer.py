"""A mixture of experts beside a dense layer of equal active operations: forward and backward.

    python benchmarks/moe_layer.py
    python benchmarks/moe_layer.py --dtype bfloat16 --tokens 32768 --width 4096 --hidden 1280 \
        --experts 64 --top-k 8

Both layers take turns in one process. The dense layer has hidden units times top-k, so both have
the same products per token; the router's product is the mixture's own. `--skew` sends tokens to
few experts: the routing scores of expert e are moved by -skew * e.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp

from step_jax.core import rng
from step_jax.core import spec as spec_lib
from step_jax.models.context import Context, Execution
from step_jax.models.layers.initialisation import FanIn
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.routing import Router
from step_jax.models.tokens import Tokens


def gradient_step(layer: SwiGLU | MoE, args):
    """A compiled function of nothing: output and all gradients of ``layer`` on fixed inputs."""
    dtype = jnp.dtype(args.dtype)
    specs = layer.specs(args.width, FanIn())
    params = spec_lib.cast(spec_lib.init(specs, rng.fold(0, 0, "init")), dtype, specs)
    if isinstance(layer, MoE):
        params = params.replace(bias_E=-args.skew * jnp.arange(args.experts, dtype=jnp.float32))
    x_BTD = jax.random.normal(rng.fold(0, 0, "data"), (1, args.tokens, args.width), dtype)
    ctx = Context(Tokens.in_order(1, args.tokens), execution=Execution(dtype=args.dtype))

    @jax.jit
    def step(params, x_BTD):
        y_BTD, pull = jax.vjp(lambda p, x: layer.apply(p, x, ctx)[0], params, x_BTD)
        return y_BTD, pull(x_BTD)

    return functools.partial(step, params, x_BTD)


def seconds(step, times: int) -> tuple[float, float]:
    """(wall, CPU) of one call, a mean over ``times``."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        out = step()
    jax.block_until_ready(out)
    return (time.perf_counter() - wall) / times, (time.process_time() - cpu) / times


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--skew", type=float, default=0.0)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--times", type=int, default=2, help="calls in a turn")
    sizes = {"tokens": 4096, "width": 384, "hidden": 512, "experts": 8, "top_k": 2}
    for name, value in sizes.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return p.parse_args()


def main() -> None:
    args = parse()
    router = Router(args.top_k, score="sigmoid", bias=True)
    moe = gradient_step(MoE((Experts(args.experts, args.hidden),), router), args)
    dense = gradient_step(SwiGLU(args.hidden * args.top_k), args)
    for step in (moe, dense):
        seconds(step, 1)
    turns = [(seconds(moe, args.times), seconds(dense, args.times)) for _ in range(args.rounds)]
    flops = 3 * 2 * 3 * args.tokens * args.width * args.hidden * args.top_k
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {vars(args)}")
    for i, clock in enumerate(("wall", "CPU")):
        ratios = [d[i] / m[i] for m, d in turns]
        m, d = (statistics.median(t[j][i] for t in turns) for j in (0, 1))
        print(
            f"{clock}: mixture {m * 1e3:.1f} ms ({flops / m / 1e9:.0f} GFLOP/s), dense "
            f"{d * 1e3:.1f} ms ({flops / d / 1e9:.0f} GFLOP/s); speed of the mixture by the dense "
            f"layer's {statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
