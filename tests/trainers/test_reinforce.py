"""The REINFORCE loop: rollouts against their definition, learning, exact resume, meshes, refusals.

Shape suffixes: B rows, N tokens of an answer.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_jax.cli.main import main
from step_jax.core.config import load_file
from step_jax.core.errors import ExitCode
from step_jax.core.sharding import MeshConfig, Sharding
from step_jax.interop.artifacts import Start
from step_jax.models.context import Context
from step_jax.models.tokens import Tokens
from step_jax.trainers.rl import reinforce
from tests.models.small import FAST_COMPILE, run
from tests.trainers.loops import run_loop, steps

RECIPE = """
run:
  directory: {run}
  checkpoint: {{every_steps: 3}}
  logging: {{sinks: []}}
model:
  width: 16
  vocab: 12
  init: {{kind: fixed, std: 0.2}}
  layers:
    - repeat: 2
      blocks:
        - attention: {{kind: mha, heads: 2, head_dim: 8}}
          mlp: {{kind: swiglu, hidden: 32}}
training: {{steps: 6, prompts: 4, samples: 4, digits: 2}}
optimizer: {{kind: adamw, learning_rate: 1e-2, schedule: {{kind: constant}}}}
execution: {{dtype: float32}}
"""


def recipe(folder: Path, run: str = "run") -> str:
    path = folder / f"{run}.yaml"
    path.write_text(RECIPE.format(run=folder / run))
    return str(path)


def test_rollouts_are_what_they_say(tmp_path):
    """Rewards by sorting text in Python; log-probabilities by a full forward pass."""
    config = load_file(reinforce.Config, recipe(tmp_path))
    sharding = Sharding.build(MeshConfig(), jax.devices()[:1])
    model, _, task = reinforce.policy_and_task(config, Start(config.model))
    params = run(lambda: model.initialise(jax.random.key(3)))
    roll = jax.jit(reinforce.make_roll(config, model, task, sharding))
    roll = roll.lower(params, 5).compile(compiler_options=FAST_COMPILE)
    batch = jax.device_get(roll(params, 5))

    rewards, logprobs = [], []
    text = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)
    positions = jnp.broadcast_to(jnp.arange(4), batch["tokens"].shape)
    ctx = Context(Tokens(positions), sharding=sharding, execution=config.execution)

    def logits(params, tokens_BT):
        return model.logits(params, model.hidden(params, tokens_BT, ctx)[0], ctx)

    logits_BTV = run(logits, params, batch["tokens"])
    logp = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    for row, tokens in enumerate(text):
        prompt, answer = task.text(tokens).split("=", 1)
        rewards.append(np.mean([a == b for a, b in zip(answer, sorted(prompt), strict=True)]))
        logprobs.append([logp[row, t, tokens[t + 1]] for t in (2, 3)])
    np.testing.assert_allclose(batch["reward"], rewards)
    np.testing.assert_array_equal(batch["solved"], np.equal(rewards, 1))
    np.testing.assert_allclose(batch["logprobs"][:, 2:], logprobs, atol=1e-5)

    advantages = np.reshape(rewards, (4, 4)) - np.reshape(rewards, (4, 4)).mean(1, keepdims=True)
    expected = np.outer(advantages.ravel(), [0, 0, 1, 1])
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(batch["weights"], expected, atol=1e-6)
    assert len({task.text(row[:2]) for row in text}) > 1  # prompts differ
    assert (roll(params, 6)["tokens"] != batch["tokens"]).any()  # from step to step, too


@pytest.mark.slow
def test_it_learns(tmp_path):
    """Sorting a single digit: to repeat it."""
    flags = ["--training.digits", "1", "--training.steps", "60", "--training.prompts", "16"]
    run_loop("reinforce", recipe(tmp_path), *flags, "--training.samples", "8")
    rewards = [r["reward"] for r in steps(tmp_path / "run")]
    assert max(r["sampler_gap"] for r in steps(tmp_path / "run")) < 1e-5  # sampled as trained
    assert np.mean(rewards[:5]) < 0.25 and np.mean(rewards[-5:]) > 0.6
    answers = (tmp_path / "run" / "samples" / "step_60.txt").read_text().splitlines()
    assert len(answers) == 16 and all(a[1] == "=" for a in answers)
    assert np.mean([a[0] == a[2] for a in answers]) > 0.6
    assert (tmp_path / "run" / "plots" / "reward.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init-from.artifact", "runs/x"], "either a model, or init_from"),
        (["--training.samples", "0"], "samples must be at least 1"),
        (["--optimizer.learning-rate", "step_law"], "step_law is a law of pretraining tokens"),
        (["--optimizer.schedule.warmup-steps", "9"], "warm-up of 9 steps"),
    ],
)
def test_bad_input_is_refused_in_words(tmp_path, capsys, flags, message):
    assert main(["reinforce", recipe(tmp_path), *flags]) == ExitCode.CONFIG
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
