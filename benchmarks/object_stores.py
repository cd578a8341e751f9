"""What a checkpoint costs on a disk and in object stores on the loopback interface.

    python benchmarks/object_stores.py --megabytes 256 --saves 3

Prints the event of every save: its size, its seconds, and how long training waited. The servers are
those of the tests, in the memory of this machine, and share its cores: the figures bound what the
client costs, and say nothing of a network. Needs the dev extra.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

from step_jax.checkpoint import Checkpointer
from tests.object_stores import store


def state_of(megabytes: int, step: int) -> dict:
    """Sixteen float32 arrays, all of ``megabytes`` together."""
    size = megabytes * 2**20 // 4 // 16
    return {f"array_{i}": jnp.arange(size, dtype=jnp.float32) + i + step for i in range(16)}


def measure(where: str, megabytes: int, saves: int) -> None:
    print(where, flush=True)
    with Checkpointer(where, on_event=lambda text: print(f"  {text}", flush=True)) as saver:
        for step in range(1, saves + 1):
            saver.save(step, jax.block_until_ready(state_of(megabytes, step)), {})
            saver.wait()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state_of(megabytes, 0))
    fresh = Checkpointer(where)
    begin = time.perf_counter()
    fresh.restore(saves, like)
    print(f"  verified and restored in {time.perf_counter() - begin:.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--saves", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(folder, asked.megabytes, asked.saves)
    for scheme in ("gs", "s3"):
        with store(scheme) as bucket:
            measure(f"{bucket}/checkpoints", asked.megabytes, asked.saves)


if __name__ == "__main__":
    main()
