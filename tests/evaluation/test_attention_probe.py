"""The attention probe: what its scores are of, and that it sees what attention does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.evaluation.attention_probe import beside, make_probe, repeated_tokens, scores_N
from step_jax.models.context import Execution
from step_jax.ops import attention as ops
from tests.models import small

ONE_DEVICE = Sharding.build(MeshConfig(), jax.devices()[:1])


def test_rows_are_a_random_text_that_comes_twice():
    tokens_BT = repeated_tokens(vocab=50, length=12, rows=3)
    np.testing.assert_array_equal(tokens_BT[:, :6], tokens_BT[:, 6:])
    assert len({tuple(row) for row in tokens_BT}) == 3 and tokens_BT.max() < 50


def test_a_head_that_looks_where_a_score_is_about_scores_one():
    T = 12
    tokens_T = np.tile(np.random.default_rng(0).permutation(T // 2), 2)
    weights_BNTT = np.zeros((1, 3, T, T), np.float32)
    for i in range(T):
        weights_BNTT[0, 0, i, max(i - 1, 0)] = 1
        earlier = [j for j in range(i) if tokens_T[j] == tokens_T[i]]
        weights_BNTT[0, 1, i, earlier[-1] + 1 if earlier else 0] = 1
        weights_BNTT[0, 2, i, i] = 1
    scores = scores_N(jnp.asarray(weights_BNTT))
    np.testing.assert_allclose(scores["previous_token"], [1, 0, 0], atol=0.2)
    assert scores["previous_token"][0] == 1
    np.testing.assert_array_equal(scores["induction"], [0, 1, 0])


@pytest.mark.thorough
@pytest.mark.parametrize("alibi", [None, "linear"])
def test_the_weights_are_those_that_values_are_multiplied_by(alibi):
    keys = jax.random.split(jax.random.key(0), 3)
    q_BTNH, k_BSKH, v_BSKV = (
        jax.random.normal(k, (2, 6, n, 4)) for k, n in zip(keys, (4, 2, 2), strict=True)
    )
    order_BT = jnp.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, -1, -1]])
    segments_BT = jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]])
    mask = ops.Mask(order_BT, order_BT, segments_BT, segments_BT)
    w_BNTS = ops.weights(q_BTNH, k_BSKH, mask, scale=0.5, alibi=alibi)
    o_BTNV = jnp.einsum("BNTS,BSNV->BTNV", w_BNTS, jnp.repeat(v_BSKV, 2, axis=2))
    expected = ops.attention(
        q_BTNH, k_BSKH, v_BSKV, mask, scale=0.5, alibi=alibi, implementation="reference"
    )
    np.testing.assert_allclose(o_BTNV, expected, atol=1e-5)


def test_every_layer_of_every_kind_is_seen_in_order():
    """A window of one token leaves nothing to look back at: its layer has the score 0."""
    window = small.MHA(small.HEADS, 8, window=1)
    model = small.decoder("mfa", window, "kr", "mla", repeat=1)
    probe = make_probe(model, Execution(dtype="float32"), ONE_DEVICE, 16)
    both = beside(lambda params, heldout: {"nll": 1.0}, probe)(small.params(model), None)
    assert both.pop("nll") == 1.0
    names = {f"{score}/{layer}" for score in ("previous_token", "induction") for layer in range(4)}
    for score in ("previous_token", "induction"):
        assert both.pop(score) == max(both[f"{score}/{layer}"] for layer in range(4))
    assert set(both) == names
    assert both["previous_token/1"] == both["induction/1"] == 0
    assert all(0.01 < both[name] < 0.9 for name in names if not name.endswith("/1"))
