"""The engine: greedy decoding is the repeated full forward pass; nothing but speed depends on
batches, chunks, streaming or the mesh.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core.errors import ConfigError, DataError
from step_jax.inference import generate as engine
from step_jax.inference import slots
from step_jax.inference.sampling import SamplingConfig
from step_jax.models.context import Context
from step_jax.models.layers.attention import MFA, MHA, MLA
from step_jax.models.tokens import Tokens
from tests.models import small

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [9], [2, 7, 1, 8, 2, 8]]
GREEDY = SamplingConfig(temperature=0, max_new_tokens=9)
SAMPLED = SamplingConfig(temperature=0.9, top_p=0.95, seed=7, max_new_tokens=9)
KINDS = {
    "gqa_window": MHA(4, 8, kv_heads=2, window=5),
    "mfa_gated_key": MFA(4, 8, value="gated_key"),
    "mla": MLA(4, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8),
}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "programs", small.quick_programs)
        yield


@functools.cache
def model(kind: str = "mfa_gated_key"):
    c = small.decoder(KINDS[kind])
    return c, small.params(c)


def write(prompts=PROMPTS, sampling=SAMPLED, kind="mfa_gated_key", **changes):
    c, p = model(kind)
    options = {"max_length": 32, "execution": small.execution()} | changes
    return engine.generate(p, c, prompts, sampling, **options)


def assert_same(a: engine.Generation, b: engine.Generation):
    assert a.tokens == b.tokens and a.reasons == b.reasons
    for x, y in zip(a.logprobs, b.logprobs, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def padded(texts, width):
    return np.array([text + [0] * (width - len(text)) for text in texts], np.int32)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_argmax_of_full_forward_passes(kind):
    c, p = model(kind)

    def both(p, prompts_BT, lengths_B):
        written = engine.rollout(
            p, c, prompts_BT, lengths_B, jax.random.key(0), GREEDY, execution=small.execution()
        )
        index_BT = jnp.broadcast_to(jnp.arange(20), (len(PROMPTS), 20))
        new_BT = jnp.take_along_axis(
            written.tokens_BN, jnp.clip(index_BT - lengths_B[:, None], 0, 8), axis=1
        )
        prompts_BT = jnp.pad(prompts_BT, ((0, 0), (0, 9)))
        text_BT = jnp.where(index_BT < lengths_B[:, None], prompts_BT, new_BT)
        ctx = Context(Tokens(index_BT), execution=small.execution())
        return written, text_BT, c.logits(p, c.hidden(p, text_BT, ctx)[0], ctx)

    lengths = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    written, text_BT, logits_BTV = small.run(both, p, padded(PROMPTS, 11), lengths)
    assert written.lengths_B.tolist() == [9] * 4 and not written.stopped_B.any()
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    for row, n in enumerate(lengths):
        best_N = logits_BTV[row, n - 1 : n + 8].argmax(-1)
        assert written.tokens_BN[row].tolist() == best_N.tolist()
        assert text_BT[row, n : n + 9].tolist() == best_N.tolist()
        np.testing.assert_allclose(
            written.logprobs_BN[row], logp_BTV[row, np.arange(n - 1, n + 8), best_N], atol=2e-5
        )


@pytest.mark.slow
def test_batch_chunk_and_streaming_change_nothing():
    whole = write()
    assert [len(tokens) for tokens in whole.tokens] == [9] * 4
    assert len({tuple(tokens) for tokens in whole.tokens}) == 4
    streamed: list[list[int]] = [[] for _ in PROMPTS]
    pieces: list[int] = []

    def on_tokens(row, tokens):
        streamed[row] += tokens
        pieces.append(len(tokens))

    assert_same(write(chunk=2, on_tokens=on_tokens), whole)
    assert streamed == whole.tokens and max(pieces) == 2
    ended: list[int] = []
    assert_same(write(slots=2, on_end=lambda row, completion: ended.append(row)), whole)
    assert sorted(ended) == [0, 1, 2, 3]
    for row in (1, 2):  # of different padding, alone
        alone = write([PROMPTS[row]], requests=[row])
        assert alone.tokens == [whole.tokens[row]]
    assert write(sampling=SamplingConfig(max_new_tokens=9, seed=8)).tokens != whole.tokens


@pytest.mark.thorough
def test_rows_end_at_a_stop_token_and_at_the_context():
    free = write(sampling=GREEDY)
    stop = free.tokens[0][4]
    got = write(sampling=GREEDY, stop_ids=[stop], chunk=3, max_length=14)
    for row, (tokens, reason) in enumerate(zip(got.tokens, got.reasons, strict=True)):
        room = min(9, 14 - len(PROMPTS[row]))
        until = free.tokens[row][:room]
        if stop in until:
            assert reason == "stop" and tokens == until[: until.index(stop) + 1]
        else:
            assert reason == ("context" if room < 9 else "length") and tokens == until
        assert len(got.logprobs[row]) == len(tokens)
    assert got.reasons[0] == "stop" and len(got.tokens[1]) <= 3
    full = write([[1] * 14, *PROMPTS[1:]], sampling=GREEDY, max_length=14, stop_ids=[stop], chunk=3)
    assert full.tokens[0] == [] and full.reasons[0] == "context"
    assert full.logprobs[0].shape == (0,)


@pytest.mark.thorough
def test_rollout_under_jit_is_generate():
    c, p = model()
    lengths = np.array([len(prompt) for prompt in PROMPTS], np.int32)

    @functools.partial(jax.jit, compiler_options=small.FAST_COMPILE)
    def roll(p, prompts_BT, lengths_B, key):
        return engine.rollout(
            p, c, prompts_BT, lengths_B, key, SAMPLED, execution=small.execution(), max_length=32
        )

    written = roll(p, padded(PROMPTS, 12), lengths, jax.random.key(SAMPLED.seed))
    assert written.tokens_BN.tolist() == write().tokens


def test_similar_shapes_compile_once():
    def compiled():
        how = 32, small.execution(), None, None
        programs = small.quick_programs(slots.Decoding.of(model()[0], *how))
        return [program._cache_size() for program in programs]

    write()
    before = compiled()
    write([[1, 2], [3, 4, 5, 6, 7, 8, 9], [4] * 13], max_length=32)
    other = SamplingConfig(0.9, top_p=0.95, seed=1, max_new_tokens=17)
    write([[6, 1], [7], [8, 2], [9, 3]], sampling=other)
    assert compiled() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "axes"),
    [("gqa_window", {"data": 4, "tensor": 2}), ("mfa_gated_key", {"fsdp": 4, "context": 2})],
    ids=str,
)
def test_on_a_mesh(kind, axes):
    c, p = model(kind)
    sharding = small.on_mesh(**axes)
    lengths = np.array([len(prompt) for prompt in PROMPTS], np.int32)

    def roll(sharding, p, prompts_BT, lengths_B):
        return engine.rollout(
            p,
            c,
            prompts_BT,
            lengths_B,
            jax.random.key(3),
            SAMPLED,
            execution=small.execution(),
            sharding=sharding,
        )

    args = padded(PROMPTS, 12), lengths
    alone = small.run(functools.partial(roll, None), p, *args)
    laid_out = jax.device_put(p, sharding.params(c.specs()))
    split = small.run(functools.partial(roll, sharding), laid_out, *args)
    assert np.array_equal(split.tokens_BN, alone.tokens_BN)
    np.testing.assert_allclose(split.logprobs_BN, alone.logprobs_BN, atol=2e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_beyond_the_range_of_the_cache_does_not_poison_what_follows(kind):
    """float8_e4m3fn ends at 448; beyond it were NaN, and token 0 was written for ever."""
    c, p = model(kind)

    def loud(path, a):  # keys and values in the thousands
        return 3e3 * a if "attention_norm" in jax.tree_util.keystr(path) else a

    p = jax.tree_util.tree_map_with_path(loud, p)
    options = {"max_length": 32, "execution": small.execution()}
    got = engine.generate(p, c, PROMPTS, GREEDY, cache_dtype="float8_e4m3fn", **options)
    assert all(np.isfinite(row).all() for row in got.logprobs)
    assert not any(row.count(0) == len(row) for row in got.tokens)


@pytest.mark.thorough
def test_slots_on_a_mesh_are_padded_and_refilled():
    c, p = model()
    sharding = small.on_mesh(data=8)
    prompts = [*PROMPTS, *([i, 60 - i] for i in range(7))]
    got = engine.generate(
        jax.device_put(p, sharding.params(c.specs())),
        c,
        prompts,
        SAMPLED,
        max_length=32,
        execution=small.execution(),
        sharding=sharding,
        slots=3,  # to eight, for eleven prompts
    )
    assert_same(got, write(prompts, slots=4))


def test_no_prompts_give_no_texts():
    assert write([]).tokens == []


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (DataError, "prompt 1 has 11 tokens, more than the context of 10", {"max_length": 10}),
        (DataError, "prompt 0 has the token 64, outside .* of 64", {"prompts": [[64]]}),
        (DataError, "prompt 0 has no token", {"prompts": [[]]}),
        (DataError, "the stop id 99 is outside", {"stop_ids": [99]}),
        (ConfigError, "chunk is 0", {"chunk": 0}),
        (ConfigError, "1 request numbers for 4 prompts", {"requests": [1]}),
    ],
)
def test_bad_input_is_named(error, message, changes):
    with pytest.raises(error, match=message):
        write(**changes)
