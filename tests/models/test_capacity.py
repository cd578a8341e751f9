"""What finds room with an expert, against its definition token by token, and where nothing drops.

Shape suffixes: B rows, T tokens of a row, N tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from step_jax.evaluation.heldout import make_evaluator
from step_jax.inference.generate import rollout
from step_jax.inference.sampling import SamplingConfig
from step_jax.models.context import Context
from step_jax.models.layers import capacity, moe
from step_jax.models.layers.initialisation import Fixed
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.models.tokens import Tokens
from tests.models import small

E, K = 8, 2
PIECE = 6  # of rows of 16 tokens: no cut of a row in two or four is one of its pieces
MIXTURE = MoE((Experts(E, 16),), Router(K, score="sigmoid", bias=True), capacity=0.75)


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(capacity, "PIECE", PIECE)


def finds_room(chosen_BTK, room: int, piece: int):
    """Which assignments are kept, one token after the other; experts of E are padding."""
    kept_BTK = np.zeros(chosen_BTK.shape, bool)
    for b, row_TK in enumerate(chosen_BTK):
        for t, chosen_K in enumerate(row_TK):
            if t % piece == 0:
                taken = dict.fromkeys(range(E), 0)
            for k, e in enumerate(chosen_K):
                if e < E:
                    kept_BTK[b, t, k] = taken[e] < room
                    taken[e] += 1
    return kept_BTK


def choices(seed: int, rows=8, tokens=16, favoured=3.0):
    """int32 (B, T, K): distinct experts, some of them in most tokens' favour, and padding."""
    rng = np.random.default_rng(seed)
    score_BTE = rng.standard_normal((rows, tokens, E)) + favoured * (np.arange(E) < 2)
    chosen_BTK = np.argsort(-score_BTE, -1)[..., :K].astype(np.int32)
    chosen_BTK[rng.random((rows, tokens)) < 0.1] = E
    return chosen_BTK


@pytest.mark.thorough
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.integers(1, 9), st.sampled_from([1, 5, 6, 16, 50]))
def test_an_expert_takes_the_first_tokens_of_every_piece(seed, room, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capacity, "PIECE", piece)
        chosen_BTK = choices(seed)
        place_BTK, dropped_E = capacity.fitted(chosen_BTK, E, room)
    kept_BTK = finds_room(chosen_BTK, room, piece)
    np.testing.assert_array_equal(place_BTK, np.where(kept_BTK, chosen_BTK, E))
    lost = chosen_BTK[~kept_BTK]
    np.testing.assert_array_equal(dropped_E, [np.sum(lost == e) for e in range(E)])


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_row_that_is_cut_keeps_the_same_assignments(short_pieces, parts):
    sharding, chosen_BTK, room = small.on_mesh(context=parts, data=8 // parts), choices(1), 2
    spec = PartitionSpec("data", "context")

    def local(place_BTK):
        place_BTK, dropped_E = capacity.fitted(place_BTK, E, room, "context")
        return place_BTK, jax.lax.psum(dropped_E, ("data", "context"))

    mapped = sharding.shard_map(local, in_specs=(spec,), out_specs=(spec, PartitionSpec()))
    got = jax.jit(mapped)(chosen_BTK)
    expected = capacity.fitted(chosen_BTK, E, room)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert expected[1].sum() > 20


def test_pieces_that_a_part_of_a_row_touches(short_pieces):
    assert [capacity.pieces_touched(16, parts) for parts in (1, 2, 4, 16)] == [3, 2, 2, 1]
    assert [capacity.pieces_touched(tokens, 4) for tokens in (24, 48)] == [1, 2]
    assert capacity.room(16, K, E, 1.0) == 2 and capacity.room(4, K, E, 1.0) == 1


# --- the layer -----------------------------------------------------------------------------------


def layer_params(c: MoE):
    """Normal weights, and a bias that sends most tokens to two experts of one shard."""
    rng = np.random.default_rng(0)
    p = small.map_specs(
        lambda s: rng.standard_normal(s.shape).astype(np.float32) * 0.5,
        c.specs(small.WIDTH, Fixed(1)),
    )
    return p.replace(bias_E=np.array([0.7, 0.6, 0, 0, 0, 0, 0, 0], np.float32))


X_BTD = np.random.default_rng(5).standard_normal((8, 16, small.WIDTH)).astype(np.float32)


def layer(c: MoE, p, sharding=None):
    """(y_BTD, ExpertStats) of ``X_BTD``, rows of one document each, within the capacity."""
    ctx = Context(
        Tokens.in_order(*X_BTD.shape[:2]), within_capacity=True, record_routing=True,
        execution=small.execution(), sharding=sharding,
    )  # fmt: skip
    return small.run(lambda p, x: c.apply(p, x, ctx), p, X_BTD)


def by_definition(c: MoE, p, chosen_BTK, kept_BTK):
    """(y_BTD, square_E, computed_E) of the kept assignments, in float64."""
    (w,) = jax.tree.map(lambda a: np.asarray(a, np.float64), p.experts)
    score_BTE = 1 / (1 + np.exp(-X_BTD.astype(np.float64) @ p.router_DE))
    weight_BTK = np.take_along_axis(score_BTE, chosen_BTK, -1)
    weight_BTK /= weight_BTK.sum(-1, keepdims=True)
    y_BTD, square_E, computed_E = np.zeros(X_BTD.shape), np.zeros(E), np.zeros(E)
    for b, t, k in zip(*np.nonzero(kept_BTK), strict=True):
        e, x_D = chosen_BTK[b, t, k], X_BTD[b, t]
        gate_F = x_D @ w.gate_EDF[e]
        hidden_F = gate_F / (1 + np.exp(-gate_F)) * (x_D @ w.up_EDF[e])
        y_BTD[b, t] += weight_BTK[b, t, k] * (hidden_F @ w.down_EFD[e])
        square_E[e] += np.mean(np.square(hidden_F))
        computed_E[e] += 1
    return y_BTD, square_E, computed_E


LAYOUTS = {
    "one device": ("gather", {}),
    "gather": ("gather", {"expert": 4, "context": 2}),
    "ragged": ("ragged", {"expert": 2, "context": 4}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropping_is_its_definition_with_every_exchange_and_mesh(short_pieces, layout):
    exchange, axes = LAYOUTS[layout]
    c = replace(MIXTURE, exchange=exchange)
    p, sharding = layer_params(c), small.on_mesh(**axes) if axes else None
    y_BTD, stats = layer(c, p, sharding)
    kept_BTK = finds_room(stats.chosen_BTK, capacity.room(16, K, E, 0.75), PIECE)
    expected_BTD, square_E, computed_E = by_definition(c, p, stats.chosen_BTK, kept_BTK)
    assert 0.2 < 1 - kept_BTK.mean() < 0.8
    np.testing.assert_allclose(y_BTD, expected_BTD, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(stats.load_E - stats.dropped_E, computed_E)
    np.testing.assert_allclose(stats.square_E, square_E, rtol=1e-4)


@pytest.mark.thorough
def test_a_token_is_dropped_by_those_before_it_in_its_row_alone():
    p, batch = layer_params(MIXTURE), small.packed_batch()
    ctx = Context(Tokens.packed(batch), within_capacity=True, execution=small.execution())
    f = jax.jit(lambda x: MIXTURE.apply(p, x, ctx), compiler_options=small.FAST_COMPILE)
    y_BTD, stats = f(X_BTD)
    assert stats.dropped_E.sum() > 10
    later_BTD, others_BTD, padded_BTD = X_BTD.copy(), X_BTD.copy(), X_BTD.copy()
    later_BTD[:, 9:], others_BTD[1:], padded_BTD[batch["segments"] == 0] = 3.0, 3.0, 3.0
    np.testing.assert_allclose(f(later_BTD)[0][:, :9], y_BTD[:, :9], atol=1e-5)
    np.testing.assert_allclose(f(others_BTD)[0][0], y_BTD[0], atol=1e-5)
    text = batch["segments"] > 0
    np.testing.assert_allclose(f(padded_BTD)[0][text], y_BTD[text], atol=1e-5)


@pytest.mark.thorough
def test_nothing_is_dropped_where_text_is_scored(monkeypatch):
    """All tokens to two experts of one shard, in several passes, gradients too."""
    monkeypatch.setattr(moe, "SMALLEST_PASS", 3)  # does not divide a device's 16 tokens
    p = layer_params(MIXTURE)
    p = p.replace(bias_E=np.array([9, 8, 0, 0, 0, 0, 0, 0], np.float32))
    assert MIXTURE.passes(16, 4) == 5 and MIXTURE.passes(2, 4) == 1

    def value(c, sharding):
        ctx = Context(Tokens.in_order(8, 16), execution=small.execution(), sharding=sharding)

        def f(p, x):
            y_BTD, stats = c.apply(p, x, ctx)
            return (y_BTD**2).sum(), (y_BTD, stats)

        (_, out), gradient = small.run(jax.value_and_grad(f, has_aux=True), p, X_BTD)
        return out, gradient

    sharding = small.on_mesh(expert=4, context=2)
    (y_BTD, stats), gradient = value(replace(MIXTURE, exchange="ragged"), sharding)
    (whole_BTD, whole_stats), whole_gradient = value(replace(MIXTURE, capacity=None), None)
    assert not stats.dropped_E.any() and stats.load_E[:2].tolist() == [128, 128]
    for got, expected in ((y_BTD, whole_BTD), (stats, whole_stats), (gradient, whole_gradient)):
        error, leaf = small.worst_leaf(got, expected)
        assert error <= 1e-5, leaf


# --- evaluation and decoding ---------------------------------------------------------------------

TEXT = replace(MIXTURE, capacity=0.25)
FREE = replace(TEXT, capacity=None)


def decoder(mixture: MoE) -> Decoder:
    block = Block(small.KINDS["gqa"], mixture)
    return Decoder(small.WIDTH, (Group(1, (block,)),), small.VOCAB, init=Fixed(0.1))


def params(c: Decoder):
    """With experts loud enough for a dropped one to be heard."""
    p = small.params(c)
    block = p.groups[0][0]
    experts = jax.tree.map(lambda w: 4 * w, block.mlp.experts)
    return p.replace(groups=((block.replace(mlp=block.mlp.replace(experts=experts)),),))


class Rows:
    """Held-out text that is one batch."""

    lossy, bytes = True, 1

    def batches(self, *_, **__):
        return [small.packed_batch()]


@pytest.mark.slow
def test_held_out_text_is_scored_as_without_a_capacity():
    sharding, batch = small.on_mesh(expert=4, fsdp=2), small.packed_batch()
    c = decoder(TEXT)
    p = jax.device_put(params(c), sharding.params(c.specs()))
    scored = make_evaluator(c, small.execution(), sharding, 8, 16)(p, Rows())["nll"]

    def trained(mixture):
        c = decoder(mixture)
        total = small.run(lambda p: small.loss_and_gradient(c, z_loss=0.0)(p, batch)[0], params(c))
        return total / batch["weights"].sum()

    assert scored == pytest.approx(trained(FREE), rel=1e-5)
    assert abs(scored / trained(TEXT) - 1) > 0.01


@pytest.mark.slow
def test_greedy_text_is_that_without_a_capacity_and_without_other_rows():
    prompts_BT = np.random.default_rng(2).integers(0, small.VOCAB, (4, 6)).astype(np.int32)

    def written(mixture, rows):
        c = decoder(mixture)
        greedy = SamplingConfig(temperature=0, max_new_tokens=8)

        def f(p, prompts_BT):
            lengths_B = np.full(len(rows), 6, np.int32)
            key, execution = jax.random.key(0), small.execution()
            return rollout(p, c, prompts_BT, lengths_B, key, greedy, execution=execution)

        return small.run(f, params(c), prompts_BT[rows])

    unlimited = written(FREE, [0, 1, 2, 3])
    together = written(TEXT, [0, 1, 2, 3])
    alone = written(TEXT, [2])
    assert len(set(map(tuple, together.tokens_BN))) > 1
    np.testing.assert_array_equal(together.tokens_BN, unlimited.tokens_BN)
    np.testing.assert_array_equal(alone.tokens_BN[0], together.tokens_BN[2])
    np.testing.assert_allclose(together.logprobs_BN, unlimited.logprobs_BN, atol=1e-5)
    np.testing.assert_allclose(alone.logprobs_BN[0], together.logprobs_BN[2], atol=1e-5)
