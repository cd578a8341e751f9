"""A server of completions behind the engine's interface: conditions, budgets, losses, refusals.

The server's model is a function of NumPy, so that an oracle in plain Python knows every text; one
test serves an exported decoder and compares with the engine's own texts.
"""

from __future__ import annotations

import json
import urllib.request

import numpy as np
import pytest

from step_jax.core.errors import ConfigError, DataError
from step_jax.inference import slots
from step_jax.inference.engine import Engine
from step_jax.inference.requests import Request, Thought
from step_jax.inference.sampling import SamplingConfig
from step_jax.inference.served import Served
from step_jax.interop.hf import save_hf
from step_jax.models.layers.attention import MHA
from tests.inference.completions_server import LENGTH, CompletionsServer
from tests.models import small

GREEDY = SamplingConfig(temperature=0)
PROMPT = [3, 1, 4]


def made_up(ids: list[int]) -> np.ndarray:
    """The logits after a text, of a model that nobody trained."""
    return np.random.default_rng([len(ids), *ids]).normal(0, 2, small.VOCAB)


def oracle(request: Request, stop_ids=()):
    """(tokens, reason, which were chosen) at temperature 0, by the definitions."""
    new, chosen, thought, answer = [], [], request.thought, 0
    thinking = thought is not None
    while True:
        if len(request.prompt) + len(new) >= LENGTH:
            return new, "context", chosen
        if not thinking and len(new) - answer >= request.max_new_tokens:
            return new, "length", chosen
        if thinking and len(new) >= thought.most:
            new.append(thought.ending[len(new) - thought.most])
            chosen.append(False)
            thinking, answer = len(new) < thought.most + len(thought.ending), len(new)
            continue
        logits_V = made_up([*request.prompt, *new])
        if thinking and len(new) < thought.least:
            logits_V[[*stop_ids, thought.close[-1]]] = -np.inf
        new.append(int(logits_V.argmax()))
        chosen.append(True)
        if new[-1] in stop_ids:
            return new, "stop", chosen
        if thinking and tuple(new[-len(thought.close) :]) == thought.close:
            thinking, answer = False, len(new)


@pytest.fixture
def server():
    with CompletionsServer() as server:
        server.logits = made_up
        yield server


def served(server, sampling=GREEDY, **changes) -> Served:
    options = {"vocab": small.VOCAB, "slots": 3, "max_length": LENGTH, "patience": 0.01}
    return Served(server.url, "policy", sampling, **(options | changes))


def requests() -> list[Request]:
    asked = []
    for p in range(6):
        prompt = [p + 1, 2, 3]
        free = oracle(Request(prompt, 12, ()))[0]
        thoughts = [
            None,
            Thought((free[4],), most=9),
            Thought((63,), most=5, forced=(50, 63)),
            Thought((free[2],), most=12, least=4),  # not where the policy would
            Thought(tuple(free[4:6]), most=9),
        ]
        asked += [Request(prompt, 4, (p, i), thought=t) for i, t in enumerate(thoughts)]
        asked.append(Request(prompt, 99, (p, 9)))
    return asked


def test_texts_end_where_their_requests_say(server):
    stop_ids, shown = (7, 11, 20), []
    remote = served(server, stop_ids=stop_ids)
    ended = remote.run(None, requests(), version=4, on_tokens=lambda r, new: shown.extend(new))
    got = {completion.request.name: completion for completion in ended}
    for request in requests():
        tokens, reason, chosen = oracle(request, stop_ids)
        completion = got.pop(request.name)
        assert (completion.tokens, completion.reason) == (tokens, reason)
        assert completion.chosen.tolist() == chosen
        assert np.all((completion.logprobs == 0) == ~completion.chosen)
        assert completion.versions.tolist() == [4] * len(tokens)
    assert not got and remote.stats.tokens == len(shown)


def test_draws_are_named_and_a_budget_leaves_texts_to_be_carried_over(server):
    sampled = SamplingConfig(temperature=0.7, top_k=9, seed=3)
    asked = [Request(PROMPT, 28, (s,)) for s in range(3)]
    remote = served(server, sampled, slots=2)
    whole = {c.request.name: c.tokens for c in remote.run(None, asked)}
    assert len(set(map(tuple, whole.values()))) == len({b["seed"] for b in server.asked}) == 3
    assert {body["top_k"] for body in server.asked} == {9}
    waiting, server.seconds = iter(asked), 0.02  # of a token: the client is far faster
    cut = list(remote.run(None, waiting, token_budget=4))
    server.seconds = 0.0
    assert len(cut) == 2 and {c.reason for c in cut} == {"unfinished"}
    for completion in cut:
        n = len(completion.tokens)
        assert completion.tokens == whole[completion.request.name][:n] and n < 28
    for completion in remote.run(None, [c.carried() for c in cut], version=1):
        assert completion.reason == "length" and len(completion.logprobs) == 28
        assert set(completion.versions.tolist()) == {0, 1}
    assert [request.name for request in waiting] == [(2,)]


def test_a_text_goes_on_when_the_server_is_lost_and_comes_back(server):
    request = Request(PROMPT, 9, (0,))
    server.tokens_left = 4  # then it hangs up, once
    (got,) = served(server).run(None, [request])
    assert got.tokens == oracle(request)[0] and server.tokens_left is None
    assert [len(body["prompt"]) for body in server.asked] == [3, 3 + 4]


def test_what_is_no_server_of_token_ids_is_named(server):
    asked = [Request([1], 3, (0,))]
    with pytest.raises(DataError, match="refuses with status 404: .*no model other"):
        list(Served(server.url, "other", GREEDY, 64, 1, LENGTH).run(None, asked))
    with pytest.raises(DataError, match="http://127.0.0.1:9 does not answer"):
        nobody = Served("http://127.0.0.1:9", "policy", GREEDY, 64, 1, LENGTH, patience=0.01)
        list(nobody.run(None, asked))
    held = Request([1], 3, (0,), thought=Thought(close=(1, 2), most=5, least=2))
    with pytest.raises(ConfigError, match="prompt 0: a server cannot hold back a close of 2"):
        list(served(server).run(None, [held]))
    with pytest.raises(ConfigError, match="slots is 0"):
        served(server, slots=0)
    server.sends_token_ids = False
    with pytest.raises(DataError, match=r"does not stream token ids .*KeyError\('token_ids'\)"):
        list(served(server).run(None, asked))


@pytest.mark.slow
def test_an_exported_decoder_writes_the_texts_of_the_engine(tmp_path, monkeypatch):
    """Parameters of two versions are handed over as a trainer does it."""
    decoder = small.decoder(MHA(4, 8, kv_heads=2), repeat=1)
    monkeypatch.setattr(slots, "programs", small.quick_programs)
    options = {"slots": 4, "max_length": LENGTH, "execution": small.execution()}
    engine = Engine(decoder, GREEDY, stop_ids=(5,), **options)
    with CompletionsServer() as server:

        def handover(params, version: int) -> None:
            folder = tmp_path / f"version_{version}"
            save_hf(folder, params, decoder, dtype="float32", context_length=LENGTH)
            body = json.dumps({"model_path": str(folder)}).encode()
            urllib.request.urlopen(f"{server.url}/update_weights_from_disk", body).close()

        remote = served(server, stop_ids=(5,), handover=handover)
        for version in (0, 1):
            params = small.params(decoder, version)
            own = {c.request.name: c for c in engine.run(params, requests(), version=version)}
            got = {c.request.name: c for c in remote.run(params, requests(), version=version)}
            assert got.keys() == own.keys()
            for name, completion in got.items():
                assert completion.tokens == own[name].tokens
                assert completion.reason == own[name].reason
                np.testing.assert_allclose(completion.logprobs, own[name].logprobs, atol=2e-5)
                assert np.array_equal(completion.versions, own[name].versions)
