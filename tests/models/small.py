"""Tiny decoders, packed batches and parameters that the model tests share.

Parameters are drawn with NumPy straight from the table (every leaf far from zero, so that every
gradient is alive), which costs no compilation. Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.core.spec import map_specs
from step_jax.inference.slots import Decoding
from step_jax.models.context import Context, Execution
from step_jax.models.layers.attention import MFA, MHA, MLA
from step_jax.models.layers.initialisation import Fixed
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.norm import RMSNorm
from step_jax.models.text.decoder import MTP, Block, Decoder, Group
from step_jax.models.tokens import Tokens
from step_jax.training.losses.text import routing_loss, token_parts
from step_jax.training.step import LossOutput

WIDTH, VOCAB, HEADS = 32, 64, 8
MLP = SwiGLU(48)

KINDS = {
    "mha": MHA(HEADS, 8, window=5, qk_norm=RMSNorm()),
    "gqa": MHA(HEADS, 8, kv_heads=2, output_gate=True),
    "mfa": MFA(HEADS, 8, query_rank=16, query_norm=RMSNorm()),
    "kr": MFA(HEADS, 8, value="gated_key"),
    "mla": MLA(HEADS, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8, query_rank=16),
}

#: Half the compile time; what is compared here does not depend on how well LLVM optimises.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def quick_programs(decoding: Decoding):
    """What ``inference.slots.programs`` gives, compiled quickly: to be put in its place."""
    return decoding.programs(FAST_COMPILE)


def decoder(*kinds, repeat: int = 2, mtp: int = 0, **changes) -> Decoder:
    """A decoder of ``repeat`` turns through the attention ``kinds`` (names or configurations)."""
    blocks = tuple(Block(KINDS.get(k, k) if isinstance(k, str) else k, MLP) for k in kinds)
    heads = MTP(mtp, blocks[-1]) if mtp else None
    fields = {"width": WIDTH, "vocab": VOCAB, "init": Fixed(0.1), "mtp": heads} | changes
    return Decoder(layers=(Group(repeat, blocks),), **fields)


def params(c: Decoder, seed: int = 0):
    """Normal float32 arrays for the table of ``c``: deviation 0.15, vectors around 0.8."""
    rng = np.random.default_rng(seed)

    def leaf(spec):
        centre = 0.8 if spec.role == "vector" else 0.0
        return (centre + 0.15 * rng.standard_normal(spec.shape)).astype(np.float32)

    return map_specs(leaf, c.specs())


def packed_batch(rows: int = 8, length: int = 16, vocab: int = VOCAB, seed: int = 0):
    """Rows of two or three documents and, in most rows, padding at the end."""
    rng = np.random.default_rng(seed)
    segments, positions = np.zeros((2, rows, length), np.int32)
    for r in range(rows):
        cuts = sorted(rng.choice(np.arange(2, length + 1), 3, replace=False))
        for i, (start, stop) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
            segments[r, start:stop], positions[r, start:stop] = i + 1, np.arange(stop - start)
    tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    same = (segments > 0) & (np.roll(segments, -1, 1) == segments)
    same[:, -1] = False
    return {
        "tokens": tokens,
        "targets": np.where(same, np.roll(tokens, -1, 1), 0).astype(np.int32),
        "weights": same.astype(np.float32),
        "segments": segments,
        "positions": positions,
    }


def with_pictures(batch, axes: int, seed: int = 0):
    """The batch with blocks of two to four neighbours in its rows, some in two documents, and with
    places of several coordinates."""
    rng = np.random.default_rng(seed)
    segments = batch["segments"]
    number = np.cumsum(rng.random(segments.shape) < 0.35, axis=1)
    places = rng.integers(0, 9, (*segments.shape, axes))
    return batch | {
        "blocks": np.where(number % 2 == 0, number, -1).astype(np.int32),
        "places": places.astype(np.int32),
    }


def tokens_of(batch) -> Tokens:
    """Those of a packed batch, with or without pictures."""
    pictures = batch.get("places"), batch.get("blocks")
    return Tokens(batch["positions"], batch["segments"], *pictures)


def documents(batch):
    """Every document of a packed batch alone, as a batch of one unpadded row."""
    for r, segments in enumerate(batch["segments"]):
        for s in range(1, segments.max() + 1):
            where = segments == s
            yield {k: v[r][where][None] for k, v in batch.items()} | {
                "segments": np.ones((1, where.sum()), np.int32)
            }


def execution(**changes) -> Execution:
    return Execution(**({"dtype": "float32", "loss_chunks": 2} | changes))


def loss_and_gradient(c: Decoder, sharding: Sharding | None = None, z_loss=1e-2, **changes):
    """(params, batch) -> (loss sum, gradient tree), to be jitted."""

    joint = routing_loss(c)

    def loss(p, batch):
        how = {"sharding": sharding, "execution": execution(**changes)}
        ctx = Context(tokens_of(batch), within_capacity=True, **how)
        return summed(LossOutput(*token_parts(p, c, batch, ctx, z_loss), joint))

    return jax.value_and_grad(loss)


def summed(out: LossOutput):
    """A loss as a sum over its targets: it adds up over rows but for the experts' balance."""
    parts = sum(part.coefficient * part.total for part in out.parts.values())
    joint = {} if out.joint is None else out.joint(out.sums)
    return parts + sum(joint.values()) * out.parts["next_token"].weight


def abstract(c: Decoder, sharding: Sharding, tokens: int):
    """(params, packed batch of 8 rows) as shapes on a mesh of devices that need not be here."""
    of_tokens = sharding.named(("batch", "sequence"), (8, tokens))

    def parameter(s):
        layout = sharding.named(s.axes, s.shape)
        return jax.ShapeDtypeStruct(s.shape, np.float32, sharding=layout)

    shapes = {
        k: jax.ShapeDtypeStruct((8, tokens), v.dtype, sharding=of_tokens)
        for k, v in packed_batch().items()
    }
    return map_specs(parameter, c.specs()), shapes


def on_mesh(**config) -> Sharding:
    return Sharding.build(MeshConfig(**config))


def compile_on(sharding: Sharding, c: Decoder, p, batch, **changes):
    """(compiled loss and gradient, arguments laid out on the mesh)."""
    layout = sharding.params(c.specs())

    def place(a):
        axes = ("batch", "sequence", None)[: a.ndim]
        return jax.device_put(a, sharding.named(axes, a.shape))

    args = (jax.device_put(p, layout), {k: place(v) for k, v in batch.items()})
    f = jax.jit(
        loss_and_gradient(c, sharding, **changes), out_shardings=(sharding.replicated(), layout)
    )
    return f.lower(*args).compile(compiler_options=FAST_COMPILE), args


def run(f, *args):
    """``f(*args)`` under jit, compiled quickly, on one device, as NumPy arrays."""
    return jax.device_get(jax.jit(f).lower(*args).compile(compiler_options=FAST_COMPILE)(*args))


def worst_leaf(got, expected) -> tuple[float, str]:
    """(largest error of a leaf relative to the norm of what was expected, its name)."""

    def error(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        norm = np.linalg.norm(b)
        return float(np.linalg.norm(a - b) / norm) if norm else float(np.linalg.norm(a))

    errors = jax.tree.leaves_with_path(jax.tree.map(error, got, expected))
    return max((e, jax.tree_util.keystr(path, simple=True, separator="/")) for path, e in errors)
