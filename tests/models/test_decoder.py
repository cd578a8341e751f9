"""One model, many ways to compute it: scan, remat, packing, caching, prediction heads."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core.errors import ConfigError
from step_jax.models.context import Context
from step_jax.models.layers.attention import MFA, MHA
from step_jax.models.layers.positions import Alibi
from step_jax.models.text.decoder import Decoder, Group
from step_jax.models.tokens import Tokens
from step_jax.training.losses.text import token_losses, token_parts
from step_jax.training.step import LossOutput
from tests.models import small

ALL = tuple(small.KINDS)


@functools.cache
def computed(*kinds, **changes):
    c = small.decoder(*kinds)
    f = small.loss_and_gradient(c, **changes)
    return small.run(f, small.params(c), small.packed_batch(rows=2))


def assert_same(got, expected, tolerance):
    assert abs(got[0] - expected[0]) <= tolerance * abs(expected[0])
    error, leaf = small.worst_leaf(got[1], expected[1])
    assert error <= tolerance, leaf


@pytest.mark.thorough
@pytest.mark.parametrize(
    "changes", [{"scan": False}, {"remat": "dots"}, {"remat": "full"}], ids=str
)
def test_scan_and_remat_change_nothing(changes):
    assert_same(computed("mfa", **changes), computed("mfa"), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("scan", [True, False])
def test_scan_and_remat_change_nothing_for_any_kind(scan, remat):
    assert_same(computed(*ALL, scan=scan, remat=remat), computed(*ALL), 1e-6)


def equations(jaxpr):
    for e in jaxpr.eqns:
        yield e
        for value in jax.tree.leaves(e.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("repeat,scan", [(2, True), (2, False), (1, True)])
def test_recomputation_is_kept_from_being_merged_away(repeat, scan):
    """Outside of a loop the compiler would find the recomputed values in the forward pass."""
    c = small.decoder("mfa", repeat=repeat)
    f = small.loss_and_gradient(c, scan=scan, remat="full")
    jaxpr = jax.make_jaxpr(f)(small.params(c), small.packed_batch(rows=2))
    layers = [e.params for e in equations(jaxpr.jaxpr) if e.params.get("policy") is not None]
    kept = [params["prevent_cse"] for params in layers]
    assert kept and set(kept) == {not (scan and repeat > 1)}


@pytest.mark.slow
def test_full_remat_holds_less_memory_than_none():
    def held(remat):
        c = small.decoder("mha", repeat=8)
        f = small.loss_and_gradient(c, remat=remat)
        args = small.params(c), small.packed_batch(rows=4, length=32)
        compiled = jax.jit(f).lower(*args).compile(compiler_options=small.FAST_COMPILE)
        return compiled.memory_analysis().temp_size_in_bytes

    assert held("full") < 0.5 * held("none")


# --- packing -----------------------------------------------------------------------------------


def two_lengths(rng):
    """A packed batch of documents of 5 and 7 tokens with padding, and both lengths alone."""
    layout = [(5, 7), (7, 5), (7,), (5, 5)]
    documents = {n: [] for n in (5, 7)}
    packed = {
        k: np.zeros((len(layout), 14), np.int32)
        for k in ("tokens", "targets", "segments", "positions")
    }
    packed["weights"] = np.zeros((len(layout), 14), np.float32)
    packed["tokens"] += 3  # padding holds a real token: it must not matter
    for r, lengths in enumerate(layout):
        start = 0
        for i, n in enumerate(lengths):
            tokens = rng.integers(0, small.VOCAB, n).astype(np.int32)
            alone = {
                "tokens": tokens,
                "targets": np.append(tokens[1:], 0).astype(np.int32),
                "weights": np.append(rng.uniform(0.5, 2, n - 1), 0).astype(np.float32),
                "segments": np.ones(n, np.int32),
                "positions": np.arange(n, dtype=np.int32),
            }
            documents[n].append(alone)
            for k, v in alone.items():
                packed[k][r, start : start + n] = v * (i + 1) if k == "segments" else v
            start += n
    stacked = [
        {k: np.stack([d[k] for d in group]) for k in group[0]} for group in documents.values()
    ]
    return packed, stacked


@pytest.mark.slow
def test_packed_equals_each_document_alone():
    """Loss and every gradient: RoPE, both ALiBi forms, windows, all kinds, two prediction heads."""
    c = small.decoder(
        MHA(4, 8, window=3, position=Alibi()),
        MHA(4, 8, kv_heads=2, window=4),
        MFA(3, 8, position=Alibi("sqrt")),
        "kr",
        "mla",
        "mfa",
        repeat=1,
        mtp=2,
    )
    p = small.params(c)
    packed, groups = two_lengths(np.random.default_rng(0))

    def alone(p, batch):
        ctx = Context(Tokens(batch["positions"]), execution=small.execution())  # no segments at all
        return small.summed(LossOutput(token_parts(p, c, batch, ctx, 1e-2)[0]))

    got = small.run(small.loss_and_gradient(c), p, packed)
    parts = [small.run(jax.value_and_grad(alone), p, batch) for batch in groups]
    expected = jax.tree.map(lambda *a: np.sum(a, axis=0), *parts)
    assert_same(got, expected, 1e-5)


# --- multi-token prediction --------------------------------------------------------------------


@pytest.mark.slow
def test_prediction_heads_follow_their_equations():
    """2412.19437, eq. 21-25, written out without packing: head k reads tokens i+k, gives i+k+1."""
    c = small.decoder("mfa", repeat=1, mtp=2)
    c = dataclasses.replace(c, mtp=dataclasses.replace(c.mtp, weight=0.7))
    p, T = small.params(c), 10
    tokens = np.random.default_rng(0).integers(0, small.VOCAB, (1, T + 1)).astype(np.int32)
    positions = np.arange(T, dtype=np.int32)[None]
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((1, T), np.float32),
        "segments": np.ones((1, T), np.int32),
    }
    ctx = Context(Tokens(positions), execution=small.execution())

    def nll(p, x, targets):
        logp = jax.nn.log_softmax(c.logits(p, x, ctx))
        return -jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]

    def by_hand(p):
        x, *_ = c.hidden(p, tokens[:, :T], ctx)
        total = jnp.mean(nll(p, x, tokens[:, 1 : T + 1]))
        for k in (1, 2):
            read = np.zeros((1, T), np.int32)
            read[:, : T + 1 - k] = tokens[:, k : T + 1][:, :T]
            x, _ = c.mtp.apply(p.mtp[k - 1], c.norm, x, c.embed(p, read, ctx), ctx)
            last = T - k  # the positions whose token k + 1 ahead exists
            total += 0.7 / 2 * jnp.mean(nll(p, x[:, :last], tokens[:, k + 1 : T + 1]))
        return total

    def loss(p):
        parts, metrics, _ = token_parts(p, c, batch, ctx)
        weights = {name: part.weight for name, part in parts.items()}
        return sum(part.value() for part in parts.values()), (weights, metrics)

    (got, (weights, metrics)), gradient = small.run(jax.value_and_grad(loss, has_aux=True), p)
    assert_same((got, gradient), small.run(jax.value_and_grad(by_hand), p), 1e-5)
    assert weights == {"next_token": T, "mtp1": T - 1, "mtp2": T - 2}
    assert [float(metrics[m][1]) for m in sorted(metrics)] == [T, T - 1, T - 2]


# --- cached decoding ---------------------------------------------------------------------------


@pytest.mark.slow
def test_cached_calls_equal_the_full_forward_pass():
    """Every kind and window, rows of unequal lengths: prompt, a second piece, single tokens.

    All in one stack; by default tests/inference/test_cached_decoding.py has every kind alone.
    """
    kinds = [MHA(4, 8, window=3), "gqa", "mfa", MFA(3, 8, value="gated_key", window=4), "kr", "mla"]
    c = small.decoder(*kinds, repeat=2)
    p, T = small.params(c), 12
    tokens = np.random.default_rng(1).integers(0, small.VOCAB, (2, T)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))

    def full(p):
        return c.hidden(p, tokens, Context(Tokens(positions), execution=small.execution()))[0]

    def call(fresh, p, tokens, positions, cache):
        ctx = Context(Tokens(positions), fresh=fresh, execution=small.execution())
        return c.hidden(p, tokens, ctx, cache)[:2]

    expected = small.run(full, p)
    cache, done = c.init_cache(2, T, jnp.float32), [0, 0]
    step = jax.jit(call, static_argnums=0, compiler_options=small.FAST_COMPILE)
    for lengths in [(5, 3), (3, 2), (1, 1), (1, 0), (1, 1), (1, 1)]:
        width = max(lengths)
        piece, at = np.zeros((2, width), np.int32), np.full((2, width), -1, np.int32)
        for row, n in enumerate(lengths):
            at[row, :n] = np.arange(done[row], done[row] + n)
            piece[row, :n] = tokens[row, at[row, :n]]
        x, cache = step(done == [0, 0], p, piece, at, cache)
        for row, n in enumerate(lengths):
            want = expected[row, done[row] : done[row] + n]
            np.testing.assert_allclose(x[row, :n], want, rtol=1e-4, atol=1e-5)
            done[row] += n
    assert cache.lengths_B.tolist() == done == [12, 8]
    slots = [layer[0].shape[2] for layer in cache.layers[0]]
    assert slots == [3, T, T, 4, T, T]  # a windowed layer holds a window


# --- odds and ends -----------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("tied", [False, True])
def test_loss_of_tokens_is_that_of_the_logits(tied):
    c = small.decoder("mfa", repeat=1, tied=tied)
    p, batch = small.params(c), small.packed_batch(rows=2)
    assert (p.head_DV is None) == tied
    ctx = Context(Tokens.packed(batch), execution=small.execution())

    def both(p):
        x, *_ = c.hidden(p, batch["tokens"], ctx)
        nll = token_losses(p, c, x, batch["targets"], batch["weights"], ctx)[1]
        logp = jax.nn.log_softmax(c.logits(p, x, ctx))
        return nll, -jnp.take_along_axis(logp, batch["targets"][..., None], -1)[..., 0]

    nll, expected = small.run(both, p)
    np.testing.assert_allclose(nll, expected, rtol=1e-5)


def test_bad_models_say_what_to_do():
    with pytest.raises(ConfigError, match="vocab is 0: set it, or let a tokenizer"):
        small.decoder("mfa", vocab=0).specs()
    with pytest.raises(ConfigError, match="repeat of at least 1"):
        Group(0, ()).validate()
    with pytest.raises(ConfigError, match="positive width"):
        Decoder(0, ()).validate()
