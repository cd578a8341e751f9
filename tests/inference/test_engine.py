"""The slot engine: a text is what its request says, whoever has the other slots.

The oracle writes a text alone, token by token, with full forward passes and Python's conditions.
Shape suffixes: T tokens, N new tokens, V vocabulary, L layers of a stack, K experts of a token.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from step_jax.core.errors import ConfigError, DataError
from step_jax.inference import slots
from step_jax.inference.engine import Engine, bytes_of_a_slot, slots_in
from step_jax.inference.requests import Completion, Request, Thought
from step_jax.inference.sampling import SamplingConfig, draw_keys, row_keys, sample
from step_jax.models.context import Context
from step_jax.models.layers.attention import MFA, MHA
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.models.tokens import Tokens
from step_jax.models.trunk import routing_of
from step_jax.ops import decode_attention
from tests.models import small

LENGTH = 32
GREEDY = SamplingConfig(temperature=0)
SAMPLED = SamplingConfig(temperature=0.9, top_p=0.95, seed=7)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [9]]
WINDOW = MHA(4, 8, kv_heads=2, window=5)
MIXTURE = MoE((Experts(8, 16),), Router(2, score="sigmoid", scale=2.0, bias=True), shared=16)
MODELS = {
    "dense": small.decoder(WINDOW, MFA(4, 8, value="gated_key"), repeat=2),
    "mixture": Decoder(small.WIDTH, (Group(2, (Block(WINDOW, MIXTURE),)),), small.VOCAB),
}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "programs", small.quick_programs)
        yield


@functools.cache
def model(name: str = "dense"):
    return MODELS[name], small.params(MODELS[name])


def engine_of(name="dense", sampling=SAMPLED, **changes) -> Engine:
    options = {"slots": 2, "max_length": LENGTH, "execution": small.execution()} | changes
    return Engine(model(name)[0], sampling, **options)


def write(requests, name="dense", sampling=SAMPLED, **changes) -> dict[tuple, Completion]:
    """Completions by name."""
    done = engine_of(name, sampling, **changes).run(model(name)[1], requests)
    return {completion.request.name: completion for completion in done}


@functools.cache
def forward(name: str = "dense"):
    """(tokens (1, LENGTH)) -> (logits_TV, routing decisions of the stacks)."""
    c, p = model(name)

    @functools.partial(jax.jit, compiler_options=small.FAST_COMPILE)
    def run(tokens_BT):
        ctx = Context(
            Tokens.in_order(*tokens_BT.shape), record_routing=True, execution=small.execution()
        )
        x_BTD, _, stats = c.hidden(p, tokens_BT, ctx)
        return c.logits(p, x_BTD, ctx)[0], [a[:, 0] for a in jax.tree.leaves(routing_of(stats))]

    def of(ids):
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(ids)] = ids
        return jax.device_get(run(padded))

    return of


@functools.partial(jax.jit, static_argnames="sampling", compiler_options=small.FAST_COMPILE)
def _draw(logits_BV, name_BM, place_B, banned_BX, sampling):
    keys_B = draw_keys(row_keys(jax.random.key(SAMPLED.seed), name_BM), place_B)
    return sample(logits_BV, keys_B, sampling, banned_BX)[0]


def draw(logits_V, request: Request, place: int, banned, sampling) -> int:
    banned_1X = np.full((1, 8), small.VOCAB, np.int32)
    banned_1X[0, : len(banned)] = banned
    name_1M = np.asarray([request.name], np.uint32)
    place_1 = np.asarray([place], np.int32)
    return int(_draw(logits_V[None], name_1M, place_1, banned_1X, sampling)[0])


def oracle(request: Request, name="dense", sampling=SAMPLED, stop_ids=()):
    """(tokens, reason, which were chosen) by the definitions."""
    new, chosen, thought, answer = [], [], request.thought, 0
    thinking, queue = thought is not None, []
    stop_ids = (*stop_ids, *request.stop_ids)
    while True:
        place = len(request.prompt) + len(new)
        if place >= LENGTH:
            return new, "context", chosen
        if not thinking and len(new) - answer >= request.max_new_tokens:
            return new, "length", chosen
        if thinking and not queue and len(new) == thought.most:
            queue = list(thought.forced or thought.close)
        if queue:
            new.append(queue.pop(0))
            chosen.append(False)
            thinking, answer = bool(queue), len(new)
            continue
        banned = []
        if thinking and len(new) < thought.least:
            closes = [*new, thought.close[-1]][-len(thought.close) :] == list(thought.close)
            banned = [*stop_ids, *thought.close[-1:] * closes]
        logits_V = forward(name)([*request.prompt, *new])[0][place - 1]
        new.append(draw(logits_V, request, place, banned, sampling))
        chosen.append(True)
        if new[-1] in stop_ids:
            return new, "stop", chosen
        if thinking and new[-len(thought.close) :] == list(thought.close):
            thinking, answer = False, len(new)


def group(budgets=(1, 4, 19), samples=4) -> list[Request]:
    """Every prompt ``samples`` times, sample s with one of the budgets."""
    return [
        Request(prompt, budgets[(p + s) % len(budgets)], (5, p, s))
        for p, prompt in enumerate(PROMPTS)
        for s in range(samples)
    ]


def assert_same(got: dict[tuple, Completion], expected: dict[tuple, Completion]):
    assert got.keys() == expected.keys()
    for name, completion in got.items():
        other = expected[name]
        assert completion.tokens == other.tokens and completion.reason == other.reason
        np.testing.assert_allclose(completion.logprobs, other.logprobs, atol=2e-5)


@functools.cache
def undisturbed() -> dict[tuple, Completion]:
    return write(group())


def test_a_text_is_the_same_in_any_order_number_of_slots_chunk_and_company():
    whole = undisturbed()
    assert len({tuple(completion.tokens) for completion in whole.values()}) == len(whole) == 12
    for name, completion in whole.items():
        assert len(completion.tokens) == (1, 4, 19)[(name[1] + name[2]) % 3]
        assert completion.reason == "length" and completion.versions.tolist() == [0] * len(
            completion.tokens
        )
    assert_same(write(group()[::-1], chunk=3), whole)
    assert_same(write(group(), slots=3), whole)
    assert_same(write(group()[5:6]), {(5, 1, 1): whole[5, 1, 1]})
    assert write(group(), seed=8)[5, 0, 2].tokens != whole[5, 0, 2].tokens


@pytest.mark.parametrize("axes", [None, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_text_is_the_same_where_its_cache_is_read_by_blocks(monkeypatch, axes):
    """The layer without a window; blocks are of eight slots, texts of up to 30 tokens."""
    whole = undisturbed()
    monkeypatch.setattr(decode_attention, "_FEWEST", 8)
    monkeypatch.setattr(decode_attention, "_MOST", 8)
    read, blocks = [], decode_attention.IMPLEMENTATIONS["blocks"]

    def watched(call):
        read.append(call.slots)
        return blocks.compute(call)

    entry = dataclasses.replace(blocks, compute=watched)
    monkeypatch.setitem(decode_attention.IMPLEMENTATIONS, "blocks", entry)
    c, p = model()
    sharding = None if axes is None else small.on_mesh(**axes)
    e = engine_of(sharding=sharding, slots=8, max_length=44)
    p = p if sharding is None else jax.device_put(p, sharding.params(c.specs()))
    assert_same({c.request.name: c for c in e.run(p, group())}, whole)
    assert read and set(read) == {44}


def test_log_probabilities_are_the_trainers():
    """Those of one forward pass over the whole text, at the temperature, before top-p."""
    worst = 0.0
    for completion in undisturbed().values():
        text = [*completion.request.prompt, *completion.tokens]
        logp_TV = np.asarray(jax.nn.log_softmax(forward()(text)[0] / SAMPLED.temperature))
        place_N = np.arange(len(completion.request.prompt) - 1, len(text) - 1)
        gap_N = logp_TV[place_N, completion.tokens] - completion.logprobs
        worst = max(worst, np.abs(gap_N).max())
    assert worst <= 1e-5


def test_a_group_reads_its_prompt_once_and_slots_are_refilled():
    e = engine_of()
    done = list(e.run(model()[1], group()))  # of four, in two slots
    assert [len(c.tokens) for c in done] != sorted(len(c.tokens) for c in done)
    read = sum(len(prompt) - 1 for prompt in PROMPTS)
    assert e.stats.read_tokens == read and e.stats.shared_tokens == 3 * read
    assert e.stats.tokens == sum(len(c.tokens) for c in done) == 4 * (1 + 4 + 19)
    assert e.stats.steps <= 4 * (1 + 4 + 19) / 2 + 18 and e.stats.busy > 0.8


def test_texts_stop_at_their_own_stop_ids_and_at_the_context():
    free = oracle(Request(PROMPTS[0], 20, (0,)))[0]
    requests = [
        Request(PROMPTS[0], 20, (0,)),
        Request(PROMPTS[0], 20, (0,), stop_ids=(free[3],)),
        Request(PROMPTS[1], 99, (2,)),
        Request([2] * LENGTH, 4, (3,)),
    ]
    for request, reason in zip(requests, ["stop", "stop", "context", "context"], strict=True):
        (got,) = engine_of(stop_ids=(free[7],)).run(model()[1], [request])
        assert (got.tokens, got.reason) == oracle(request, stop_ids=(free[7],))[:2]
        assert got.reason == reason
    assert got.tokens == [] and got.logprobs.shape == (0,)


def thoughts() -> list[Request]:
    """Closed by the policy, at the cap by a text of its own, later because held, never."""
    free = oracle(Request(PROMPTS[0], 14, (1, 0)))[0]
    assert free[5:7] not in (free[i : i + 2] for i in range(5))
    pair = tuple(free[5:7])
    conditions = [
        Thought(pair, most=20),
        Thought((63, 62), most=6, forced=(50, 51, 52)),
        Thought(pair, most=16, least=11),
        Thought((63,), most=6, least=6),
        Thought((63,), most=0),
        Thought((63,), most=60),
        None,
    ]
    stop = {3: (free[2],)}  # not while the thought is held
    return [
        Request(PROMPTS[0], 3, (1, 0), stop_ids=stop.get(i, ()), thought=thought)
        for i, thought in enumerate(conditions)
    ]


@pytest.mark.thorough
def test_a_thought_is_closed_at_its_cap_and_not_before_its_least():
    requests = thoughts()
    done = {id(c.request): c for c in engine_of().run(model()[1], requests)}
    got = [done[id(request)] for request in requests]
    for request, completion in zip(requests, got, strict=True):
        tokens, reason, chosen = oracle(request)
        assert (completion.tokens, completion.reason) == (tokens, reason)
        assert completion.chosen.tolist() == chosen
        assert np.all((completion.logprobs == 0) == ~completion.chosen)
    assert [int((~completion.chosen).sum()) for completion in got] == [0, 3, 2, 1, 1, 0, 0]
    lengths = [len(completion.tokens) for completion in got]
    assert lengths == [10, 12, 21, lengths[3], 4, 29, 3] and lengths[3] > 6
    assert got[5].reason == "context"


@pytest.mark.thorough
@pytest.mark.parametrize("budget", [9, pytest.param(4, marks=pytest.mark.slow)])
def test_a_text_that_is_carried_over_is_the_text_that_was_not(budget):
    """Thoughts too, cut before, in and after what is forced; under the same parameters."""
    named = enumerate([*group()[2:4], *thoughts()])
    asked = [dataclasses.replace(request, name=(i,)) for i, request in named]
    whole = write(asked)
    e, waiting, versions = engine_of(), iter(asked), 0
    carried: list[Request] = []
    done: dict[tuple, Completion] = {}
    while True:
        # texts that were begun go on first
        queue = (request for part in (carried, waiting) for request in part)
        ended = list(e.run(model()[1], queue, version=versions, token_budget=budget))
        assert sum(len(c.tokens) - len(c.request.written) for c in ended) == e.stats.tokens
        assert e.stats.tokens < budget + e.slots
        done |= {c.request.name: c for c in ended if c.reason != "unfinished"}
        carried = [c.carried() for c in ended if c.reason == "unfinished"]
        if not ended:
            break
        versions += 1
    assert_same(done, whole)
    mixed = [c for c in done.values() if len(set(c.versions.tolist())) > 1]
    assert mixed and all(np.all(np.diff(c.versions) >= 0) for c in mixed)
    assert versions > 4


@pytest.mark.thorough
def test_greedy_decoding_of_a_mixture_is_the_full_forward_pass_and_its_routing():
    requests = [Request(prompt, 9, (p,)) for p, prompt in enumerate(PROMPTS)]
    got = write(requests, "mixture", GREEDY, keep_routing=True)
    for request in requests:
        completion = got[request.name]
        assert completion.tokens == oracle(request, "mixture", GREEDY)[0]
        text = [*request.prompt, *completion.tokens]
        expected = forward("mixture")(text)[1]
        assert len(completion.routing) == len(expected) == 1
        for got_LTK, expected_LTK in zip(completion.routing, expected, strict=True):
            assert np.array_equal(got_LTK, expected_LTK[:, : len(text) - 1])


@pytest.mark.slow  # ``test_generate.py`` has one mesh
@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("dense", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("dense", {"fsdp": 2, "context": 4}),
        ("mixture", {"expert": 2, "data": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_on_a_mesh(name, axes):
    alone = write(group(), name) if name != "dense" else undisturbed()
    sharding = small.on_mesh(**axes)
    c, p = model(name)
    e = engine_of(name, sharding=sharding, slots=8)
    laid_out = jax.device_put(p, sharding.params(c.specs()))
    assert_same({c.request.name: c for c in e.run(laid_out, group())}, alone)


def test_a_slot_has_the_bytes_that_its_attention_keeps():
    def of(kind, length=64, sharding=None):
        return bytes_of_a_slot(small.decoder(kind), length, "bfloat16", sharding)

    heads = MHA(8, 16)
    assert of(heads) == 2 * 64 * 2 * 8 * 16 * 2  # layers, tokens, keys and values, heads, width
    assert of(heads) == 8 * of(MFA(26, 16)) == 16 * of(MFA(28, 16, value="gated_key"))
    assert of(dataclasses.replace(heads, window=8)) == of(heads) // 8
    assert of(heads, sharding=small.on_mesh(data=2, tensor=4)) == of(heads) // 4
    memory = 10 * of(heads) + 1
    assert slots_in(memory, small.decoder(heads), 64, "bfloat16") == 10
    assert slots_in(memory, small.decoder(MFA(26, 16)), 64, "bfloat16") == 80
    mesh = small.on_mesh(data=2, tensor=4)
    assert slots_in(memory, small.decoder(heads), 64, "bfloat16", mesh) == 80


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ConfigError, "slots is 0; it must be at least 1", {"slots": 0}),
        (ConfigError, "3 slots are no multiple of the mesh's 4", {"slots": 3, "mesh": {"data": 4}}),
        (DataError, "the stop id 64 is outside the vocabulary of 64", {"stop_ids": (3, 64)}),
        (DataError, "prompt 1 ends at more than 16 stop ids", {"stop_ids": tuple(range(17))}),
        (DataError, "prompt 1 has 33 tokens, more than the context", {"prompt": [1] * 33}),
    ],
)
def test_bad_input_is_named(error, message, changes):
    mesh, prompt = changes.pop("mesh", None), changes.pop("prompt", [1])
    if mesh is not None:
        changes["sharding"] = small.on_mesh(**mesh, tensor=8 // mesh["data"])
    with pytest.raises(error, match=message):
        write([Request(prompt, 1, (1,))], **changes)
