"""Answers that call tools: what they were told is in the text, and is nobody's choice."""

from __future__ import annotations

import json
import string
from concurrent.futures import Future

import numpy as np
import pytest

from step_jax.core.errors import ConfigError
from step_jax.environments.pool import Score
from step_jax.environments.problems import Problem
from step_jax.environments.tools import Tools
from step_jax.inference.engine import Stats
from step_jax.inference.requests import Completion
from step_jax.tokenizers.files import chat_tokenizer
from step_jax.tokenizers.huggingface import character_tokenizer
from step_jax.trainers.rl.config import Rollout
from step_jax.trainers.rl.learning import trajectory
from step_jax.trainers.rl.rollouts import Rollouts, evaluated
from step_jax.trainers.rl.samples import Sample
from step_jax.trainers.rl.turns import Turns

SYMBOLS = string.printable[:95] + "\n"


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer(character_tokenizer(SYMBOLS, "<end>"), "plain")


class Sums:
    """Problem i asks for i + 2."""

    def train(self, seed, index):
        return Problem(str(index), f"{index}+2=", {"answer": str(index + 2)}, str(index))


class Caller:
    """Calls the calculator in each turn but the last, then says what it was told last."""

    def __init__(self, tokenizer, calls):
        self.tokenizer, self.calls, self.stats = tokenizer, calls, Stats(4)

    def run(self, params, requests, *, version=0, token_budget=None, on_tokens=None):
        self.stats = Stats(4)
        for request in requests:
            text = self.tokenizer.decode([*request.prompt, *request.written])
            sum_, told = text.partition("User: ")[2].partition("=")[0], text.split("Tool: ")[1:]
            if text.count("Assistant:") <= self.calls:
                said = {"name": "calculator", "arguments": {"expression": sum_}}
                reply = f"<tool_call>{json.dumps(said)}</tool_call>"
            else:
                reply = told[-1].partition("\n")[0] if told else "0"
            new = [*self.tokenizer.encode(reply).tolist(), self.tokenizer.eos_id]
            self.stats.tokens += len(new)
            yield Completion(
                request,
                [*request.written, *new],
                np.append(request.logprobs, np.full(len(new), -1.0)).astype(np.float32),
                np.append(request.versions, np.full(len(new), version)).astype(np.int32),
                "stop",
            )


class Judge:
    def submit(self, reply, record):
        future: Future[Score] = Future()
        future.set_result(Score(float(reply == record["answer"]), {}, 0.0))
        return future


def rollouts(tokenizer, turns, calls, room=400):
    return Rollouts(
        Rollout(max_new_tokens=room, max_prompt_tokens=2000),
        prompts=2,
        samples=2,
        batches=6,
        keep_telling=False,
        seed=0,
        problems=Sums(),
        engine=Caller(tokenizer, calls),
        encode=turns.begin,
        decode=tokenizer.decode_continuation,
        pool=Judge(),
        turns=turns,
    )


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_reply_that_calls_goes_on_with_what_it_was_told(tokenizer, calls):
    with Turns(Tools(), tokenizer) as turns, rollouts(tokenizer, turns, calls) as of:
        batch = of.batch(None, 0)
    assert batch.figures["tool_calls"] == 4 * calls
    for sample in batch.samples:
        assert sample.turns == calls + 1
        assert sample.reward == float(calls > 0) and sample.finish == "stop"
        told = tokenizer.decode(sample.tokens[~sample.chosen])
        assert told.count(f"Tool: {sample.index + 2}\n") == calls == told.count("Assistant:")
        assert not sample.logprobs[~sample.chosen].any()
        assert np.all(sample.logprobs[sample.chosen] == -1)
        assert tokenizer.decode(sample.tokens[sample.begin :]) in (str(sample.index + 2), "0")
    t = trajectory(batch.samples, [of.prompt(s.index) for s in batch.samples], 2, 2400)
    assert t.mask_BT.sum(axis=1).tolist() == [s.chosen.sum() for s in batch.samples]
    rewarded = t.rewards_BT != 0
    assert rewarded.sum() == (4 if calls else 0) and np.all(t.targets_BT[rewarded] == 96)


def test_after_the_most_turns_a_call_is_the_answer(tokenizer):
    with Turns(Tools(most_turns=2), tokenizer) as turns:
        batch = rollouts(tokenizer, turns, calls=5).batch(None, 0)
    assert {(s.turns, s.reward) for s in batch.samples} == {(2, 0.0)}


def test_without_room_for_what_is_told_an_answer_is_over_and_worth_nothing(tokenizer):
    with Turns(Tools(), tokenizer) as turns:
        batch = rollouts(tokenizer, turns, calls=1, room=100).batch(None, 0)
    assert {(s.turns, s.finish, s.reward) for s in batch.samples} == {(1, "length", 0.0)}


def test_a_turn_under_way_is_carried_over(tokenizer):
    """Cut between what a tool told and the next reply: under a budget of tokens that happens."""
    with Turns(Tools(), tokenizer) as turns:
        first, second = (rollouts(tokenizer, turns, calls=2) for _ in range(2))
        assert first._round(None, 0) == []  # nobody is done after a turn
        second.restore(first.carried())
        want, got = first.batch(None, 0), second.batch(None, 0)
    for a, b in zip(want.samples, got.samples, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.chosen, b.chosen)
        assert (a.turns, a.reward) == (b.turns, b.reward) == (3, 1.0)


def test_held_out_problems_are_answered_with_tools(tokenizer):
    with Turns(Tools(), tokenizer) as turns:
        asked = [turns.begin(Sums().train(0, index)) for index in range(3)]
        written = evaluated(
            Caller(tokenizer, 1), None, asked, 2, 400, 7, tokenizer.decode_continuation, turns
        )
    assert [[(s.index, s.sample, s.turns, reply) for s, reply in g] for g in written] == [
        [(index, i, 2, str(index + 2)) for i in range(2)] for index in range(3)
    ]


@pytest.mark.parametrize(
    ("chosen", "begin", "turns"),
    [([], 0, 1), ([1, 1], 0, 1), ([1, 0, 0, 1], 3, 2), ([1, 0, 1, 0], 4, 3), ([0, 1], 1, 2)],
)
def test_turns_are_told_by_what_was_chosen(chosen, begin, turns):
    sample = Sample(0, 0, chosen=np.asarray(chosen, bool))
    assert (sample.begin, sample.turns) == (begin, turns)


def test_tools_need_a_chat_template_that_goes_on():
    with pytest.raises(ConfigError, match="has no chat template"):
        Turns(Tools(), character_tokenizer("ab", "<end>"))
