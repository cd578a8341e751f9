"""Running a stack of equal layers: scanned or unrolled, rematerialised, with FSDP undone per layer.

Shape suffixes: B batch, T tokens, D model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from step_jax.core import spec as specs_lib
from step_jax.core.fsdp import gathered
from step_jax.core.sharding import GATHERED_AXES
from step_jax.core.spec import ParamSpec
from step_jax.models import pipeline
from step_jax.models.context import Context

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def run_layers(
    turn: Callable, x_BTD, inputs: Any, repeat: int, ctx: Context, *, rows=None, pipelined=True
):
    """Calls ``turn`` once per layer, as ``ctx.execution`` and the mesh say.

    Args:
      turn: (x_BTD, inputs of one layer, ctx, rows) -> (x_BTD, outputs of the layer or None).
        ``ctx`` and ``rows`` are those of the tokens it is given: some of the batch in a pipeline.
      inputs: a tree of arrays with a leading axis of ``repeat`` layers.
      rows: a tree of arrays (B, ...), what the layers read of each row besides ``ctx``.
      pipelined: use the mesh's ``pipeline`` axis if it has one and the layers divide into its
        stages. False if inputs or outputs are of single rows (caches, routing decisions): then the
        axis is one more of data parallelism, and the layers' parameters are gathered along it.

    Returns:
      (x_BTD, outputs stacked along a leading axis or None). Those of a pipeline are sums over its
      microbatches.
    """
    if pipelined and pipeline.is_pipelined(repeat, ctx.sharding):
        return pipeline.run(functools.partial(_run, turn), x_BTD, inputs, repeat, ctx, rows)
    return _run(turn, x_BTD, inputs, repeat, ctx, rows)


def _run(turn: Callable, x_BTD, inputs: Any, repeat: int, ctx: Context, rows: Any):
    def layer(x_BTD, inputs):
        return turn(x_BTD, inputs, ctx, rows)

    scan = ctx.execution.scan and repeat > 1
    if ctx.execution.remat != "none":
        layer = jax.checkpoint(
            layer, policy=REMAT_POLICIES[ctx.execution.remat], prevent_cse=not scan
        )
    if scan:
        return jax.lax.scan(layer, x_BTD, inputs)
    outputs = []
    for i in range(repeat):
        x_BTD, out = layer(x_BTD, jax.tree.map(lambda a, i=i: a[i], inputs))
        outputs.append(out)
    return x_BTD, jax.tree.map(lambda *a: jnp.stack(a), *outputs)


@functools.partial(jax.named_call, name="gather")
def gather(specs, params, ctx: Context):
    """The parameters of one layer with FSDP undone: each device gets the whole width.

    This is where FSDP communicates: an all-gather before use here, a reduce-scatter of the
    gradient in its transpose. Inside a rematerialised layer the gathered copy is not kept.
    """

    def leaf(spec: ParamSpec, w):
        if not set(GATHERED_AXES) & set(spec.axes) or "experts" in spec.axes:
            return w  # experts are gathered where they compute (models.moe)
        return gathered(w, spec.axes, ctx.sharding)

    return specs_lib.map_specs(leaf, specs, params)
