"""One decoded token with many cached: MHA, MFA and MFA-KR of equal parameters, in turns.

    python benchmarks/decode_cache.py [--rounds 15] [--width 1024] [--lengths 4096 32768]

MHA has heads of width C / 2 and the others width C = WIDTH / 8, as in arXiv 2412.19255. Prints the
median CPU time of a token and the bytes of the cache that it reads, counted from its arrays.

Exits 1 if MFA takes more than half of MHA's time at the last length.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp

from step_jax.models.context import Execution
from step_jax.models.layers.attention import MFA, MHA, equal_parameter_heads
from step_jax.models.layers.block import Block
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.text.decoder import Decoder
from step_jax.models.trunk import Group
from step_jax.trainers.ablation_times import TOKENS, decoding_turn, filled_cache, in_turns

LONGEST_SHARE = 0.5  # of MHA's time


def models(width: int, layers: int) -> dict[str, Decoder]:
    """The kinds at equal parameters, behind a small vocabulary."""
    C = width // 8
    mha = MHA(16, C // 2)
    kinds: dict[str, MHA | MFA] = {
        "mha": mha,
        "mfa": MFA(1, C),
        "mfa_kr": MFA(1, C, value="gated_key"),
    }
    for name in ("mfa", "mfa_kr"):
        kind = kinds[name]
        heads = equal_parameter_heads(kind, width, like=mha)
        kinds[name] = MFA(heads, C, value=kind.value)
    return {
        name: Decoder(width, (Group(layers, (Block(kind, SwiGLU(2 * width)),)),), vocab=256)
        for name, kind in kinds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--cache", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args()
    decoders, dtype = models(args.width, args.layers), jnp.dtype(args.cache)
    execution = Execution(dtype="float32")
    print(f"| kind | heads | cached | {args.cache} bytes read | by MHA | CPU-ms a token | by MHA |")
    print("| :-- | --: | --: | --: | --: | --: | --: |")
    for length in args.lengths:
        turns = {n: decoding_turn(m, execution, length, dtype) for n, m in decoders.items()}
        seconds = in_turns(turns, args.rounds, time.process_time)
        size = {n: filled_cache(m, length - 1, dtype).nbytes() for n, m in decoders.items()}
        for name, model in decoders.items():
            (stack,) = model.trunk.walk()
            share, spent = seconds[name] / seconds["mha"], 1e3 * seconds[name] / TOKENS
            print(
                f"| {name} | {stack.block.attention.heads} | {length:,} | {size[name]:,} | "
                f"{size[name] / size['mha']:.4f} | {spent:.2f} | {share:.2f} |"
            )
    sys.exit(seconds["mfa"] / seconds["mha"] > LONGEST_SHARE)


if __name__ == "__main__":
    main()
