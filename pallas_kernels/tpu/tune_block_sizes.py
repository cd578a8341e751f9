"""Regenerates ``block_sizes.json`` by compiling for every chip; needs libtpu, but no TPU.

Shape suffixes: none; there are no arrays here.

``python -m pallas_kernels.tpu.tune_block_sizes [chip ...]``: twelve candidates a chip, a minute
each on two cores.

A candidate's score is its share of the chip's peak for a causal row at the tokens and width of
``SHAPE`` (``work``): larger blocks waste more on the diagonal. It ranks without a device and leaves
out memory, so only times on a device can confirm a choice. What does not compile, or does not fit
by ``block_sizes.check``, is passed over.
"""

from __future__ import annotations

import itertools
import json
import sys

from pallas_kernels.tpu import block_sizes, work
from pallas_kernels.tpu.aot import TOPOLOGIES
from pallas_kernels.tpu.chips import CHIPS, MIB
from pallas_kernels.tpu.schedule import measure

SHAPE = {"heads": 64, "tokens": 8192, "width": 256}
CHUNK = {64: 4096, 128: 8192}  # MiB of VMEM -> keys whose gradients stay in it
FORWARD = [
    {"rows": rows, "q_block": q, "kv_block": kv, "kv_inner": inner}
    for rows, q, kv, inner in itertools.product((1024, 2048), (512, 1024), (1024,), (512, 1024))
]
BACKWARD = [{"rows": 1024, "q_block": q, "kv_block": kv} for q in (512, 1024) for kv in (512, 1024)]


def best(chip: str, direction: str, options: list[dict], other: dict) -> dict:
    """The option with the best score; ``other`` holds the other direction's entries.

    Raises:
      RuntimeError: none compiles.
    """
    scored = []
    for entry in options:
        try:
            sizes = other | {direction: entry}
            backward = direction == "backward"
            found = measure(chip, "attention", SHAPE, sizes=sizes, backward=backward)
        except RuntimeError as error:
            print(f"{chip} {direction} {entry}: {str(error).strip().splitlines()[-1][:100]}")
            continue
        block_sizes.table()[chip] = sizes
        kernel = f"attention_{direction}"
        score = work.attention(chip, **SHAPE)[kernel].share(chip, found[kernel])
        print(f"{chip} {direction} {entry}: {score:.0%} of peak")
        scored.append((score, entry))
    if not scored:
        raise RuntimeError(f"{chip}: none of the {direction} block sizes compiles")
    return max(scored, key=lambda pair: pair[0])[1]


def main():
    table = dict(block_sizes.table())
    for chip in sys.argv[1:] or TOPOLOGIES:
        chunk = CHUNK[CHIPS[chip].vmem // MIB]
        backward = [entry | {"chunk": chunk} for entry in BACKWARD]
        forward = best(chip, "forward", FORWARD, {"backward": backward[0]})
        table[chip] = {
            "forward": forward,
            "backward": best(chip, "backward", backward, {"forward": forward}),
        }
        block_sizes.TABLE.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
