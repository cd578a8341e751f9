"""Compiles every Hopper kernel for sm_90a on a machine without a GPU and prints what ptxas says.

    python benchmarks/gpu_compile.py                 # all kernels
    python benchmarks/gpu_compile.py attention       # those whose section or name has this word

The environment needs neither driver nor GPU: ``pip install '.[hopper]'``, or what
``make test-hopper`` makes in ``.venv-hopper``.

Every kernel must have no spilled bytes, no wgmma that ptxas makes wait for the one before (warnings
C7510 to C7519) and at most 227 KiB of shared memory; the exit status is 1 otherwise. ``registers``
is what a thread is born with: the kernels move registers between warpgroups (setmaxnreg), and the
spills are counted with what they have after that.

To add kernels, write a function like :func:`attention` and list it in ``SECTIONS``.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

SHARED_MEMORY_LIMIT = 227 * 1024  # of a block on Hopper
TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A function to compile: ``shapes`` are (shape, dtype name) of its arguments."""

    name: str
    function: Callable
    shapes: tuple[tuple[tuple[int, ...], str], ...]


def attention() -> Iterator[Case]:
    """Forward, dq and dk with dv of every head width, causal and with a window or documents."""
    from pallas_kernels.gpu import attention_backward as backward
    from pallas_kernels.gpu.attention import WIDTHS, head_groups
    from pallas_kernels.gpu.attention_forward import forward
    from pallas_kernels.gpu.attention_tiles import ROWS, Mask

    B, T, N = 1, 8192, 64
    groups = head_groups(N, B * T // ROWS)
    masks = {"causal": Mask(True), "bounded": Mask(True, bounded=True), "full": Mask(False)}
    for H in WIDTHS:
        for label, mask in masks.items():
            wide, narrow = ((B, T, N, H), "bfloat16"), ((B, T, H), "bfloat16")
            row = ((B, N, T), "float32")
            bound = (((B, T), "int32"),) if mask.bounded else ()
            static = {"scale": H**-0.5, "mask": mask, "interpret": None}
            none = () if mask.bounded else (None,)

            def case(name, kernel, *shapes, none=none, bound=bound, **static):
                def call(*arguments):
                    return kernel(*arguments, *none, **static)

                return Case(name, call, (*shapes, *bound))

            tail = f"d{H} {label}"
            gradient = (wide, narrow, narrow, wide, row, row)
            yield case(f"forward {tail}", forward, wide, narrow, narrow, **static)
            yield case(f"dq {tail}", backward.dq, *gradient, **static)
            yield case(f"dk_dv {tail}", backward.dk_dv, *gradient, groups=groups, **static)


def grouped_matmul() -> Iterator[Case]:
    """Rows by matrices, by transposed matrices, and the gradient of the matrices.

    The widths reach tiles of 256 and 128 columns, clusters of two blocks and of one.
    """
    from pallas_kernels.gpu import grouped_matmul as kernels

    M, E = 16384, 16
    for D, F in ((7168, 5120), (4096, 1536), (768, 1280), (384, 128)):
        rows, results = ((M, D), "bfloat16"), ((M, F), "bfloat16")
        matrices, sizes = ((E, D, F), "bfloat16"), ((E,), "int32")
        transposed = functools.partial(kernels.rows_by_matrices, transposed=True)
        tail = f"{D}x{F}"
        yield Case(f"rows {tail}", kernels.rows_by_matrices, (rows, matrices, sizes))
        yield Case(f"rows transposed {tail}", transposed, (results, matrices, sizes))
        yield Case(f"matrices {tail}", kernels.matrices_of_rows, (rows, results, sizes))


def cross_entropy() -> Iterator[Case]:
    """What the forward leaves of tiles of logits, and the gradient of the logits."""
    from pallas_kernels.gpu import cross_entropy as kernels

    N = 16384
    for D, V in ((7168, 129280), (4096, 131072), (1024, 384)):
        x, w = ((N, D), "bfloat16"), ((D, V), "bfloat16")
        target, column = ((N,), "int32"), ((N,), "float32")
        tail = f"{D}x{V}"
        yield Case(f"log likelihood {tail}", kernels.log_likelihood, (x, w, target))
        columns = (target, column, column, column)
        yield Case(f"gradients {tail}", kernels.gradients, (x, w, *columns))


def decode() -> Iterator[Case]:
    """Decoding over a stack of caches: what is cached, bfloat16 and float8, of MFA and GQA."""
    from pallas_kernels.decode_call import DecodeCall
    from pallas_kernels.gpu.decode import decode as attend

    layers, B, S = 3, 16, 32768
    for label, N, K, H in (("mfa d256", 64, 1, 256), ("gqa d128", 64, 8, 128)):
        for dtype in ("bfloat16", "float8_e4m3fn"):
            for kind, page in (("", None), ("reuse", None), ("rotated", None), ("paged", 16)):
                values, rotates = kind != "reuse", kind in ("reuse", "rotated")
                shape = (layers, B * S // page, page, K, H) if page else (layers, B, S, K, H)
                shapes = [
                    ((B, 1, N, H), "bfloat16"),
                    ((B, 1), "int32"),
                    ((B,), "int32"),
                    ((), "int32"),
                    ((B, S // page), "int32") if page else ((0,), "int32"),
                    ((H // 2,), "float32"),
                    *[(shape, dtype)] * (2 if values else 1),
                ]

                def call(
                    q, positions, lengths, layer, table, frequency, k, v=None,
                    page=page, rotates=rotates,
                ):  # fmt: skip
                    call = DecodeCall(
                        q, k, v, positions, lengths, scale=1.0, layer=layer, window=1024,
                        frequency_F=frequency if rotates else None,
                        page_table_BM=table if page else None,
                    )  # fmt: skip
                    return attend(call, device=hopper())

                name = "bf16" if dtype == "bfloat16" else "fp8"
                yield Case(f"decode {label} {name} {kind}".strip(), call, tuple(shapes))


SECTIONS: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention,
    "grouped_matmul": grouped_matmul,
    "cross_entropy": cross_entropy,
    "decode": decode,
}


@functools.cache
def hopper():
    """A device to compile for, which is not there."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    return topology.devices[0]


@functools.cache
def ptxas() -> str:
    """Path of ptxas in the ``nvidia-cuda-nvcc`` wheel.

    Raises:
      FileNotFoundError: the wheel is not installed.
    """
    for folder in sys.path:
        for found in sorted(Path(folder or ".").glob("nvidia/*/bin/ptxas")):
            return str(found)
    raise FileNotFoundError("no ptxas: pip install nvidia-cuda-nvcc (see the top of this file)")


def compile_case(case: Case) -> list[dict]:
    """Compiles and returns one row for each Mosaic kernel in it."""
    import jax

    sharding = jax.sharding.SingleDeviceSharding(hopper())
    arguments = [jax.ShapeDtypeStruct(s, d, sharding=sharding) for s, d in case.shapes]
    folder = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    before = set(folder.iterdir())
    jax.jit(case.function).lower(*arguments).compile()
    new = set(folder.iterdir()) - before
    ptx, modules = numbered(new, ".ptx"), numbered(new, ".before_layout_inference.txt")
    if not ptx:
        raise RuntimeError("no PTX was dumped: not a Mosaic GPU kernel, or compiled before")
    # The two kinds of files are counted apart, and a kernel that was compiled before in this
    # process has a module and no PTX. So they are paired in order, by the kernel's name.
    rows = []
    for name in ptx:
        if len(ptx[name]) != len(modules[name]):
            raise RuntimeError(f"{len(ptx[name])} of {len(modules[name])} {name} were compiled")
        rows += [assemble(*pair) for pair in zip(ptx[name], modules[name], strict=True)]
    return rows


def numbered(paths: set[Path], suffix: str) -> dict[str, list[Path]]:
    """The files ``<kernel>_<number><suffix>`` of each kernel, in the order of the numbers."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in paths:
        if path.name.endswith(suffix):
            name, number = path.name.removesuffix(suffix).rsplit("_", 1)
            found.setdefault(name, []).append((int(number), path))
    return {name: [path for _, path in sorted(found[name])] for name in sorted(found)}


def assemble(ptx: Path, mlir: Path) -> dict:
    """What ``ptxas -v`` reports of one kernel, and the shared memory that its module asks for."""
    command = [ptxas(), "-arch=sm_90a", "-v", "-o", os.devnull, str(ptx)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = done.stdout + done.stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return {
        "kernel": ptx.stem,
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spill_stores": int(spills[1]),
        "spill_loads": int(spills[2]),
        "serialised": len(re.findall(r"\(C751\d\)", report)),
        "shared_memory": int(
            re.search(r"dynamic_shared_memory_size %c(\d+)_i32", mlir.read_text())[1]
        ),
    }


def faults(row: dict) -> list[str]:
    """The rules that a kernel breaks."""
    found = []
    if row["spill_stores"] or row["spill_loads"]:
        found.append("spills")
    if row["serialised"]:
        found.append("serialised wgmma")
    if row["shared_memory"] > SHARED_MEMORY_LIMIT:
        found.append("shared memory")
    return found


def main(words: list[str]) -> int:
    """Prints the table; returns the exit status."""
    dump = tempfile.TemporaryDirectory()
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_TO": dump.name,
        "PATH": f"{os.environ['PATH']}:{Path(ptxas()).parent}",
    }
    failed = 0
    print(f"{'kernel':34} registers  spilled  serialised  shared memory")
    for section, cases in SECTIONS.items():
        for case in cases():
            if words and not any(word in f"{section} {case.name}" for word in words):
                continue
            try:
                rows = compile_case(case)
            except Exception:
                failed += 1
                print(f"{case.name}: does not compile")
                traceback.print_exc()
                continue
            for row in rows:
                failed += bool(faults(row))
                print(
                    f"{case.name:34} {row['registers']:9} {row['spill_stores']:4}/"
                    f"{row['spill_loads']:<4} {row['serialised']:9} {row['shared_memory']:14}"
                    f"  {', '.join(faults(row))}",
                    flush=True,
                )
    print(f"{failed} kernels break a rule or do not compile")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
