import json
import shutil
from pathlib import Path

import pytest

from step_jax.cli.main import main
from step_jax.core.errors import ExitCode
from step_jax.tokenizers.files import load_tokenizer


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
    assert "training a tokenizer" not in capsys.readouterr().out


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


def test_tokenize_takes_the_recipe_of_any_loop_that_reads_text(tmp_path, capsys):
    pairs = [{"prompt": f"the fox {i}?", "completion": f"seven wizards box {i}"} for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"loop: sft\nrun: {{directory: {tmp_path}/run}}\ntraining: {{steps: 1, batch_size: 1}}\n"
        "init_from: {artifact: nowhere}\noptimizer: {kind: adamw, learning_rate: 1e-3, schedule: "
        f"{{kind: constant, warmup_steps: 0}}}}\ndata: {{path: {tmp_path}/d.jsonl, "
        f"vocab_size: 300, cache_dir: {tmp_path}/cache}}\n"
    )
    assert main(["tokenize", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "tokens learned" in printed and "Assistant: 4" in printed
    recipe.write_text("loop: rl\n")
    assert main(["tokenize", str(recipe)]) == ExitCode.CONFIG
    assert "a loop that reads no text" in capsys.readouterr().err
