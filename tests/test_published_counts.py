"""The recipes of published models against what is public of them, by shape evaluation alone.

Sources: Step-3, arXiv 2507.19427 (61 layers; table of bytes and operations per decoded token at 8K,
to the three digits printed there); Step-3.5-Flash, arXiv 2602.10604; MFA, arXiv 2412.19255
(tables of its 7B mixture and its 1B dense models). Step-2 is unpublished: only its size is held to.
"""

import dataclasses
from pathlib import Path

import pytest

from step_jax import PretrainConfig
from step_jax.core.command_line import load_config
from step_jax.core.spec import count
from step_jax.models.flops import forward_flops_per_token, mean_keys
from step_jax.models.layers.initialisation import FanIn
from step_jax.models.text.facts import cache_bytes_per_token

CONFIGS = Path(__file__).parents[1] / "configs"


def model_of(name: str):
    """The recipe's model without heads of multi-token prediction, which public counts leave out."""
    model = load_config(PretrainConfig, [str(CONFIGS / f"{name}.yaml")]).config.model
    return dataclasses.replace(model, mtp=None)


def parameters(model, active: bool = False, matrices: int = 2) -> float:
    """Of the model with that many of its two matrices of the vocabulary, the input's first."""
    without = (2 - matrices) * model.vocab * model.width
    return count(model.specs(), active=active) - without


@pytest.mark.parametrize(
    "name, active, matrices, billions",
    [
        ("step3_316b", False, 2, "316.3"),
        ("step3_316b", True, 1, "37.9"),
        ("step35_flash_196b", False, 2, "196.96"),
        ("step35_flash_196b", True, 0, "10.9"),
        ("mfa_paper_7b_moe", False, 2, "6.9"),
        ("mfa_paper_7b_moe", True, 1, "1.2"),
        ("mfa_paper_1b_dense", False, 0, "1.0"),
    ],
)
def test_parameters(name, active, matrices, billions):
    """Equal in every digit that is public."""
    decimals = len(billions.split(".")[1])
    counted = parameters(model_of(name), active, matrices)
    assert f"{counted / 1e9:.{decimals}f}" == billions


def test_step_2_has_a_trillion_and_mini_a_twentieth_of_them():
    step2, mini = parameters(model_of("step2_1t")), parameters(model_of("step2_mini"))
    assert step2 > 1e12 and parameters(model_of("step2_1t_32k")) == step2
    assert 0.03 < mini / step2 < 0.052
    assert parameters(model_of("step2_1t"), active=True) < 0.05 * step2


@pytest.mark.parametrize(
    "name, nbytes",
    [
        ("step3_316b", 61 * 2 * 256 * 2),
        ("step35_flash_196b", 49_152),  # its full layers; the windows are constant
        ("mfa_paper_7b_moe", 24_576),
        ("mfa_paper_1b_dense", 20_480),
    ],
)
def test_cache_bytes_per_token(name, nbytes):
    assert cache_bytes_per_token(model_of(name)) == nbytes


def test_step_2_mini_keeps_a_sixteenth_of_multi_head_attentions_cache():
    model = model_of("step2_mini")
    multi_head = 2 * model.width * model.trunk.depth * 2
    assert 1 - cache_bytes_per_token(model) / multi_head == 0.9375


def three_digits(x: float) -> str:
    return f"{x:.2e}"


def test_step_3s_costs_of_a_decoded_token():
    """KV bytes at 8 bits, operations of attention, of its projections and of the MLPs, at 8K."""
    model, length = model_of("step3_316b"), 8192
    assert three_digits(cache_bytes_per_token(model) / 2 * length) == "2.56e+08"
    core = projections = mlp = 0.0
    for _, _, block, repeat, *_ in model.trunk.walk():
        widths = sum(block.attention.score_and_value_widths())
        core += repeat * 2 * block.attention.heads * widths * length
        specs = block.attention.specs(model.width, FanIn())
        projections += repeat * 2 * count(specs, active=True)
        mlp += repeat * 2 * count(block.mlp.specs(model.width, FanIn()), active=True)
    assert three_digits(core) == "3.27e+10"
    assert three_digits(projections) == "2.07e+10"
    assert abs(mlp / 5.33e10 - 1) < 0.005  # ours has the router in it
    head = 2 * model.vocab * model.width
    whole = forward_flops_per_token(model, length)
    causal = core * mean_keys(length, None) / length
    assert whole == pytest.approx(causal + projections + mlp + head, rel=1e-3)
