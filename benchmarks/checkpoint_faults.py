"""Faults found in saved checkpoints, and what saving costs.

    python benchmarks/checkpoint_faults.py [--megabytes 36] [--flips 100] [--seed 0]

Prints: single-bit flips found of N (drawn evenly over all bits of the step and, apart from
that, one in every file), truncated, emptied, zeroed and deleted files found of all; for the same
flips what Orbax alone reports; the time a training step waits for a save and until it is
committed; checksum throughput; CPU seconds of the first save with its imports.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

# A step of 250 kB: the chance that a flip hits metadata rather than weights is not nil.
SMALL = {"w": ((200, 300), "float32"), "b": ((300,), "float32")}


def cpu_s() -> float:
    t = os.times()
    return t.user + t.system


def flip_bit(path: Path, bit: int) -> None:
    with open(path, "r+b") as f:
        f.seek(bit // 8)
        byte = f.read(1)[0]
        f.seek(bit // 8)
        f.write(bytes([byte ^ 1 << bit % 8]))


def draw_bits(files: list[Path], count: int, seed: int) -> list[tuple[Path, int]]:
    rng = random.Random(seed)
    sizes = [8 * f.stat().st_size for f in files]
    chosen = rng.choices(range(len(files)), weights=sizes, k=count)
    return [(files[i], rng.randrange(sizes[i])) for i in chosen]


def measure_saves(directory: Path, megabytes: float) -> None:
    import jax

    before = cpu_s()
    from step_jax.checkpoint import CheckpointConfig, Checkpointer

    imports = cpu_s() - before
    leaves, width = 24, 512
    rows = max(1, int(megabytes * 1e6 / 4 / leaves / width))
    make = jax.jit(
        lambda key: {
            f"leaf{i}": jax.random.normal(jax.random.fold_in(key, i), (rows, width))
            for i in range(leaves)
        }
    )
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x * 0.999, s), donate_argnums=0)
    state = jax.block_until_ready(make(jax.random.key(0)))
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    stalls, totals = [], []
    with Checkpointer(directory, CheckpointConfig(keep=2), lambda e: None) as saver:
        for step in range(1, 8):
            state = jax.block_until_ready(advance(state))
            begin, before = time.perf_counter(), cpu_s()
            saver.save(step, state, {"step": step})
            stalls.append(time.perf_counter() - begin)
            saver.wait()
            totals.append(time.perf_counter() - begin)
            if step == 1:
                print(f"first save with its imports      {cpu_s() - before + imports:8.2f} CPU-s")
    print(f"state                            {size / 1e6:8.1f} MB in {leaves} arrays")
    print(f"step waits for save(), first     {stalls[0] * 1e3:8.2f} ms")
    print(f"step waits for save(), median    {statistics.median(stalls[1:]) * 1e3:8.2f} ms")
    print(f"until committed, median          {statistics.median(totals[1:]) * 1e3:8.1f} ms")


def measure_hash(directory: Path) -> None:
    from step_jax.checkpoint.manifest import hash_files

    path = directory / "block"
    path.write_bytes(os.urandom(256 << 20))
    hash_files(directory, ["block"])  # warms the page cache
    begin = cpu_s()
    for _ in range(4):
        hash_files(directory, ["block"])
    print(f"checksum, read included          {1 / max(cpu_s() - begin, 1e-3):8.2f} GiB/CPU-s")
    path.unlink()


def count_faults(directory: Path, flips: int, seed: int) -> None:
    from step_jax.checkpoint import verify
    from step_jax.checkpoint.manifest import (
        MANIFEST,
        committed_steps,
        list_files,
        step_name,
    )

    step = committed_steps(directory)[-1]
    copy = directory / "faults" / step_name(step)
    shutil.copytree(directory / step_name(step), copy)
    files = [copy / n for n in [MANIFEST, *list_files(copy)]]
    filled = [f for f in files if f.stat().st_size]

    def damaged() -> bool:
        return bool(verify(copy.parent)[step])

    for name, bits in {
        "single-bit flips, drawn over all bits": draw_bits(files, flips, seed),
        "single-bit flips, one in every file": [draw_bits([f], 1, seed)[0] for f in filled],
    }.items():
        found = silent = 0
        for path, bit in bits:
            flip_bit(path, bit)
            found += damaged()
            silent += orbax_alone_is_silent(copy)
            flip_bit(path, bit)
        print(f"{name:<40} found {found} of {len(bits)}  (Orbax alone: {len(bits) - silent})")
    damages = {
        "last byte cut off": lambda p, b: p.write_bytes(b[:-1]),
        "emptied": lambda p, b: p.write_bytes(b""),
        "zeroed": lambda p, b: p.write_bytes(bytes(len(b))),
        "deleted": lambda p, b: p.unlink(),
    }
    for name, damage in damages.items():
        found = 0
        for path in filled:
            content = path.read_bytes()
            damage(path, content)
            found += damaged()
            path.write_bytes(content)
        print(f"{name + ', every file in turn':<40} found {found} of {len(filled)}")
    assert not damaged() and orbax_alone_is_silent(copy), "the copy must be whole again"


def orbax_alone_is_silent(step_dir: Path) -> bool:
    """Whether Orbax restores the step without an error."""
    import jax
    from orbax.checkpoint import v1

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {n: jax.ShapeDtypeStruct(*x, sharding=here) for n, x in SMALL.items()}
    try:
        v1.load(str(step_dir), wanted, checkpointable_name="arrays")
    except Exception:  # noqa: BLE001 - any error counts as detection
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=36.0)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        measure_hash(Path(name))
        measure_saves(Path(name) / "large", options.megabytes)
        small = Path(name) / "small"
        save_small(small)
        count_faults(small, options.flips, options.seed)


def save_small(directory: Path) -> None:
    import jax

    from step_jax.checkpoint import Checkpointer

    state = {n: jax.random.normal(jax.random.key(0), *x) for n, x in SMALL.items()}
    with Checkpointer(directory, on_event=lambda e: None) as saver:
        saver.save(1, state, {"seed": 0})


if __name__ == "__main__":
    main()
