"""What the TPU compiler's static schedule says of a kernel, with no TPU at hand.

Shape suffixes: N bundles (instructions of a core's cycle), U units.

libtpu writes, for every bundle of a compiled kernel, how many slots of each unit it uses. From the
bundles of a visit with a mask, of one without, and of what begins and ends a result follows the
time of whole rows, and from it the share of the chip's peak (``work``). A product takes the matrix
units longer than the bundles that start it: a visit takes the larger of both. Memory is not in it.

``python -m pallas_kernels.tpu.schedule [chip ...]`` prints the table of benchmarks/tpu_kernels.md;
four minutes a chip on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pallas_kernels.tpu import work
from pallas_kernels.tpu.aot import COMPILE, ENVIRONMENT, TOPOLOGIES, temporaries

#: (family of kernels, shape) of the table
CASES = (
    ("attention", {"heads": 64, "tokens": 4096, "width": 256}),
    ("attention", {"heads": 27, "tokens": 4096, "width": 256}),  # an odd group on two cores
    ("grouped_matmul", {"rows": 131072, "width": 4096, "result": 1536, "groups": 128}),
    # widths with few divisors, or of one block
    ("grouped_matmul", {"rows": 65536, "width": 2048, "result": 768, "groups": 64}),
    ("grouped_matmul", {"rows": 65536, "width": 2048, "result": 1408, "groups": 64}),
    ("grouped_matmul", {"rows": 65536, "width": 2048, "result": 1664, "groups": 64}),
    ("grouped_matmul", {"rows": 65536, "width": 2880, "result": 2880, "groups": 32}),
    ("grouped_matmul", {"rows": 32768, "width": 4096, "result": 14336, "groups": 8}),
    ("grouped_matmul", {"rows": 49152, "width": 7168, "result": 5120, "groups": 48}),
    ("cross_entropy", {"tokens": 16384, "width": 7168, "vocabulary": 128_000}),
    ("cross_entropy", {"tokens": 16384, "width": 7168, "vocabulary": 128_815}),
)
_USE = "final_hlo-static-per-bundle-utilization.txt"
_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +([A-Z]{2})?: *>* *\{(.*)")
_EXIT = re.compile(r"(%\w+) = scmp\.ge\.s32\.totalorder %\w+, (\S+) /\* loop exit test")
_BACK = re.compile(r"sbr\.rel \(!(%\w+)\)")
_ALLOCATION = re.compile(r"(#allocation\d+) \[.*space=vmem, size = (0x[0-9a-f]+)")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Of one visit of a kernel that needs no mask.

    matrix, vector, power: shares of the slots of the matrix units, the vector arithmetic and the
      transcendental unit. bundles: executed, loops counted as often as they run. moves: spills and
      fills of registers among them. vmem: bytes of vector memory of the whole kernel. masked:
      bundles of a visit that needs a mask. result: of what begins and ends a result. step: of every
      step of the grid besides.
    """

    matrix: float
    vector: float
    power: float
    bundles: int
    moves: int
    vmem: int
    masked: int
    result: int
    step: int


def regions(bundles: str) -> tuple[np.ndarray, np.ndarray]:
    """(how often each bundle runs in a step of the grid, its region): int (N,) each.

    A region of the outermost loop (the grid) runs or does not, under a condition of its own; region
    0 is before the loop. Loops of unknown length count once.

    Args:
      bundles: the schedule as libtpu writes it: ``LB`` where a loop begins, ``PF`` where a
        conditional region has ended.
      products_N: matrix products of each bundle.
    """
    lines = [m.groups() for m in map(_BUNDLE.match, bundles.splitlines()) if m]
    trips = {p: int(n) if n.isdigit() else 1 for _, w in lines for p, n in _EXIT.findall(w)}
    times_N, region_N, starts = np.ones(len(lines), int), np.zeros(len(lines), int), []
    for i, (mark, words) in enumerate(lines):
        if mark == "LB":
            starts.append(i)
        # a loop ends with a branch on its exit test: what follows the loop is mixed into its tail
        ends = [p for p in _BACK.findall(words) if p in trips]
        region_N[i] = len(starts) == 1 and not ends and (mark is not None or "sbr.rel" in words)
        if ends and starts:
            start = starts.pop()
            times_N[start : i + 1] *= trips[ends[0]] if starts else 1
    return times_N, np.cumsum(region_N)


def read(table: str, bundles: str, allocations: str) -> Schedule:
    """From what libtpu writes of a kernel: slots in use, its schedule, and its allocations.

    Kernels have what needs no mask before what does: the first two regions with matrix products.
    The largest regions before and after them begin and end a result.
    """
    lines = table.splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacity = dict(zip(names, map(int, lines[2].split()), strict=True))
    rows = lines[lines.index("== UTILIZATION:") + 1 :]
    used_NU = np.array([[int(n) for n in row.split()] for row in rows if row.strip()])
    times_N, region_N = regions(bundles)
    length_R = np.bincount(region_N, times_N).astype(int)
    products_R = np.bincount(region_N, used_NU[:, names.index("MATMUL")])
    working = np.nonzero(products_R)[0]
    whole, masked = working[0], working[min(1, working.size - 1)]
    begins, ends = length_R[1:whole], length_R[working[-1] + 1 :]
    result = int(begins.max(initial=0) + ends.max(initial=0))
    count = dict(zip(names, map(int, (times_N * (region_N == whole)) @ used_NU), strict=True))
    total = int(length_R[whole])
    share = {name: count[name] / (total * capacity[name]) for name in names}
    return Schedule(
        matrix=share["MATMUL"],
        vector=share["VALU"],
        power=share["EUP"],
        bundles=total,
        moves=count["VLOAD:FILL"] + count["VSTORE:SPILL"],
        vmem=sum(int(size, 16) for size in dict(_ALLOCATION.findall(allocations)).values()),
        masked=int(length_R[masked]),
        result=result,
        step=int(begins.sum() + ends.sum()) - result,
    )


def measure(chip: str, family: str, shape: dict, **options) -> dict:
    """Compiles in a process of its own; kernel name -> Schedule, and ``temporaries`` in bytes.

    Args:
      chip: a key of ``TOPOLOGIES``.
      family: a key of ``COMPILE``; ``shape`` and ``options`` are that function's arguments.

    Raises:
      RuntimeError: it does not compile; holds the compiler's words.
    """
    request = json.dumps({"chip": chip, "family": family, "shape": shape | options})
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        done = subprocess.run(
            [sys.executable, "-m", "pallas_kernels.tpu.schedule", "--compile", request],
            env=os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": dump},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = {}
        named = re.compile(rf"({family}[a-z_]*?)_*(\.\d+)?-\d+-{_USE}")  # jvp_NAME_.1-70-...
        for path in sorted(Path(folder).iterdir()):
            if name := named.search(path.name):
                kernel = path.name[: -len(_USE)].rsplit("-", 2)[0]
                files = [_USE, "[0-9]-final_bundles.txt", "post-delay-converter.txt"]
                texts = [next(Path(folder).glob(f"{kernel}-*{f}")).read_text() for f in files]
                found[name[1]] = read(*texts)
        return found | {"temporaries": int(done.stdout.split()[-1])}


def row(chip: str, family: str, shape: dict) -> list[str]:
    """Lines of the table."""
    found = measure(chip, family, shape)
    kept = found.pop("temporaries") / 2**20
    size = " x ".join(f"{n:,}" for n in shape.values())
    counted = work.WORK.get(family, lambda chip, **shape: {})(chip, **shape)

    def peak(kernel: str) -> str:
        return f"{counted[kernel].share(chip, found[kernel]):.0%}" if kernel in counted else ""

    return [
        f"| {chip} | {kernel} | {size} | {peak(kernel)} | {s.matrix:.0%} | {s.vector:.0%} "
        f"| {s.power:.0%} "
        f"| {s.bundles:,} | {s.moves:,} | {s.vmem / 2**20:.1f} | {kept:,.1f} |"
        for kernel, s in found.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("chip", nargs="*", choices=[[], *TOPOLOGIES])
    args = parser.parse_args()
    if args.compile:
        request = json.loads(args.compile)
        print(temporaries(COMPILE[request["family"]](request["chip"], **request["shape"])))
        return
    columns = "chip kernel shape peak matrix vector powers bundles moves VMEM_MiB temporaries_MiB"
    print("| " + columns.replace(" ", " | ").replace("_", " ") + " |")
    print("|" + "---|" * len(columns.split()))
    for chip in args.chip or TOPOLOGIES:
        for case in CASES:
            print(*row(chip, *case), sep="\n", flush=True)


if __name__ == "__main__":
    main()
