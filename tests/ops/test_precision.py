"""``execution.dtype: float32`` is float32 in every product, on every kind of device."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import Precision

from step_jax.models.context import Context
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.models.tokens import Tokens
from step_jax.models.video.vae import VideoVAE
from step_jax.ops.token_logprobs import token_logprobs
from step_jax.training.learner import LoRA, tables, view
from tests.models import small
from tests.models.test_dit import MODEL as DIT
from tests.models.test_dit import pack, samples

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
MIXTURE = MoE((Experts(4, 16),), Router(2), shared=8)


def products(jaxpr) -> Iterator:
    """Every product of a program, in its loops and calls too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from products(getattr(inner, "jaxpr", inner))


def is_program(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def checked(f, *args) -> int:
    """How many products of float32 a function has; all must say that they mean it."""
    found = 0
    for equation in products(jax.make_jaxpr(f)(*args).jaxpr):
        if all(v.aval.dtype == jnp.float32 for v in equation.invars[:2]):
            asked = equation.params["precision"]
            assert asked in (Precision.HIGHEST, (Precision.HIGHEST,) * 2), equation
            found += 1
    return found


def decoder(kind: str, mlp=small.MLP) -> Decoder:
    return Decoder(small.WIDTH, (Group(1, (Block(small.KINDS[kind], mlp),)),), small.VOCAB)


DECODERS = {"mfa": decoder("kr"), "mla": decoder("mla"), "moe": decoder("gqa", MIXTURE)}


@pytest.mark.parametrize("name", DECODERS)
def test_training_of_a_decoder(name):
    c = DECODERS[name]
    p, batch = small.params(c), small.packed_batch(2)
    assert checked(small.loss_and_gradient(c), p, batch) > 20
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p)
    routed = checked(small.loss_and_gradient(c, dtype="bfloat16"), half, batch)
    assert (routed > 0) == (name == "moe")  # its router is float32 whatever the rest is


def test_writing_and_likelihoods():
    c = decoder("mla")
    p, tokens_BT = small.params(c), small.packed_batch(2)["tokens"]

    def logits(p):
        ctx = Context(Tokens.in_order(*tokens_BT.shape), execution=small.execution())
        x_BTD, *_ = c.hidden(p, tokens_BT, ctx)
        return c.logits(p, x_BTD, ctx), token_logprobs(x_BTD, p.head_DV, tokens_BT)[0].sum()

    assert checked(jax.grad(lambda p: logits(p)[0].sum() + logits(p)[1]), p) > 20


def test_packs_of_a_diffusion_transformer():
    p, (x_BTP, time_BG, rows) = small.params(DIT), pack(list(samples()), 14, segments=True)

    def loss(p):
        return DIT.apply(p, x_BTP, time_BG, rows, small.execution()).sum()

    assert checked(jax.grad(loss), p) > 20


def test_convolutions_and_their_gradients():
    vae = VideoVAE(2, 4, (8,), (8,), 1, 1, temporal=(), head_width=16, groups=4, chunk=5)
    p, clip_BTHWC = small.params(vae), np.zeros((1, 5, 8, 8, 3), np.float32)

    def loss(p):
        return vae.decode(p, vae.encode(p, clip_BTHWC)[0]).sum()

    assert checked(jax.grad(loss), p) > 20


def test_adapters_are_added_to_their_weights_in_float32():
    """On every device the same sum, which a checkpoint's loader and an export take."""
    c, lora = decoder("mfa"), LoRA(rank=2)
    model, kept = tables(c.specs(), lora=lora)
    p = small.map_specs(lambda s: np.zeros(s.shape, np.float32), kept)
    assert checked(lambda p: view(model, p, lora), p) > 5
