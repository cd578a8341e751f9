"""What the kernels for TPUs have to do, and what share of a chip's peak their schedules make of it.

Shape suffixes: none; there are no arrays here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pallas_kernels.tpu import block_sizes
from pallas_kernels.tpu.chips import CHIPS
from pallas_kernels.tpu.grouped_matmul import blocks_of_matrices, blocks_of_rows
from pallas_kernels.tpu.visits import Pattern, candidates


@dataclass(frozen=True)
class Work:
    """Of one call of a kernel, on all cores of a device.

    useful: multiply-adds that somebody asked for. visit: of one visit, as the matrix units do them:
    in whole units, masked or not. whole, masked: visits without and with a mask. results: blocks
    that are begun and ended. pieces: into which the grid is cut for the cores.
    """

    useful: float
    visit: float
    whole: float
    masked: float
    results: float
    pieces: int

    def share(self, chip: str, s: Any) -> float:
        """Of the peak, by a ``schedule.Schedule``."""
        products, cores = CHIPS[chip].products, CHIPS[chip].cores
        least = self.visit / products
        cycles = (
            self.whole * max(s.bundles, least)
            + self.masked * max(s.masked, least)
            + (self.whole + self.masked) * s.step
            + self.results * s.result
        )
        busy = self.pieces / (math.ceil(self.pieces / cores) * cores)
        return self.useful / products / cycles * busy


def attention(chip: str, heads: int, tokens: int, width: int) -> dict[str, Work]:
    """Of one causal row of one document and one key head; see ``aot.compile_attention``."""
    computed = block_sizes.computed_heads(chip, 1, heads)
    shape = block_sizes.Shape(computed, tokens, tokens, width, width, 2)
    side, work = CHIPS[chip].side, {}
    parts = (1, block_sizes.parts(chip, computed))
    for name, s, products, part in zip(
        ("attention_forward", "attention_backward"),
        block_sizes.fit(chip, shape),
        (2, 5),
        parts,
        strict=True,
    ):
        whole = block_sizes.padded(shape, s)
        pattern = Pattern(in_order=True)
        q_C, kv_C = candidates(pattern, whole.queries, whole.keys, s.q_block, s.kv_block)
        masked = int(((kv_C + 1) * s.kv_block > q_C * s.q_block + 1).sum())
        groups = computed // s.heads
        in_units = math.ceil(width / side) * side
        work[name] = Work(
            useful=products * width * heads * tokens * (tokens + 1) / 2,
            visit=products * in_units * s.heads * s.q_block * s.kv_block,
            whole=groups * (q_C.size - masked),
            masked=groups * masked,
            results=groups * whole.queries // s.q_block,
            # forwards, blocks of heads are parallel; backwards they add to one result
            pieces=groups if products == 2 else part,
        )
    return work


def grouped_matmul(chip: str, rows: int, width: int, result: int, groups: int) -> dict[str, Work]:
    """Of groups of whole blocks of rows; see ``aot.compile_grouped_matmul``."""
    useful = float(rows * width * result)
    work = {}
    for name, (D, F) in {
        "grouped_matmul": (width, result),
        "grouped_matmul_transposed": (result, width),
    }.items():
        R, _, f, _ = blocks_of_rows(chip, rows, D, F, 2)
        columns = math.ceil(F / f)
        visits = columns * rows / R
        work[name] = Work(useful, R * _units(chip, D) * _units(chip, f), visits, 0, 0, columns)
    R, d, f, _ = blocks_of_matrices(chip, rows, width, result, 2)
    blocks = math.ceil(width / d), math.ceil(result / f)
    work["grouped_matmul_matrices"] = Work(
        useful,
        visit=R * _units(chip, d) * _units(chip, f),
        whole=math.prod(blocks) * rows / R,
        masked=0,
        results=groups * math.prod(blocks),
        pieces=blocks[0],
    )
    return work


def _units(chip: str, width: int) -> int:
    side = CHIPS[chip].side
    return math.ceil(width / side) * side


#: family of kernels -> what it has to do: kernel -> Work. Cross-entropy is not counted yet.
WORK = {"attention": attention, "grouped_matmul": grouped_matmul}
