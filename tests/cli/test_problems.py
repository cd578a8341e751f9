import json

from step_jax.cli.main import main
from step_jax.core.errors import ExitCode
from step_jax.data.conversations import check_conversation


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_conversations_of_a_task_are_written_and_held_out_ones_are_others(tmp_path, capsys):
    asked = ["problems", "--task.kind", "addition", "--task.digits", "1", "2", "--count", "300"]
    assert main([*asked, "--out", str(tmp_path), "--heldout", "30"]) == 0
    train, heldout = lines(tmp_path / "train.jsonl"), lines(tmp_path / "heldout.jsonl")
    assert (len(train), len(heldout)) == (300, 30)
    for record in train:
        check_conversation(record["messages"], "a record")
    asked = {record["messages"][0]["content"] for record in train}
    assert not asked & {record["question"] for record in heldout}
    assert "300 problems" in capsys.readouterr().out


def test_texts_have_the_question_and_the_reply(tmp_path):
    asked = ["problems", "--task.kind", "chain_sum", "--count", "3", "--form", "text"]
    assert main([*asked, "--heldout", "0", "--out", str(tmp_path)]) == 0
    assert lines(tmp_path / "train.jsonl")[0] == {"text": "75-61=75-61=14#14"}


def test_a_task_without_worked_answers_is_refused(tmp_path, capsys):
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"question": str(i)}) + "\n" for i in range(9)))
    asked = ["problems", "--task.kind", "file", "--task.path", str(path), "--task.answer", "null"]
    asked += ["--task.checked-by.kind", "format", "--out", str(tmp_path)]
    assert main(asked) == ExitCode.CONFIG
    assert "no worked answers" in capsys.readouterr().err
