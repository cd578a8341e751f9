"""What every attention kind shares: the seam it fills and the step between projections.

Shape suffixes: B batch, T tokens, S keys, D model width, N query heads, K key/value heads, H width
of queries and keys, V width of values.

An attention kind is a frozen dataclass with the methods of :class:`Attention`, in one file, named
in ``models/layers/attention/__init__.py``. Its cache is a tuple of (B, slots, ...) arrays with
one entry per token; ``through_cache`` does all there is to do with it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from step_jax.models.context import Context
from step_jax.models.layers.initialisation import Initialisation
from step_jax.models.layers.positions import Position, Rope, alibi, rotate
from step_jax.ops import attention as ops_attention
from step_jax.ops import decode_attention as ops_decode


class Attention(Protocol):
    """The seam between a block and its attention."""

    heads: int
    window: int | None

    @property
    def position(self) -> Position | None:
        """What tells tokens their places."""

    @property
    def kv(self) -> int:
        """Key/value heads that the query heads share when training."""

    def specs(self, width: int, init: Initialisation) -> Any:
        """The parameters, as a tree of ParamSpec."""

    def apply(self, p, x_BTD, ctx: Context, cache: tuple | None = None) -> tuple[Any, tuple | None]:
        """(y_BTD, cache with this call's tokens stored)."""

    def cache_entries(self) -> tuple[tuple[int, ...], ...]:
        """Shape of what is stored per token and layer, one entry per cached array."""

    def score_and_value_widths(self) -> tuple[int, int]:
        """Widths whose sum, times heads, is the multiply-adds per query and key when training."""


def attend(
    q_BTNH,
    k_BSKH,
    v_BSKV,
    ctx: Context,
    kv_positions_BS=None,
    *,
    scale: float,
    window: int | None,
    position: Position | None,
):
    """Attention across the mesh: (B, T, N, V).

    Keys and values may come in the dtype of a cache. ``v_BSKV`` None: the keys are unrotated, and
    are their own values before they are rotated to ``kv_positions_BS``.

    Keys and values with a leading axis of layers are caches (``through_cache``): one token attends
    to layer ``ctx.layer`` of them, by a kernel where there is one (``ops.decode_attention``).

    Queries stay where their tokens are. With a context axis, keys and values are gathered along it
    (2 C numbers per token for a shared head: cheaper than any exchange of queries). With several
    heads they may travel around the ring (``ctx.sharding.ring``), or heads are exchanged for the
    sequence, there and back (``ctx.sharding.ulysses``).
    """
    sharding = ctx.sharding
    bias = alibi(position)
    q_BTNH = ctx.constrain(q_BTNH, "batch", "sequence", "heads", None)
    kv_places_BS = kv_positions_BS
    if k_BSKH.ndim == 5:
        o_BTNV = _decoded(q_BTNH, k_BSKH, v_BSKV, ctx, scale, window, position)
        if o_BTNV is not None:
            return ctx.constrain(o_BTNV, "batch", "sequence", "heads", None)
        k_BSKH = k_BSKH[ctx.layer]
        v_BSKV = None if v_BSKV is None else v_BSKV[ctx.layer]
        if window is None:  # no ring: slot s of every row holds place s, and one turn does for all
            kv_places_BS = jnp.arange(k_BSKH.shape[1])[None]
    k_BSKH = k_BSKH.astype(q_BTNH.dtype)
    if v_BSKV is None:
        v_BSKV, k_BSKH = k_BSKH, rotate(position, k_BSKH, kv_places_BS[..., None])
    v_BSKV = v_BSKV.astype(q_BTNH.dtype)
    q_BTNH, k_BSKH, v_BSKV = checkpoint_name((q_BTNH, k_BSKH, v_BSKV), "qkv")
    mask = ctx.mask(kv_positions_BS, window)
    if ctx.observe is not None:
        ctx.observe(ops_attention.weights(q_BTNH, k_BSKH, mask, scale=scale, alibi=bias))
    context = 1 if sharding is None else sharding.size("context")
    exchanged = context > 1 and k_BSKH.shape[2] > 1 and kv_positions_BS is None
    if exchanged and ctx.on_mesh.ring:
        o_BTNV = _ring(q_BTNH, k_BSKH, v_BSKV, mask, ctx, scale, bias)
    elif exchanged and ctx.on_mesh.ulysses:
        o_BTNV = _by_heads(q_BTNH, k_BSKH, v_BSKV, mask, ctx, scale, bias)
    else:
        if context > 1 and kv_positions_BS is None:
            # projected where the tokens are: else the partitioner gathers x to project it whole
            k_BSKH = ctx.constrain(k_BSKH, "batch", "sequence", "kv_heads", None)
            v_BSKV = ctx.constrain(v_BSKV, "batch", "sequence", "kv_heads", None)
            # a block of queries would cut across devices
            mask = dataclasses.replace(mask, in_order=False)
        k_BSKH = ctx.constrain(k_BSKH, "batch", None, "kv_heads", None)
        v_BSKV = ctx.constrain(v_BSKV, "batch", None, "kv_heads", None)
        o_BTNV = _gathered(q_BTNH, k_BSKH, v_BSKV, mask, ctx, scale, bias)
    return ctx.constrain(o_BTNV, "batch", "sequence", "heads", None)


def attend_across(q_BTNH, k_BSKH, v_BSKV, mask: ops_attention.Mask, ctx: Context, *, scale: float):
    """Attention of the call's tokens over others, as ``mask`` says: (B, T, N, V).

    Queries stay where their tokens are; keys and values are whole along the sequence.
    """
    q_BTNH = ctx.constrain(q_BTNH, "batch", "sequence", "heads", None)
    k_BSKH = ctx.constrain(k_BSKH, "batch", None, "kv_heads", None)
    v_BSKV = ctx.constrain(v_BSKV, "batch", None, "kv_heads", None)
    q_BTNH, k_BSKH, v_BSKV = checkpoint_name((q_BTNH, k_BSKH, v_BSKV), "qkv")
    o_BTNV = _gathered(q_BTNH, k_BSKH, v_BSKV, mask, ctx, scale, None)
    return ctx.constrain(o_BTNV, "batch", "sequence", "heads", None)


def _decoded(q_BTNH, k_LBSKH, v_LBSKH, ctx: Context, scale, window, position: Position | None):
    """One token over a cache where it lies; None if it is better read first."""
    sharding, device = ctx.sharding, ctx.device
    frequency_F = None
    if v_LBSKH is None and isinstance(position, Rope):
        frequency_F = position.frequencies_F(q_BTNH.shape[-1])
    arrays = (q_BTNH, k_LBSKH, v_LBSKH, ctx.tokens.order_BT, ctx.lengths_after_B())
    call = ops_decode.DecodeCall(
        *arrays, scale=scale, window=window, frequency_F=frequency_F, layer=ctx.layer
    )
    pieces = 1 if sharding is None else sharding.ways("batch")
    problem = ops_decode.Problem(call, alibi(position) is not None, pieces)
    name = ops_decode.in_place(ctx.execution.attention, problem, device)
    if name is None:
        return None
    decode = functools.partial(ops_decode.decode_attention, implementation=name, device=device)
    if sharding is None or sharding.mesh.size == 1:
        return decode(call)
    heads = sharding.spec(("batch", None, "heads", None), q_BTNH.shape)
    keys = sharding.spec(("layers", "batch", None, "kv_heads", None), k_LBSKH.shape)
    batch, whole = sharding.spec(("batch",), q_BTNH.shape[:1]), PartitionSpec()
    slices_heads_only = heads[2] is not None and keys[3] is None

    def local(call):
        if slices_heads_only:
            first_head = jax.lax.axis_index(heads[2]) * call.q_BTNH.shape[2]
            call = dataclasses.replace(call, first_head=first_head)
        return decode(call)

    call = dataclasses.replace(call, heads_per_key=q_BTNH.shape[2] // k_LBSKH.shape[3])
    specs = dataclasses.replace(
        jax.tree.map(lambda _: whole, call),
        q_BTNH=heads,
        k_cache=keys,
        v_cache=None if v_LBSKH is None else keys,
        positions_BT=batch,
        lengths_B=batch,
    )
    # the kernel's own results carry no mesh axes to check
    return jax.shard_map(
        local, mesh=sharding.mesh, in_specs=(specs,), out_specs=heads, check_vma=False
    )(call)


def _gathered(q_BTNH, k_BSKH, v_BSKV, mask, ctx: Context, scale, bias):
    """Each device's queries against all keys of their rows."""
    sharding = ctx.sharding
    device = None if sharding is None else sharding.mesh.devices.flat[0]
    problem = ops_attention.problem_of(q_BTNH, k_BSKH, v_BSKV, mask, bias)
    name = ops_attention.resolve(ctx.execution.attention, problem, device)

    def compute(q_BTNH, k_BSKH, v_BSKV, mask):
        return ops_attention.attention(
            q_BTNH,
            k_BSKH,
            v_BSKV,
            mask,
            scale=scale,
            alibi=bias,
            implementation=name,
            device=device,
        )

    if sharding is not None and ops_attention.IMPLEMENTATIONS[name].kernel:
        return _on_each_device(compute, q_BTNH, k_BSKH, v_BSKV, mask, sharding)
    return compute(q_BTNH, k_BSKH, v_BSKV, mask)


def _on_each_device(compute, q_BTNH, k_BSKH, v_BSKV, mask, sharding):
    """``compute`` on the part of each device, for kernels, which the partitioner cannot cut."""
    if sharding.mesh.size == 1:
        return compute(q_BTNH, k_BSKH, v_BSKV, mask)
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # of several key heads, a device has those of its query heads, or else all of both
    heads, count = ("heads", N) if K == 1 else ("kv_heads", K)
    q_spec = sharding.spec(("batch", "sequence", heads, None), (B, T, count, H))
    kv_spec = sharding.spec(("batch", None, "kv_heads", None), k_BSKH.shape)
    tokens, keys = PartitionSpec(*q_spec[:2]), PartitionSpec(kv_spec[0])
    masks = mask.with_queries(*jax.tree.map(lambda _: tokens, mask.of_queries()))
    masks = masks.with_keys(*jax.tree.map(lambda _: keys, mask.of_keys()))
    return jax.shard_map(
        compute,
        mesh=sharding.mesh,
        in_specs=(q_spec, kv_spec, kv_spec, masks),
        out_specs=q_spec,
        check_vma=False,  # a kernel's outputs do not say along which axes they vary
    )(q_BTNH, k_BSKH, v_BSKV, mask)


def _by_heads(q_BTNH, k_BSKH, v_BSKV, mask, ctx: Context, scale, bias):
    """Each device's heads over whole rows."""

    def here(x):  # projected where the tokens are, before anything is exchanged
        return ctx.constrain(x, "batch", "sequence", "kv_heads", None)

    whole = dataclasses.replace(ctx, sharding=ctx.on_mesh.of_whole_heads())
    q_BTNH = whole.constrain(q_BTNH, "batch", "sequence", "heads", None)
    k_BSKH = whole.constrain(here(k_BSKH), "batch", "sequence", "kv_heads", None)
    v_BSKV = whole.constrain(here(v_BSKV), "batch", "sequence", "kv_heads", None)
    # else made of pieces of rows and exchanged, with all its queries and keys
    mask = jax.tree.map(lambda a_BT: whole.constrain(a_BT, "batch", "sequence"), mask)
    o_BTNV = _gathered(q_BTNH, k_BSKH, v_BSKV, mask, whole, scale, bias)
    return whole.constrain(o_BTNV, "batch", "sequence", "heads", None)


def _ring(q_BTNH, k_BSKH, v_BSKV, mask, ctx: Context, scale, bias):
    sharding, implementation = ctx.on_mesh, ctx.execution.attention
    entry = ops_attention.IMPLEMENTATIONS.get(implementation)
    if entry is not None and entry.kernel:
        raise ValueError(f"ring attention is not computed by {implementation}: set ring: false")
    if bias is not None and sharding.size("tensor") > 1:
        raise ValueError("ring attention with ALiBi needs all heads on a device: set ring: false")
    tokens = sharding.spec(("batch", "sequence"), q_BTNH.shape[:2])
    heads = sharding.spec(("batch", "sequence", "kv_heads", None), k_BSKH.shape)
    masks = jax.tree.map(lambda _: tokens, mask)

    def local(q_BTNH, k_BSKH, v_BSKV, mask):
        return ops_attention.ring(q_BTNH, k_BSKH, v_BSKV, mask, scale, bias, "context")

    return sharding.shard_map(local, (heads, heads, heads, masks), heads)(
        q_BTNH, k_BSKH, v_BSKV, mask
    )
