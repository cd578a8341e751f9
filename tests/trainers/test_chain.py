"""From one loop to the next by commands: pretrain, rl, generate, eval, export; draw."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from step_jax.cli.main import main
from step_jax.core.errors import ExitCode
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.interop.artifacts import load_artifact
from step_jax.tokenizers.sentencepiece import train_sentencepiece
from tests.trainers.loops import run_loop, steps
from tests.trainers.test_loop_contract import CASES, places  # noqa: F401 - a fixture
from tests.trainers.test_pretrain import WORDS

ONE = Sharding.build(MeshConfig(), jax.devices()[:1])
PRETRAIN, SFT, RL, DIFFUSION = (
    next(case for case in CASES if case.loop == loop)
    for loop in ("pretrain", "sft", "rl", "diffusion")
)


#: what ends a run when its start and its data are there, before a step is compiled
EARLY = ["--sample.prompts", "word " * 99, "--sample.tokens", "2"]


pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def chain(tmp_path_factory, places):  # noqa: F811
    """Run directories of pretraining, and of reinforcement on top of it."""
    folder = tmp_path_factory.mktemp("chain")
    run_loop("pretrain", PRETRAIN.write(folder, name="text", **places))
    start = f"init_from: {{{{artifact: {folder / 'text'}}}}}\n"
    run_loop("rl", RL.write(folder, start, name="policy", **places))
    return folder / "text", folder / "policy"


def test_a_policy_writes_and_is_scored_with_the_tokenizer_it_started_from(chain, places, capsys):  # noqa: F811
    text, policy = chain
    assert main(["generate", str(policy), "--prompt", "3", "12", "--max-new-tokens", "2"]) == 0
    written = capsys.readouterr().out
    assert "--- 0\n3" in written and "--- 1\n12" in written
    assert main(["eval", str(policy), "--data.path", str(places["text"] / "0.txt")]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["eval", str(policy)]) == ExitCode.FAILURE
    assert "does not keep what it held out" in capsys.readouterr().err
    assert main(["eval", str(text)]) == 0
    assert "held-out documents of the run" in capsys.readouterr().out


def test_a_policy_is_trained_on_as_a_language_model(chain, places, tmp_path):  # noqa: F811
    _, policy = chain
    start = f"init_from: {{{{artifact: {policy}@4, part: policy}}}}\n"
    run_loop("pretrain", PRETRAIN.write(tmp_path, start, **places), "--training.steps", "2")
    mine, before = (load_artifact(str(p), ONE) for p in (tmp_path / "run", policy))
    assert mine.meta["artifact"]["origin"] == f"{policy}@4, step 4"
    assert mine.tokenizer.hash == before.tokenizer.hash
    # what it started from may go: the run has all it needs
    moved = policy.rename(policy.with_name("moved"))
    try:
        run_loop("pretrain", str(tmp_path / "run.yaml"), "--training.steps", "3")
    finally:
        moved.rename(policy)
    assert [r["step"] for r in steps(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_an_export_is_an_artifact_again(tmp_path, places, capsys):  # noqa: F811
    """MHA, which Hugging Face has: the same logits, and training goes on from the folder."""
    pytest.importorskip("safetensors")
    recipe = PRETRAIN.write(tmp_path, **places)
    text = (tmp_path / "run.yaml").read_text().replace(
        "{kind: mfa, heads: 2, head_dim: 8}", "{kind: mha, heads: 2, kv_heads: 1, head_dim: 8}"
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(text)
    run_loop("pretrain", recipe, "--training.steps", "2")
    folder = tmp_path / "exported"
    assert main(["export", str(tmp_path / "run"), str(folder), "--dtype", "float32"]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 16
    run, hub = load_artifact(str(tmp_path / "run"), ONE), load_artifact(f"hf:{folder}", ONE)
    jax.tree.map(np.testing.assert_array_equal, run.params, hub.params)
    assert replace(hub.model, init=run.model.init) == run.model
    assert hub.context == 16 and hub.dtype == "float32"
    text = "the quick brown fox 3="
    np.testing.assert_array_equal(hub.tokenizer.encode(text), run.tokenizer.encode(text))
    assert hub.tokenizer.stop_ids == run.tokenizer.stop_ids
    start = f"init_from: {{{{artifact: 'hf:{folder}'}}}}\n"
    again = PRETRAIN.write(tmp_path, start, name="again", **places)
    run_loop("pretrain", again, "--training.steps", "1")
    assert main(["generate", f"hf:{folder}", "--prompt", "the ", "--max-new-tokens", "2"]) == 0
    assert main(["export", str(tmp_path / "run"), str(folder)]) == ExitCode.CONFIG
    assert "is not empty" in capsys.readouterr().err


def test_pictures_are_drawn_from_an_artifact_and_texts_are_not(tmp_path, places, chain, capsys):  # noqa: F811
    pytest.importorskip("sklearn")
    run_loop("diffusion", DIFFUSION.write(tmp_path, **places), "--text.dropout", "0")
    picture = tmp_path / "drawn.png"
    prompts = ["the digit three and much more", "数字七"]
    options = ["--count", "2", "--sampler.steps", "2", "--output", str(picture)]
    assert main(["sample-video", str(tmp_path / "run"), *prompts, *options]) == 0
    assert Image.open(picture).size == (28, 28)  # two of each prompt, each with a frame
    out = capsys.readouterr().out
    assert "4 in " in out and "2 of 3 texts have more than 4 tokens and are cut" in out
    options = ["--sampler.guidance", "3"]
    assert main(["sample-video", str(tmp_path / "run"), "seven", *options]) == ExitCode.FAILURE
    assert "was never trained without text" in capsys.readouterr().err
    for command in (["generate", str(tmp_path / "run")], ["eval", str(tmp_path / "run")]):
        assert main(command) == ExitCode.FAILURE
        assert "a model of kind video_dit" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == ExitCode.CONFIG
    assert "a StepVideoModel reads states of a CLIP and of a language model" in (
        capsys.readouterr().err
    )
    assert main(["sample-video", str(chain[0]), "seven"]) == ExitCode.FAILURE
    assert "a model of kind decoder" in capsys.readouterr().err
    assert main(["sample-video", str(tmp_path / "run")]) == ExitCode.CONFIG
    assert "give a prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("fresh: [head]", "no parameter is named 'head'; there are: embedding_VD"),
        ("freeze: ['*']", "leaves nothing to train"),
        ("part: critic", "has no part 'critic'; there are: model"),
        ("lora: {{rank: 2}}, freeze: [groups]", "leave freeze and fresh out"),
    ],
)
def test_a_start_that_cannot_be_meant_is_refused(chain, places, tmp_path, capsys, init, message):  # noqa: F811
    start = f"init_from: {{{{artifact: {chain[0]}, {init}}}}}\n"
    assert main(["pretrain", PRETRAIN.write(tmp_path, start, **places)]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_parameters_that_do_not_fit_are_named(chain, places, tmp_path, capsys):  # noqa: F811
    recipe = PRETRAIN.write(tmp_path, **places)
    wide = ["--model.width", "32", "--init-from.artifact", str(chain[0])]
    assert main(["pretrain", recipe, *wide]) == ExitCode.FAILURE
    message = capsys.readouterr().err
    assert "embedding_VD: the model has (300, 32), it has (300, 16)" in message
    assert "init_from.fresh" in message


def test_settings_that_are_not_the_artifacts_are_named(chain, places, tmp_path, capsys):  # noqa: F811
    recipe = PRETRAIN.write(tmp_path, **places)
    other = ["--model.norm.eps", "1e-3", "--init-from.artifact", str(chain[0])]
    assert main(["pretrain", recipe, *other]) == ExitCode.FAILURE
    message = capsys.readouterr().err
    assert f"the parameters of {chain[0]} fit the model" in message
    assert "\n  norm.eps was 1e-05 and is 0.001\n" in message
    assert (
        main(["pretrain", recipe, *other, "--init-from.changed", "norm.eps", *EARLY])
        == ExitCode.CONFIG
    )
    assert "leaves no room in a context of 16 tokens" in capsys.readouterr().err


def test_another_tokenizer_than_the_artifacts_is_said(chain, places, tmp_path, capsys):  # noqa: F811
    train_sentencepiece([" ".join(WORDS)] * 9, 290).save(tmp_path / "other")
    start = f"init_from: {{{{artifact: {chain[0]}}}}}\n"
    recipe = PRETRAIN.write(tmp_path, start, **places)
    assert main(["pretrain", recipe, *EARLY]) == ExitCode.CONFIG
    assert "stand for other tokens" not in capsys.readouterr().out
    named = ["--data.tokenizer", str(tmp_path / "other")]
    assert main(["pretrain", recipe, *EARLY, *named]) == ExitCode.CONFIG
    said = capsys.readouterr().out
    assert "(290 tokens), and" in said and f"{chain[0]}, step 6 was made with" in said


@pytest.mark.slow
def test_adapters_are_trained_and_added_to_what_is_loaded(chain, places, tmp_path):  # noqa: F811
    start = (
        (
            f"init_from: {{{{artifact: {chain[0]}, "
            "lora: {{{{rank: 2, targets: ['*/attention/*', '*/mlp/*']}}}}}}}}\n"
        )
        .replace("{{{{rank", "{{rank")
        .replace("']}}}}}}}}", "']}}}}")
    )
    run_loop("pretrain", PRETRAIN.write(tmp_path, start, **places), "--training.steps", "3")
    before, after = (load_artifact(str(p), ONE) for p in (chain[0], tmp_path / "run"))
    np.testing.assert_array_equal(after.params.embedding_VD, before.params.embedding_VD)
    (old,), (new,) = before.params.groups[0], after.params.groups[0]
    assert np.any(np.asarray(old.mlp.up_DF) != np.asarray(new.mlp.up_DF))
    assert steps(tmp_path / "run")[-1]["loss"] < steps(tmp_path / "run")[0]["loss"]
