"""What a model function is told besides parameters and inputs, and how it executes.

Shape suffixes: B batch, T tokens of this call, S slots of a cache or keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from step_jax.core import checks
from step_jax.core.errors import ConfigError
from step_jax.core.sharding import Sharding
from step_jax.models.tokens import Tokens
from step_jax.ops import attention as attention_ops
from step_jax.ops import cross_entropy as cross_entropy_ops
from step_jax.ops import grouped_matmul as grouped_matmul_ops
from step_jax.ops.attention import Mask
from step_jax.ops.decode_attention import slot_positions_BS

RematPolicy = Literal["none", "dots", "full"]
#: What layers give a name (``checkpoint_name``), so that ``Execution`` may say what becomes of it.
Named = Literal["layer", "qkv", "attention", "mlp"]

ComputeDtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Execution:
    """How a model is computed; no choice here changes what is computed.

    attention: implementation of softmax attention (``step_jax.ops.attention``); ``auto`` is the
      fastest that the devices compiled for have and that supports the model's heads.
    scan: compile one layer of each kind and loop over it, instead of unrolling all layers.
    remat: what the backward pass recomputes. ``none`` nothing, ``dots`` everything but products
      with weights, ``full`` each whole layer from its input.
    keep, offload: what ``full`` does not recompute, kept on the device or in the memory of its
      host. ``layer``: what goes into a block; ``qkv``: queries, keys and values as they meet;
      ``attention``: its output, before the output weight, and the log-sum-exp of each query;
      ``mlp``: the products with the first weights, of routed experts too.
    grouped_matmul: implementation of the experts' products (``step_jax.ops.grouped_matmul``).
    loss: implementation of the vocabulary projection and its loss (``step_jax.ops.cross_entropy``).
    loss_chunks: into how many pieces the vocabulary projection cuts a sequence.
    dtype: of activations and of the weights' copies they meet.
    """

    attention: attention_ops.Implementation = "auto"
    scan: bool = True
    remat: RematPolicy = "none"
    keep: tuple[Named, ...] = ()
    offload: tuple[Named, ...] = ()
    grouped_matmul: grouped_matmul_ops.Implementation = "auto"
    loss: cross_entropy_ops.Implementation = "auto"
    loss_chunks: int = 8
    dtype: ComputeDtype = "bfloat16"

    def validate(self):
        checks.at_least(self, loss_chunks=1)
        named = (*self.keep, *self.offload)
        if named and self.remat != "full":
            raise ConfigError(
                f"keep and offload are exceptions from remat: full; remat is {self.remat}"
            )
        if len(set(named)) < len(named):
            raise ConfigError(f"keep and offload name something twice: {', '.join(named)}")

    @property
    def policy(self) -> Callable[..., Any] | None:
        """The ``policy`` of ``jax.checkpoint`` for a layer; None where nothing is recomputed."""
        policies = jax.checkpoint_policies
        if self.remat == "none":
            return None
        if self.remat == "dots":
            return policies.dots_with_no_batch_dims_saveable
        if not self.offload:
            return policies.save_only_these_names(*self.keep)
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(self.keep),
            names_which_can_be_offloaded=list(self.offload),
            offload_src="device",
            offload_dst="pinned_host",
        )


@struct.dataclass
class Context:
    """The tokens of one call, the cache before it, and how and where to compute.

    Attributes:
      tokens: where they stand, and so what each may see.
      lengths_B: int32 tokens in the cache before this call; None without a cache.
      layer: int32 scalar, which layer of its group's caches a layer uses; None without a cache.
      fresh: the cache is empty (lets a prompt attend to itself alone).
      within_capacity: mixtures of experts keep to their ``capacity`` and drop what is beyond, as a
        loss of training on text does; where text is scored or written they drop nothing.
      record_routing: mixtures of experts report their decisions (``moe.ExpertStats``).
      observe: called while tracing with every layer's attention weights, float32 (B, N, T, S) of
        N heads over S keys, in the order of the layers. Needs ``execution.scan`` to be false, and
        no remat: what a scan or a checkpoint traces cannot leave it.
      sharding: mesh and rules, or None on one device.
      execution: how to compute.
    """

    tokens: Tokens
    lengths_B: jax.Array | None = None
    layer: jax.Array | None = None
    fresh: bool = struct.field(pytree_node=False, default=False)
    within_capacity: bool = struct.field(pytree_node=False, default=False)
    record_routing: bool = struct.field(pytree_node=False, default=False)
    observe: Callable[[jax.Array], None] | None = struct.field(pytree_node=False, default=None)
    sharding: Sharding | None = struct.field(pytree_node=False, default=None)
    execution: Execution = struct.field(pytree_node=False, default=Execution())

    def constrain(self, x, *axes: str | None):
        return x if self.sharding is None else self.sharding.constrain(x, *axes)

    @property
    def on_mesh(self) -> Sharding:
        """``sharding``, where there must be a mesh."""
        assert self.sharding is not None
        return self.sharding

    @property
    def device(self) -> jax.Device:
        """One of those computed on, which may be only compiled for."""
        return jax.devices()[0] if self.sharding is None else self.sharding.mesh.devices.flat[0]

    def as_matrix(self, x_BTD):
        """The tokens' vectors as rows of one matrix (B*T, D); unchanged if the mesh cuts rows of T.

        The gradient of a weight is then a plain product. Of three-dimensional factors XLA makes
        transposed copies first, on a CPU at half the cost of the product.
        """
        if self.sharding is not None and self.sharding.size("context") > 1:
            return x_BTD
        return x_BTD.reshape(-1, x_BTD.shape[-1])

    def lengths_after_B(self):
        """Tokens in the cache once those of this call are stored."""
        assert self.lengths_B is not None  # there is a cache
        return self.lengths_B + jnp.sum(self.tokens.order_BT >= 0, axis=1, dtype=jnp.int32)

    def mask(self, kv_positions_BS=None, window: int | None = None) -> Mask:
        """What this call's tokens see of themselves, or of keys at given positions.

        Of more keys than the tokens' own, the last are those: the keys of a cache are in no block.
        """
        t = self.tokens
        if kv_positions_BS is None:
            order = (t.order_BT, t.order_BT, t.segments_BT, t.segments_BT, t.block_BT, t.block_BT)
            return Mask(*order, causal=t.causal, window=window, in_order=True)
        mask = Mask(t.order_BT, kv_positions_BS, causal=t.causal, window=window)
        T, S = t.order_BT.shape[1], kv_positions_BS.shape[1]
        if t.block_BT is None or T == 1:  # a single token is no block
            return mask
        kv_blocks_BS = jnp.pad(t.block_BT, ((0, 0), (S - T, 0)), constant_values=-1)
        return replace(mask, q_blocks_BT=t.block_BT, kv_blocks_BS=kv_blocks_BS)


def through_cache(new, cache, ctx: Context):
    """Stores what a layer keeps of this call's tokens and returns what they attend to.

    Args:
      new: tuple of (B, T, ...) arrays, one entry per token.
      cache: tuple of (L, B, S, ...) arrays of the same kinds, of which layer ``ctx.layer`` is
        updated in place; or None.
      ctx: the call.

    Returns:
      (keys, kv_positions_BS, cache): ``keys`` are ``new`` itself without a cache or with an empty
      one (``kv_positions_BS`` is then None: the tokens' own). For a single token they are the
      caches of all layers, for ``attend`` to read one of, else (B, S + T, ...) arrays.
    """
    if cache is None:
        return new, None, None
    order_BT = ctx.tokens.order_BT
    B, T = order_BT.shape
    slots = cache[0].shape[2]
    after_B = ctx.lengths_after_B()
    kept_BT = (order_BT >= 0) & (order_BT >= after_B[:, None] - slots)
    slot_BT = jnp.where(kept_BT, order_BT % slots, slots)
    rows_B1 = jnp.arange(B)[:, None]
    stored = tuple(
        c.at[ctx.layer, rows_B1, slot_BT].set(
            saturated(n, c.dtype), mode="drop", unique_indices=T == 1
        )
        for c, n in zip(cache, new, strict=True)
    )
    if ctx.fresh:
        return new, None, stored
    if T == 1:
        return stored, slot_positions_BS(after_B, slots), stored
    before_BS = slot_positions_BS(ctx.lengths_B, slots)
    both = tuple(
        jnp.concatenate([c[ctx.layer].astype(n.dtype), n], axis=1)
        for c, n in zip(cache, new, strict=True)
    )
    return both, jnp.concatenate([before_BS, order_BT], axis=1), stored


def saturated(x, dtype):
    """``x`` in the dtype of a cache; what exceeds the range of a narrower float becomes its end.

    A plain cast to float8_e4m3fn makes it NaN, and of a row with one NaN nothing else is left.
    """
    if jnp.issubdtype(dtype, jnp.floating):
        most = float(jnp.finfo(dtype).max)
        if most < float(jnp.finfo(x.dtype).max):
            x = jnp.clip(x.astype(jnp.float32), -most, most)
    return x.astype(dtype)


def one_layer(keys, ctx: Context):
    """(B, S, ...) arrays from the ``keys`` of :func:`through_cache`, whatever its call was."""
    cached_token = ctx.layer is not None and not ctx.fresh and ctx.tokens.order_BT.shape[1] == 1
    return tuple(k[ctx.layer] for k in keys) if cached_token else keys
