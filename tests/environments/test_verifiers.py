from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_jax.core.config import parse_config
from step_jax.core.errors import ConfigError, DataError
from step_jax.environments.replies import Thinking, boxed, program
from step_jax.environments.rewards import Term, WeightedSum
from step_jax.environments.tasks import TaskConfig
from step_jax.environments.verifiers import Exact, Expression, Format, Numeric, evaluate

PLAIN = Thinking()
BEGUN = Thinking(open="")


@pytest.mark.parametrize(
    ("thinking", "reply", "conclusion"),
    [
        (PLAIN, "<think>a</think> 12 ", "12"),
        (PLAIN, "12", "12"),
        (PLAIN, "<think>it is 12", None),
        (PLAIN, "a</think>1</think>2", "2"),
        (PLAIN, "<think>a</think>", ""),
        (BEGUN, "a</think>12", "12"),
        (BEGUN, "a, so 12", None),
    ],
)
def test_a_conclusion_is_what_stands_after_the_last_thought(thinking, reply, conclusion):
    assert thinking.conclusion(reply) == conclusion


@given(st.text("ab"), st.text("cd", min_size=1), st.sampled_from([PLAIN, BEGUN]))
def test_a_written_reply_is_well_formed_and_has_its_conclusion(thought, answer, thinking):
    reply = thinking.write(thought, answer)
    assert thinking.conclusion(reply) == answer
    assert Format(thinking).score(reply, {}) == 1.0


@pytest.mark.parametrize(
    "reply",
    ["12", "<think>a</think>", "<think>a 12", "x<think>a</think>12", "<think>a</think>1</think>2",
     "<think><think>a</think>12", "<think>a</think><think>12"],
)  # fmt: skip
def test_format_is_one_thought_and_a_conclusion(reply):
    assert Format().score(reply, {}) == 0.0


def test_exact_takes_any_of_the_answers_and_capitals_if_they_may_differ():
    record = {"answer": ["Paris", " paris, France"]}
    assert Exact().score("<think>hm</think>\n\nparis, France\n", record) == 1.0
    assert Exact().score("PARIS", record) == 0.0
    assert Exact(ignore_case=True).score("PARIS", record) == 1.0
    assert Exact().score("<think>Paris", record) == 0.0
    assert Exact(thinking=None).score("<think>Paris", {"answer": "<think>Paris"}) == 1.0


@pytest.mark.parametrize(
    ("said", "answer", "score"),
    [
        ("46", "46.0", 1),
        ("so 12+34=46.", "46", 1),
        ("5-3", "3", 1),
        ("= -3", "-3", 1),
        ("$1,234,567.50", "1234567.5", 1),
        ("3/4", "0.75", 1),
        ("2 / 4", "1/2", 1),
        ("1e3", "1000", 1),
        (".5", "1/2", 1),
        (r"\boxed{\text{seven: } 7} and 8", "7", 1),
        ("1/0", "0", 0),
        ("x2", "2", 0),
        ("none", "0", 0),
        ("12,34", "1234", 0),
        ("0.333", "1/3", 0),
    ],
)
def test_numeric_compares_the_last_number_exactly(said, answer, score):
    assert Numeric().score(said, {"answer": answer}) == score


def test_numeric_may_be_near():
    record = {"answer": "3.14159"}
    assert Numeric(relative=1e-3).score("3.1416", record) == 1.0
    assert Numeric(relative=1e-3).score("3.15", record) == 0.0
    with pytest.raises(DataError, match="line 3: the answer 'pi' holds no number"):
        Numeric().check({"answer": "pi"}, "line 3")


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("3+5*7", 1),
        (" (5 * 7) + 3 = 38", 1),
        ("7\u00d75+3", 1),
        ("38", 0),
        ("3+5+7", 0),
        ("3+5*7+7-7", 0),
        ("7*5+3-0", 0),
        ("3/(5-5)*7", 0),
        ("35+3", 0),
        ("__import__('os')", 0),
        ("9**9**9**9", 0),
        ("(" * 400 + "3", 0),
        ("-" * 999 + "3", 0),
        ("3+5*7 # so", 0),
    ],
)
def test_an_expression_uses_each_number_once_and_makes_the_target(said, score):
    assert Expression().score(said, {"numbers": [3, 5, 7], "target": 38}) == score


@given(st.integers(-99, 99), st.integers(-99, 99), st.integers(1, 99))
def test_expressions_are_evaluated_exactly(a, b, c):
    value, numbers = evaluate(f"({a}-{b})/{c}*3")
    assert value == Fraction(a - b, c) * 3
    assert sorted(numbers) == sorted(map(abs, (a, b, c, 3)))


def test_a_sum_tells_its_parts_by_name():
    both = WeightedSum({"right": Term(Exact()), "format": Term(Format(), 0.25)})
    reply = "<think>a</think>12"
    assert both.scores(reply, {"answer": "12"}) == {"right": 1.0, "format": 0.25}
    assert both.score("12", {"answer": "12"}) == 1.0
    with pytest.raises(DataError, match="record 1: answer is None"):
        both.check({}, "record 1")


def test_verifiers_are_read_from_recipes():
    config = parse_config(
        TaskConfig,
        """
        task: {kind: chain_sum, terms: [2, 3]}
        verifier:
          kind: sum
          terms:
            right: {verifier: {kind: numeric, thinking: {open: "", close: "#"}}}
            format: {verifier: {kind: format}, weight: 0.1}
        """,
    )
    assert config.checked_by.scores("1#7", {"answer": "7"}) == {"right": 1.0, "format": 0.0}
    assert parse_config(TaskConfig, "task: {kind: addition}").checked_by == Exact(Thinking("", "#"))
    with pytest.raises(ConfigError, match="close is empty"):
        parse_config(TaskConfig, "task: {kind: addition, thinking: {close: ''}}")
    with pytest.raises(ConfigError, match="terms is empty"):
        parse_config(TaskConfig, "task: {kind: addition}\nverifier: {kind: sum}")


def test_the_last_block_of_code_is_the_program():
    reply = "First:\n```\nold\n```\nbetter:\n```python\nprint(1)\n\nx = 2\n```\nDone."
    assert program(reply) == "print(1)\n\nx = 2\n"
    assert program("print(1)") == "print(1)"


def test_the_content_of_a_box_has_balanced_braces():
    assert boxed(r"\boxed{1} then \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert boxed(r"\boxed{1") is None
