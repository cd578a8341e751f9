"""Softmax attention as a named operation with exchangeable implementations.

Shape suffixes: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K query heads
of one key head, H width of queries and keys, V width of values.

Masks are descriptions, never arrays: every implementation builds the part it needs from positions
and segments. A row that may see nothing returns zeros.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from step_jax.core.sharding import vary_alike
from step_jax.ops import registry
from step_jax.ops.einsum import product

NEGATIVE = -1e30  # finite, so that a fully masked row has no NaN on its way to zero


@struct.dataclass
class Mask:
    """Which keys a query may see.

    Attributes:
      q_positions_BT, kv_positions_BS: int32 positions in the document; a negative one is an empty
        slot, seen by nobody.
      q_segments_BT, kv_segments_BS: int32 documents of a packed row (0 is padding); None when the
        row is one document.
      q_blocks_BT, kv_blocks_BS: int32; a query sees the keys of its document with its own number,
        if that is not negative, at whatever positions they are. None when there are no blocks.
      causal: keys at later positions are hidden.
      window: a query sees itself and the ``window - 1`` positions before it, without causality as
        many after it; None for all.
      in_order: queries and keys are the same tokens in the same order, so that with ``causal`` a
        key at a later index is hidden whatever its position, unless there are blocks (lets
        implementations skip what is hidden). It promises that positions rise within a document.
    """

    q_positions_BT: jax.Array
    kv_positions_BS: jax.Array
    q_segments_BT: Any = None
    kv_segments_BS: Any = None
    q_blocks_BT: Any = None
    kv_blocks_BS: Any = None
    causal: bool = struct.field(pytree_node=False, default=True)
    window: int | None = struct.field(pytree_node=False, default=None)
    in_order: bool = struct.field(pytree_node=False, default=False)

    @property
    def hides_later_keys(self) -> bool:
        """Whether a key at a later index than a query's is known to be hidden from it."""
        return self.causal and self.in_order and self.q_blocks_BT is None

    def of_queries(self) -> tuple:
        """The arrays that describe queries, to be given back to :meth:`with_queries`."""
        return self.q_positions_BT, self.q_segments_BT, self.q_blocks_BT

    def of_keys(self) -> tuple:
        """The arrays that describe keys, to be given back to :meth:`with_keys`."""
        return self.kv_positions_BS, self.kv_segments_BS, self.kv_blocks_BS

    def with_queries(self, positions_BT, segments_BT, blocks_BT) -> Mask:
        return dataclasses.replace(
            self, q_positions_BT=positions_BT, q_segments_BT=segments_BT, q_blocks_BT=blocks_BT
        )

    def with_keys(self, positions_BS, segments_BS, blocks_BS) -> Mask:
        return dataclasses.replace(
            self, kv_positions_BS=positions_BS, kv_segments_BS=segments_BS, kv_blocks_BS=blocks_BS
        )

    def rows(self, start: int, stop: int, keys: int) -> Mask:
        """The mask of queries ``start:stop`` over the first ``keys`` keys."""
        queries = jax.tree.map(lambda a_BT: a_BT[:, start:stop], self.of_queries())
        mask = self.with_queries(*queries)
        return mask.with_keys(*jax.tree.map(lambda a_BS: a_BS[:, :keys], self.of_keys()))

    def distance_BTS(self):
        """How far a key lies from a query, before or after it."""
        return jnp.abs(self.q_positions_BT[:, :, None] - self.kv_positions_BS[:, None, :])

    def allowed_BTS(self):
        """The dense boolean mask (used block by block)."""
        q_BT1, kv_B1S = self.q_positions_BT[:, :, None], self.kv_positions_BS[:, None, :]
        allowed_BTS = jnp.broadcast_to(kv_B1S >= 0, (*q_BT1.shape[:2], kv_B1S.shape[2]))
        near_BTS = allowed_BTS
        if self.causal:
            near_BTS &= q_BT1 >= kv_B1S
        if self.window is not None:
            near_BTS &= self.distance_BTS() < self.window
        if self.q_blocks_BT is None:
            allowed_BTS = near_BTS
        else:
            q_BT1, kv_B1S = self.q_blocks_BT[:, :, None], self.kv_blocks_BS[:, None, :]
            allowed_BTS &= near_BTS | ((q_BT1 == kv_B1S) & (kv_B1S >= 0))
        if self.q_segments_BT is not None:
            q_BT1, kv_B1S = self.q_segments_BT[:, :, None], self.kv_segments_BS[:, None, :]
            allowed_BTS &= (q_BT1 == kv_B1S) & (kv_B1S > 0)
        return allowed_BTS


def alibi_slopes_N(heads: int):
    """Slopes of ALiBi (arXiv 2108.12409, section 3), float32 (N,); any number of heads."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return jnp.asarray(slopes + between, jnp.float32)


def _heads_first(q_BTNH, k_BSKH, v_BSKV):
    """(q_BKGTH, k_BKSH, v_BKSV): one matrix per head, the layout of batched products."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    return q_BKGTH, k_BSKH.swapaxes(1, 2), v_BSKV.swapaxes(1, 2)


def _heads_last(o_BKGTV):
    B, K, G, T, V = o_BKGTV.shape
    return o_BKGTV.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, V)


def _scores_BKGTS(q_BKGTH, k_BKSH, mask: Mask, scale: float, alibi: str | None):
    s_BKGTS = product("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, jnp.float32)
    s_BKGTS *= scale
    if alibi is not None:
        kv_heads, groups = q_BKGTH.shape[1:3]
        distance_BTS = mask.distance_BTS().astype(jnp.float32)
        if alibi == "sqrt":
            distance_BTS = jnp.sqrt(distance_BTS)
        slopes_KG11 = alibi_slopes_N(kv_heads * groups).reshape(kv_heads, groups, 1, 1)
        s_BKGTS -= slopes_KG11 * distance_BTS[:, None, None]
    return jnp.where(mask.allowed_BTS()[:, None, None], s_BKGTS, NEGATIVE)


def _block(q_BKGTH, k_BKSH, v_BKSV, mask, scale, alibi):
    """Unnormalised attention: (output_BKGTV, row maximum_BKGT1, row sum_BKGT1), all float32."""
    s_BKGTS = _scores_BKGTS(q_BKGTH, k_BKSH, mask, scale, alibi)
    max_BKGT1 = jax.lax.stop_gradient(jnp.max(s_BKGTS, axis=-1, keepdims=True))
    # far above NEGATIVE: the exponentials of a row that may see nothing are 0, not 1
    max_BKGT1 = jnp.maximum(max_BKGT1, 0.5 * NEGATIVE)
    p_BKGTS = jnp.exp(s_BKGTS - max_BKGT1)
    p_BKGTS, sum_BKGT1 = p_BKGTS.astype(v_BKSV.dtype), jnp.sum(p_BKGTS, axis=-1, keepdims=True)
    o_BKGTV = product("BKGTS,BKSV->BKGTV", p_BKGTS, v_BKSV, jnp.float32)
    return o_BKGTV, max_BKGT1, sum_BKGT1


def _normalise(o_BKGTV, sum_BKGT1):
    return o_BKGTV / jnp.where(sum_BKGT1 == 0.0, 1.0, sum_BKGT1)


def reference(q_BKGTH, k_BKSH, v_BKSV, mask, scale, alibi):
    """All scores at once, in float32: the definition the others are compared with."""
    q_BKGTH, k_BKSH, v_BKSV = (x.astype(jnp.float32) for x in (q_BKGTH, k_BKSH, v_BKSV))
    o_BKGTV, _, sum_BKGT1 = _block(q_BKGTH, k_BKSH, v_BKSV, mask, scale, alibi)
    return checkpoint_name(_normalise(o_BKGTV, sum_BKGT1), "attention")


#: Query rows whose scores exist at a time: memory grows with the keys, not with their square.
MOST_ROWS = 512


def _together(q_BKGTH, mask: Mask):
    """The same, as if the mask came with the queries.

    A loop over layers would find a mask of its own the same for all of them, and its gradient keep
    what `where` makes of it: a bool for every head, query and key.
    """
    return jax.lax.optimization_barrier((q_BKGTH, mask))


def _blocks(q_BKGTH, k_BKSH, v_BKSV, mask: Mask):
    """Queries cut into blocks with all they may see: (q, k, v, mask, first row, last row + 1).

    In-order causal attention needs only the keys up to a block's own end, which saves up to half
    of the work. Few blocks, because each is compiled; ``_parts`` cuts large ones further.
    """
    q_BKGTH, mask = _together(q_BKGTH, mask)
    T, S = q_BKGTH.shape[3], k_BKSH.shape[2]
    size = next(T // n for n in (8, 4, 2, 1) if T % n == 0 and (T // n >= 128 or n == 1))
    for i in range(0, T, size):
        j = i + size
        keys = j if mask.hides_later_keys else S
        rows = mask.rows(i, j, keys)
        yield q_BKGTH[:, :, :, i:j], k_BKSH[:, :, :keys], v_BKSV[:, :, :keys], rows, i, j


def _parts(body: Callable, carry, mask: Mask, *arrays):
    """``body(carry, mask, *arrays) -> (carry, results)`` over parts of at most ``MOST_ROWS`` rows.

    Args:
      mask: of a block of queries.
      arrays: (B, K, G, rows, ...), cut along the rows, as the results are.

    Returns:
      (carry, results of all rows).
    """
    rows = mask.q_positions_BT.shape[1]
    parts = -(-rows // MOST_ROWS)
    if parts == 1:
        return body(carry, mask, *arrays)
    size = -(-rows // parts)

    def cut(x, axis: int, fill=0):
        padding = [(0, parts * size - rows if a == axis else 0) for a in range(x.ndim)]
        x = jnp.pad(x, padding, constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], parts, size, *x.shape[axis + 1 :]), axis, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], parts * size, *x.shape[5:])[:, :, :, :rows]

    # what fills up the last part is cut off again
    described = jax.tree.map(lambda a_BT: cut(a_BT, 1, -1), mask.of_queries())

    def part(carry, x):
        described, arrays = x
        return body(carry, mask.with_queries(*described), *arrays)

    inputs = (described, tuple(cut(x, 3) for x in arrays))
    carry, results = jax.lax.scan(part, carry, inputs)
    return carry, jax.tree.map(join, results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def xla(q_BKGTH, k_BKSH, v_BKSV, mask, scale, alibi):
    """At most ``MOST_ROWS`` queries at a time; no score outlives its part.

    The backward pass makes the probabilities again from the scores and each row's log-sum-exp, as
    FlashAttention does (arXiv 2205.14135, appendix B.2). The output has the queries' dtype.
    """
    return _xla_forward(q_BKGTH, k_BKSH, v_BKSV, mask, scale, alibi)[0]


def _xla_forward(q_BKGTH, k_BKSH, v_BKSV, mask, scale, alibi):
    out, lse = [], []
    for q, k, v, rows, _, _ in _blocks(q_BKGTH, k_BKSH, v_BKSV, mask):

        def part(_, mask, q, k=k, v=v):
            o_BKGTV, max_BKGT1, sum_BKGT1 = _block(q, k, v, mask, scale, alibi)
            lse_BKGT1 = max_BKGT1 + jnp.log(jnp.where(sum_BKGT1 == 0.0, 1.0, sum_BKGT1))
            return None, (_normalise(o_BKGTV, sum_BKGT1).astype(q.dtype), lse_BKGT1)

        _, (o_BKGTV, lse_BKGT1) = _parts(part, None, rows, q)
        out.append(o_BKGTV)
        lse.append(lse_BKGT1)
    results = jnp.concatenate(out, axis=3), jnp.concatenate(lse, axis=3)
    o_BKGTV, lse_BKGT1 = checkpoint_name(results, "attention")
    return o_BKGTV, (q_BKGTH, k_BKSH, v_BKSV, mask, o_BKGTV, lse_BKGT1)


def _xla_backward(scale, alibi, residuals, do_BKGTV):
    q_BKGTH, k_BKSH, v_BKSV, mask, o_BKGTV, lse_BKGT1 = residuals
    dtype, S = q_BKGTH.dtype, k_BKSH.shape[2]
    # sum over keys of p * dp, from the output instead of the scores
    mean_BKGT1 = jnp.sum(
        do_BKGTV.astype(jnp.float32) * o_BKGTV.astype(jnp.float32), axis=-1, keepdims=True
    )
    dq, dk_BKSH, dv_BKSV = [], jnp.zeros(k_BKSH.shape), jnp.zeros(v_BKSV.shape)
    for q, k, v, rows, i, j in _blocks(q_BKGTH, k_BKSH, v_BKSV, mask):

        def part(sums, mask, q, do, lse_BKGT1, mean_BKGT1, k=k, v=v):
            p_BKGTS = jnp.exp(_scores_BKGTS(q, k, mask, scale, alibi) - lse_BKGT1)
            dp_BKGTS = product("BKGTV,BKSV->BKGTS", do, v, jnp.float32)
            ds_BKGTS = (scale * p_BKGTS * (dp_BKGTS - mean_BKGT1)).astype(dtype)
            dk_BKSH = product("BKGTS,BKGTH->BKSH", ds_BKGTS, q, jnp.float32)
            dv_BKSV = product("BKGTS,BKGTV->BKSV", p_BKGTS.astype(dtype), do, jnp.float32)
            dq_BKGTH = product("BKGTS,BKSH->BKGTH", ds_BKGTS, k, jnp.float32).astype(dtype)
            return (sums[0] + dk_BKSH, sums[1] + dv_BKSV), dq_BKGTH

        zeros = vary_alike(jnp.zeros(k.shape), jnp.zeros(v.shape), q, k, v, do_BKGTV)[:2]
        of_rows = (x[:, :, :, i:j] for x in (do_BKGTV, lse_BKGT1, mean_BKGT1))
        (dk, dv), dq_BKGTH = _parts(part, zeros, rows, q, *of_rows)
        dq.append(dq_BKGTH)
        unseen = ((0, 0), (0, 0), (0, S - k.shape[2]), (0, 0))
        dk_BKSH += jnp.pad(dk, unseen)
        dv_BKSV += jnp.pad(dv, unseen)
    return jnp.concatenate(dq, axis=3), dk_BKSH.astype(dtype), dv_BKSV.astype(dtype), None


xla.defvjp(_xla_forward, _xla_backward)


def ring(q_BTNH, k_BSKH, v_BSKV, mask, scale, alibi, axis: str):
    """Inside ``shard_map``: keys and values travel around the mesh axis ``axis``.

    Every device ends with its own queries' attention over the keys of all (online softmax, arXiv
    2310.01889). Memory holds one remote piece at a time; its scores are recomputed backwards.

    Args and result as :func:`attention`, of the device's own tokens.
    """
    n = jax.lax.axis_size(axis)
    to_next = [(i, (i + 1) % n) for i in range(n)]

    @jax.checkpoint
    def merge(carry, q_BKGTH, k_BKSH, v_BKSV, mask):
        o_BKGTV, max_BKGT1, sum_BKGT1 = carry
        q_BKGTH, mask = _together(q_BKGTH, mask)
        po_BKGTV, pmax_BKGT1, psum_BKGT1 = _block(q_BKGTH, k_BKSH, v_BKSV, mask, scale, alibi)
        new_BKGT1 = jnp.maximum(max_BKGT1, pmax_BKGT1)
        old_BKGT1, add_BKGT1 = jnp.exp(max_BKGT1 - new_BKGT1), jnp.exp(pmax_BKGT1 - new_BKGT1)
        o_BKGTV = o_BKGTV * old_BKGT1 + po_BKGTV * add_BKGT1
        return o_BKGTV, new_BKGT1, sum_BKGT1 * old_BKGT1 + psum_BKGT1 * add_BKGT1

    q_BKGTH, k_BKSH, v_BKSV = _heads_first(q_BTNH, k_BSKH, v_BSKV)

    def step(carry, _):
        accumulated, k_BKSH, v_BKSV, described = carry
        here = mask.with_keys(*described)
        accumulated = merge(accumulated, q_BKGTH, k_BKSH, v_BKSV, here)
        moved = jax.lax.ppermute((k_BKSH, v_BKSV, described), axis, to_next)
        return (accumulated, *moved), None

    # derived from q so that they vary over the mesh as the loop's results do
    zero_BKGT1 = 0.0 * q_BKGTH[..., :1].astype(jnp.float32)
    o_BKGTV = jnp.broadcast_to(zero_BKGT1, (*zero_BKGT1.shape[:-1], v_BKSV.shape[-1]))
    start = (o_BKGTV, zero_BKGT1 + NEGATIVE, zero_BKGT1)
    carry = (start, k_BKSH, v_BKSV, mask.of_keys())
    ((o_BKGTV, _, sum_BKGT1), *_), _ = jax.lax.scan(step, carry, length=n)
    o_BTNV = _heads_last(_normalise(o_BKGTV, sum_BKGT1)).astype(q_BTNH.dtype)
    return checkpoint_name(o_BTNV, "attention")


def pallas_tpu(q_BKGTH, k_BKSH, v_BKSV, mask, scale, alibi, device, interpret: bool = False):
    """The kernels of ``pallas_kernels.tpu``; the arrays are those of one device."""
    from pallas_kernels.tpu.attention import attention as kernel
    from pallas_kernels.tpu.visits import Pattern

    o_BKGTV, _ = kernel(
        q_BKGTH,
        k_BKSH,
        v_BKSV,
        mask.q_positions_BT,
        mask.kv_positions_BS,
        mask.q_segments_BT,
        mask.kv_segments_BS,
        pattern=Pattern(mask.causal, mask.window, mask.in_order),
        scale=scale,
        chip=registry.interpreted_chip(device) if interpret else registry.tpu_chip(device),
        interpret=interpret,
    )
    return o_BKGTV


def pallas_gpu(q_BKGTH, k_BKSH, v_BKSV, mask, scale, alibi, device):
    """The kernels of ``pallas_kernels.gpu``; the arrays are those of one device.

    Each key head is a row of its own. To the kernels a document is an unbroken run of the row: a
    row in which that means something else than :class:`Mask` says comes back as NaN.
    """
    from pallas_kernels.gpu import attention as kernel

    B, K, G, T, H = q_BKGTH.shape

    def whole_tiles(x, axis: int):  # what is added comes after all others, so that nobody sees it
        return jnp.pad(x, [(0, -T % kernel.TILE if a == axis else 0) for a in range(x.ndim)])

    def of_key_heads(x_BT):
        return whole_tiles(jnp.repeat(x_BT, K, axis=0), 1)

    segments_BT = jnp.ones_like(mask.q_positions_BT)
    if mask.q_segments_BT is not None:
        segments_BT = jnp.maximum(mask.q_segments_BT, 0)
    segments_BT = jnp.where(mask.q_positions_BT >= 0, segments_BT, 0)
    o_RTGH = kernel.mfa_attention(
        whole_tiles(q_BKGTH.reshape(B * K, G, T, H).swapaxes(1, 2), 1),
        *(whole_tiles(x.reshape(B * K, T, H), 1) for x in (k_BKSH, v_BKSV)),
        scale=scale,
        window=mask.window,
        segments_BT=of_key_heads(segments_BT),
        positions_BT=of_key_heads(mask.q_positions_BT),
        device=device,
    )
    o_BKGTH = o_RTGH[:, :T].swapaxes(1, 2).reshape(q_BKGTH.shape)
    o_BKGTH = jnp.where(segments_BT[:, None, None, :, None] > 0, o_BKGTH, 0)
    runs_B = are_runs_B(mask.q_positions_BT, segments_BT)
    return jnp.where(runs_B[:, None, None, None, None], o_BKGTH, jnp.nan)


def are_runs_B(positions_BT, segments_BT):
    """Whether a row's documents are unbroken, their numbers rising, and positions rise in each.

    ``segments_BT`` is 0 for padding, which may lie between documents but not within one.
    """
    number_BT, position_BT = segments_BT[:, 1:], positions_BT[:, 1:]
    before_BT = jax.lax.cummax(segments_BT, axis=1)[:, :-1]
    begins_BT = number_BT > before_BT
    goes_on_BT = (number_BT == segments_BT[:, :-1]) & (position_BT > positions_BT[:, :-1])
    return jnp.all((number_BT == 0) | begins_BT | goes_on_BT, axis=1)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What decides whether an implementation can do it (and whether ``auto`` takes it).

    width, value_width: of a head. queries, keys: tokens in a row. alibi: a bias is added.
    in_order: causal, and queries and keys are the same tokens.
    blocks: tokens of a block see each other. two_sided: a window without causality.
    """

    width: int
    value_width: int
    queries: int
    keys: int
    dtype: str
    alibi: bool
    in_order: bool
    blocks: bool = False
    two_sided: bool = False

    def unlike_a_kernel(self) -> str | None:
        """What no kernel computes yet, if this asks for it."""
        if self.alibi:
            return "it adds no ALiBi bias"
        if self.blocks:
            return "it has no blocks of tokens that see each other whatever their order"
        return "its windows look back only" if self.two_sided else None


def _pallas_tpu_unsupported(problem: Problem, device, interpret: bool = False) -> str | None:
    reason = problem.unlike_a_kernel()
    if reason is not None:
        return reason
    from pallas_kernels.tpu import block_sizes

    chip = registry.interpreted_chip(device) if interpret else registry.tpu_chip(device)
    shape = block_sizes.Shape(
        1,
        problem.queries,
        problem.keys,
        problem.width,
        problem.value_width,
        jnp.dtype(problem.dtype).itemsize,
    )
    return block_sizes.unsupported(chip, shape, problem.dtype)


def _pallas_gpu_unsupported(problem: Problem, device) -> str | None:
    from pallas_kernels.gpu.attention import WIDTHS

    reason = problem.unlike_a_kernel()
    if reason is not None:
        return reason
    if problem.dtype != "bfloat16":
        return f"the dtype {problem.dtype} is not bfloat16"
    if problem.width not in WIDTHS or problem.value_width != problem.width:
        widths = ", ".join(map(str, WIDTHS))
        return (
            f"head widths {problem.width} (scores) and {problem.value_width} (values) are not the "
            f"same of {widths}"
        )
    if not problem.in_order:
        return (
            "its queries and keys must be the same tokens in order, which they are not with a "
            "context axis, over a cache or without causality"
        )
    return None


#: compute: (q_BKGTH, k_BKSH, v_BKSV, mask, scale, alibi[, device: kernels only]) -> o_BKGTV
IMPLEMENTATIONS = {
    "pallas_tpu": registry.kernel(
        pallas_tpu,
        registry.needs_tpu,
        _pallas_tpu_unsupported,
        # a decoded token's rows would be padding but for one
        worthwhile=lambda problem: problem.queries >= 128,
    ),
    # asked for by name until it has been measured on a GPU
    "pallas_gpu": registry.kernel(pallas_gpu, registry.needs_hopper, _pallas_gpu_unsupported),
    # by JAX's interpreter, for tests on machines without a TPU
    "pallas_tpu_interpret": registry.Entry(
        functools.partial(pallas_tpu, interpret=True),
        functools.partial(_pallas_tpu_unsupported, interpret=True),
        kernel=True,
    ),
    "xla": registry.Entry(xla),
    "reference": registry.Entry(reference),
}
Implementation = Literal[
    "auto", "pallas_tpu", "pallas_gpu", "pallas_tpu_interpret", "xla", "reference"
]
OPERATION = registry.Operation(
    "attention", IMPLEMENTATIONS, fallback="xla", automatic={"tpu": ("pallas_tpu",)}
)
resolve = OPERATION.resolve


def problem_of(q_BTNH, k_BSKH, v_BSKV, mask: Mask, alibi) -> Problem:
    (_, T, _, H), (_, S, _, V) = q_BTNH.shape, v_BSKV.shape
    return Problem(
        H,
        V,
        T,
        S,
        q_BTNH.dtype.name,
        alibi is not None,
        mask.causal and mask.in_order,
        blocks=mask.q_blocks_BT is not None,
        two_sided=mask.window is not None and not mask.causal,
    )


def attention(
    q_BTNH,
    k_BSKH,
    v_BSKV,
    mask: Mask,
    *,
    scale: float,
    alibi: Literal["linear", "sqrt"] | None = None,
    implementation: str = "auto",
    device: jax.Device | None = None,
):
    """Softmax attention of N query heads on K shared key/value heads.

    Args:
      q_BTNH, k_BSKH, v_BSKV: of one dtype; K divides N.
      mask: what each query may see.
      scale: multiplies the scores.
      alibi: bias ``-slope * distance`` (Press et al.) or ``-slope * sqrt(distance)`` (Step-1).
      implementation: a key of ``IMPLEMENTATIONS`` or ``auto``.
      device: one of those compiled for; None for the default.

    Returns:
      (B, T, N, V) in ``q_BTNH.dtype``. Scores and softmax are float32.

    Raises:
      ValueError: K does not divide N, or see ``registry.Operation.resolve``.
    """
    N, K = q_BTNH.shape[2], k_BSKH.shape[2]
    if N % K:
        raise ValueError(f"{N} query heads are not a multiple of {K} key/value heads")
    device = jax.devices()[0] if device is None else device
    name = resolve(implementation, problem_of(q_BTNH, k_BSKH, v_BSKV, mask, alibi), device)
    arguments = (*_heads_first(q_BTNH, k_BSKH, v_BSKV), mask, scale, alibi)
    entry = IMPLEMENTATIONS[name]
    o_BKGTV = entry.compute(*arguments, device) if entry.kernel else entry.compute(*arguments)
    return _heads_last(o_BKGTV).astype(q_BTNH.dtype)


def weights(
    q_BTNH, k_BSKH, mask: Mask, *, scale: float, alibi: Literal["linear", "sqrt"] | None = None
):
    """What :func:`attention` multiplies values by, all of it: float32 (B, N, T, S)."""
    q_BKGTH, k_BKSH, _ = _heads_first(q_BTNH, k_BSKH, k_BSKH)
    s_BKGTS = _scores_BKGTS(q_BKGTH, k_BKSH, mask, scale, alibi)
    B, K, G, T, S = s_BKGTS.shape
    p_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1) * (s_BKGTS > 0.5 * NEGATIVE)
    return p_BKGTS.reshape(B, K * G, T, S)
