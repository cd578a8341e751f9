"""Two saved plans side by side."""

from __future__ import annotations

import json

import pytest

from step_jax.cli.main import main
from step_jax.core.errors import ExitCode

PLAN = {
    "recipe": "a", "topology": "v5p:4x4x4", "mesh": {"fsdp": 64}, "accumulation": 1,
    "parameters": 7_000_000_000, "active": 7_000_000_000, "work": 1024, "unit": "tokens",
    "memory_compiler": 40e9, "bound_s": 2.0, "fits": True, "rate": 100.0, "mfu": 0.5,
    "forecast": {"step": 4.0, "layers": {"mlp": 3.0}, "exposed": 1.0}, "versions": {"jax": "0.12"},
}  # fmt: skip


def compared(tmp_path, capsys, **changes) -> str:
    for name, plan in (("a", PLAN), ("b", PLAN | changes)):
        (tmp_path / f"{name}.json").write_text(json.dumps(plan))
    assert main(["plan", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    return capsys.readouterr().out


def test_figures_stand_side_by_side_with_their_change(tmp_path, capsys):
    mesh = {"fsdp": 32, "tensor": 2}
    words = compared(tmp_path, capsys, mesh=mesh, bound_s=3.0, fits=False)
    assert "fsdp=32 x tensor=2" in words and "+50.0%" in words and "yes | no" in words
    assert "different models" not in words


def test_plans_of_different_models_are_compared_and_it_is_said(tmp_path, capsys):
    words = compared(tmp_path, capsys, recipe="b", parameters=1e9, work=2048)
    assert "these are different models: a (7" in words and "compare the rates" in words


@pytest.mark.parametrize("text", ["{", '{"proposals": []}'])
def test_what_is_no_plan_is_refused(tmp_path, capsys, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert main(["plan", "--compare", str(path), str(path)]) == ExitCode.CONFIG
    assert "is no saved plan" in capsys.readouterr().err
