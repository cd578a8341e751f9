"""Steady seconds per training step of a video diffusion transformer, by step_jax and by diffusers.

Both train by flow matching (noise and times drawn in the step), with AdamW (decay 0.1, clipping at
1.0), a transformer of the same widths, depth, heads, tokens and texts. The peer is diffusers'
LTXVideoTransformer3DModel, whose layer is Step-Video's in its order: adaLN-single, attention with
normed queries and keys and rotation by three axes, attention over the text on the un-normed stream
without a gate, a GELU perceptron. It differs in what costs little: norms without mean, scale and
bias, queries and keys normed over all heads at once, biases on linear layers.

    python benchmarks/peers/dit_step_time.py --diffusers-python PATH

STEP_JAX_DIFFUSERS_PYTHON names the interpreter as well (``pip install torch diffusers``).
CPU-seconds of a process and of its threads are the steadier measure on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

from step_time import Contender, table

#: by which the peer may have more parameters, all of them vectors
MORE = 0.01


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = os.environ.get("STEP_JAX_DIFFUSERS_PYTHON")
    p.add_argument("--diffusers-python", default=named, required=named is None)
    p.add_argument("--torch-modes", nargs="+", default=["eager"], choices=["eager", "compile"])
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=2, help="steps in a turn")
    p.add_argument("--logs", type=pathlib.Path, help="directory for what the workers print")
    p.add_argument("--size", type=int, nargs=3, default=[8, 8, 8], help="frames, height, width")
    sizes = {"layers": 6, "heads": 6, "head_dim": 64, "channels": 16, "batch": 4}
    sizes |= {"text": 64, "text_width": 256}
    for name, value in sizes.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = p.parse_args()
    args.shape = {name: getattr(args, name) for name in (*sizes, "size", "dtype", "threads")}
    return args


def main() -> None:
    args = parse()
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
    running = [
        Contender("step_jax", sys.executable, "dit_step_jax_worker.py", args.shape, args.logs)
    ]
    for mode in args.torch_modes:
        peer = args.shape | {"torch_compile": mode == "compile"}
        worker = "dit_diffusers_worker.py"
        running.append(
            Contender(f"diffusers-{mode}", args.diffusers_python, worker, peer, args.logs)
        )
    counts = {c.name: c.about["parameters"] for c in running}
    ours, most = counts["step_jax"], max(counts.values())
    if not ours <= most <= (1 + MORE) * ours:
        raise SystemExit(f"the contenders do not train the same model: parameters {counts}")
    for c in running:  # the first turn of each is not counted
        c.run(args.steps)
        c.results.clear()
    for _ in range(args.rounds):
        for c in running:
            c.run(args.steps)
    print(f"shape: {args.shape}, parameters {counts}")
    print(f"{args.rounds} rounds of {args.steps} steps; medians\n")
    print(table(running))
    for c in running:
        c.close()


if __name__ == "__main__":
    main()
