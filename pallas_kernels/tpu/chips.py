"""The chips that the kernels for TPUs are made for, and how much of its memories a kernel may use.

Shape suffixes: none; there are no arrays here.

Every kernel chooses its blocks by an estimate of the vector memory (VMEM) that they need. What the
compiler adds, spilled registers above all, is known only after compiling: so blocks are chosen for
a *budget*, and the compiler is given more than the estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Chip:
    """One JAX device.

    vmem: bytes of vector memory of a core. cores: tensor cores, on which a grid's parallel
    dimensions are shared out. units: matrix units of a core; side: of one, in numbers. (JAX counts
    two units from v6e on: at the clocks there are, their peak and their schedules take four.)
    """

    vmem: int
    units: int
    side: int
    cores: int = 1

    @property
    def products(self) -> int:
        """Multiply-adds of 16 bits that a core can do in a cycle."""
        return self.units * self.side**2

    @property
    def most(self) -> int:
        """Bytes that a kernel may use in all, what the compiler adds counted."""
        return self.vmem * 15 // 16

    @property
    def budget(self) -> int:
        """Bytes that a kernel's blocks may need, what the compiler adds not counted."""
        return self.vmem * 3 // 4

    def limit(self, need: int) -> int:
        """Bytes that the compiler may use for blocks that need some."""
        return min(max(need * 5 // 4, ANYWHERE), self.most)


#: Bytes of vector memory that a kernel may use on any chip without asking which.
ANYWHERE = 16 * MIB
#: Bytes that a kernel's tables may take of the scalar memory (SMEM), which is 1 MiB in every chip.
TABLES = MIB * 3 // 4
#: By the name that people use.
CHIPS = {
    "v5e": Chip(vmem=128 * MIB, units=4, side=128),
    "v5p": Chip(vmem=64 * MIB, units=4, side=128, cores=2),
    "v6e": Chip(vmem=128 * MIB, units=4, side=256),
    "tpu7x": Chip(vmem=64 * MIB, units=4, side=256),
}


def unsupported(chip: str) -> str | None:
    """Why no kernel can be compiled for a chip of this name, or None."""
    if chip in CHIPS:
        return None
    return f"the chip {chip!r} is none of {', '.join(CHIPS)}"
