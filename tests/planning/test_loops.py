"""Plans of loops other than pretraining, and of runs that start from an artifact."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from step_jax.checkpoint.checkpointer import Checkpointer
from step_jax.cli.main import main
from step_jax.core.command_line import load_config
from step_jax.core.config import load_file
from step_jax.core.errors import ConfigError, ExitCode
from step_jax.core.sharding import MeshConfig
from step_jax.planning import estimate, report, search, topology
from step_jax.planning.case import case_of
from step_jax.planning.compiled import program_for, resolved
from step_jax.runs import device_memory
from step_jax.tokenizers.huggingface import character_tokenizer
from step_jax.trainers import pretrain
from step_jax.trainers.diffusion import flow_matching
from step_jax.trainers.rl import loop as rl
from step_jax.trainers.text import Training
from step_jax.training.optimizers.config import Muon
from step_jax.training.schedules import Constant
from tests.trainers.loops import run_loop

TOYS = Path(__file__).parents[2] / "configs" / "toys"
DIGITS = TOYS.parent / "video" / "digits.yaml"

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards boil some odd juice".split()

PRETRAIN = """
run: {{directory: {run}, logging: {{sinks: []}}}}
model:
  width: 32
  layers:
    - repeat: 2
      blocks:
        - attention: {{kind: mha, heads: 2, head_dim: 16}}
          mlp: {{kind: swiglu, hidden: 32}}
training: {{steps: 1, batch_size: 4}}
data: {{path: {text}, sequence_length: 16, vocab_size: 300, cache_dir: {cache}}}
optimizer: {{kind: adamw, learning_rate: 1e-3, schedule: {{kind: constant}}}}
execution: {{dtype: float32}}
evaluation: {{every_steps: 0, tokens: 100}}
sample: {{tokens: 0}}
"""

RL = """
loop: rl
run: {{directory: {folder}/run}}
model:
  width: 64
  layers:
    - repeat: 2
      blocks:
        - attention: {{kind: mha, heads: 4, head_dim: 16}}
          mlp: {{kind: swiglu, hidden: 128}}
tokenizer: {folder}/tokenizer
training: {{steps: 300, prompts: 32, samples: 16}}
rollout: {{max_new_tokens: 16, max_prompt_tokens: 8}}
problems: {{task: {{kind: addition, digits: [1, 1]}}}}
algorithm: {{name: dr_grpo}}
optimizer: {{kind: adamw, learning_rate: 1e-3, schedule: {{kind: constant}}}}
execution: {{dtype: float32, loss_chunks: 1}}
"""

OWN = """
from dataclasses import dataclass
from typing import Literal

from step_jax.trainers.rl import loop as rl

program, run = rl.program, rl.run


@dataclass(frozen=True)
class Config(rl.Config):
    loop: Literal["sorting"] = "sorting"
"""


def planned(recipe, folder: Path, *flags: str) -> dict:
    """What a plan on two simulated devices saved."""
    argv = ["plan", str(recipe), "--topology", "cpu:2", "--output", str(folder), *flags]
    assert main(argv) == 0
    (saved,) = folder.glob("*.json")
    assert saved.with_suffix(".png").stat().st_size > 10_000
    return json.loads(saved.read_text())


@pytest.fixture
def policy(tmp_path):
    """A recipe of reinforcement learning, that needs nothing but its tokenizer."""
    (tmp_path / "tokenizer").mkdir()
    character_tokenizer("0123456789+=#;,", "<end>").save(tmp_path / "tokenizer")
    (tmp_path / "rl.yaml").write_text(RL.format(folder=tmp_path))
    return tmp_path / "rl.yaml"


@pytest.mark.slow
def test_plan_of_rl_says_that_rollouts_are_not_in_it(policy, tmp_path, capsys):
    plan = planned(policy, tmp_path / "plans")
    assert (plan["unit"], plan["work"], plan["rows"], plan["sequence"]) == ("answers", 512, 512, 24)
    assert 0.9 < plan["flops"] / plan["flops_model"] < 1.1
    words = capsys.readouterr().out
    assert "rollouts, and what a batch is compared with" in words and "answers per day" in words


@pytest.mark.slow
def test_plan_of_diffusion_leaves_out_what_does_not_exist(tmp_path, capsys):
    plan = planned(DIGITS, tmp_path)
    words = capsys.readouterr().out
    assert plan["unit"] == "clips" and "clips per day" in words and "64 rows of 16" in words
    assert plan["work_total"] == 64 * 1200 and plan["collectives"] and plan["bound_s"] > 0
    assert 0.9 < plan["flops"] / plan["flops_model"] < 1.1
    for name in ("memory_estimate", "expert_bubble"):
        assert name not in plan
    for text in ("before compiling", "tokens", " 0 rows"):
        assert text not in words
    # one device's half of weights and of their average, and of two moments
    assert plan["memory"]["parameters"] == pytest.approx(plan["parameters"] * 2 * 4 / 2, rel=0.05)
    assert plan["memory"]["optimizer"] == pytest.approx(plan["memory"]["parameters"], rel=0.05)


def test_recipe_names_its_loop_by_a_file(policy, tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    recipe = tmp_path / "own.yaml"
    recipe.write_text(policy.read_text().replace("loop: rl", f"loop: {own}"))
    argv = ["plan", str(recipe), "--topology", "gpu:h200x2", "--output", str(tmp_path / "plans")]
    assert main(argv) == 0
    assert "proposals for gpu:h200x2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--loop", "pretraining"], "did you mean 'pretrain'?"),
        (["--loop", "nowhere.py"], "nowhere.py is no file"),
        (["--loop", "pretrain"], "prompts"),
        (["--search"], "trains model (video_dit)"),
        (["--topology", "gpu:h200x8"], "only a single decoder of texts can be estimated"),
    ],
)
def test_bad_input_is_refused(policy, flags, words, capsys):
    recipe = policy if flags[0] == "--loop" else DIGITS
    argv = ["plan", str(recipe), "--topology", "cpu:2", *flags]
    assert main(argv) == ExitCode.CONFIG
    assert words in capsys.readouterr().err


def test_recipe_without_a_loop_is_said_to_be_read_as_pretraining(policy, tmp_path, capsys):
    text = policy.read_text().replace("loop: rl", "")
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--topology", "cpu:2"]) == ExitCode.CONFIG
    assert "read as of pretrain: the recipe has no `loop:`" in capsys.readouterr().err


def test_search_works_for_reinforcement_learning(policy):
    config = load_file(rl.Config, policy)
    found = search.search(rl, config, topology.parse("cpu:2"), compiled=False)
    assert "--training.accumulation 2" in " ".join(p.flags for p in found)


def test_search_on_paper_knows_the_devices_that_an_optimizer_asks_for():
    config = load_file(pretrain.Config, TOYS / "pretrain.yaml")
    muon = Muon(learning_rate=1e-3, schedule=Constant())
    training = replace(config.training, batch_size=16)
    found = search.search(
        pretrain, replace(config, optimizer=muon, training=training), topology.parse("gpu:h200x2")
    )
    assert found and all(p.plan is None for p in found)


@pytest.mark.usefixtures("topology")
@pytest.mark.parametrize("name", ["gpu:h200x8", "v5e:2x4"])
def test_batch_of_step_law_fits_every_mesh_that_is_tried(name):
    config = load_file(pretrain.Config, TOYS / "pretrain.yaml")
    config = replace(config, training=Training(tokens=1e7))
    at = topology.parse(name)
    for proposal in search.search(pretrain, config, at, compiled=False):
        again = program_for(pretrain, resolved(proposal.config, 8), at)
        case = case_of(again, proposal.config.execution)
        assert sum(estimate.memory(case).values()) == proposal.nbytes


# --- From an artifact ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    draw, lines = random.Random(0), []
    for _ in range(300):
        lines.append(" ".join(draw.choices(WORDS, k=8)))
    (folder / "text.txt").write_text("\n".join(lines))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        PRETRAIN.format(run=folder / "run", text=folder / "text.txt", cache=folder / "cache")
    )
    run_loop("pretrain", str(recipe))
    more, text = folder / "more.yaml", recipe.read_text()
    model = text[text.index("model:") : text.index("training:")]
    more.write_text(text.replace(model, f"init_from: {{artifact: {folder / 'run'}}}\n"))
    return recipe, more


@pytest.mark.slow
def test_run_from_an_artifact_is_planned_without_its_arrays(run, tmp_path, monkeypatch):
    def restored(*_, **__):
        raise AssertionError("a plan loads no arrays")

    monkeypatch.setattr(Checkpointer, "restore", restored)
    recipe, more = run
    plan = planned(more, tmp_path / "plans")
    config = resolved(load_file(pretrain.Config, recipe), 2)
    fresh = program_for(pretrain, config, topology.parse("cpu:2"))
    assert plan["flops_model"] == fresh.work.flops / 2
    expected = estimate.memory(case_of(fresh, config.execution))
    assert plan["memory_estimate"] == expected


@pytest.mark.thorough
def test_adapters_alone_have_gradients_and_moments_in_the_estimate(run):
    at = topology.parse("cpu:2")
    config, adapted = (
        resolved(load_config(pretrain.Config, [str(run[1]), *flags]).config, 2)
        for flags in ([], ["--init_from.lora.rank", "2"])
    )
    whole, few = (
        estimate.memory(case_of(program_for(pretrain, c, at), c.execution))
        for c in (config, adapted)
    )
    assert few["parameters"] > whole["parameters"]
    assert few["gradients"] < 0.3 * whole["gradients"]
    assert few["optimizer"] < 0.3 * whole["optimizer"]


# --- A step that does not fit the devices of a run ----------------------------------------------


@pytest.mark.parametrize("loop,advised", [(rl, True), (flow_matching, False)])
def test_step_that_does_not_fit_names_its_largest_buffers(policy, loop, advised):
    config = load_file(loop.Config, policy if loop is rl else DIGITS)
    step = jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.zeros((64, 64))).compile()
    error = device_memory.DoesNotFit("a step needs too much", step)
    text = report.overflow(loop, config, error)
    assert "1. 1.64e-05 GB" in text and "f32[64,64]" in text and text.endswith("all the same")
    assert ("would help: execution.remat" in text) == advised


def test_overflow_of_a_program_that_no_plan_can_make_still_names_buffers():
    def program(config, sharding):
        raise ConfigError("a plan does not open the tokenizer")

    error = device_memory.DoesNotFit("RESOURCE_EXHAUSTED: too much")
    config = SimpleNamespace(parallel=MeshConfig(fsdp=-1))
    text = report.overflow(SimpleNamespace(program=program), config, error)
    assert text.startswith("RESOURCE_EXHAUSTED: too much") and "tokenizer" not in text
