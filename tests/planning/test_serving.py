"""Plans of serving: the engine's halves compiled, against what the model says that they need."""

from __future__ import annotations

import json

import pytest

from step_jax.cli.main import main
from step_jax.core.command_line import load_config
from step_jax.core.errors import ConfigError, ExitCode
from step_jax.core.spec import count
from step_jax.inference.engine import bytes_of_a_slot
from step_jax.planning import topology as topologies
from step_jax.planning.serving import make_serving
from step_jax.trainers import pretrain

RECIPE = """
run: {directory: unused}
model:
  width: 128
  vocab: 512
  layers:
    - repeat: 3
      blocks:
        - attention: {kind: mfa, heads: 4, head_dim: HEAD, value: gated_key}
          mlp: {kind: swiglu, hidden: 256}
training: {tokens: 1e6, batch_size: 16}
data: {path: unused, sequence_length: 128, vocab_size: 300}
optimizer: {kind: adamw, learning_rate: 1e-3, schedule: {kind: constant}}
execution: {dtype: bfloat16, remat: full}
parallel: {fsdp: -1}
"""


def recipe(tmp_path, head: int = 32):
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.replace("HEAD", str(head)))
    return path


@pytest.mark.thorough
def test_halves_do_the_models_operations_and_the_command_saves_them(tmp_path, capsys):
    path = recipe(tmp_path)
    command = ["plan", str(path), "--topology", "cpu:1", "--serve", "--output", str(tmp_path)]
    sizes = ["--prompt", "48", "--length", "64", "--slots", "4"]
    assert main([*command, *sizes]) == ExitCode.OK
    saved = json.loads((tmp_path / "small_cpu_1_serving.json").read_text())
    decoder = load_config(pretrain.Config, [str(path)]).config.model
    parameters = count(decoder.specs())
    outside = 2 * 512 * 128  # embedding and head
    read, write = saved["read"], saved["write"]
    assert saved["parameters"] == 2 * parameters
    assert saved["slot"] == bytes_of_a_slot(decoder, 64, "bfloat16") == 3 * 64 * 32 * 2
    assert 0.8 < read["flops"] / (2 * 48 * (parameters - outside)) < 1.3
    head_too = parameters - outside // 2
    assert 0.9 < write["flops"] / (2 * 4 * head_too) < 1.6  # and attention to 64 tokens
    assert saved["tokens_per_s"] == 4 / write["bound_s"]
    assert saved["first_token_s"] == read["bound_s"] + write["bound_s"]
    printed = capsys.readouterr().out
    assert "served on cpu:1" in printed and "first token of 48" in printed


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("a prompt of 64 tokens leaves no room in 64", ["--prompt", "64", "--length", "64"]),
        ("0 slots: they are to be a multiple of the 1 parts", ["--prompt", "4", "--length", "64"]),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path, capsys, message, options):
    command = ["plan", str(recipe(tmp_path)), "--topology", "cpu:1", "--serve", *options]
    assert main(command) == ExitCode.CONFIG
    assert message in capsys.readouterr().err


@pytest.mark.aot
def test_slots_fill_a_device_and_tokens_are_bound_by_memory(tmp_path, topology):
    config = load_config(pretrain.Config, [str(recipe(tmp_path, head=128))]).config
    where = topologies.parse("v5e:2x2")
    plan = make_serving(pretrain, config, where, prompt=4000, length=32768)
    assert plan.fits and plan.slots % 4 == 0
    held = plan.parameters + plan.slots // 4 * plan.slot
    assert 0.75 * plan.memory_limit < held <= 0.8 * plan.memory_limit
    # every parameter of a layer and every cached key are read once for a token
    assert plan.write.bound_by == "memory bandwidth"
    assert 1.0 < plan.write.traffic / held < 1.25
    with pytest.raises(ConfigError, match="6 slots: they are to be a multiple of the 4 parts"):
        make_serving(pretrain, config, where, prompt=4000, length=32768, slots=6)
