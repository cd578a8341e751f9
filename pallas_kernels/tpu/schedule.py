"""What the TPU compiler's static schedule says of a kernel, with no TPU at hand.

Shape suffixes: N bundles (instructions of a core's cycle), U units.

libtpu writes, for every bundle of a compiled kernel, how many slots of each unit it uses. The share
of matrix slots in the bundles that do the work is an upper bound of the share of the chip's peak:
memory, the steps' own cost and blocks on a mask's edge are not in it.

``python -m pallas_kernels.tpu.schedule v6e 64 4096 256`` prints it for the attention kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

#: chip -> (smallest topology to compile for, its ``device_kind``)
TOPOLOGIES = {
    "v5e": ("v5e:2x2", "TPU v5 lite"),
    "v5p": ("v5p:2x2x1", "TPU v5"),
    "v6e": ("v6e:2x2", "TPU v6 lite"),
    "tpu7x": ("tpu7x:2x2x1", "TPU7x"),
}
#: what libtpu wants to know where there is no TPU
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_TABLE = "final_hlo-static-per-bundle-utilization.txt"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Of one kernel's unmasked visit.

    matrix, vector, power: shares of the slots of the matrix units, the vector arithmetic and the
      transcendental unit. bundles: their number. moves: spills and fills of registers. total:
      bundles of the whole kernel.
    """

    matrix: float
    vector: float
    power: float
    bundles: int
    moves: int
    total: int


def read(text: str) -> Schedule:
    """A utilisation table as libtpu writes it.

    A kernel has its work twice, without and then with a mask, each with the same products; the
    first half of the matrix slots is the unmasked one.
    """
    lines = text.splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacity = dict(zip(names, map(int, lines[2].split()), strict=True))
    rows = lines[lines.index("== UTILIZATION:") + 1 :]
    used_NU = np.array([[int(n) for n in row.split()] for row in rows if row.strip()])
    products_N = used_NU[:, names.index("MATMUL")].cumsum()
    start = int(np.argmax(products_N > 0))
    stop = int(np.argmax(products_N >= products_N[-1] / 2)) + 1
    total_U = used_NU[start:stop].sum(axis=0)
    count = dict(zip(names, map(int, total_U), strict=True))
    bundles = stop - start
    share = {name: count[name] / (bundles * capacity[name]) for name in names}
    return Schedule(
        matrix=share["MATMUL"],
        vector=share["VALU"],
        power=share["EUP"],
        bundles=bundles,
        moves=count["VLOAD:FILL"] + count["VSTORE:SPILL"],
        total=len(used_NU),
    )


def measure(chip: str, shape: dict, sizes: dict | None = None, backward: bool = True) -> dict:
    """Compiles attention in a process of its own; kernel name -> Schedule, and ``temporaries``.

    Args:
      chip: a key of ``TOPOLOGIES``.
      shape: ``heads``, ``tokens``, ``width``.
      sizes: entries of ``block_sizes.json`` to use instead of the table's.

    Raises:
      RuntimeError: it does not compile; holds the compiler's words.
    """
    request = json.dumps({"chip": chip, "sizes": sizes, "backward": backward} | shape)
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
        for kernel in ("attention_forward", "attention_backward"):
            for path in sorted(Path(folder).glob(f"*{kernel}*{_TABLE}"))[:1]:
                found[kernel] = read(path.read_text())
        return found | {"temporaries": float(done.stdout.split()[-1])}


def compile_attention(chip, heads, tokens, width, sizes=None, backward=True, packed=False):
    """The compiled (q, k, v, do, positions, segments) -> output and gradients, in bfloat16.

    One row of ``heads`` query heads on one key head; causal and in order.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels.tpu import block_sizes
    from pallas_kernels.tpu.attention import attention
    from pallas_kernels.tpu.visits import Pattern

    name, kind = TOPOLOGIES[chip]
    device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
    if sizes is not None:
        block_sizes.table()[kind].update(sizes)

    def step(q, k, v, do, positions, segments):
        def forward(q, k, v):
            documents = (segments, segments) if packed else (None, None)
            return attention(
                q,
                k,
                v,
                positions,
                positions,
                *documents,
                pattern=Pattern(in_order=True),
                scale=width**-0.5,
                chip=kind,
            )[0]

        if not backward:
            return forward(q, k, v)
        o, back = jax.vjp(forward, q, k, v)
        return o, back(do)

    place = SingleDeviceSharding(device)
    q = jax.ShapeDtypeStruct((1, 1, heads, tokens, width), jnp.bfloat16, sharding=place)
    k = jax.ShapeDtypeStruct((1, 1, tokens, width), jnp.bfloat16, sharding=place)
    positions = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=place)
    return jax.jit(step).lower(q, k, k, q, positions, positions).compile()


def temporaries(compiled, heads: int, tokens: int, width: int) -> float:
    """Bytes of the program's temporaries, in units of the queries'."""
    return compiled.memory_analysis().temp_size_in_bytes / (2 * heads * tokens * width)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("chip", nargs="?", choices=list(TOPOLOGIES))
    parser.add_argument("heads", nargs="?", type=int)
    parser.add_argument("tokens", nargs="?", type=int)
    parser.add_argument("width", nargs="?", type=int)
    args = parser.parse_args()
    if args.compile:
        request = json.loads(args.compile)
        shape = {key: request[key] for key in ("heads", "tokens", "width")}
        print(temporaries(compile_attention(**request), **shape))
        return
    shape = {"heads": args.heads, "tokens": args.tokens, "width": args.width}
    found = measure(args.chip, shape)
    print(f"{args.chip}: temporaries {found.pop('temporaries'):.2f} x the queries")
    for kernel, s in found.items():
        print(
            f"  {kernel}: matrix slots {s.matrix:.0%}, vector {s.vector:.0%}, powers {s.power:.0%}"
            f" of {s.bundles:,} bundles; {s.moves:,} register spills and fills"
        )


if __name__ == "__main__":
    main()
