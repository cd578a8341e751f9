"""Random shapes of attention and grouped matmul compiled under ``auto`` for TPUs that are not here.

    python benchmarks/kernel_shapes.py --out shapes.jsonl

Every shape is compiled with its gradients for every chip, as a model's step would ask for it: what
``auto`` takes must compile, and what it passes over must say so in a line. Nothing is run. A shape
takes 2 to 10 seconds a chip; ``--out`` is a line for each, and the same command goes on where it
ended. Ends with a table, and exit code 1 if a shape raised, but for those whose matrices and their
gradients alone are more than the chip's HBM.

Shape suffixes: B rows, T queries, S keys, N query heads, K key heads, H, V widths; M rows, E
groups, D, F widths.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np

from pallas_kernels.tpu.aot import ENVIRONMENT

os.environ.update(ENVIRONMENT)

import jax  # noqa: E402

from pallas_kernels.tpu import aot  # noqa: E402
from step_jax.ops import attention, grouped_matmul, registry  # noqa: E402

#: What review and users found: lengths and widths without good divisors.
ATTENTION = [
    {"B": 1, "T": T, "S": T, "K": 8, "G": 4, "H": 128, "V": 128, "dtype": "bfloat16"}
    for T in (769, 800, 1700, 2500, 2560, 3584, 4224, 5200, 6200)
]
GROUPED = [
    {"M": 8192, "E": 8, "D": D, "F": F, "dtype": "bfloat16"}
    for D, F in ((2880, 2880), (2880, 5760), (4096, 14336), (14336, 4096), (2048, 1408))
]


def attention_shape(rng: np.random.Generator) -> dict:
    T = int(np.exp(rng.uniform(np.log(128), np.log(20_000))))
    width = int(rng.choice([64, 128, 128, 192, 256, 80]))
    value = 128 if width == 192 else width
    return {
        "B": int(rng.integers(1, 4)), "T": T,
        # a part of a row's queries, as a context axis gives
        "S": T * 4 if rng.random() < 0.15 else T,
        "K": int(rng.choice([1, 2, 8])), "G": int(rng.choice([1, 3, 4, 8, 26, 64])),
        "H": width, "V": value,
        "dtype": "float32" if rng.random() < 0.2 else "bfloat16",
        "window": int(rng.integers(1, T + 1)) if rng.random() < 0.3 else None,
        "packed": bool(rng.random() < 0.5),
    }  # fmt: skip


def grouped_shape(rng: np.random.Generator) -> dict:
    def width() -> int:
        unit = int(rng.choice([128, 128, 64, 8, 1]))
        return unit * max(1, int(np.exp(rng.uniform(np.log(64), np.log(16_384)))) // unit)

    return {
        "M": int(np.exp(rng.uniform(0, np.log(200_000)))),
        "E": int(rng.choice([1, 3, 8, 32, 128, 384])),
        "D": width(), "F": width(),
        "dtype": "float32" if rng.random() < 0.2 else "bfloat16",
    }  # fmt: skip


def compile_attention(chip: str, device, B, T, S, K, G, H, V, dtype, window=None, packed=False):
    """The name of what ``auto`` took; compiled if that is a kernel."""

    def step(q, k, v, do, q_positions, kv_positions):
        documents = (1 + q_positions // 1000, 1 + kv_positions // 1000) if packed else (None, None)
        mask = attention.Mask(q_positions, kv_positions, *documents, window=window, in_order=T == S)

        def forward(q, k, v):
            return attention.attention(q, k, v, mask, scale=H**-0.5, device=device)

        o, back = jax.vjp(forward, q, k, v)
        return o, back(do)

    problem = attention.Problem(H, V, T, S, dtype, alibi=False, in_order=T == S)
    name = attention.resolve("auto", problem, device)
    if name == "pallas_tpu":
        with aot.arrays(chip) as array:
            q, do = array(dtype, B, T, K * G, H), array(dtype, B, T, K * G, V)
            k, v = array(dtype, B, S, K, H), array(dtype, B, S, K, V)
            positions = array("int32", B, T), array("int32", B, S)
            jax.jit(step).lower(q, k, v, do, *positions).compile()
    return name


def compile_grouped_matmul(chip: str, device, M, E, D, F, dtype):
    """The same."""

    def step(x, w, sizes, dy):
        y, back = jax.vjp(
            lambda x, w: grouped_matmul.grouped_matmul(x, w, sizes, device=device), x, w
        )
        return y, back(dy)

    name = grouped_matmul.resolve("auto", grouped_matmul.Problem.of(M, E, D, F, dtype), device)
    if name == "pallas_tpu":
        with aot.arrays(chip) as array:
            arrays = array(dtype, M, D), array(dtype, E, D, F), array("int32", E)
            jax.jit(step).lower(*arrays, array(dtype, M, F)).compile()
    return name


COMPILE = {"attention": compile_attention, "grouped matmul": compile_grouped_matmul}


def cases(shapes: int, seed: int, chips: list[str]):
    """(operation, shape, chip): the known awkward ones first, then as many random ones."""
    rng = np.random.default_rng(seed)
    both = {"attention": (ATTENTION, attention_shape), "grouped matmul": (GROUPED, grouped_shape)}
    for number in range(shapes):
        for operation, (known, draw) in both.items():
            drawn = draw(rng)
            shape = known[number] if number < len(known) else drawn
            for chip in chips:
                yield operation, shape, chip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, default=100, help="of each operation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chips", nargs="*", default=[*aot.TOPOLOGIES])
    parser.add_argument("--out", type=Path, required=True, help="a line for each; is gone on with")
    args = parser.parse_args()
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {(r["operation"], json.dumps(r["shape"]), r["chip"]): r for r in map(json.loads, lines)}
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("step_jax.ops").addHandler(handler)
    devices = {chip: aot.device(chip) for chip in args.chips}
    results = []
    for operation, shape, chip in cases(args.shapes, args.seed, args.chips):
        key = (operation, json.dumps(shape), chip)
        if key not in done:
            said.clear()
            registry._say_once.cache_clear()
            result = {"operation": operation, "shape": shape, "chip": chip}
            start = time.perf_counter()
            try:
                result["took"] = COMPILE[operation](chip, devices[chip], **shape)
            except Exception as error:  # whatever it is, it is what this looks for
                result["raised"] = f"{type(error).__name__}: {error}"[:1000]
            done[key] = result | {"said": [*said], "s": round(time.perf_counter() - start, 1)}
            with args.out.open("a") as out:
                out.write(json.dumps(done[key]) + "\n")
        results.append(done[key])
    return report(results)


def outcome_of(result: dict) -> str:
    """What came of a shape on a chip."""
    if "CompileTimeHbmOom" in result.get("raised", ""):
        return "too large"
    if "raised" in result:
        return "raised"
    return "kernel" if result["took"] == "pallas_tpu" else "passed over"


def report(results: list[dict]) -> int:
    """Prints the table; 1 if anything raised or fell back without a word."""
    counts: dict = collections.defaultdict(collections.Counter)
    silent = []
    for r in results:
        outcome = outcome_of(r)
        counts[r["operation"], r["chip"]][outcome] += 1
        if outcome == "passed over" and not r["said"]:
            silent.append(r)
    print("| operation | chip | shapes | kernel compiled | passed over | too large | raised |")
    print("|---" * 7 + "|")
    for (operation, chip), n in counts.items():
        outcomes = (n[o] for o in ("kernel", "passed over", "too large", "raised"))
        print("| " + " | ".join(map(str, (operation, chip, n.total(), *outcomes))) + " |")
    raised = [r for r in results if outcome_of(r) == "raised"]
    for r in raised:
        print("raised:", r["chip"], r["shape"], r["raised"][:300])
    for line in sorted({line for r in results for line in r["said"]}):
        print("said:", line)
    for r in silent:
        print("passed over without a word:", r["chip"], r["shape"])
    return int(bool(raised or silent))


if __name__ == "__main__":
    sys.exit(main())
