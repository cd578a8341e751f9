"""What is asked and handed out, with an engine that answers by rule instead of by a model."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

from step_jax.core.errors import DataError
from step_jax.environments.pool import Score
from step_jax.environments.problems import Problem
from step_jax.inference.engine import Stats
from step_jax.inference.requests import Completion
from step_jax.trainers.rl.config import Rollout
from step_jax.trainers.rl.learning import SHORTEST, places, trajectory
from step_jax.trainers.rl.rollouts import Rollouts
from step_jax.trainers.rl.samples import Sample

STOP = 9


class Asked:
    """Problem i is asked by i + 1 tokens; each third answer's score is its number of tokens."""

    def train(self, seed, index):
        return Problem(str(index), "", {"index": index}, str(index))


class Rule:
    """Answer (index, sample) has index % 3 + sample + 1 tokens, each naming its writer."""

    def __init__(self):
        self.stats = Stats(4)
        self.asked = []

    def run(self, params, requests, *, version=0, token_budget=None, on_tokens=None):
        self.stats = Stats(4)
        for request in requests:
            index, i = request.name
            self.asked.append((index, i, len(request.written)))
            length = index % 3 + i + 1
            left = np.inf if token_budget is None else token_budget - self.stats.tokens
            if left <= 0:
                return
            tokens = list(request.written)
            logprobs, versions = list(request.logprobs), list(request.versions)
            while len(tokens) < length and left > 0:
                tokens.append(STOP if len(tokens) == length - 1 else params)
                logprobs.append(-0.5 - len(tokens))
                versions.append(version)
                self.stats.tokens, left = self.stats.tokens + 1, left - 1
            yield Completion(
                request,
                tokens,
                np.asarray(logprobs, np.float32),
                np.asarray(versions, np.int32),
                "stop" if len(tokens) == length else "unfinished",
            )


class Judge:
    """Every answer to each second problem scores the same."""

    def submit(self, reply, record):
        future: Future[Score] = Future()
        dull = record["index"] % 2
        future.set_result(Score(1.0 if dull else float(len(reply)), {}, 0.0))
        return future


def rollouts(engine=None, *, prompts=2, samples=2, batches=6, telling=False, **settings):
    return Rollouts(
        Rollout(max_new_tokens=8, max_prompt_tokens=settings.pop("longest", 100), **settings),
        prompts=prompts,
        samples=samples,
        batches=batches,
        keep_telling=telling,
        seed=0,
        problems=Asked(),
        engine=engine or Rule(),
        encode=lambda problem: [1] * (problem.record["index"] + 1),
        decode=lambda prompt, tokens: "x" * len(tokens),
        pool=Judge(),
    )


def texts(batch):
    return [(s.index, s.sample, s.tokens.tolist(), s.versions.tolist(), s.reward) for s in batch]


def test_a_batch_is_whole_groups_in_the_order_of_problems_and_written_by_the_newest_policy():
    of = rollouts()
    made = [of.batch(5 + n, n) for n in range(3)]
    batches = [batch.samples for batch in made]
    assert [[(s.index, s.sample) for s in b] for b in batches] == [
        [(2 * n, 0), (2 * n, 1), (2 * n + 1, 0), (2 * n + 1, 1)] for n in range(3)
    ]
    assert [{int(v) for s in b for v in s.versions} for b in batches] == [{0}, {1}, {2}]
    assert all(batch.figures["staleness_max"] == 0 for batch in made)


@pytest.mark.parametrize("lag", [1, 3])
def test_with_a_lag_a_batch_was_written_so_many_batches_ago(lag):
    of = rollouts(lag=lag)
    ages = []
    for n in range(6):
        ages.append(of.batch(5 + n, n).figures["staleness_max"])
    assert ages == [min(n, lag) for n in range(6)]
    with pytest.raises(IndexError):  # nothing is written that nobody learns from
        of.batch(11, 6)


def test_groups_of_equal_scores_make_room_for_others():
    of = rollouts(telling=True, prompts=3)
    first = of.batch(5, 0)
    assert [s.index for s in first.samples] == [0, 0, 2, 2, 4, 4]
    assert first.figures["same_reward_share"] == pytest.approx(2 / 5)
    assert [s.index for s in of.batch(5, 1).samples] == [6, 6, 8, 8, 10, 10]


def test_what_is_hopeless_is_taken_in_the_end_instead_of_drawn_for_ever():
    of = rollouts(telling=True, prompts=3, samples=1)  # a single answer equals itself
    batch = of.batch(5, 0)
    assert len(batch.samples) == 3 and batch.figures["same_reward_share"] == 1


def test_an_answer_goes_on_under_the_next_parameters_where_the_budget_ended_it():
    of = rollouts(token_budget=3, in_flight=4)
    batches = [of.batch(3 + n, n).samples for n in range(6)]
    written = [t for b in batches for t in texts(b)]
    assert any(len(set(versions)) > 1 for *_, versions, _ in written)
    for index, i, tokens, versions, reward in written:
        assert len(tokens) == index % 3 + i + 1 and tokens[-1] == STOP
        # each token names the parameters that wrote it
        assert [v + 3 for v in versions[:-1]] == tokens[:-1] and sorted(versions) == versions
        assert reward == (1.0 if index % 2 else len(tokens))
    assert len({(index, i) for index, i, *_ in written}) == len(written)


@pytest.mark.parametrize("settings", [{}, {"lag": 2}, {"token_budget": 3, "in_flight": 4}])
@pytest.mark.parametrize("cut", [1, 3])
def test_what_is_carried_over_goes_on_as_if_nothing_had_happened(settings, cut):
    whole, first, second = rollouts(**settings), rollouts(**settings), rollouts(**settings)
    want = [texts(whole.batch(3 + n, n).samples) for n in range(6)]
    got = [texts(first.batch(3 + n, n).samples) for n in range(cut)]
    carried = first.carried()
    assert all(isinstance(a, np.ndarray) for a in carried.values())
    second.restore(carried)
    assert got + [texts(second.batch(3 + n, n).samples) for n in range(cut, 6)] == want


def test_problems_with_prompts_too_long_are_left_out_and_counted():
    of = rollouts(longest=5)
    of.batch(5, 0), of.batch(5, 1)
    with pytest.raises(DataError, match="1000 problems in a row have prompts of more than 5"):
        of.batch(5, 2)


def test_a_batch_as_arrays():
    routing = (np.arange(2 * 3 * 1).reshape(2, 3, 1),)  # of all tokens of the text but the last
    short = Sample(
        7, 0, np.array([4, STOP]), np.array([-1.0, -2.0]), np.array([3, 4]),
        np.array([False, True]), "stop", 0.5, routing,
    )  # fmt: skip
    long = Sample(
        7, 1, np.array([5, 6, 8]), np.array([-1.0, -2.0, -3.0]), np.array([4, 4, 4]),
        np.array([True] * 3), "length", -1.0, (np.ones((2, 4, 1), int),),
    )  # fmt: skip
    t = trajectory([short, long], [[1, 2], [1, 2]], 2, 6)
    assert t.tokens_BT.tolist() == [[1, 2, 4, STOP, 0, 0], [1, 2, 5, 6, 8, 0]]
    assert t.targets_BT.tolist() == [[2, 4, STOP, 0, 0, 0], [2, 5, 6, 8, 0, 0]]
    assert t.mask_BT.tolist() == [[0, 0, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]]  # the 4 was forced
    assert t.logprobs_BT.tolist() == [[0, 0, -2, 0, 0, 0], [0, -1, -2, -3, 0, 0]]
    assert t.rewards_BT.tolist() == [[0, 0, 0.5, 0, 0, 0], [0, 0, 0, -1, 0, 0]]
    assert t.version_BT.tolist() == [[0, 3, 4, 0, 0, 0], [0, 4, 4, 4, 0, 0]]
    assert t.lengths_B.tolist() == [4, 5] and t.group_B.tolist() == [0, 0]
    assert t.cut_B.tolist() == [False, True]
    assert t.routing_LBTK[0][:, 0, :, 0].tolist() == [[0, 1, 2, 0, 0, 0], [3, 4, 5, 0, 0, 0]]


def test_rows_get_few_lengths_none_of_them_a_quarter_too_long():
    got = [places(n, 1000, 1) for n in range(1, 1001)]
    assert all(n <= T <= max(1.25 * n, n + SHORTEST - 1) for n, T in enumerate(got, 1))
    assert set(got[:12]) == {SHORTEST}
    assert len(set(got)) < 30 and got[-1] == 1000
    assert all(places(n, 1000, 8) % 8 == 0 for n in range(1, 1000))
