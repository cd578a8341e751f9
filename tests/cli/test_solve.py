"""A model solves problems by command, and what it came to is a task again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from step_jax.cli.main import main
from step_jax.core.config import parse_config
from step_jax.core.errors import DataError, ExitCode
from step_jax.environments.cached import Coordinated
from step_jax.environments.tasks import TaskConfig
from tests.trainers.loops import run_loop
from tests.trainers.test_rl_loop import recipe

ADDITION = ["--task.kind", "addition", "--task.digits", "1", "1"]
ROUNDS = """
rounds: [[2, 1]]
round: {prompt: '{references}{question}', reference: '{text};'}
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "of"
    run_loop("rl", recipe(folder), "--training.steps", "1", "--training.updates", "1")
    return str(folder / "run")


@pytest.mark.thorough
def test_accuracy_is_that_of_the_replies_that_are_kept(policy, tmp_path, capsys):
    out = tmp_path / "solved"
    flags = ["--problems", "3", "--samples", "4", "--max-new-tokens", "6", "--slots", "8"]
    (tmp_path / "ways.yaml").write_text(ROUNDS)
    ways = [str(tmp_path / "ways.yaml"), "--budgets", "2", "4"]
    assert main(["solve", policy, *ways, *ADDITION, *flags, "--out", str(out)]) == ExitCode.OK
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    found = json.loads((out / "accuracy.json").read_text())
    assert len(lines) == 12 and len({line["content"] for line in lines}) == 3
    assert found["mean@4"]["mean"] == pytest.approx(np.mean([line["right"] for line in lines]))
    assert found["tokens"]["mean"] == pytest.approx(np.mean([line["tokens"] for line in lines]))
    assert all((line["conclusion"] is None) == ("#" not in line["reply"]) for line in lines)
    curves = found["curves"]
    assert [len(points) for points in curves.values()] == [3, 2, 1]
    votes = [point["tokens"] for point in curves["votes"]]
    assert votes == pytest.approx([votes[0], 2 * votes[0], 4 * votes[0]])
    assert (out / "accuracy.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "pass@4" in shown and "coordinated rounds" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budgets", "0"], "a thought needs a token"),
        (["--problems", "1000"], "held-out problems are asked for"),
        (["--verifier.kind", "exact", "--budgets", "3", "--verifier.thinking", "null"], "no marks"),
        (["--chat", "true", "--problems", "3"], "has no chat template"),
    ],
)
def test_what_cannot_be_solved_is_refused(policy, capsys, flags, message):
    assert main(["solve", policy, *ADDITION, *flags]) != ExitCode.OK
    assert message in capsys.readouterr().err


def sample(question, conclusion, right):
    record = {"answer": "7"}
    return json.dumps(
        {"problem": "p", "question": question, "record": record, "content": question, "answer": "7",
         "reply": f"...#{conclusion}", "conclusion": conclusion, "score": float(right),
         "right": right, "tokens": 5, "finish": "stop"}
    )  # fmt: skip


def test_what_was_solved_is_a_task_of_coordinated_rounds(tmp_path):
    path = tmp_path / "samples.jsonl"
    lines = [sample(f"{q}+2=", c, c == "7") for q in range(20) for c in ("7", "8", "9")]
    path.write_text("\n".join([*lines, sample("9+9=", None, False)]) + "\n")
    config = parse_config(
        TaskConfig,
        f"task: {{kind: coordinated, path: {path}, checked_by: {{kind: exact}}, rounds: "
        "{round: {prompt: '{references}|{question}', reference: '{text},'}, messages: [2, 3]}}\n"
        "heldout_fraction: 0.3\n",
    )
    problems = config.open()
    asked = [problems.train(0, index).question for index in range(40)]
    held = [problem.question for problem in problems.heldout(2)]
    assert all(text.partition("|")[0].count(",") in (2, 3) for text in [*asked, *held])
    assert not {q.partition("|")[2] for q in asked} & {q.partition("|")[2] for q in held}
    assert len({q.partition("|")[0] for q in asked}) > 3  # orders and choices differ
    assert all("9+9=" not in text for text in asked)  # nobody came to anything
    assert problems.train(0, 0).record == {"answer": "7"}


def test_a_round_is_worked_out_by_a_right_reply_and_what_nobody_solved_is_left_out(
    tmp_path, capsys
):
    path = tmp_path / "samples.jsonl"
    lines = [sample(f"{q}+2=", c, c == "7" and q < 10) for q in range(20) for c in ("7", "8", "9")]
    path.write_text("\n".join(lines) + "\n")
    asked = ["problems", "--task.kind", "coordinated", "--task.path", str(path), "--form", "text"]
    asked += ["--task.checked-by.kind", "numeric", "--task.checked-by.thinking.open", ""]
    asked += ["--task.checked-by.thinking.close", "#", "--task.rounds.messages", "2", "2"]
    asked += ["--task.rounds.round.prompt", "{references}{question}", "--heldout", "0"]
    asked += ["--task.rounds.round.reference", "{text};", "--count", "60", "--out", str(tmp_path)]
    assert main(asked) == 0
    texts = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").open()]
    assert 0 < len(texts) < 60
    assert f"{60 - len(texts)} have no worked answer" in capsys.readouterr().out
    for text in texts:
        said, question = text[:4], text[4:].removesuffix("...#7")
        assert set(said[::2]) < set("789") and said[1::2] == ";;"
        assert int(question.removesuffix("+2=")) < 10  # of the others nothing was right


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "samples.jsonl:1 is no JSON"),
        ("[]", "samples.jsonl:1 is list"),
        ('{"question": "a"}', "samples.jsonl:1 is no sample of step-jax solve: it lacks 'problem'"),
        (sample("1+6=", None, False), "holds no conclusion"),
    ],
)
def test_lines_that_are_no_samples_are_named(tmp_path, text, message):
    path = tmp_path / "samples.jsonl"
    path.write_text(text)
    task = parse_config(Coordinated, f"{{path: {path}, checked_by: {{kind: exact}}}}")
    with pytest.raises(DataError, match=message):
        task.open(0.1)
