"""The loop of reinforcement learning as its users meet it, beyond what every loop must do."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from step_jax.cli.main import main
from step_jax.core.errors import DataError, ExitCode
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.interop.artifacts import load_artifact
from step_jax.models.text.reward import RewardModel
from step_jax.tokenizers.huggingface import character_tokenizer
from step_jax.trainers.rl import outside
from step_jax.trainers.rl.config import Server
from tests.inference.completions_server import CompletionsServer
from tests.trainers.loops import run_loop, steps

ONE = Sharding.build(MeshConfig(), jax.devices()[:1])
SERVER = "{kind: vllm, url: 'http://localhost:1', model: a, weights: /tmp/a}"
MIXTURE = "{kind: moe, experts: [{count: 4, hidden: 16}], router: {top_k: 2}}"
RECIPE = """
loop: rl
run: {{directory: {folder}/run, checkpoint: {{every_steps: 1, keep: 9}}, logging: {{sinks: []}}}}
model:
  width: 16
  init: {{kind: fixed, std: 0.2}}
  layers:
    - repeat: 2
      blocks:
        - attention: {{kind: mfa, heads: 2, head_dim: 8}}
          mlp: {mlp}
tokenizer: {folder}/tokenizer
optimizer: {{kind: adamw, learning_rate: 1e-2, schedule: {{kind: constant}}}}
training: {{steps: 4, prompts: 4, samples: 4, updates: 2}}
rollout: {{max_new_tokens: 6, max_prompt_tokens: 6, slots: 2{rollout}}}
problems:
  task: {{kind: addition, digits: [1, 1]}}
  verifier: {{kind: format, thinking: {{open: '', close: '#'}}}}
evaluation: {{problems: 0}}
execution: {{dtype: float32, loss_chunks: 1}}
"""


def recipe(folder: Path, mlp="{kind: swiglu, hidden: 32}", rollout="", **changes: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer").mkdir()
    character_tokenizer("0123456789+=#;,", "<end>").save(folder / "tokenizer")
    text = RECIPE.format(folder=folder, mlp=mlp, rollout=rollout)
    text += "".join(f"{key}: {value}\n" for key, value in changes.items())
    (folder / "run.yaml").write_text(text)
    return str(folder / "run.yaml")


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    """A run of PPO: policy and critic, KL in the reward, two updates a batch."""
    folder = tmp_path_factory.mktemp("ppo") / "whole"
    state = run_loop("rl", recipe(folder, algorithm="{name: ppo, kl: 0.001}"))
    return folder / "run", state


@pytest.mark.slow
def test_a_run_cut_between_two_updates_of_a_batch_ends_in_the_same_bits(ppo, tmp_path):
    run, state = ppo
    again = recipe(tmp_path / "cut", algorithm="{name: ppo, kl: 0.001}")
    run_loop("rl", again, cut_after=3)
    jax.tree.map(np.testing.assert_array_equal, run_loop("rl", again), state)
    assert steps(tmp_path / "cut" / "run") == steps(run)


@pytest.mark.thorough
def test_policy_and_critic_are_parts_of_one_artifact(ppo):
    run, state = ppo
    critic = load_artifact(str(run), ONE, "critic")
    assert isinstance(critic.require(RewardModel, "a test"), RewardModel)
    jax.tree.map(np.testing.assert_array_equal, critic.params, state.learners["critic"].params)
    assert np.any(np.asarray(critic.params.score_D))  # it began at 0, and has learned
    assert load_artifact(str(run), ONE).model == critic.model.decoder


@pytest.mark.thorough
def test_every_step_says_how_far_engine_and_trainer_are_apart(ppo):
    records = steps(ppo[0])
    assert all(r["rollout_gap"] < 1e-5 and r["staleness_max"] == 0 for r in records)
    assert records[0]["ratio"] == pytest.approx(1, abs=1e-6)  # before the first update
    assert abs(records[1]["ratio"] - 1) > 1e-6 and records[1]["kl_behaviour"] > 0
    for name in ("reward", "entropy", "clip_share", "truncated_share", "value_error", "slots_busy"):
        assert all(name in r for r in records)


@pytest.mark.slow
def test_writing_on_devices_of_its_own_while_the_policy_learns_gives_the_same_bits(tmp_path):
    """The lag alone says which parameters wrote what; and a cut run goes on from what was ahead."""
    state = run_loop("rl", recipe(tmp_path / "one", rollout=", lag: 1"))
    own = {"rollout": ", lag: 1, parallel: {}", "parallel": "{spare: 1, fsdp: -1}"}
    apart = recipe(tmp_path / "two", **own)
    run_loop("rl", apart, devices=2, cut_after=3)
    jax.tree.map(np.testing.assert_array_equal, run_loop("rl", apart, devices=2), state)
    assert steps(tmp_path / "two" / "run") == steps(tmp_path / "one" / "run")


@pytest.mark.slow
def test_a_server_writes_with_each_version_of_the_exported_parameters(tmp_path, capsys):
    with CompletionsServer() as server:
        told = f"url: '{server.url}', model: policy, weights: {tmp_path / 'shared'}, dtype: float32"
        path = recipe(
            tmp_path / "run",
            rollout=f", lag: 1, server: {{kind: vllm, {told}}}",
            algorithm="{name: dr_grpo, corrections: [{kind: truncate}]}",
        )
        text = Path(path).read_text().replace("kind: mfa, heads: 2", "kind: mha, heads: 2")
        Path(path).write_text(text)
        run_loop("rl", path, "--training.steps", "6")
        records = steps(tmp_path / "run" / "run")
        # the second batch was written, by the same parameters, while the first was learned from
        assert [r["staleness"] for r in records] == [0, 0, 1, 1, 1, 1]
        assert [Path(folder).exists() for folder in server.loaded] == [False, True]
        assert all(r["rollout_gap"] < 1e-5 for r in records[:2])
        assert main(["rl", path, "--rollout.server.model", "other"]) == ExitCode.CONFIG
        assert "has no model 'other'; it has: policy" in capsys.readouterr().err
        server.says = {"success": False, "message": "no room"}
        with pytest.raises(DataError, match="did not load .*version_0: no room"):
            outside.load(Server("sglang", server.url, "policy", ""), tmp_path / "version_0")


@pytest.mark.slow
def test_a_mixture_learns_with_the_experts_that_wrote(tmp_path):
    run_loop("rl", recipe(tmp_path / "moe", MIXTURE, ", replay_routing: true"))
    records = steps(tmp_path / "moe" / "run")
    assert all(r["rollout_gap"] < 1e-5 for r in records) and records[-1]["step"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "{name: grpo2}"}, "no algorithm 'grpo2'; did you mean 'grpo'"),
        ({"algorithm": "{name: ppo}", "reference": "nowhere"}, "algorithm.kl is 0"),
        ({"critic": "{optimizer: {kind: adamw, learning_rate: 1e-3}}"}, "grpo has none"),
        ({"algorithm": "{name: ppo, signal: {kind: group_relative}}"}, "need each other"),
        ({"rollout": f", server: {SERVER}"}, "give algorithm.corrections"),
        ({"rollout": f", replay_routing: true, server: {SERVER}"}, "says nothing of experts"),
        ({"parallel": "{spare: 1}"}, "leaves devices to rollout.parallel"),
        ({"rollout": ", parallel: {}", "parallel": "{spare: 8}"}, "of 8 devices: none is left"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, capsys, changes, message):
    assert main(["rl", recipe(tmp_path / "bad", **changes)]) == ExitCode.CONFIG
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--training.samples", "1", "--training.prompts", "16"], "needs 2 or more"),
        (["--training.updates", "3"], "do not divide into 3 updates"),
        (["--rollout.temperature", "0"], "temperature is 0"),
        (["--rollout.max-prompt-tokens", "2"], "1000 problems in a row"),
        (["--rollout.chat", "true"], "has no chat template"),
        (["--evaluation.problems", "1000"], "held-out problems are asked for"),
    ],
)
def test_what_cannot_be_written_or_compared_is_refused(tmp_path, capsys, flags, message):
    assert main(["rl", recipe(tmp_path / "bad"), *flags]) != ExitCode.OK
    assert message in capsys.readouterr().err


@pytest.mark.thorough
def test_answers_are_shown_with_their_rewards_as_they_are_written(ppo):
    text = (ppo[0] / "samples" / "step_0.txt").read_text()
    assert text.count("--- problem") == 8 and "reward" in text and ">>>" in text
    ends = [json.loads(line) for line in (ppo[0] / "metrics.jsonl").read_text().splitlines()]
    assert ends[-1]["event"] == "final" or ends[-1]["event"] == "end"
