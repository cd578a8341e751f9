"""Looking up rows of an embedding table that is cut over the devices.

Shape suffixes: B batch, T tokens of a row, V vocabulary, v a device's part of it, D width, R pieces
of the batch, C pieces of the sequence.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from step_jax.core.fsdp import add_up, whole
from step_jax.core.sharding import Sharding, vary_alike


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(table_VD, tokens_BT, sharding: Sharding | None):
    """Rows of a table, (B, T, D) of its dtype.

    Every device adds up the gradients of its own tokens, in float32, and the devices add up the
    sums in the table's dtype.

    Args:
      table_VD: as stored (logical axes ``vocab``, ``embed``), in the compute dtype.
      tokens_BT: int32, in [0, V).
      sharding: of the arrays; None on one device.
    """
    if sharding is None:
        return table_VD[tokens_BT]
    table_VD = whole(table_VD, ("vocab", "embed"), sharding)
    return sharding.constrain(table_VD[tokens_BT], "batch", "sequence", None)


def _forward(table_VD, tokens_BT, sharding):
    return embed(table_VD, tokens_BT, sharding), (tokens_BT, table_VD)


def _backward(sharding, saved, g_BTD):
    tokens_BT, table_VD = saved

    def sums(tokens_BT, g_BTD, v: int, start=0):
        slot_BT = tokens_BT - start
        slot_BT = jnp.where((slot_BT >= 0) & (slot_BT < v), slot_BT, v)  # v: of another device
        sum_vD, g_BTD = vary_alike(jnp.zeros((v, g_BTD.shape[-1]), jnp.float32), g_BTD)
        return sum_vD.at[slot_BT].add(g_BTD.astype(jnp.float32), mode="drop")

    V, dtype = table_VD.shape[0], table_VD.dtype
    if sharding is None or sharding.mesh.size == 1:
        return sums(tokens_BT, g_BTD, V).astype(dtype), None
    batch, sequence = sharding.spec(("batch", "sequence"), tokens_BT.shape)
    vocab = sharding.spec(("vocab",), (V,))[0]

    def local(tokens_BT, g_BTD):
        v = V // sharding.ways("vocab")
        start = 0 if vocab is None else jax.lax.axis_index(vocab) * v
        return sums(tokens_BT, g_BTD, v, start).astype(dtype)[None, None]

    parts_RCVD = jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(P(batch, sequence), P(batch, sequence, None)),
        out_specs=P(batch, sequence, vocab, None),
    )(tokens_BT, g_BTD)
    return add_up(parts_RCVD, ("vocab", "embed"), sharding), None


embed.defvjp(_forward, _backward)
