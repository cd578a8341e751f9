"""Speed of the training iterator on one core, beside Grain's own packing of the same tokens.

    python benchmarks/data_pipeline.py
    python benchmarks/data_pipeline.py --tokenise    # preparation: two processes beside one

Prints tokens per CPU second (all threads of the process, pinned to one core) for long documents
(the Python standard library) and short ones (the same tokens cut every 64), and the time from a
finished preparation to the first batch at steps 0, 1e6 and 1e9. CPU seconds and not wall time,
so that a busy machine changes little. The peer does the same work as far as it can: documents in
shuffled order, packed with Grain's `ConcatThenSplitIterDataset` (split) or
`BestFitPackIterDataset` (fit), batched, with segment ids and positions.

``--tokenise`` prepares the same files (copies of the standard library) three times, each from
nothing: by one process on one core; by two worker processes on two; and by two processes that have
nothing to do with each other, each all of it, which is what the two cores can do. It asserts that
the caches are the same bytes, and prints wall and CPU seconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from step_jax.data import DataConfig, TextDataset, TokenCache, cache, prepare, train_tokenizer
from step_jax.data.cache import Prepared
from step_jax.data.corpus import Documents
from step_jax.data.parts import FILES

PARTS = 12  # of the text that is prepared; a larger one would have as many of the usual size


def with_documents(prepared: Prepared, length: int | None) -> Prepared:
    """The same tokens as documents of ``length`` tokens (None: as they are)."""
    if length is None:
        return prepared
    (cache,) = prepared.caches
    ends = np.append(np.arange(0, len(cache.train.tokens), length), len(cache.train.tokens))
    train = Documents(cache.train.tokens, ends.astype(np.int64))
    changed = {**cache.__dict__, "train": train, "digest": f"{cache.digest}/{length}"}
    return Prepared(prepared.tokenizer, (TokenCache(**changed),))


def peer_iterator(cache: TokenCache, packing: str, rows: int, length: int) -> Iterator[dict]:
    """Grain's packing over the same documents; inputs and targets as two features."""
    import grain

    tokens, offsets = cache.train

    def document(i: int) -> dict[str, np.ndarray]:
        text = tokens[offsets[i] : offsets[i + 1]].astype(np.int32)
        return {"inputs": text, "targets": text}

    documents = grain.MapDataset.range(len(offsets) - 1).shuffle(seed=0).repeat().map(document)
    stream = documents.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64))
    shape = {"inputs": length, "targets": length}
    if packing == "split":
        packed = grain.experimental.ConcatThenSplitIterDataset(stream, length_struct=shape)
    else:
        packed = grain.experimental.BestFitPackIterDataset(
            stream, length_struct=shape, num_packing_bins=64
        )
    return iter(packed.batch(rows))


def tokens_per_cpu_second(batches: Iterator[dict], seconds: float, name: str) -> float:
    """Tokens that carry a target, per second of the process's CPU time."""
    next(batches)
    tokens, start = 0.0, time.process_time()
    while time.process_time() - start < seconds:
        for _ in range(8):
            batch = next(batches)
            tokens += (batch[name] > 0).sum()
    return tokens / (time.process_time() - start)


def restore_seconds(prepared: Prepared, config: DataConfig, rows: int, step: int) -> float:
    """CPU seconds from prepared corpora to the first batch of ``step``."""
    start = time.process_time()
    iterator = TextDataset(config, prepared, batch_size=rows).iterate(step)
    next(iterator)
    elapsed = time.process_time() - start
    iterator.close()
    return elapsed


def copies_of_the_standard_library(folder: Path, megabytes: int) -> None:
    """Writes Python files of so many megabytes, all different by their first line."""
    left, copy = megabytes * 10**6, 0
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    while left > 0:
        for source in sources:
            text = f"# copy {copy}\n".encode() + source.read_bytes()
            (folder / f"{copy}-{source.name}").write_bytes(text)
            left -= len(text)
            if left <= 0:
                break
        copy += 1


class Measured(NamedTuple):
    """Of one preparation: seconds, CPU seconds of all its processes, the corpus that it made."""

    wall: float
    cpu: float
    corpus: str


def measured(config: DataConfig, workers: int, on: set[int], part_bytes: int, results) -> None:
    """In a process of its own."""
    os.sched_setaffinity(0, on)
    cache.PART_BYTES = part_bytes
    start = time.perf_counter()
    (made,) = prepare(config, workers=workers).caches
    wall = time.perf_counter() - start
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(u.ru_utime + u.ru_stime for u in used)
    results.put(Measured(wall, cpu, str(made.directory)))


def preparations(root: Path, part_bytes: int, *runs: tuple[int, set[int]]) -> list[Measured]:
    """Preparations at once, each (workers, cores), each from nothing."""
    processes = multiprocessing.get_context("spawn")
    results, started = processes.Queue(), []
    for workers, on in runs:
        config = DataConfig(
            path=str(root / "texts"),
            tokenizer=str(root / "tokenizer"),
            cache_dir=tempfile.mkdtemp(dir=root),
        )
        arguments = (config, workers, on, part_bytes, results)
        started.append(processes.Process(target=measured, args=arguments))
        started[-1].start()
    found = [results.get() for _ in started]
    for process in started:
        process.join()
    return found


def tokenise(megabytes: int, rounds: int) -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    both = {first, second}
    ways = {
        "one process": [(1, {first})],
        "two processes": [(2, both)],
        "two unrelated ones, all of it": [(1, {first}), (1, {second})],
    }
    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "texts").mkdir()
        copies_of_the_standard_library(root / "texts", megabytes)
        train_tokenizer([sysconfig.get_path("stdlib") + "/asyncio"], root / "tokenizer", 3000)
        contents = set()
        for _ in range(rounds):  # in turns: the machine may be busier at one time than at another
            for way, runs in ways.items():
                found = preparations(root, megabytes * 10**6 // PARTS, *runs)
                seconds = max(m.wall for m in found), sum(m.cpu for m in found)
                best[way] = min(best.get(way, seconds), seconds)
                print(f"{way}: {seconds[0]:.1f} s, {seconds[1]:.1f} CPU-s", flush=True)
                contents |= {tuple((Path(m.corpus) / f).read_bytes() for f in FILES) for m in found}
        assert len(contents) == 1, "the caches are not the same bytes"
    print(f"{megabytes} MB of text in {PARTS} parts, best of {rounds}; all caches the same bytes")
    print(f"{'':<32}{'wall s':>8}{'CPU s':>8}{'MB/s':>8}")
    for way, (wall, cpu) in best.items():
        print(f"{way:<32}{wall:>8.1f}{cpu:>8.1f}{len(ways[way]) * megabytes / wall:>8.2f}")
    (wall_1, cpu_1), (wall_2, cpu_2), (wall_both, _) = best.values()
    ratio, limit = wall_1 / wall_2, 2 * wall_1 / wall_both
    print(
        f"two processes are {ratio:.2f} times one; these cores do {limit:.2f} times the work of "
        f"one, so {ratio / limit:.0%} of what there is; CPU seconds {cpu_2 / cpu_1:.2f} times"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", default="python:stdlib")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU seconds per figure")
    parser.add_argument("--cache-dir")
    parser.add_argument("--tokenise", action="store_true", help="measure preparation instead")
    parser.add_argument("--megabytes", type=int, default=48, help="of text, with --tokenise")
    parser.add_argument("--rounds", type=int, default=3, help="with --tokenise")
    args = parser.parse_args()
    if args.tokenise:
        return tokenise(args.megabytes, args.rounds)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    def config_for(packing: str) -> DataConfig:
        return DataConfig(
            path=args.path, sequence_length=args.length, packing=packing, cache_dir=args.cache_dir
        )

    prepared = prepare(config_for("split"), print)
    print(f"batches of {args.rows} x {args.length}; million tokens per CPU second, one core")
    print(f"{'documents':<12}{'packing':<10}{'step_jax':>10}{'grain':>10}{'ratio':>8}")
    for name, length in (("files", None), ("64 tokens", 64)):
        shaped = with_documents(prepared, length)
        for packing in ("split", "fit"):
            dataset = TextDataset(config_for(packing), shaped, batch_size=args.rows)
            iterator = dataset.iterate()
            ours = tokens_per_cpu_second(iterator, args.seconds, "segments") / 1e6
            iterator.close()
            if packing == "fit" and length is None:
                peer = "-"  # Grain's packers refuse documents longer than a row
                ratio = "-"
            else:
                other = peer_iterator(shaped.caches[0], packing, args.rows, args.length)
                value = tokens_per_cpu_second(other, args.seconds, "targets_segment_ids") / 1e6
                peer, ratio = f"{value:.2f}", f"{ours / value:.1f}x"
            print(f"{name:<12}{packing:<10}{ours:>10.2f}{peer:>10}{ratio:>8}")
    for step in (0, 10**6, 10**9):
        seconds = restore_seconds(prepared, config_for("split"), args.rows, step)
        print(f"first batch at step {step:<11,} {seconds * 1e3:.1f} ms CPU")


if __name__ == "__main__":
    main()
