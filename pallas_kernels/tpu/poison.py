"""Fills the vector memory of a TPU with a number, so that what reads unwritten scratch is found.

Shape suffixes: L 128 lanes, R rows of the memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.chips import CHIPS

LANES = 128
STEP = 512  # rows written at a time


def fill_vmem(value_1L, *, chip: str, interpret: bool = False):
    """Leaves ``value_1L``, float32 (1, 128), in all rows that a kernel may use on every core.

    Returns:
      The first rows of what each core holds then, float32 (8 * cores, 128).
    """
    steps = CHIPS[chip].most // (4 * LANES * STEP) - 1  # the rest is for the argument and result
    cores = CHIPS[chip].cores

    def kernel(value_1L, out_8L, memory_RL):
        @pl.loop(0, steps)
        def _(i):
            rows = pl.ds(pl.multiple_of(i * STEP, STEP), STEP)
            memory_RL[rows] = jnp.broadcast_to(value_1L[...], (STEP, LANES))

        out_8L[...] = memory_RL[:8]

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8 * cores, LANES), jnp.float32),
        grid=(cores,),
        in_specs=[pl.BlockSpec((1, LANES), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((8, LANES), lambda i: (i, 0)),
        scratch_shapes=[pltpu.VMEM((steps * STEP, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=CHIPS[chip].most
        ),
        interpret=interpret,
        name="fill_vmem",
    )(value_1L)
