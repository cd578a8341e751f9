"""Trajectories: what a rollout becomes, their batch and schema, and what is refused in words.

Shape suffixes: B rows, T places, P places of a prompt, N tokens of an answer.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.core.errors import DataError
from step_jax.data.batches import microbatches
from step_jax.data.schema import check as check_schema
from step_jax.inference.generate import Written, rollout
from step_jax.inference.sampling import SamplingConfig
from step_jax.models.context import Context, Execution
from step_jax.models.tokens import Tokens
from step_jax.trainers.rl import trajectory
from step_jax.trainers.rl.algorithms import algorithm
from step_jax.trainers.rl.trajectory import FINISH, Trajectory, gathered, last_place, schema
from tests.models import small

PROMPTS = [[5, 6, 7], [8], [5, 6], []]
ANSWERS = [[1, 9], [2, 3, 9], [4, 4, 4], []]  # 9 stops
LOGPROBS = [[-0.1, -0.2], [-0.3, -0.4, -0.5], [-0.6, -0.7, -0.8], []]


def padded(lists, width, dtype):
    return np.asarray([row + [0] * (width - len(row)) for row in lists], dtype)


def rolled(max_length=None) -> Trajectory:
    """Four rows: two that stopped, one that was cut, one of padding."""
    lengths_B = np.asarray([len(p) for p in PROMPTS], np.int32)
    written = Written(
        padded(ANSWERS, 3, np.int32),
        padded(LOGPROBS, 3, np.float32),
        np.asarray([len(a) for a in ANSWERS], np.int32),
        np.asarray([9 in a for a in ANSWERS]),
    )
    prompts_BP, group_B = padded(PROMPTS, 3, np.int32), np.asarray([0, 0, 2, 3], np.int32)
    make = jax.jit(gathered, static_argnames=("version", "max_length"))
    made = make(prompts_BP, lengths_B, written, group_B, version=7, max_length=max_length)
    return jax.device_get(made)


def test_a_rollout_of_unequal_prompts_becomes_texts_and_choices():
    t = rolled()
    for row, (prompt, answer, logprobs) in enumerate(zip(PROMPTS, ANSWERS, LOGPROBS, strict=True)):
        text = prompt + answer
        np.testing.assert_array_equal(t.tokens_BT[row], text + [0] * (6 - len(text)))
        places = np.flatnonzero(t.mask_BT[row])
        # each token of the answer is the target of one place, which has its log-probability
        np.testing.assert_array_equal(places, np.arange(len(answer)) + len(prompt) - 1)
        np.testing.assert_array_equal(t.targets_BT[row, places], answer)
        np.testing.assert_allclose(t.logprobs_BT[row, places], logprobs)
        assert t.logprobs_BT[row].sum() == pytest.approx(sum(logprobs))
    np.testing.assert_array_equal(t.lengths_B, [5, 4, 5, 0])
    np.testing.assert_array_equal(t.chosen_B, [2, 3, 3, 0])
    np.testing.assert_array_equal(t.real_B, [1, 1, 1, 0])
    assert [FINISH[i] for i in t.finish_B[:3]] == ["stop", "stop", "length"]
    assert FINISH[rolled(max_length=5).finish_B[2]] == "context"
    np.testing.assert_array_equal(t.cut_B[:3], [False, False, True])
    assert (t.version_BT == 7).all()
    trajectory.check(t)


@pytest.mark.thorough
def test_log_probs_of_a_real_rollout_are_those_of_one_pass_over_its_texts():
    """Prompts of unequal lengths, rows that stop early: every choice stands at its place."""
    model, execution = small.decoder("gqa", repeat=1, vocab=7), Execution(dtype="float32")
    params = small.params(model)
    prompts_BP = np.asarray([[3, 5, 2], [4, 0, 0], [5, 5, 0], [1, 2, 0]], np.int32)
    lengths_B, group_B = np.asarray([3, 1, 2, 2], np.int32), np.zeros(4, np.int32)
    sampling = SamplingConfig(temperature=0.7)

    def rolled_and_read(params):
        how = dataclasses.replace(sampling, max_new_tokens=6)
        key = jax.random.key(13)
        written = rollout(
            params, model, prompts_BP, lengths_B, key, how, stop_ids=(1, 2), execution=execution
        )
        t = gathered(prompts_BP, lengths_B, written, group_B)
        ctx = Context(Tokens.in_order(*t.tokens_BT.shape), execution=execution)
        logits_BTV = model.logits(params, model.hidden(params, t.tokens_BT, ctx)[0], ctx)
        logp_BTV = jax.nn.log_softmax(logits_BTV / sampling.temperature)
        return t, jnp.take_along_axis(logp_BTV, t.targets_BT[..., None], -1)[..., 0]

    t, logprobs_BT = small.run(rolled_and_read, params)
    trajectory.check(t)
    np.testing.assert_allclose(t.logprobs_BT, logprobs_BT * t.mask_BT, atol=1e-5)
    assert 1 < t.chosen_B.min() < t.chosen_B.max() == 6


def test_the_reward_of_an_answer_is_that_of_its_last_choice():
    t = rolled()
    t = t.rewarded(jnp.asarray([1.0, 2.0, 3.0, 0.0]))
    np.testing.assert_array_equal(np.argmax(t.rewards_BT, 1)[:3], [3, 2, 3])
    np.testing.assert_array_equal(t.rewards_BT.sum(1), [1, 2, 3, 0])
    each = t.rewarded(jnp.full(t.mask_BT.shape, 0.5))  # of single choices, and added
    np.testing.assert_allclose(each.outcome_B, [2, 3.5, 4.5, 0])
    holes_BT = jnp.asarray([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]], jnp.float32)
    np.testing.assert_array_equal(last_place(holes_BT)[0], [0, 0, 0, 0, 1, 0])
    assert last_place(holes_BT)[1].sum() == 0


def test_a_batch_is_described_cut_and_put_together_again():
    t = rolled()
    routing = (np.arange(2 * 4 * 6 * 2, dtype=np.int32).reshape(2, 4, 6, 2),)
    t = dataclasses.replace(t, routing_LBTK=routing, values_BT=np.ones((4, 6), np.float32))
    described = schema(4, 6, ["values"], [(2, 2)])
    check_schema(described, t.batch())
    cut = microbatches(described, {n: jnp.asarray(a) for n, a in t.batch().items()}, 2)
    half = Trajectory.of(cut(1))
    np.testing.assert_array_equal(half.tokens_BT, t.tokens_BT[1::2])
    np.testing.assert_array_equal(half.routing_LBTK[0], routing[0][:, 1::2])
    assert half.old_BT is None and half.values_BT.shape == (2, 6)
    with pytest.raises(DataError, match="values is not in the schema"):
        check_schema(schema(4, 6, [], [(2, 2)]), t.batch())


def changed(**arrays) -> Trajectory:
    """A good trajectory with some entries changed: name=(index, value)."""
    t = rolled().rewarded(np.asarray([1.0, 0.0, 1.0, 0.0], np.float32))
    new = {name: np.array(getattr(t, name)) for name in arrays}
    for name, (index, value) in arrays.items():
        new[name][index] = value
    return dataclasses.replace(t, **new)


NAN = float("nan")


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (changed(rewards_BT=((1, 2), NAN)), r"row 1 \(group 0\), place 2: rewards is not finite: "
         "nan; 1 such in 4 rows"),
        (changed(logprobs_BT=((0, 2), -np.inf)), "row 0 .*place 2: logprobs is not finite: -inf"),
        (changed(logprobs_BT=((0, 2), 0.5)), "row 0 .*a log-probability above 0: 0.5"),
        (changed(rewards_BT=((2, 0), 1.0)), "row 2 .*place 0: a reward where nothing was chosen"),
        (changed(mask_BT=((0, 3), 0.5)), "row 0 .*the mask must be 0 or 1, not 0.5"),
        (changed(mask_BT=((1, 5), 1.0)), "row 1 .*place 5: the last place has no target"),
        (changed(group_B=(2, 4)), "row 2 .*groups are numbered from 0 to 3, not 4"),
        (changed(finish_B=(0, 4)), "row 0 .*finish reasons are 0 stop, .* 3 unfinished, not 4"),
        (dataclasses.replace(rolled(), group_B=np.zeros(3, np.int32)),
         r"group has shape \(3,\), expected \(4,\), as the tokens have"),
        (dataclasses.replace(rolled(), values_BT=np.full((4, 6), NAN)), "values is not finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_is_named(t, message):
    with pytest.raises(DataError, match=message):
        trajectory.check(t)


def test_a_reward_that_is_not_finite_is_found_where_it_was_given():
    t = rolled().rewarded(np.asarray([1.0, NAN, 1.0, 0.0], np.float32))
    with pytest.raises(DataError, match=r"row 1 \(group 0\), place 2: rewards is not finite"):
        trajectory.check(t)


def test_groups_of_one_are_refused_by_those_who_compare():
    t = rolled()  # groups 0, 0, 2 and padding
    for name in ("grpo", "dr_grpo", "dapo", "rloo", "gspo", "cispo"):
        how = dataclasses.replace(algorithm(name, 3), kl=None)
        with pytest.raises(DataError, match=r"row 2 \(group 2\): .*needs 2, this one has 1"):
            how.check(t)
    for name in ("ppo", "reinforce_pp", "mis_po"):
        how = dataclasses.replace(algorithm(name, 3), kl=None)
        how.check(dataclasses.replace(t, values_BT=np.zeros((4, 6), np.float32)))


@pytest.mark.parametrize(("name", "stream"), [("ppo", "values"), ("grpo", "reference")])
def test_what_an_algorithm_reads_has_to_be_there(name, stream):
    t = dataclasses.replace(rolled(), group_B=np.zeros(4, np.int32))
    with pytest.raises(DataError, match=f"the algorithm reads {stream}, which is not there"):
        algorithm(name, 3).check(t)
