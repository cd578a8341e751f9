"""What reasoning-gym and math-verify are trusted with."""

from __future__ import annotations

import random

import pytest

from step_jax.core.errors import ConfigError
from step_jax.environments import gym
from step_jax.environments.gym import GymTask, ReasoningGym
from step_jax.environments.mathematics import Math


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("said", "answer", "score"),
    [
        (r"\boxed{\frac{1}{2}}", "1/2", 1),
        (r"the answer is $0.5$", r"\frac12", 1),
        (r"\boxed{x^2+2x+1}", "$(x+1)^2$", 1),
        (r"\boxed{3}", "4", 0),
        ("", "4", 0),
    ],
)
def test_math_verify_knows_equal_answers(said, answer, score):
    assert Math().score(said, {"answer": answer}) == score


def test_a_task_is_a_function_of_seed_and_index():
    first, again = (GymTask("chain_sum").open(0.1) for _ in range(2))
    assert first.train(3, 7) == again.train(3, 7)
    assert first.train(3, 7) != first.train(4, 6)


def test_a_task_that_draws_from_shared_generators_is_a_function_too():
    problems = GymTask("list_functions").open(0.1)
    before = random.getstate()
    first = [problems.train(0, index) for index in range(60)]
    assert random.getstate() == before
    random.random()
    assert [problems.train(0, index) for index in range(60)] == first


def test_reasoning_gyms_own_score_is_used():
    verifier = ReasoningGym("gcd")
    entry = {"question": "", "answer": "12", "metadata": {}}
    assert verifier.score("<think>a</think>12", {"entry": entry}) == 1.0
    assert verifier.score("13", {"entry": entry}) == 0.0


@pytest.mark.parametrize(
    ("name", "harmless", "hostile"),
    [
        ("n_queens", "[['Q', '_'], ['_', 'Q']]", "[[__import__('os').getpid()]]"),
        ("n_queens", "Q _\n_ Q", "max([])"),
        ("spiral_matrix", "1 2 3", "[open('/etc/passwd')]"),
        ("string_insertion", "ABCD", "exec(chr(49))"),
        ("binary_matrix", "0 1\n1 0", "(lambda: 0)()"),
        ("countdown", "(3 + 4) * 12 / 2 - 1", "exec(chr(49))"),
        ("simple_integration", "3*X**2/2 + sin(X) + C", "(1).__class__"),
        ("polynomial_multiplication", "6*y**3 - 4*y", "x.free_symbols"),
    ],
)
def test_a_score_that_evaluates_a_reply_gets_only_a_harmless_one(name, harmless, hostile):
    assert gym.harmless(name, harmless) and not gym.harmless(name, hostile)


def test_a_hostile_reply_scores_nothing_and_is_not_run(tmp_path):
    verifier = ReasoningGym("string_insertion")
    entry = {"question": "", "answer": "AB", "metadata": {}}
    left = tmp_path / "left"
    assert verifier.score(f"[open({str(left)!r}, 'w').name, 'B']", {"entry": entry}) == 0.0
    assert not left.exists()
    assert verifier.score("['A', 'B']", {"entry": entry}) == 0.1


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (GymTask("chain_sums"), "no task 'chain_sums'; did you mean 'chain_sum'"),
        (GymTask("puzzle24"), "puzzle24 is refused: .* any four numbers"),
        (GymTask("codeio"), "codeio is refused: .* another answer each time"),
        (GymTask("gcd", {"numbers": 2}), "settings of reasoning-gym's gcd: .*numbers"),
        (GymTask("gcd", {"seed": 2}), "seed is not yours to set"),
        (GymTask("gcd", prompt="{nums}"), "prompt names {nums}.*there are .*question"),
    ],
)
def test_what_reasoning_gym_cannot_give_is_refused(task, message):
    with pytest.raises(ConfigError, match=message):
        task.open(0.1)


def test_a_prompt_can_be_made_short():
    task = GymTask("chain_sum", {"max_terms": 3}, prompt="{expression}=")
    problem = task.open(0.1).train(0, 0)
    assert problem.question.endswith("=") and problem.content != problem.question
    assert task.verifier.score(problem.answer, problem.record) == 1.0


SAMPLED = ["gcd", "graph_color", "propositional_logic", "list_functions", "letter_counting"]


def check_task(name: str, count: int) -> None:
    task = GymTask(name)
    if name in gym.REFUSED:
        with pytest.raises(ConfigError, match="is refused"):
            task.open(0.1)
        return
    problems = task.open(0.1)
    for index in range(count):
        problem = problems.train(0, index)
        assert problem == problems.train(0, index)
        if problem.answer is None:
            assert name in ("boxnet", "rush_hour")
        else:
            reply = task.thinking.write("so", problem.answer)
            assert task.verifier.score(reply, problem.record) == 1.0, problem


@pytest.mark.parametrize("name", SAMPLED)
def test_a_task_of_reasoning_gym_scores_its_own_answers(name):
    check_task(name, 3)


@pytest.mark.slow
def test_every_task_of_reasoning_gym_scores_its_own_answers_or_is_refused():
    from reasoning_gym.factory import DATASETS

    for name in sorted(DATASETS):
        check_task(name, 3 if name in gym.SLOW else 10)
