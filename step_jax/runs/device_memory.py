"""Whether a compiled step fits into a device's memory, asked before anything is put there."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax

from step_jax.core import hardware
from step_jax.core.errors import StepError


class DoesNotFit(StepError):
    """A step needs more memory than a device has.

    Attributes:
      program: the compiled step, None if the compiler itself gave up.
    """

    def __init__(self, message: str, program: jax.stages.Compiled | None = None):
        super().__init__(message)
        self.program = program


def needed(program: jax.stages.Compiled) -> int | None:
    """Bytes that a program's arguments, results and temporaries take on one device.

    Donated arguments count once. None if the backend does not say.
    """
    memory = program.memory_analysis()
    if memory is None:
        return None
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    return memory.argument_size_in_bytes + made + memory.generated_code_size_in_bytes


def available(device: jax.Device) -> float | None:
    """Bytes that programs can use of a device's memory: what the runtime says, else the chip's.

    CPU devices share the machine's memory evenly. None for an accelerator that is not known.
    """
    if device.platform == "cpu":
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return machine / jax.local_device_count("cpu")
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    chip = hardware.detect(device)
    return chip.hbm_bytes if chip else None


def fitting(
    compile_program: Callable[[], jax.stages.Compiled],
    device: Any,
    force: bool = False,
    beside: int = 0,
) -> jax.stages.Compiled:
    """What ``compile_program`` gives.

    TPU compilers refuse a program that is too large; GPUs' do not, and their allocator fails in the
    first step or before it; on a CPU the system ends the process without a word.

    Args:
      device: one of those that the program is for.
      force: do not compare with the device's memory.
      beside: bytes of a device that other arrays take all the while.

    Raises:
      DoesNotFit: the program needs more memory than the device has.
    """
    try:
        program = compile_program()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(str(error)) from error
    need, limit = needed(program), available(device)
    if not force and need is not None and limit is not None and need + beside > limit:
        others = f", of which other arrays take {beside / 1e9:.3g} GB" if beside else ""
        raise DoesNotFit(
            f"a step needs {need / 1e9:.3g} GB of the {limit / 1e9:.3g} GB of a device{others}",
            program,
        )
    return program
