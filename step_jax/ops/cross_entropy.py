"""Projection to the vocabulary and cross-entropy: full logits never exist.

Shape suffixes: B batch, T sequence, D width, V vocabulary; on a mesh the batch is R pieces of b
rows and the sequence C pieces of n chunks of t tokens, one device holding one piece.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from step_jax.core.fsdp import add_up, whole
from step_jax.core.sharding import Sharding, vary_alike
from step_jax.ops import registry
from step_jax.ops.einsum import product


def cross_entropy(
    x_BTD,
    w_DV,
    targets_BT,
    weights_BT,
    *,
    z_loss: float = 0.0,
    chunks: int = 1,
    sharding: Sharding | None = None,
    implementation: str = "auto",
):
    """Weighted sum of ``-log p(target) + z_loss * logsumexp^2`` (z-loss: arXiv 2204.02311, 5.1).

    Args:
      x_BTD: hidden states in the compute dtype.
      w_DV: the head, in any dtype; the products are made in ``x_BTD.dtype`` and accumulated in
        float32.
      targets_BT: int32.
      weights_BT: float32; may be negative (a policy gradient's advantages) and is differentiable.
      z_loss: coefficient.
      chunks: into how many parts each sequence is cut (the nearest divisor below is used).
      sharding: of the arrays; None on one device.
      implementation: a key of ``IMPLEMENTATIONS`` or ``auto``.

    Returns:
      (total, nll_BT): the differentiable float32 sum, and the float32 negative log-likelihood of
      every target (no gradient flows through it).

    Raises:
      ValueError: arrays that the mesh does not divide or the implementation does not support, or
        see ``registry.Operation.resolve``.
    """
    name = resolve(implementation, Problem.of(sharding), _device(sharding))
    weights_BT = weights_BT.astype(jnp.float32)
    return IMPLEMENTATIONS[name].compute(
        x_BTD, w_DV, targets_BT, weights_BT, z_loss, chunks, sharding
    )


def _device(sharding: Sharding | None) -> jax.Device:
    """One of those compiled for."""
    return jax.devices()[0] if sharding is None else sharding.mesh.devices.flat[0]


def chunked(x_BTD, w_DV, targets_BT, weights_BT, z_loss, chunks, sharding: Sharding | None):
    """Chunk by chunk, the gradients in the same sweep as the loss.

    The logits are neither stored nor computed twice; only float32 dw (D, V) and dx are kept for the
    backward pass. Chunks are cut inside a device's piece, and the devices add up their dw once,
    after the last chunk.
    """
    split, joined = pieces(targets_BT.shape, chunks, sharding)
    total, nll_nRbCt = _cross_entropy(
        split(x_BTD), w_DV, split(targets_BT), split(weights_BT), z_loss, sharding
    )
    return total, joined(nll_nRbCt)


def pieces(shape: tuple[int, int], chunks: int, sharding: Sharding | None):
    """How (B, T) tokens are cut into chunks, and joined again; no element leaves its device.

    Two functions: (B, T, ...) -> (n, R, b, C, t, ...), and (n, R, b, C, t) -> (B, T).
    """
    B, T = shape
    R, C = (1, 1) if sharding is None else (sharding.ways("batch"), sharding.ways("sequence"))
    if B % R or T % C:
        raise ValueError(f"a mesh with {R} x {C} pieces of a batch does not divide {B} x {T}")
    local = T // C
    chunks = max(n for n in range(1, min(chunks, local) + 1) if local % n == 0)

    def split(a):
        a = a.reshape(R, B // R, C, chunks, local // chunks, *a.shape[2:])
        a = _constrain(sharding, a, "batch", None, "sequence", *(None,) * (a.ndim - 3))
        return jnp.moveaxis(a, 3, 0)

    return split, lambda a_nRbCt: jnp.moveaxis(a_nRbCt, 0, 3).reshape(B, T)


def _constrain(sharding: Sharding | None, x, *axes):
    return x if sharding is None else sharding.constrain(x, *axes)


def _chunk(x_RbCtD, w_DV, targets_RbCt, z_loss):
    """(nll, cost, logits, logsumexp, one-hot mask) of one chunk, all float32."""
    logits_RbCtV = product("RbCtD,DV->RbCtV", x_RbCtD, w_DV, jnp.float32)
    lse_RbCt = jax.nn.logsumexp(logits_RbCtV, axis=-1)
    # a comparison, not a gather: it stays local when the vocabulary is sharded
    hot_RbCtV = jnp.arange(w_DV.shape[1], dtype=jnp.int32) == targets_RbCt[..., None]
    nll_RbCt = lse_RbCt - jnp.sum(jnp.where(hot_RbCtV, logits_RbCtV, 0.0), axis=-1)
    return nll_RbCt, nll_RbCt + z_loss * jnp.square(lse_RbCt), logits_RbCtV, lse_RbCt, hot_RbCtV


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(x_nRbCtD, w_DV, targets_nRbCt, weights_nRbCt, z_loss, sharding):
    w_DV = whole(w_DV.astype(x_nRbCtD.dtype), ("embed", "vocab"), sharding)

    def body(_, inputs):
        nll_RbCt, cost_RbCt, *_ = _chunk(inputs[0], w_DV, inputs[1], z_loss)
        return None, (nll_RbCt, cost_RbCt)

    _, (nll_nRbCt, cost_nRbCt) = jax.lax.scan(body, None, (x_nRbCtD, targets_nRbCt))
    return jnp.sum(weights_nRbCt * cost_nRbCt), nll_nRbCt


def _forward(x_nRbCtD, w_stored_DV, targets_nRbCt, weights_nRbCt, z_loss, sharding):
    w_DV = whole(w_stored_DV.astype(x_nRbCtD.dtype), ("embed", "vocab"), sharding)

    def chunk(x_RbCtD, targets_RbCt, weights_RbCt):
        nll_RbCt, cost_RbCt, logits_RbCtV, lse_RbCt, hot_RbCtV = _chunk(
            x_RbCtD, w_DV, targets_RbCt, z_loss
        )
        p_RbCtV = jnp.exp(logits_RbCtV - lse_RbCt[..., None])
        d_RbCtV = p_RbCtV * (1.0 + 2.0 * z_loss * lse_RbCt)[..., None] - hot_RbCtV
        return d_RbCtV * weights_RbCt[..., None], (nll_RbCt, cost_RbCt)

    dx, dw_DV, (nll, cost) = gradients(
        chunk, (x_nRbCtD, targets_nRbCt, weights_nRbCt), w_DV, sharding
    )
    residuals = (dx, dw_DV, cost, targets_nRbCt, jnp.zeros((), w_stored_DV.dtype))
    return (jnp.sum(weights_nRbCt * cost), nll), residuals


def gradients(chunk, inputs, w_DV, sharding: Sharding | None):
    """(dx_nRbCtD, float32 dw_DV, more) of a function of logits, chunk by chunk.

    Args:
      chunk: (one chunk of every input) -> (gradient of the logits (R, b, C, t, V), more).
      inputs: x_nRbCtD first.
      w_DV: the whole head, in the dtype of x.
    """

    def body(dw_RCDV, inputs):
        x_RbCtD = inputs[0]
        d_RbCtV, more = chunk(*inputs)
        d_RbCtV = d_RbCtV.astype(x_RbCtD.dtype)
        dx_RbCtD = product("RbCtV,DV->RbCtD", d_RbCtV, w_DV)
        dw_RCDV += product("RbCtD,RbCtV->RCDV", x_RbCtD, d_RbCtV, jnp.float32)
        return layout(dw_RCDV), (dx_RbCtD, more)

    def layout(dw_RCDV):  # every device its own sum: nothing crosses the mesh inside the loop
        return _constrain(sharding, dw_RCDV, "batch", "sequence", None, "vocab")

    R, C = inputs[0].shape[1], inputs[0].shape[3]
    start = layout(jnp.zeros((R, C, *w_DV.shape), jnp.float32))
    dw_RCDV, (dx, more) = jax.lax.scan(body, start, inputs)
    if sharding is None:
        return dx, jnp.sum(dw_RCDV, (0, 1)), more
    return dx, add_up(dw_RCDV, ("embed", "vocab"), sharding), more


def _backward(z_loss, sharding, residuals, cotangents):
    dx, dw_DV, cost, targets, w_like = residuals
    g, _ = cotangents  # nll carries no gradient by contract
    zero = jnp.zeros(targets.shape, jax.dtypes.float0)
    return (g * dx).astype(dx.dtype), (g * dw_DV).astype(w_like.dtype), zero, g * cost


_cross_entropy.defvjp(_forward, _backward)


def pallas_tpu(*arguments, interpret: bool = False):
    """The kernel of this project for TPUs: not even a chunk's logits exist in HBM.

    Its gradients make the logits again, for 10 N D V operations instead of 6, so it is for memory
    and for losses without gradients. ``chunks`` has no meaning here.
    """
    from pallas_kernels.tpu import cross_entropy as kernel  # not paid for elsewhere

    device = _device(arguments[-1])
    chip = registry.interpreted_chip(device) if interpret else registry.tpu_chip(device)
    compute = functools.partial(kernel.cross_entropy, chip=chip, interpret=interpret)
    return _on_every_piece(compute, *arguments)


def pallas_gpu(*arguments):
    """The kernel of this project for Hopper GPUs: bfloat16 hidden states, V a multiple of 128.

    The forward pass has no logits in HBM, the backward pass makes the gradient of those of a part
    of the vocabulary at a time, for 8 N D V operations in all. ``chunks`` has no meaning here.
    """
    from pallas_kernels.gpu import cross_entropy as kernel  # not paid for elsewhere

    compute = functools.partial(kernel.cross_entropy, device=_device(arguments[-1]))
    return _on_every_piece(compute, *arguments)


def _on_every_piece(compute, x_BTD, w_DV, targets_BT, weights_BT, z_loss, chunks, sharding):
    """``compute``, a kernel, on every device's tokens and the whole head."""

    def local(x_BTD, w_DV, targets_BT, weights_BT):
        x_BTD, w_DV, targets_BT, weights_BT = vary_alike(x_BTD, w_DV, targets_BT, weights_BT)
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        target_N, weight_N = targets_BT.reshape(-1), weights_BT.reshape(-1)
        total, nll_N = compute(x_ND, w_DV, target_N, weight_N, z_loss)
        return total, nll_N.reshape(targets_BT.shape)

    if sharding is None or sharding.mesh.size == 1:
        return local(x_BTD, w_DV, targets_BT, weights_BT)
    tokens = sharding.spec(("batch", "sequence"), targets_BT.shape)
    axes = tuple(jax.tree.leaves(tuple(tokens)))  # an entry is a name, several, or None

    def piece(*arrays):
        total, nll_BT = local(*arrays)
        return jax.lax.psum(total, axes), nll_BT

    f = jax.shard_map(
        piece,
        mesh=sharding.mesh,
        in_specs=(P(*tokens, None), P(), tokens, tokens),
        out_specs=(P(), tokens),
    )
    return f(x_BTD, w_DV, targets_BT, weights_BT)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What decides whether an implementation can do it.

    vocabulary_pieces: into which the mesh cuts the head.
    """

    vocabulary_pieces: int = 1

    @classmethod
    def of(cls, sharding: Sharding | None) -> Problem:
        return cls() if sharding is None else cls(sharding.ways("vocab"))


def whole_vocabulary(problem: Problem, device) -> str | None:
    """What the kernels need of a mesh, if it is not so."""
    if problem.vocabulary_pieces == 1:
        return None
    return (
        "it needs the whole vocabulary, which is cut into "
        f"{problem.vocabulary_pieces} pieces over the tensor axis"
    )


#: compute: (x_BTD, w_DV, targets_BT, weights_BT, z_loss, chunks, sharding) -> (total, nll_BT)
IMPLEMENTATIONS = {
    "chunked": registry.Entry(chunked),
    # asked for by name: the kernels do more operations
    "pallas_tpu": registry.kernel(pallas_tpu, registry.needs_tpu, whole_vocabulary),
    "pallas_gpu": registry.kernel(pallas_gpu, registry.needs_hopper, whole_vocabulary),
    # by JAX's interpreter, for tests on machines without a TPU
    "pallas_tpu_interpret": registry.Entry(
        functools.partial(pallas_tpu, interpret=True), whole_vocabulary, kernel=True
    ),
}
Implementation = Literal["auto", "chunked", "pallas_tpu", "pallas_gpu", "pallas_tpu_interpret"]
OPERATION = registry.Operation("cross-entropy", IMPLEMENTATIONS, fallback="chunked")
resolve = OPERATION.resolve
