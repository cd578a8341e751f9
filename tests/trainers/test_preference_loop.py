"""Preference tuning and reward models: the reference that is kept, and what comes after."""

# ruff: noqa: F401, F811 (fixtures)
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from step_jax.checkpoint.artifact import Artifact
from step_jax.cli.main import main
from step_jax.core.errors import CheckpointError, ConfigError, DataError, ExitCode
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.evaluation.judge import Shown, generative
from step_jax.evaluation.rewards import score
from step_jax.interop.artifacts import Start, load_artifact
from step_jax.models.context import Context, Execution
from step_jax.models.layers.attention import MFA
from step_jax.models.layers.initialisation import Fixed
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.models.text.reward import RewardModel
from step_jax.models.tokens import Tokens
from step_jax.tokenizers.chat import encode_answer, encode_request
from step_jax.tokenizers.files import chat_tokenizer
from step_jax.trainers.reference import Compared, Reference, digest_of_params
from tests.data.conftest import tokenizer, tokenizer_path
from tests.data.test_conversations import assistant, user, write
from tests.models.small import run
from tests.trainers.loops import run_loop, steps
from tests.trainers.test_loop_contract import CASES, DECODER, places

ONE = Sharding.build(MeshConfig(), jax.devices()[:1])
PRETRAIN = CASES[0]
RECIPE = """
loop: {loop}
run: {{directory: {run}, checkpoint: {{every_steps: 2}}, logging: {{sinks: []}}}}
optimizer: {{kind: adamw, learning_rate: 1e-2, schedule: {{kind: constant}}}}
training: {{steps: 3, batch_size: 8}}
data:
  {{path: {path}, vocab_size: 400, sequence_length: 64, examples_per_row: 2, cache_dir: {cache}}}
execution: {{dtype: float32}}
"""


def recipe(folder: Path, loop: str, path, places, *lines: str) -> str:
    text = RECIPE.format(loop=loop, run=folder / loop, path=path, **places)
    (folder / f"{loop}.yaml").write_text("\n".join([text, *lines]))
    return str(folder / f"{loop}.yaml")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, places):
    """Run directories of pretraining and of DPO with adapters after it, and the recipe of that."""
    folder = tmp_path_factory.mktemp("tuned")
    run_loop("pretrain", PRETRAIN.write(folder, name="base", **places), "--training.steps", "1")
    start = f"init_from: {{artifact: {folder / 'base'}, lora: {{rank: 2}}}}"
    more = "sample: {tokens: 0}", "evaluation: {every_steps: 2, tokens: 100}"
    path = recipe(folder, "preference", places["pairs"], places, start, *more)
    run_loop("preference", path)
    return SimpleNamespace(base=folder / "base", preference=folder / "preference", recipe=path)


@pytest.mark.slow
def test_the_reference_is_the_start_and_adapters_alone_move_away_from_it(tuned):
    first, _, last = steps(tuned.preference)
    for side in ("chosen", "rejected"):
        assert abs(first[f"log_ratio_{side}"]) < 1e-4 < abs(last[f"log_ratio_{side}"])
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5) and last["loss"] < first["loss"]
    before, after = (load_artifact(str(p), ONE).params for p in (tuned.base, tuned.preference))
    np.testing.assert_array_equal(before.embedding_VD, after.embedding_VD)
    assert any(
        np.any(a != b)
        for a, b in zip(*(jax.tree.leaves(p.groups) for p in (before, after)), strict=True)
    )
    scores = [json.loads(line) for line in (tuned.preference / "metrics.jsonl").open()]
    scores = {(r["name"], r["step"]): r for r in scores if r["event"] == "eval"}
    assert set(scores) == {("heldout", 2), ("final", 3)}
    assert {"loss", "reward_accuracy", "reward_margin"} <= set(scores["final", 3])


@pytest.mark.slow
def test_a_run_that_goes_on_reads_what_it_kept_and_needs_no_reference_any_more(tuned, capsys):
    base, steps = tuned.base.rename(tuned.base.with_name("away")), ["--training.steps", "4"]
    kept = tuned.preference / "reference" / "logprobs.npz"
    try:
        run_loop("preference", tuned.recipe, *steps)
        kept.write_bytes(kept.read_bytes()[:-1])
        assert main(["preference", tuned.recipe, *steps]) == ExitCode.FAILURE
        assert "logprobs.npz is not what was written" in capsys.readouterr().err
    finally:
        base.rename(tuned.base)


def artifact_of(model, tokenizer) -> Artifact:
    params = run(lambda: model.initialise(jax.random.key(0)))
    if isinstance(model, RewardModel):  # a fresh one is zero
        params = params.replace(score_D=np.linspace(-1, 1, 8, dtype=np.float32))
    tokenizer = chat_tokenizer(tokenizer, "plain")
    processor = {"tokenizer": tokenizer}
    return Artifact("mine", Path(), model, params, processor, 48, "float32", 1, {})


@pytest.mark.thorough
def test_answers_are_scored_by_a_reward_model_each_at_its_end(tokenizer):
    reward = artifact_of(RewardModel(small(tokenizer.vocab_size)), tokenizer)
    talks = [[user("fox 3?"), assistant("fox " * n)] for n in (1, 2, 5)]
    scores = score(reward, talks, ONE, rows=2)
    assert scores.shape == (3,) and len(set(scores.tolist())) == 3
    np.testing.assert_allclose(score(reward, talks[2:], ONE, rows=1), scores[2:], rtol=1e-5)
    with pytest.raises(DataError, match="conversation 0 has .* tokens; the model's context is 48"):
        score(reward, [[user("fox " * 40), assistant("x")]], ONE)
    decoder = artifact_of(small(tokenizer.vocab_size), tokenizer)
    with pytest.raises(CheckpointError, match="a model of kind decoder; a score needs one of kind"):
        score(decoder, talks, ONE)


def test_a_language_model_judges_by_its_reply(tokenizer):
    decoder = artifact_of(small(tokenizer.vocab_size), tokenizer)
    asks = generative(decoder, ONE, "{question} {first} {second}", rows=2)
    shown = [Shown("q", "a", "b"), Shown("q", "b", "a"), Shown("q", "a", "b")]
    odds = asks(shown)
    assert odds[0] == pytest.approx(odds[2]) and odds[0] != odds[1]
    ids = encode_request(decoder.tokenizer, [user("q b a")])
    replies = [
        encode_answer(decoder.tokenizer, decoder.tokenizer.chat_template, [user("q b a"), said]).ids
        for said in (assistant("A"), assistant("B"))
    ]
    n = int(np.argmax(replies[0] != replies[1]))
    assert n >= len(ids)

    def logits(params):
        tokens = replies[0][None, :n]
        ctx = Context(Tokens.in_order(*tokens.shape), execution=Execution(dtype="float32"))
        x_BTD, *_ = decoder.model.hidden(params, tokens, ctx)
        return decoder.model.logits(params, x_BTD, ctx)[0, -1]

    logits_V = run(logits, decoder.params)
    assert odds[1] == pytest.approx(logits_V[replies[0][n]] - logits_V[replies[1][n]], abs=1e-5)


def test_what_was_kept_of_a_reference_is_read_back_whole_or_not_at_all(tmp_path):
    rng = np.random.default_rng(0)
    facts = {"reference": "runs/a", "dtype": "float32", "texts": ["1"], "parameters": "2"}
    saved = Reference(facts, [rng.normal(size=(n, 2)).astype(np.float32) for n in (5, 0)])
    assert Reference.load(tmp_path) is None
    saved.save(tmp_path)
    loaded = Reference.load(tmp_path)
    assert loaded.facts == facts
    for a, b in zip(loaded.logprobs, saved.logprobs, strict=True):
        np.testing.assert_array_equal(a, b)
    loaded.check(facts, 3)
    with pytest.raises(CheckpointError, match="not the one of step 3: its parameters was 7 and is"):
        loaded.check(facts | {"parameters": "7"}, 3)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="are damaged .*: remove the folder, and they are computed"):
        Reference.load(tmp_path)


def test_parameters_have_one_digest_on_every_mesh_and_another_after_any_change():
    eight = Sharding.build(MeshConfig(data=1, fsdp=4, tensor=2))
    a = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    swapped = a.copy()
    swapped[[0, 1]] = a[[1, 0]]
    made = [
        digest_of_params({"w": jax.device_put(x, s.named(("embed", "mlp"), x.shape))})
        for x, s in ((a, ONE), (a, eight), (swapped, ONE), (np.nextafter(a, 9), ONE))
    ]
    assert made[0] == made[1] and len(set(made)) == 3


def small(vocab: int) -> Decoder:
    block = Block(MFA(heads=2, head_dim=4), SwiGLU(16))
    return Decoder(8, (Group(1, (block,)),), vocab, init=Fixed(0.5))


def test_a_reference_of_another_vocabulary_is_refused_by_name(tokenizer):
    other = SimpleNamespace(hash="0" * 64, name="theirs", vocab_size=300)
    model = small(tokenizer.vocab_size)
    whole = model.specs()
    start = Start(model, whole, {"tokenizer": other})
    with pytest.raises(ConfigError, match=r"reference runs/a has another vocabulary \(theirs: 300"):
        Compared("runs/a", None, start).check(tokenizer, ONE)
    few = Start(small(30), small(30).specs(), {"tokenizer": tokenizer})
    with pytest.raises(ConfigError, match=r"runs/a has another vocabulary .* model.vocab 30"):
        Compared("runs/a", None, few).check(tokenizer, ONE)
    fresh = Start(model, whole.replace(embedding_VD=None), {"tokenizer": tokenizer})
    with pytest.raises(ConfigError, match="init_from.fresh leaves no whole policy of runs/a"):
        Compared("runs/a", None, fresh).check(tokenizer, ONE)
    Compared("runs/a", None, Start(model, whole, {"tokenizer": tokenizer})).check(tokenizer, ONE)


MODEL = f"model:{DECODER}".replace("{{", "{").replace("}}", "}")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "the loss dpo compares with a reference policy, and a fresh model is none: give"),
        ("loss: {kind: kto}", "the loss kto compares with a reference policy"),
        ("loss: {kind: orpo}\nreference: runs/a", "the loss orpo compares with no reference"),
        ("loss: {kind: dpo, label_smoothing: 0.5}", "label_smoothing is 0.5; it must be in"),
        ("reference: nowhere", "nowhere does not exist"),
    ],
)
def test_a_loss_and_its_reference_must_fit(places, tmp_path, capsys, lines, message):
    named = MODEL + "  vocab: 400\n" + lines
    path = recipe(tmp_path, "preference", places["pairs"], places, named)
    assert main(["preference", path]) == ExitCode.CONFIG
    assert message in capsys.readouterr().err
    assert not (tmp_path / "preference" / "config.yaml").exists()
