"""Steady seconds per training step of step_jax and of peers, interleaved in one session.

Every contender trains the same Llama-style decoder (RMSNorm, RoPE, SwiGLU, untied head) with
AdamW (decay 0.1, clipping at 1.0) in a process of its own. All stay alive and take turns, A B C A B
C ..., so that a busy machine is busy for all of them. CPU-seconds of a process and of its threads
are the steadier measure; wall time is printed beside them.

    python benchmarks/peers/step_time.py --maxtext-python PATH --torch-python PATH

With --experts the perceptrons are mixtures of that many experts of --hidden units, of which a token
uses --top-k; the peer is then MaxText's Mixtral, and a dense step_jax of equal active operations
(hidden units times top-k) runs beside.

Each peer has its own environment (STEP_JAX_MAXTEXT_PYTHON and STEP_JAX_TORCH_PYTHON name their
interpreters as well); benchmarks/README.md says how to make them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys

DENSE = "step_jax-dense"
WORKERS = pathlib.Path(__file__).parent / "workers"
ROOT = pathlib.Path(__file__).parents[2]


class Contender:
    """A worker process that runs steps when asked."""

    def __init__(self, name: str, python: str, worker: str, shape: dict, log: pathlib.Path | None):
        self.name, self.results = name, []
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": str(shape["threads"]),
        }
        environment["PYTHONPATH"] = str(ROOT)
        command = [python, str(WORKERS / worker), json.dumps(shape)]
        cpus = sorted(all_cpus := os.sched_getaffinity(0))[-shape["threads"] :]
        os.sched_setaffinity(0, cpus)  # is inherited
        self.process = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if log is None else (log / f"{name}.log").open("w"),
        )
        os.sched_setaffinity(0, all_cpus)
        self.about = self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{self.name} ended with code {self.process.wait()} before it answered; "
                "--logs DIRECTORY keeps what it printed"
            )
        return json.loads(line)

    def run(self, steps: int) -> None:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self._answer()
        whole = {"peak_mb": answer.pop("peak_mb")}
        self.results.append({key: value / steps for key, value in answer.items()} | whole)

    def median(self, key: str) -> float:
        return statistics.median(r[key] for r in self.results)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def contenders(args, shape: dict) -> list[tuple[str, str, str, dict]]:
    """(name, interpreter, worker, shape) of everything that was asked for."""
    found = [("step_jax", sys.executable, "step_jax_worker.py", shape)]
    if shape["experts"]:
        dense = shape | {"experts": 0, "hidden": shape["hidden"] * shape["top_k"]}
        found.append((DENSE, sys.executable, "step_jax_worker.py", dense))
    if args.maxtext_python:
        products = args.maxtext_experts if shape["experts"] else [""]
        for remat, product in itertools.product(args.maxtext_remat, products):
            peer = shape | {"maxtext_remat": remat, "maxtext_experts": product}
            name = "-".join(filter(None, ("maxtext", remat, product)))
            found.append((name, args.maxtext_python, "maxtext_worker.py", peer))
    if args.torch_python and not shape["experts"]:
        for mode in args.torch_modes:
            peer = shape | {"torch_compile": mode == "compile"}
            found.append((f"torch-{mode}", args.torch_python, "torch_worker.py", peer))
    return found


def _ratio(ours: Contender, other: Contender, key: str) -> str:
    """Median and range of the ratios of neighbours in time: a machine's load changes."""
    ratios = [a[key] / b[key] for a, b in zip(ours.results, other.results, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"


def table(running: list[Contender]) -> str:
    ours = running[0]
    lines = [
        "| contender | CPU-s/step | step_jax by it (range) | wall s/step | by it (range) | peak MB "
        "| versions |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in running:
        cpu, wall = c.median("cpu"), c.median("wall")
        by_cpu, by_wall = (_ratio(ours, c, key) for key in ("cpu", "wall"))
        lines.append(
            f"| {c.name} | {cpu:.3f} | {by_cpu} | {wall:.3f} | {by_wall} | "
            f"{c.median('peak_mb'):.0f} | {c.about['version']} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--maxtext-python", default=os.environ.get("STEP_JAX_MAXTEXT_PYTHON"))
    p.add_argument("--torch-python", default=os.environ.get("STEP_JAX_TORCH_PYTHON"))
    p.add_argument("--maxtext-remat", nargs="+", default=["minimal_with_context"])
    products = ["ragged", "dense"]  # jax.lax.ragged_dot, or every expert for every token
    p.add_argument("--maxtext-experts", nargs="+", default=products, choices=products)
    p.add_argument("--torch-modes", nargs="+", default=["eager"], choices=["eager", "compile"])
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=2, help="steps in a turn")
    p.add_argument("--logs", type=pathlib.Path, help="directory for what the workers print")
    sizes = {"width": 384, "layers": 6, "heads": 6, "kv_heads": 6, "head_dim": 64, "hidden": 1024}
    sizes |= {"vocab": 4096, "seq": 512, "batch": 8, "experts": 0, "top_k": 2}
    for name, value in sizes.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = p.parse_args()
    args.shape = {name: getattr(args, name) for name in (*sizes, "dtype", "threads")}
    return args


def main() -> None:
    args = parse()
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
    running = [Contender(*entry, args.logs) for entry in contenders(args, args.shape)]
    counts = {c.name: c.about["parameters"] for c in running if c.name != DENSE}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"the contenders do not train the same model: parameters {counts}")
    for c in running:  # the first turn of each is not counted
        c.run(args.steps)
        c.results.clear()
    for _ in range(args.rounds):
        for c in running:
            c.run(args.steps)
    print(f"shape: {args.shape}, {counts['step_jax']:,} parameters")
    print(f"{args.rounds} rounds of {args.steps} steps; medians\n")
    print(table(running))
    for c in running:
        c.close()


if __name__ == "__main__":
    main()
