"""Votes, budgets and rounds, over samplers whose replies are known."""

from __future__ import annotations

import numpy as np
import pytest

from step_jax.core.config import validate
from step_jax.core.errors import ConfigError
from step_jax.environments.pacore import Round
from step_jax.environments.replies import Thinking
from step_jax.inference import test_time
from step_jax.inference.requests import Completion
from step_jax.inference.test_time import (
    Chosen,
    EngineSampler,
    Reply,
    ThinkingBudget,
    Ways,
    vote,
)  # fmt: skip
from tests.tokenizers.made import byte_level, ours

SHORT = Round(prompt="{references}|{question}", reference="{text},")


class Scripted:
    """Replies with the conclusions of a list, one after the other, of ten tokens each."""

    def __init__(self, *answers):
        self.answers, self.asked = answers, []

    def __call__(self, prompts, n, *, seed, budget=None):
        self.asked.append((list(prompts), n, seed, budget))
        texts = [a if a is None else f"<think>t</think>{a}" for a in self.answers[:n]]
        return [[Reply(text or "<think>cut", 10) for text in texts] for _ in prompts]


def test_the_most_votes_win_and_the_first_of_equal_ones():
    assert vote(["a", "b", "b", None, None, None]) == "b"
    assert vote(["b", "a"]) == "b"
    assert vote([None, None]) is None
    assert vote(["a", "b", "b"], [1.0, 0.4, 0.5]) == "a"


def test_self_consistency_counts_every_token_and_no_cut_thought():
    sample = Scripted("7", None, "8", "8", None)
    budget = ThinkingBudget(most=5)
    chosen = Ways(sample, seed=3, budget=budget).self_consistency(["p", "q"], 5)
    assert chosen == [Chosen("8", 50)] * 2
    assert sample.asked == [(["p", "q"], 5, 3, budget)]


def judge(prompt, reply):
    return {"7": 0.9, "8": 0.5}.get(reply.text[-1], 5.0)


def test_best_of_n_takes_the_best_with_an_answer_and_a_weighted_vote_adds_up():
    ways = Ways(Scripted("8", "7", None, "8"), seed=0)
    assert ways.best_of_n(["p"], 4, judge) == [Chosen("7", 40)]
    assert ways.weighted_vote(["p"], 4, judge) == [Chosen("8", 40)]
    assert Ways(Scripted(None), seed=0).best_of_n(["p"], 1, judge) == [Chosen(None, 10)]


def test_coordinated_rounds_hand_on_conclusions_and_nothing_of_thoughts():
    sample = Scripted("1", "2", None, "4")
    chosen = Ways(sample, seed=5).coordinated(["p"], (4, 2), SHORT)
    assert chosen == [Chosen("1", (4 + 2 + 1) * 10)]
    (first, n1, seed1, _), (second, n2, seed2, _), (third, n3, seed3, _) = sample.asked
    assert (first, n1, n2, n3) == (["p"], 4, 2, 1)
    assert len({seed1, seed2, seed3}) == 3
    references, _, question = second[0].partition("|")
    assert question == "p" and sorted(references.split(",")) == ["", "1", "2", "4"]
    assert sorted(third[0].partition("|")[0].split(",")) == ["", "1", "2"]
    again = Scripted("1", "2", None, "4")
    Ways(again, seed=5).coordinated(["p"], (4, 2), SHORT)
    assert again.asked == sample.asked


def test_a_round_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="each must have a reply"):
        Ways(Scripted("1"), seed=0).coordinated(["p"], (4, 0))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (ThinkingBudget(least=9, most=5), "nothing is in between"),
        (ThinkingBudget(most=0), "most is 0"),
    ],
)
def test_budgets_that_ask_for_nothing_are_refused(budget, message):
    with pytest.raises(ConfigError, match=message):
        validate(budget)


# --- the engine ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return ours(byte_level(), tokenizer_config={"eos_token": "<|im_end|>"})


def test_a_budget_is_a_thought_in_tokens(tokenizer):
    budget = ThinkingBudget(most=9, least=2, last_words="the end.", thinking=Thinking("", "#"))
    thought = budget.thought(tokenizer)
    assert tokenizer.decode(thought.close) == "#"
    assert tokenizer.decode(thought.ending) == "the end.#"
    assert (thought.most, thought.least) == (9, 2)


def test_a_close_that_is_joined_with_what_stands_before_it_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="joins 'he' with what stands before"):
        merges = ThinkingBudget(most=9, thinking=Thinking("", "he"))
        text = "t" + "he"
        assert len(tokenizer.encode(text)) == 1  # as the tokenizer was trained
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(test_time, "_BEFORE", ("t", "7"))
            merges.thought(tokenizer)


class FakeEngine:
    """Ends texts in the reverse of their order, and says what it was asked."""

    def run(self, params, requests):
        for request in reversed(list(requests)):
            tokens = [*params[request.name[1]], 40 + request.name[2]]
            reason = "stop" if request.thought is None else "length"
            n = len(tokens)
            yield Completion(request, tokens, np.zeros(n), np.zeros(n, np.int32), reason)


def test_replies_of_an_engine_stand_where_they_were_asked_for(tokenizer):
    said = {0: tokenizer.encode("the fox").tolist(), 1: tokenizer.encode("a dog").tolist()}
    rooms = []

    def engine_for(length):
        rooms.append(length)
        return FakeEngine()

    sample = EngineSampler(engine_for, said, tokenizer, lambda prompt: [3] * len(prompt), 5)
    first, second = sample(["p", "q"], 2, seed=7)
    assert [reply.text.startswith("the fox") for reply in first] == [True, True]
    assert [reply.text.startswith("a dog") for reply in second] == [True, True]
    assert first[0] != first[1]  # draws of their own
    assert [reply.tokens for reply in first] == [len(said[0]) + 1] * 2
    assert {reply.finish for reply in first + second} == {"stop"}
    budget = ThinkingBudget(most=4, thinking=Thinking("", "#"))
    assert sample(["p"], 1, seed=7, budget=budget)[0][0].finish == "length"
    sample(["p", "a long prompt"], 1, seed=7)
    assert rooms == [16, 16, 32]  # 1 + 5, with the thought 1 + 5 + 4 and its close, 13 + 5
