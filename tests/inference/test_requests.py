"""Requests and thoughts on the host: what is refused, and where a thought ends."""

from __future__ import annotations

import numpy as np
import pytest

from step_jax.core.errors import ConfigError, DataError
from step_jax.inference.requests import Completion, Request, Thought

CLOSE = Thought(close=(8, 9), most=5, forced=(1, 2, 9))


@pytest.mark.parametrize(
    ("written", "length", "forced"),
    [
        ([], None, []),
        ([8], None, []),
        ([8, 9], 2, []),
        ([9, 8, 3, 8, 9, 7, 7], 5, []),  # the last place where it may close by itself
        ([3, 3, 3, 3, 3], None, []),
        ([3, 3, 3, 3, 8, 1, 2], None, [5, 6]),
        ([3, 3, 3, 3, 8, 1, 2, 9], 8, [5, 6, 7]),
        ([3, 3, 3, 3, 3, 1, 2, 9, 8, 9, 8, 9], 8, [5, 6, 7]),
    ],
)
def test_a_thought_ends_where_it_is_closed_or_at_its_cap(written, length, forced):
    assert CLOSE.length(written) == length
    request = Request([1], 4, (0,), thought=CLOSE)
    none = np.zeros(len(written))
    completion = Completion(request, written, none, none, "unfinished")
    assert np.flatnonzero(~completion.chosen).tolist() == forced


def test_what_is_forced_is_the_close_if_nothing_else_is_said():
    thought = Thought(close=(8, 9), most=1)
    assert thought.ending == (8, 9) and thought.length([3, 8, 9]) == 3


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("most is -1", {"close": (1,), "most": -1}),
        ("at least 4 tokens, at most 3", {"close": (1,), "most": 3, "least": 4}),
        ("has 1 to 16 tokens", {"close": (), "most": 3}),
        ("at most 16, not 1 and 17", {"close": (1,), "most": 3, "forced": (1,) * 17}),
    ],
)
def test_a_thought_that_cannot_be_is_refused(message, options):
    with pytest.raises(ConfigError, match=message):
        Thought(**options)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("prompt 3/1 has no token", {"prompt": []}),
        ("prompt 3/1 has 9 tokens, more than the context of 8", {"prompt": [1] * 9}),
        ("prompt 3/1 has the token 10, outside the vocabulary of 10", {"prompt": [1, 10]}),
        ("prompt 3/1 has the mark 12, outside", {"stop_ids": (12,)}),
        ("prompt 3/1 has the mark 10, outside", {"thought": Thought(close=(10,), most=3)}),
        ("prompt 3/1 asks for 0 new tokens", {"max_new_tokens": 0}),
        (r"the name \(3, -1\) is not of numbers", {"name": (3, -1)}),
        ("after 2 tokens with 1 log-prob.* and 0 versions", {"written": [1, 2], "logprobs": [0.0]}),
    ],
)
def test_a_request_that_cannot_be_written_is_named(message, options):
    request = Request(**({"prompt": [1], "max_new_tokens": 4, "name": (3, 1)} | options))
    with pytest.raises(DataError, match=message):
        request.check(vocab=10, max_length=8)
