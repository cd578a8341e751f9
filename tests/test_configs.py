"""Every recipe under configs/ loads, describes a model that can be built, and says its use."""

import re
from pathlib import Path

import pytest

from step_jax import PretrainConfig
from step_jax.cli import main as cli
from step_jax.cli.main import COMMANDS
from step_jax.core.command_line import load_config
from step_jax.core.spec import count
from step_jax.models.text.facts import with_vocabulary
from step_jax.trainers import LOOPS

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.rglob("*.yaml"))


def header(recipe: Path) -> str:
    """The comment that a recipe starts with."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    first = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:first])


def command(recipe: Path) -> str:
    """The command that the header names, or nothing."""
    found = re.search(r"^step-jax (\S+) configs/", header(recipe), re.M)
    return found[1] if found else ""


def name(recipe: Path) -> str:
    return str(recipe.relative_to(CONFIGS))


def test_there_are_recipes():
    assert {"quickstart.yaml", "ablations/attention/base.yaml"} <= set(map(name, RECIPES))


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_header_gives_command_hardware_and_time(recipe):
    text = header(recipe)
    found = re.search(r"^step-jax (\S+) (configs/\S+)", text, re.M)
    assert found and found[1] in LOOPS | COMMANDS
    assert CONFIGS.parent / found[2] in (recipe, recipe.parent)
    assert re.search(r"^Hardware: \S", text, re.M)
    assert re.search(r"Wall time: \S", text)


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_loads_and_is_valid(recipe, capsys):
    used_by = {"ablate": "pretrain", "sweep": "pretrain"}.get(command(recipe), command(recipe))
    with pytest.raises(SystemExit) as stop:
        cli.main([used_by, str(recipe), "--explain"])
    assert stop.value.code == 0
    assert f"{recipe.name}:" in capsys.readouterr().out  # it says something of its own


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if command(r) in ("pretrain", "ablate")], ids=name
)
def test_model_of_a_pretraining_recipe_can_be_built(recipe):
    config = load_config(PretrainConfig, [str(recipe)]).config
    if config.model is None:
        assert config.init_from  # which brings it
        return
    model = with_vocabulary(config.model, config.data.vocab_size)
    assert count(model.specs()) > model.vocab * model.width
