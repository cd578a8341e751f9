"""Held-out figures against a document-by-document computation, on a mesh, and the commands.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import math
import re
import shutil

import jax
import numpy as np
import pytest

from step_jax.cli.main import main
from step_jax.core.errors import DataError
from step_jax.data import DataConfig, Tokenizer
from step_jax.evaluation.corpus import whole_corpus
from step_jax.evaluation.heldout import figures, make_evaluator
from step_jax.interop.artifacts import load_artifact
from step_jax.models.context import Context
from step_jax.models.tokens import Tokens
from step_jax.tokenizers.files import load_tokenizer
from step_jax.tokenizers.sentencepiece import train_sentencepiece
from tests.artifacts import save_run
from tests.models import small

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box with care".split()
LENGTH = 32


def text(seed: int) -> str:
    words = np.random.default_rng(seed).choice(WORDS, 4 + 9 * seed)
    return " ".join(words) + "\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_sentencepiece([text(i) for i in range(20)], vocab_size=340)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    for i in range(6):  # from shorter than a row to several rows long
        (root / f"{i}.txt").write_text(text(i))
    (root / "binary").write_bytes(b"\0\1\2")
    return root


@pytest.fixture(scope="module")
def run(tokenizer, folder, tmp_path_factory):
    """A run directory as pretraining leaves it: (path, decoder, parameters)."""
    path = tmp_path_factory.mktemp("runs") / "small"
    c = small.decoder("mfa", vocab=tokenizer.vocab_size)
    p = small.params(c)
    wrong = jax.tree.map(np.zeros_like, p)  # what must not be used when there is an average
    save_run(path, c, wrong, tokenizer, LENGTH, step=7, average=p)
    return path, c, p


def nats_of(c, p, tokenizer, document: str) -> float:
    """Of one document alone, cut into rows of LENGTH, each read without what came before."""
    targets = np.append(tokenizer.encode(document), tokenizer.eos_id)
    inputs = np.concatenate([[tokenizer.bos_id], targets[:-1]])
    total = 0.0
    for start in range(0, len(targets), LENGTH):
        row, aim = inputs[start:][:LENGTH], targets[start:][:LENGTH]
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(row)] = row
        logp_TV = np.asarray(_log_probabilities(c)(p, padded)[0])
        total -= float(logp_TV[np.arange(len(aim)), aim].astype(np.float64).sum())
    return total


@functools.cache
def _log_probabilities(c):
    def f(p, tokens_1T):
        ctx = Context(Tokens.in_order(1, LENGTH), execution=small.execution())
        return jax.nn.log_softmax(c.logits(p, c.hidden(p, tokens_1T, ctx)[0], ctx))

    return jax.jit(f, compiler_options=small.FAST_COMPILE)


def test_figures_are_those_of_every_document_alone(run, tokenizer, folder):
    _, c, p = run
    heldout, skips = whole_corpus(DataConfig(path=str(folder)), tokenizer)
    assert [skip.name for skip in skips] == ["binary"]
    sharding = small.on_mesh(data=2, fsdp=2, tensor=2)
    laid_out = jax.device_put(p, sharding.params(c.specs()))
    got = make_evaluator(c, small.execution(), sharding, 4, LENGTH)(laid_out, heldout)

    texts = [text(i) for i in range(6)]
    nats = sum(nats_of(c, p, tokenizer, document) for document in texts)
    tokens = sum(len(tokenizer.encode(document)) + 1 for document in texts)
    assert got["tokens"] == tokens == heldout.tokens
    assert got["nll"] == pytest.approx(nats / tokens, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    size = sum(len(document.encode()) for document in texts)
    assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_figures_of_a_hopeless_model_and_of_nothing(run, tokenizer, folder):
    assert figures(1e6, 10.0, 5)["perplexity"] == math.inf
    _, c, p = run
    nothing = whole_corpus(DataConfig(path=str(folder)), tokenizer)[0].subset(0)
    evaluate = make_evaluator(c, small.execution(), small.on_mesh(data=8), 8, LENGTH)
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(p, nothing)


def test_an_artifact_has_the_average_and_the_run_s_own_tokenizer(run, tokenizer):
    path, c, p = run
    loaded = load_artifact(str(path), small.on_mesh(fsdp=8))
    assert loaded.model == c and loaded.step == 7 and loaded.context == LENGTH
    assert loaded.dtype == "float32" and loaded.tokenizer.hash == tokenizer.hash
    for got, expected in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(p), strict=True):
        assert np.array_equal(got, expected)


def test_eval_command(run, folder, capsys):
    path, c, p = run
    assert main(["eval", str(path), "--data.path", str(folder), "--batch-size", "8"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    rows = {key.strip(): value.strip() for key, value in lines.items()}
    assert rows["documents"] == "6 (1 left out)"
    tokenizer = load_tokenizer(path / "tokenizer")
    size = sum(len(text(i).encode()) for i in range(6))
    assert rows["bytes"] == f"{size:,}"
    bits = sum(nats_of(c, p, tokenizer, text(i)) for i in range(6)) / math.log(2) / size
    assert float(rows["bits per byte"]) == pytest.approx(bits, abs=1e-3)
    assert float(rows["bits per byte, gzip"]) > 0 < float(rows["bits per byte, xz"])


def test_eval_reads_what_the_run_held_out_or_refuses(run, folder, tmp_path, capsys):
    path, c, p = run
    command = ["eval", str(path), "--batch-size", "8"]
    assert main(command) == 1  # this run kept nothing: its texts of today may be others
    assert re.search("does not keep what it held out.*Give --data.path", capsys.readouterr().err)

    tokenizer = load_tokenizer(path / "tokenizer")
    kept = tmp_path / "kept"
    kept.mkdir()
    for i in (30, 31):
        (kept / f"{i}.txt").write_text(text(i))
    heldout, _ = whole_corpus(DataConfig(path=str(kept)), tokenizer)
    heldout.save(path / "heldout")
    shutil.rmtree(kept)
    try:
        assert main(command) == 0
        rows = dict(
            re.split("  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()
        )
        assert rows["text"] == "held-out documents of the run" and rows["documents"] == "2"
        size = sum(len(text(i).encode()) for i in (30, 31))
        bits = sum(nats_of(c, p, tokenizer, text(i)) for i in (30, 31)) / math.log(2) / size
        assert float(rows["bits per byte"]) == pytest.approx(bits, abs=1e-3)

        (path / "heldout" / "0.tokens.npy").write_bytes(b"")
        assert main(command) == 1
        assert "heldout are damaged (0.tokens.npy" in capsys.readouterr().err
        heldout.subset(0).save(path / "heldout")
        assert main(command) == 1
        assert "held out nothing (data.heldout_fraction was 0)" in capsys.readouterr().err
    finally:
        shutil.rmtree(path / "heldout")


def test_generate_command_streams_what_it_writes(run, tmp_path, capsys):
    path, *_ = run
    options = ["--temperature", "0.8", "--seed", "3", "--max-new-tokens", "12"]
    assert main(["generate", f"{path}@7", "--prompt", "the", *options]) == 0
    first = capsys.readouterr()
    assert first.out.startswith("the") and len(first.out) > len("the\n")
    prompts = tmp_path / "prompts"
    prompts.write_text("the\n\nfox\n")
    assert main(["generate", str(path), "--prompts-file", str(prompts), *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"--- 0\n{first.out}") and "--- 1\nfox" in out


def test_a_prompts_file_with_a_stray_byte_names_the_line(run, tmp_path, capsys):
    path = tmp_path / "prompts"
    path.write_bytes(b"the\nfox\ncaf\xe9\n")
    assert main(["generate", str(run[0]), "--prompts-file", str(path)]) == 78
    assert f"prompts file {path}, line 3: byte 0xe9 is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "needs an artifact"),
        (["generate", "nowhere"], "nowhere does not exist: give the directory of a run"),
        (["generate", "RUN", "--top-p", "2"], "top_p is 2.0; it must be in"),
        (["generate", "RUN", "--prompts-file", "nofile"], "prompts file nofile"),
        (["generate", "RUN", "--prompt", "caf\udce9"], r"'caf\\\\xe9' is not UTF-8 text"),
        (["generate", "RUN\udce9"], r"RUN\\\\xe9' is not UTF-8 text"),
        (["generate", "RUN", "--seed", "9223372036854775808"], "seed is 9223.* from 0 to 4294967"),
        (["generate", "RUN", "--seed", "-1"], "seed is -1; it must be from 0 to 4294967295"),
        (["generate", "RUN@8"], "has no step 8; there are: .7."),
        (["generate", "RUN", "--prompt", "fox " * 99], "more than the context of 32 tokens"),
        (["eval", "RUN", "--batch-size", "0"], "batch_size is 0"),
        (["eval", "RUN", "--data.path", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_commands_name_bad_input(run, arguments, message, capsys):
    assert main([str(run[0]) + w[3:] if w in ("RUN", "RUN@8") else w for w in arguments]) != 0
    captured = capsys.readouterr()
    assert re.search(message, captured.err) and captured.out == ""
