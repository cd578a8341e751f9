"""Scores and texts of runs whose tokenizer loses text, or puts a mark before the first word."""

from types import SimpleNamespace

import pytest
from tokenizers import normalizers

from step_jax.cli.generate import GenerateConfig, _write
from step_jax.cli.main import main
from step_jax.data import DataConfig
from step_jax.evaluation.heldout import figures
from tests.artifacts import save_run
from tests.models import small
from tests.tokenizers.made import byte_level, metaspace, ours

LENGTH = 32


def run_of(tokenizer, folder, data: DataConfig):
    """(path, decoder, parameters) of a run as pretraining leaves it."""
    c = small.decoder("mfa", vocab=tokenizer.vocab_size)
    p = small.params(c)
    save_run(folder / "run", c, p, tokenizer, data.sequence_length, step=1)
    return folder / "run", c, p


@pytest.fixture
def data(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / f"texts/{i}.txt").write_text(f"The quick Fox {i}\n" * 3)
    return DataConfig(
        path=str(tmp_path / "texts"),
        tokenizer=str(tmp_path / "run/tokenizer"),
        cache_dir=str(tmp_path / "cache"),
        heldout_fraction=0.5,
        sequence_length=LENGTH,
        lossy_tokenizer=True,
    )


@pytest.mark.thorough
def test_bits_per_byte_are_not_given_where_the_tokenizer_loses_text(tmp_path, data, capsys):
    assert "bits_per_byte" in figures(3.0, 2.0, 5) and "bits_per_byte" not in figures(
        3.0, 2.0, None
    )
    normalizer = normalizers.Lowercase()
    lower = ours(byte_level(normalizer), tokenizer_config={"eos_token": "<|endoftext|>"})
    path = run_of(lower, tmp_path, data)[0]
    assert main(["eval", str(path), "--data.path", str(tmp_path / "texts")]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("bits per byte")]
    assert "not available: the tokenizer loses text (its normaliser Lowercase" in line


@pytest.mark.parametrize("prompts", [["the"], ["the", "a"]])
def test_generate_keeps_the_space_between_prompt_and_answer(monkeypatch, capsys, prompts):
    tokenizer = ours(metaspace())
    answer = tokenizer.encode("fox").tolist()
    assert tokenizer.decode(answer) == "fox"

    def write(params, decoder, ids, sampling, *, on_tokens, on_end, stop_ids, **_):
        if on_tokens:
            on_tokens(0, answer)
        for row in reversed(range(len(ids))):  # as they end
            on_end(row, SimpleNamespace(tokens=answer, reason="stop"))

    monkeypatch.setattr("step_jax.inference.generate.generate", write)
    artifact = SimpleNamespace(
        tokenizer=tokenizer, context_of_text=LENGTH, params=0, model=0, execution=0
    )
    _write(artifact, None, GenerateConfig(), prompts)
    printed = capsys.readouterr().out
    assert printed == ("the fox\n" if len(prompts) == 1 else "--- 0\nthe fox\n--- 1\na fox\n")
