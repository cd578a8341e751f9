"""The pretraining loop with a mixture of experts: resumed, moved to another mesh, refused."""

# ruff: noqa: F401, F811 (the fixture `text`)
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from step_jax import PretrainConfig
from step_jax.cli.main import main
from step_jax.core.command_line import load_config
from step_jax.models.layers.attention import MFA
from step_jax.models.layers.moe import Experts, MoE
from step_jax.models.layers.routing import Router
from step_jax.models.text.decoder import Block, Decoder, Group
from step_jax.models.text.facts import implementations
from tests.devices import TPU
from tests.trainers.loops import run_loop
from tests.trainers.test_pretrain import losses, recipe, text

MLP = (
    "mlp: {kind: moe, experts: [{count: 8, hidden: 32}], shared: 16, "
    "router: {top_k: 2, score: sigmoid, bias: true, bias_rate: 1e-2, group_loss: 1e-3}}"
)


def with_experts(tmp: Path, text: Path, changes: str = MLP) -> str:
    path = Path(recipe(tmp, text, "run"))
    words = path.read_text().replace("mlp: {kind: swiglu, hidden: 64}", changes)
    path.write_text(words.replace("sample: {tokens: 4}", "sample: {tokens: 0}"))
    return str(path)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, text) -> Path:
    tmp = tmp_path_factory.mktemp("experts")
    run_loop("pretrain", with_experts(tmp, text), devices=1)
    return tmp / "run"


@pytest.mark.thorough
def test_stopped_and_resumed_bit_for_bit(straight, tmp_path, text):
    path = with_experts(tmp_path, text)
    run_loop("pretrain", path, "--training.steps", "4", devices=1)
    run_loop("pretrain", path, devices=1)
    assert losses(tmp_path / "run") == losses(straight)


@pytest.mark.slow
def test_resumed_with_its_experts_on_other_devices(straight, tmp_path, text):
    path = with_experts(tmp_path, text)
    assert main(["pretrain", path, "--training.steps", "4"]) == 0
    assert main(["pretrain", path, "--parallel.expert", "4"]) == 0
    got, want = losses(tmp_path / "run"), losses(straight)
    np.testing.assert_allclose([got[i] for i in want], [want[i] for i in want], rtol=1e-5)


@pytest.mark.thorough
def test_a_checkpoint_of_another_number_of_experts_is_refused(
    straight,
    tmp_path,
    text,
    capsys,
):
    config = straight / "config.yaml"
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text().replace("count: 8", "count: 16"))
    assert other.read_text() != config.read_text()
    assert main(["pretrain", str(other)]) != 0
    message = capsys.readouterr().err
    assert "gate_EDF" in message and "[2, 8, " in message and "[2, 16, " in message


def test_the_header_names_what_each_mixture_is_computed_with(tmp_path, text):
    """The kernel for TPUs has a table of experts, which so many do not fit."""
    device = SimpleNamespace(devices=np.array([TPU], object))
    sharding = SimpleNamespace(mesh=device, size=lambda axis: 1, ways=lambda axis: 1)
    config = load_config(PretrainConfig, [with_experts(tmp_path, text)]).config

    def shown(*experts: int) -> str:
        blocks = [Block(MFA(4, 64), MoE((Experts(n, 64),), Router(2))) for n in experts]
        model = Decoder(2040, (Group(1, tuple(blocks)),))
        chosen = implementations(model, config.execution, config.data.sequence_length, sharding)
        return chosen["grouped matmul"]

    assert shown(8) == "auto -> pallas_tpu"
    assert shown(2**18) == "auto -> tiles"
    assert shown(8, 2**18) == "auto -> pallas_tpu, tiles"
