"""Which layer an instruction of a compiled program belongs to, and what kind of work it is.

Both are read from the files that it was traced in, which the compiler keeps for every instruction.
"""

from __future__ import annotations

import functools
import re

from step_jax.planning.hlo import Instruction, Module

LAYERS = ("attention", "mlp", "experts", "head", "optimizer", "rest")

#: Kinds of work that operations of the matrix units measure, and bytes of main memory.
PRODUCTS = ("attention", "dense", "experts")
BYTES = ("elementwise", "optimizer")
KINDS = (*PRODUCTS, *BYTES)

#: Layer or kind -> what a file's path has in it; the innermost file with one of them decides.
_LAYER = (
    ("attention", r"/layers/(attention/|cross_attention|positions)|/ops/(attention|rope)"),
    ("experts", r"/layers/(moe|expert_parallel|routing|capacity)|/ops/grouped_matmul"),
    ("mlp", r"/layers/mlp"),
    ("rest", r"/models/trunk|/layers/(norm|block)|/ops/norm"),
    ("head", r"/ops/(cross_entropy|embedding)|/training/losses/"),
    ("optimizer", r"/optimizers/|/optax/"),
)
_KIND = (
    ("attention", r"/ops/attention|pallas_kernels/\w+/\w*attention"),
    ("experts", r"/ops/grouped_matmul|pallas_kernels/\w+/\w*grouped"),
)


@functools.cache
def _named(files: tuple[str, ...], names: tuple[tuple[str, str], ...], otherwise: str) -> str:
    for file in files:
        for name, pattern in names:
            if re.search(pattern, file):
                return name
    return otherwise


def of_product(module: Module, i: Instruction) -> tuple[str, str]:
    """(layer, kind) of a product or a kernel."""
    files = module.files(i)
    return _named(files, _LAYER, "rest"), _named(files, _KIND, "dense")


def of_bytes(module: Module, i: Instruction) -> tuple[str, str]:
    """(layer, kind) of an instruction that only moves bytes."""
    files = module.files(i)
    if not files and i.opcode == "fusion":
        inner = module.computations[i.calls("calls")[0]].instructions.values()
        files = next((f for f in map(module.files, inner) if f), ())
    layer = _named(files, _LAYER, "rest")
    return layer, "optimizer" if layer == "optimizer" else "elementwise"
