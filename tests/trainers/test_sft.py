"""Fine-tuning on conversations: the loss, and what a user does with the result."""

# ruff: noqa: F401, F811 (fixtures)
from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from step_jax.cli.main import main
from step_jax.core.errors import ExitCode
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.data import ConversationConfig, TextDataset
from step_jax.data.batches import to_mesh
from step_jax.data.packing import empty_batch, text_schema
from step_jax.models.context import Execution
from step_jax.models.layers.attention import MFA
from step_jax.models.layers.mlp import SwiGLU
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.tokenizers.chat import encode_request
from step_jax.tokenizers.files import load_tokenizer
from step_jax.trainers import sft
from step_jax.training.learner import learn
from step_jax.training.losses.text import packed_text_loss
from step_jax.training.optimizers.config import AdamW
from step_jax.training.program import Program, Work
from step_jax.training.schedules import Constant
from tests.data.conftest import tokenizer, tokenizer_path
from tests.data.test_conversations import segments, write
from tests.trainers.loops import run_loop, steps
from tests.trainers.test_loop_contract import CASES, places

ONE = Sharding.build(MeshConfig(), jax.devices()[:1])
PRETRAIN, SFT = CASES[:2]
MLPS = {
    "dense": SwiGLU(32),
    "experts": MoE((Experts(4, 16),), router=Router(top_k=2, balance_loss=0.1, z_loss=0.01)),
}


def first_step(model, rows, accumulation=1) -> dict[str, float]:
    """Loss and norm of the gradient of one batch."""
    schema = text_schema(*rows["tokens"].shape)
    adamw = AdamW(learning_rate=1e-2, schedule=Constant(warmup_steps=0))
    loss = packed_text_loss(model, Execution(dtype="float32"), ONE)
    program = Program.build(
        lambda params, batch, key: loss(params["model"], batch),
        {"model": model},
        {"model": learn(model, adamw, total_steps=1, sharding=ONE)},
        schema,
        ONE,
        total_steps=1,
        work=Work(1),
        seed=0,
        accumulation=accumulation,
    )
    state = program.initial_state(jax.random.key(0))
    step = program.compile()
    _, metrics = step(state, to_mesh(ONE, schema, rows))
    names = ("loss", "nll", "grad_norm")
    return {name: float(metrics[name]) for name in names}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("mlp", "accumulation"),
    [pytest.param("dense", 1, marks=pytest.mark.slow), ("experts", 2)],
)
def test_packed_conversations_give_the_loss_and_gradient_of_one_in_each_row(
    tokenizer_path, tmp_path, mlp, accumulation
):
    """And so does accumulation, however unevenly answers are spread over the microbatches."""
    pairs = [{"prompt": f"{i}?", "completion": "ab" * (i % 5 + 1)} for i in range(20)]
    data = ConversationConfig(
        path=str(write(tmp_path / "d.jsonl", pairs)),
        tokenizer=tokenizer_path,
        sequence_length=64,
        cache_dir=str(tmp_path / "cache"),
    )
    dataset = TextDataset.build(data, batch_size=2)
    packed = dataset.batch(1)
    conversations = list(segments(packed))
    assert len(conversations) > 2
    count = len(conversations) + len(conversations) % 2
    alone = empty_batch(count, 64, dataset.tokenizer.pad_id)
    for row, arrays in enumerate(conversations):
        for name, values in zip(("tokens", "targets", "weights", "positions"), arrays, strict=True):
            alone[name][row, : len(values)] = values
        alone["segments"][row, : len(arrays[0])] = 1
    model = Decoder(
        16, (Group(1, (Block(MFA(heads=2, head_dim=8), MLPS[mlp]),)),), dataset.tokenizer.vocab_size
    )
    want = first_step(model, alone)
    assert first_step(model, packed, accumulation) == pytest.approx(want, rel=1e-5)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, places):
    """Run directories of pretraining, and of fine-tuning on top of it."""
    folder = tmp_path_factory.mktemp("chain")
    recipe = Path(PRETRAIN.write(folder, name="text", **places))
    recipe.write_text(recipe.read_text().replace(
        "{kind: mfa, heads: 2, head_dim: 8}", "{kind: mha, heads: 2, kv_heads: 1, head_dim: 8}"
    ))  # fmt: skip
    run_loop("pretrain", str(recipe), "--training.steps", "2")
    start = f"init_from: {{{{artifact: {folder / 'text'}}}}}\n"
    recipe = Path(SFT.write(folder, start, name="chat", **places))
    recipe.write_text(
        recipe.read_text().replace("every_steps: 0, tokens: 100", "every_steps: 3, tokens: 100")
        .replace("sample: {tokens: 0}", "sample: {tokens: 4, prompts: ['fox 3?']}")
    )  # fmt: skip
    run_loop("sft", str(recipe), "--training.ema-decay", "0.9")
    return folder / "text", folder / "chat"


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_fine_tuned_model_answers_with_the_template_that_it_was_trained_with(chain, capsys):
    text, chat = chain
    tokenizer = load_tokenizer(chat / "tokenizer")
    assert load_tokenizer(text / "tokenizer").chat_template is None
    assert tokenizer.chat_template.render([{"role": "user", "content": "x"}]) == "User: x\n\n"
    several = ["--prompt", "fox 3?", "dog 4?", "--system", "be brief", "--max-new-tokens", "2"]
    assert main(["generate", str(chat), "--chat", *several]) == 0
    written = capsys.readouterr().out
    assert "--- 0\n" in written and "--- 1\n" in written
    assert not any(text in written for text in ("be brief", "fox 3?", "User:"))
    assert (chat / "samples" / "step_6.txt").read_text().startswith("user: fox 3?\nassistant: ")


@pytest.mark.thorough
def test_held_out_answers_are_scored_during_the_run_at_its_end_and_by_command(chain, capsys):
    _, chat = chain
    scores = {(r["name"], r["step"]): r for r in records(chat) if r["event"] == "eval"}
    assert set(scores) == {("heldout", 3), ("final", 6)}
    assert main(["eval", str(chat)]) == 0
    table = capsys.readouterr().out
    assert "held-out documents of the run" in table
    (nll,) = re.findall(r"nll \(nats per token\) +([\d.]+)", table)
    assert float(nll) == pytest.approx(scores["final", 6]["nll"], abs=1e-3)
    (tokens,) = re.findall(r"\ntokens +([\d,]+)", table)
    meta = np.load(chat / "heldout" / "0.said.npy")
    assert int(tokens.replace(",", "")) == meta.sum() < len(meta)
    header = next(r for r in records(chat) if r["event"] == "header")
    assert "an epoch" in header["values"]["tokens of answers"]


@pytest.mark.slow  # by default test_chain.py trains adapters on rows of tokens, as this loop does
def test_adapters_are_trained_on_conversations_and_nothing_else_is(chain, places, tmp_path):
    from step_jax.interop.artifacts import load_artifact

    start = f"init_from: {{{{artifact: {chain[0]}, lora: {{{{rank: 2}}}}}}}}\n"
    run_loop("sft", SFT.write(tmp_path, start, **places), "--training.steps", "3")
    before, after = (load_artifact(str(p), ONE) for p in (chain[0], tmp_path / "run"))
    np.testing.assert_array_equal(after.params.embedding_VD, before.params.embedding_VD)
    (old,), (new,) = before.params.groups[0], after.params.groups[0]
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), old, new)
    assert any(jax.tree.leaves(changed))
    assert [r["step"] for r in steps(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.thorough
def test_a_fine_tuned_model_is_exported_with_its_template(chain, tmp_path):
    pytest.importorskip("safetensors")
    assert main(["export", str(chain[1]), str(tmp_path / "out")]) == 0
    mine, theirs = (load_tokenizer(p) for p in (chain[1] / "tokenizer", tmp_path / "out"))
    assert theirs.chat_template.source == mine.chat_template.source
    assert theirs.stop_ids == mine.stop_ids
    asked = [encode_request(t, [{"role": "user", "content": "fox 3?"}]) for t in (mine, theirs)]
    assert asked[0] == asked[1]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--chat"], ExitCode.CONFIG, "chat needs what the user says"),
        (["--system", "x"], ExitCode.CONFIG, "it needs --chat"),
        (["--chat", "--prompt", "hello"], ExitCode.FAILURE, "has no chat template"),
    ],
)
def test_talking_to_what_cannot_is_refused(chain, capsys, flags, code, message):
    assert main(["generate", str(chain[0]), *flags]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.packing", "split"], "packed whole and apart"),
        (["--sample.prompts", " ", "--sample.tokens", "2"], "has an empty one"),
        (["--data.path", "nowhere"], "does not exist"),
        (["--sample.prompts", "word " * 99, "--sample.tokens", "2"], "leaves no room"),
        (["--data.chat-template", "chatml"], "has not what the chat template chatml writes"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_first_step(
    places, tmp_path, capsys, flags, message
):  # fmt: skip
    assert main(["sft", SFT.write(tmp_path, **places), *flags]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.thorough
def test_a_run_does_not_go_on_with_another_template(chain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sft, "fitting", lambda *_: None)  # no step is needed to know it
    chat = chain[1]
    other = tmp_path / "other.jinja"
    plain = load_tokenizer(chat / "tokenizer").chat_template.source
    other.write_text(plain.replace(r"'\n\n'", r"'\n'"))
    changed = ["--training.steps", "7", "--data.chat-template", str(other)]
    assert main(["sft", str(chat / "config.yaml"), *changed]) == ExitCode.FAILURE
    assert "do not go on where the checkpoint of step 6 stopped" in capsys.readouterr().err
