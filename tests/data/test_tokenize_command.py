import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from step_jax.cli.main import main
from step_jax.core.command_line import load_config
from step_jax.core.errors import ExitCode
from step_jax.core.sharding import MeshConfig, Sharding, make_mesh
from step_jax.interop.artifacts import Start
from step_jax.tokenizers.files import load_tokenizer
from step_jax.trainers import ahead, find_loop, judged, text


def test_tokenize_trains_prepares_and_prints_the_counters(corpus, tmp_path, capsys):
    out = tmp_path / "kept"
    (corpus / "image.png").write_bytes(b"\0")
    argv = ["tokenize", "--data.path", str(corpus), "--data.vocab-size", "330"]
    argv += ["--data.cache-dir", str(tmp_path / "cache"), "--out", str(out)]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    table = dict(line.split("  ", 1) for line in printed.splitlines() if "  " in line)
    table = {name.strip(): value.strip() for name, value in table.items()}
    assert table["files"] == "61" and table["skipped binary"] == "1"
    assert int(table["documents"]) + int(table["heldout documents"]) == 60
    assert table["tokens dropped"] == "0"
    trained = load_tokenizer(out)
    assert trained.vocab_size == 330 and table["tokenizer hash"] == trained.hash[:16]
    assert main(argv) == 0
    again = capsys.readouterr().out
    assert "training a tokenizer" not in again and "tokenising" not in again


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.path", "/nowhere"], "does not exist"),
        (["--data.pth", "x"], "data.path"),
        (["--data.vocab-size", "10"], "vocab_size is 10"),
    ],
)
def test_errors_are_one_message(argv, message, capsys):
    assert main(["tokenize", *argv]) != 0
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_tokenize_shows_special_tokens_and_the_chat_template(corpus, tmp_path, capsys):
    golden = Path(__file__).parents[1] / "golden/chat_tokenizer"
    argv = ["tokenize", "--data.path", str(corpus), "--data.tokenizer", str(golden)]
    assert main([*argv, "--data.cache-dir", str(tmp_path / "cache")]) == 0
    printed = capsys.readouterr().out
    rows = dict(line.split("  ", 1) for line in printed.splitlines() if "  " in line)
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["begin of text"] == "none" and rows["end of text"] == "2 <|im_end|>"
    assert rows["stop tokens"] == "2 <|im_end|>, 0 <|endoftext|>"
    assert rows["special tokens"] == "0 <|endoftext|>, 1 <|im_start|>, 2 <|im_end|>"
    assert rows["gives back any text"] == "yes"
    assert "assistant\n4<|im_end|>\n<|im_start|>user\nAnd 3 + 3?<|im_end|>\n<|im_st" in printed


def test_tokenize_shows_why_a_chat_template_fails(corpus, tmp_path, capsys):
    shutil.copytree(Path(__file__).parents[1] / "golden/chat_tokenizer", tmp_path / "t")
    (tmp_path / "t/chat_template.jinja").write_text("{{ raise_exception('system first') }}")
    argv = ["tokenize", "--data.path", str(corpus), "--data.tokenizer", str(tmp_path / "t")]
    assert main([*argv, "--data.cache-dir", str(tmp_path / "cache")]) == 0
    assert "failed: system first" in capsys.readouterr().out


RECIPE = """
loop: {loop}
run: {{directory: {folder}/run}}
training: {{steps: 1, batch_size: 1}}
init_from: {{artifact: runs/base}}
optimizer: {{kind: adamw, learning_rate: 1e-3, schedule: {{kind: constant, warmup_steps: 0}}}}
data: {{path: {folder}/d.jsonl, cache_dir: {folder}/cache}}
"""


@pytest.mark.parametrize("loop", ["sft", "preference", "reward"])
def test_a_run_finds_what_tokenize_made_of_its_recipe(loop, tmp_path, capsys, monkeypatch):
    """With the tokenizer of what the run starts from, and the records that its loop reads."""
    golden = load_tokenizer(Path(__file__).parents[1] / "golden/chat_tokenizer")
    asked = []

    def artifact(name, sharding, part, *, arrays):
        asked.append((name, arrays))
        return SimpleNamespace(model=None, processor={"tokenizer": golden})

    monkeypatch.setattr(ahead, "load_artifact", artifact)
    records = [
        {"prompt": f"the fox {i}?", "completion": f"wizards box {i}"}
        if loop == "sft"
        else {"prompt": f"the fox {i}?", "chosen": f"wizards box {i}", "rejected": f"{i}"}
        for i in range(60)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(loop=loop, folder=tmp_path))
    assert main(["tokenize", str(recipe), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "tokens learned" in printed and "every byte checked" in printed
    assert asked == [("runs/base", False)]
    config = load_config(find_loop(loop).Config, [str(recipe)]).config
    prepare_data = (text if loop == "sft" else judged).prepare_data
    said: list[str] = []
    begin = Start(None, None, {"tokenizer": golden}, "runs/base")
    found = prepare_data(config, begin, Sharding(make_mesh(MeshConfig(context=-1))), said.append)
    assert found.tokenizer.hash == golden.hash and not said


def test_recipes_without_text_and_impossible_workers_are_refused(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("loop: rl\n")
    assert main(["tokenize", str(recipe)]) == ExitCode.CONFIG
    assert "a loop that reads no text" in capsys.readouterr().err
    for workers in ("0", "-1", "two"):
        assert main(["tokenize", "--workers", workers]) == ExitCode.CONFIG
        assert f"--workers is {workers}; it must be" in capsys.readouterr().err
