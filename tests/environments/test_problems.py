from __future__ import annotations

import json

import pytest

from step_jax.core.config import validate
from step_jax.core.errors import ConfigError, DataError
from step_jax.environments.arithmetic import Addition, ChainSum, Countdown
from step_jax.environments.files import FileTask
from step_jax.environments.replies import Thinking
from step_jax.environments.verifiers import Exact, Numeric
from step_jax.tokenizers.chat import built_in
from tests.tokenizers.made import byte_level, ours

NATIVE = [Addition(), Addition(digits=(3, 9)), ChainSum(), Countdown(),
          Countdown(numbers=4, operators="+-*/")]  # fmt: skip
SMALL = Addition(digits=(1, 1))


@pytest.mark.parametrize("task", NATIVE, ids=str)
def test_worked_solutions_are_right_and_held_out_problems_are_others(task):
    problems = task.open(0.1)
    train = [problems.train(seed, index) for seed in (0, 1) for index in range(60)]
    heldout = problems.heldout(40)
    assert len({problem.content for problem in heldout}) == 40
    assert not {p.content for p in train} & {p.content for p in heldout}
    for problem in train + heldout:
        assert task.verifier.score(problem.reply(task.thinking), problem.record) == 1.0
        for step in (problem.thought or "").split(";"):
            left, _, right = step.partition("=")
            assert eval(left) == int(right)
    assert len({problem.content for problem in train}) > 20


@pytest.mark.parametrize("task", NATIVE, ids=str)
def test_a_problem_is_a_function_of_seed_and_index(task):
    first, again = task.open(0.1), task.open(0.1)
    assert first.train(3, 7) == again.train(3, 7)
    assert first.heldout(2) == again.heldout(3)[:2]
    assert first.train(3, 7) != first.train(4, 6)


def test_no_order_of_training_reaches_a_held_out_sum_even_written_the_other_way_round():
    problems = SMALL.open(0.3)
    held = {problem.content for problem in problems.heldout(10)}
    seen = {problems.train(seed, index).question for seed in range(3) for index in range(500)}
    assert not seen & {f"{c}=" for c in held} | seen & {
        f"{c.partition('+')[2]}+{c.partition('+')[0]}=" for c in held
    }


def test_a_task_with_few_problems_says_so():
    with pytest.raises(DataError, match="gave only .* that differ: addition has few"):
        SMALL.open(0.3).heldout(50)


def test_the_golden_problems_stay():
    """What a seed gives is part of every result that was made with it."""
    assert ChainSum().open(0.1).train(0, 0).question == "75-61="
    countdown = Countdown().open(0.1).train(0, 0)
    assert (countdown.question, countdown.answer) == ("4,10,12:58=", "10+4*12")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Addition(digits=(0, 2)), "digits is"),
        (ChainSum(terms=(3, 2)), "terms is"),
        (Countdown(numbers=7), "numbers is 7"),
        (Countdown(target=(5, 2)), "target is"),
    ],
)
def test_settings_that_make_no_problem_are_refused(task, message):
    with pytest.raises(ConfigError, match=message):
        validate(task)


def test_a_solution_is_a_conversation_that_sft_reads():
    problem = ChainSum().open(0.1).train(0, 0)
    question, said = problem.solved(Thinking())["messages"]
    assert question == {"role": "user", "content": problem.question}
    apart = {"content": problem.answer, "reasoning_content": problem.thought}
    assert said == {"role": "assistant", **apart}
    _, said = problem.solved(ChainSum().thinking)["messages"]
    assert said == {"role": "assistant", "content": "75-61=14#14"}


def test_what_a_chat_template_makes_of_a_solution_is_scored_as_right():
    """Whatever the marks: what is fine-tuned on is what the verifier reads."""
    tokenizer = ours(byte_level(), tokenizer_config={"eos_token": "<|im_end|>"})
    for thinking in (Thinking(), Thinking("", "#"), Thinking("[", "]")):
        task = ChainSum(thinking=thinking)
        problem = task.open(0.1).train(0, 0)
        for name in ("chatml", "plain"):
            template = built_in(name, tokenizer)
            ((text, (answer,)),) = template.answers(problem.solved(thinking)["messages"])
            reply = text[answer.start :].strip().removesuffix("<|im_end|>")
            assert task.verifier.score(reply, problem.record) == 1.0, reply


# --- files --------------------------------------------------------------------------------------


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_problems_of_a_file_are_all_trained_on_but_for_the_held_out_ones(tmp_path):
    records = [{"question": f"{i} + 1?", "answer": f"think #### {i + 1}"} for i in range(40)]
    path = written(tmp_path / "a.jsonl", records + records[:5])
    task = FileTask(path, Numeric(), answer_mark="####")
    problems = task.open(0.2)
    assert problems.train(0, 0).thought == "think"
    heldout = {p.question for p in problems.heldout(5)}
    epoch = [problems.train(1, index) for index in range(40)]
    assert not heldout & {problem.question for problem in epoch}
    assert all(Numeric().score(problem.answer, problem.record) == 1.0 for problem in epoch)
    with pytest.raises(DataError, match="41 held-out problems are asked for"):
        problems.heldout(41)


def test_every_problem_of_a_file_comes_once_in_an_epoch_and_in_another_order_in_the_next(tmp_path):
    records = [{"question": str(i), "answer": "1"} for i in range(30)]
    problems = FileTask(written(tmp_path / "a.jsonl", records), Exact()).open(0.1)
    count = 30 - len(problems._heldout)
    first, second = (
        [problems.train(0, epoch * count + i).question for i in range(count)] for epoch in (0, 1)
    )
    assert sorted(first) == sorted(second) and len(set(first)) == count and first != second


def test_bad_problems_are_named_by_file_and_line_within_a_budget(tmp_path):
    good = {"question": "1+1", "answer": 2}
    lines = [good, {"question": "", "answer": "1"}, {"question": "x", "answer": "none"}, good]
    path = written(tmp_path / "a.jsonl", lines)
    problems, skips = FileTask(path, Numeric()).read()
    assert [problem.name for problem in problems] == ["a.jsonl:1", "a.jsonl:4"]
    assert [skip.name for skip in skips] == ["a.jsonl:2", "a.jsonl:3"]
    with pytest.raises(DataError, match=r"2 bad records.*a.jsonl:2.*question is ''.*a.jsonl:3"):
        FileTask(path, Numeric(), max_bad_records=1).open(0.1)
    with pytest.raises(DataError, match="no field 'problem'"):
        FileTask(path, Numeric(), question="problem").read()


def test_tables_are_read_and_null_is_taken_for_absent(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    tests = [[{"stdin": "1", "stdout": "2"}], [{"call": "f", "args": "1", "result": "2"}]]
    table = pa.table({"question": ["a", "b"], "tests": tests})
    pq.write_table(table, tmp_path / "a.parquet")
    task = FileTask(str(tmp_path), ReadsTests(), answer=None, fields=("tests",))
    problems, skips = task.read()
    assert not skips
    assert [problem.record["tests"] for problem in problems] == tests


class ReadsTests(Exact):
    def check(self, record, name):
        assert record["tests"]
